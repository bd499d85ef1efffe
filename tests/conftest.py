"""What every test shares: one compute thread, no network, no traces at home, Hypothesis without a stopwatch."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Read by libraries when they are imported, and inherited by the servers and commands that tests start."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # tests share the cores, and one thread gives the same bits everywhere
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cache = tempfile.mkdtemp(prefix="phalanx-tests-")
    os.environ["HF_HOME"] = cache
    os.environ["XDG_CACHE_HOME"] = cache
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    # On top of Hypothesis's own choice, which draws the same examples every time where CI is set.
    chosen = settings.get_profile(settings.get_current_profile_name())
    settings.register_profile("phalanx", chosen, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("phalanx")


@pytest.fixture(scope="session")
def eurosat_sample() -> Path:
    """A real EuroSAT in small: 400 training, 100 validation and 50 test tiles, as `load_dataset` reads them."""
    return REPOSITORY / "tests" / "data" / "eurosat"


@pytest.fixture(scope="session")
def example_tiles() -> list[Path]:
    """Twenty real tiles as PNG, two of each class, in the order of their names."""
    return sorted((REPOSITORY / "examples" / "tiles").glob("*.png"))
