"""One smoke bundle, and one campaign on it, for all tests of what comes after training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.commands import SMOKE, phalanx_train


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that one command makes of the smoke recipe."""
    folder = tmp_path_factory.mktemp("smoke")
    ended = phalanx_train("build", "smoke", "--runs", str(folder / "runs"), "-o", str(folder / "bundle"), "--jobs", "2")
    assert ended.returncode == 0, ended.stderr
    return folder / "bundle"


@pytest.fixture(scope="session")
def folder(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign of the ablation, done in two shards, of which the first is told that the other is missing."""
    folder = tmp_path_factory.mktemp("campaign")
    first = phalanx_train("ablate", str(built), *SMOKE, "--out", str(folder), "--shard", "1/2")
    assert first.returncode == 0, first.stderr
    assert "the other shards have the rest" in first.stderr
    second = phalanx_train("ablate", str(built), *SMOKE, "--out", str(folder), "--shard", "2/2")
    assert second.returncode == 0, second.stderr
    assert "adversarial+bayesian+edge" in second.stdout
    assert "fewer safeguards than a published figure" in second.stdout
    return folder
