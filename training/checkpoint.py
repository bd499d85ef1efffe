"""Checkpoints that survive a kill at any moment."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from models.durable import replace_file
from training.refused import TrainingRefused


class StaleCheckpoint(TrainingRefused):
    """A checkpoint or weights that another recipe, or other data, left behind."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, durably."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


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
            f"{path} was written by another recipe, precision or data; train into another folder, or delete it to start afresh"
        )
    return state
