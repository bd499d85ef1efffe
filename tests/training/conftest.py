"""One smoke bundle for all tests of what comes after training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.commands import phalanx_train


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that one command makes of the smoke recipe."""
    folder = tmp_path_factory.mktemp("smoke")
    ended = phalanx_train("build", "smoke", "--runs", str(folder / "runs"), "-o", str(folder / "bundle"), "--jobs", "2")
    assert ended.returncode == 0, ended.stderr
    return folder / "bundle"
