"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.graph_cache import GraphCache
from tests.bundles import write_tiny_bundle
from tests.service.serving import Running, serving


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("served") / "bundle")


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> GraphCache:
    """So that every server after the first starts at once."""
    return GraphCache(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="session", params=["grpcio", "native"])
def running(tiny_bundle: Path, graphs: GraphCache, request: pytest.FixtureRequest) -> Iterator[Running]:
    """Behind either front end: callers must not notice which."""
    with serving(tiny_bundle, graphs, front_end=request.param) as server:
        yield server
