"""Killed at any moment and run again, training ends with the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from training.checkpoint import StaleCheckpoint, load_checkpoint, save_checkpoint
from training.data import load_splits
from training.lock import AlreadyRunning, only_process
from training.loop import read_weights, train_member
from training.progress import Progress
from training.recipe import load_recipe

ROOT = Path(__file__).parents[2]

TRAIN = """
import os, signal, sys
from pathlib import Path
import torch
from lightning_fabric import Fabric
from training.data import load_splits
from training.loop import train_member
from training.progress import Progress
from training.recipe import load_recipe

kind, folder, kill_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

class Killer(Progress):
    def advance(self, step, loss, training):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
recipe = load_recipe("smoke")
fabric = Fabric(accelerator="cpu", devices=1, precision=recipe.precision)
train_member(recipe, kind, load_splits(recipe.data), folder, fabric, Killer(), checkpoint_seconds=0)
"""


def train(kind: str, folder: Path, kill_at: int = -1) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", TRAIN, kind, str(folder), str(kill_at)], cwd=ROOT, env=environment, check=False
    ).returncode


def digests(folder: Path, kind: str) -> tuple[str, str]:
    """SHA-256 of the written weights, and of every tensor of the last checkpoint (weights, averages, momenta)."""
    state = torch.load(folder / f"{kind}.ckpt", weights_only=True)
    digest = hashlib.sha256()
    for part in (state["network"], state["average"]):
        for name, value in part.items():
            digest.update(name.encode() + value.numpy().tobytes())
    return hashlib.sha256((folder / f"{kind}.safetensors").read_bytes()).hexdigest(), digest.hexdigest()


@pytest.mark.parametrize("kind", ["adversarial", "bayesian"])
def test_killed_twice_and_run_again_it_ends_with_the_same_weights_and_averages(kind: str, tmp_path: Path) -> None:
    assert train(kind, tmp_path / "whole") == 0

    assert train(kind, tmp_path / "killed", kill_at=10) == -signal.SIGKILL
    assert train(kind, tmp_path / "killed", kill_at=20) == -signal.SIGKILL
    assert not (tmp_path / "killed" / f"{kind}.safetensors").exists()
    assert train(kind, tmp_path / "killed") == 0

    assert digests(tmp_path / "killed", kind) == digests(tmp_path / "whole", kind)


def test_weights_of_another_recipe_are_not_exported(tmp_path: Path) -> None:
    recipe = load_recipe("smoke")
    splits = load_splits(recipe.data)
    fabric = Fabric(accelerator="cpu", devices=1, precision=recipe.precision)
    train_member(recipe, "metric", splits, tmp_path, fabric, Progress(io.StringIO()))
    assert read_weights(recipe, "metric", splits, tmp_path) == (tmp_path / "metric.safetensors").read_bytes()
    for other in (recipe.model_copy(update={"epsilon": 12.0}), recipe.model_copy(update={"seed": 7})):
        with pytest.raises(StaleCheckpoint, match="trained by another recipe, in another precision or on other data"):
            read_weights(other, "metric", splits, tmp_path)
    (tmp_path / "metric.safetensors").write_bytes(b"")
    with pytest.raises(StaleCheckpoint, match="is damaged"):
        read_weights(recipe, "metric", splits, tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", {"fingerprint": "one", "step": 1})
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:200])
    with pytest.raises(StaleCheckpoint, match=r"a\.ckpt is damaged"):
        load_checkpoint(tmp_path / "a.ckpt", "one", torch.device("cpu"))


def test_a_second_trainer_of_the_same_member_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "edge.lock"
    with only_process(lock), pytest.raises(AlreadyRunning, match="does this work already"), only_process(lock):
        pass
    with only_process(tmp_path / "edge.lock"):
        pass


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", {"fingerprint": "one", "step": 1})
    with pytest.raises(StaleCheckpoint, match="was written by another recipe, precision or data"):
        load_checkpoint(tmp_path / "a.ckpt", "two", torch.device("cpu"))


def test_a_disk_that_fills_leaves_the_old_checkpoint_intact(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", {"fingerprint": "one", "step": 1})
    script = (
        "import resource, signal, sys, torch\nfrom pathlib import Path\nfrom training.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "save_checkpoint(Path(sys.argv[1]), {'fingerprint': 'one', 'step': 2, 'weights': torch.zeros(100_000)})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.ckpt")], cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode != 0
    state = load_checkpoint(tmp_path / "a.ckpt", "one", torch.device("cpu"))
    assert state is not None
    assert state["step"] == 1
