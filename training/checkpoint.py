"""Checkpoints that survive a kill at any moment, and one trainer at a time."""

from __future__ import annotations

import fcntl
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from models.durable import replace_file
from training.refused import TrainingRefused


class StaleCheckpoint(TrainingRefused):
    """A checkpoint or weights that another recipe, or other data, left behind."""


class AlreadyTraining(TrainingRefused):
    """Another process writes the same files."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, durably."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


@contextmanager
def only_trainer(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` inside; it goes with the process, however that ends. Raises AlreadyTraining."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AlreadyTraining(f"another process holds {path}, and trains this member already") from None
        yield


def load_checkpoint(path: Path, fingerprint: str, device: torch.device) -> dict[str, Any] | None:
    """The state at `path`, None where there is none; raises StaleCheckpoint if it belongs to something else."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StaleCheckpoint(f"{path} is damaged ({error}); delete it to start afresh") from error
    if state["fingerprint"] != fingerprint:
        raise StaleCheckpoint(
            f"{path} was written by another recipe or other data; train into another folder, or delete it to start afresh"
        )
    return state
