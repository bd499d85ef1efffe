"""`phalanx-train` answers at once, and imports for a command what that command needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from training.cli import COMMANDS


def imported_by(*arguments: str) -> tuple[str, set[str]]:
    """What `phalanx-train` prints, and which heavy packages are in memory then."""
    heavy = ("torch", "datasets", "lightning_fabric", "torchmetrics", "matplotlib")
    script = f"""
import sys
from training.cli import main
try:
    main({list(arguments)!r})
except SystemExit:
    print("imported:", *(name for name in {heavy!r} if name in sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    printed, _, names = ended.stdout.rpartition("imported:")
    return printed, set(names.split())


def test_help_names_every_command_and_imports_none() -> None:
    printed, heavy = imported_by("--help")
    assert heavy == set()
    assert [name for name in COMMANDS if f"\n    {name} " not in printed] == []
    assert "train every member of a recipe" in printed


@pytest.mark.parametrize("command", ["attack", "ablate"])
def test_an_attack_does_without_what_trains_and_what_draws(command: str) -> None:
    printed, heavy = imported_by(command, "--help")
    assert "--shard" in printed
    assert heavy == {"torch", "datasets"}
