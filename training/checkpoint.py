"""Checkpoints that survive a kill at any moment: written aside, synced, renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class StaleCheckpoint(RuntimeError):
    """A checkpoint that another recipe, or other data, left behind."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` holds the old checkpoint or the new one, never a part of either."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path, fingerprint: str, device: torch.device) -> dict[str, Any] | None:
    """The state at `path`, None where there is none; raises StaleCheckpoint if it belongs to something else."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if state["fingerprint"] != fingerprint:
        raise StaleCheckpoint(
            f"{path} was written by another recipe or other data; train into another folder, or delete it to start afresh"
        )
    return state
