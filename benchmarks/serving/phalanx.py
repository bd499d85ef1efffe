"""Phalanx, as it is by default, and behind its other front end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import await_serving
from benchmarks.processes import phalanx as serve
from benchmarks.serving.target import Target
from service.config import ServiceConfig

# 64 callers with 32 images each wait at once: more images than the queue holds by default, and it would refuse some of them
QUEUE = {"max_queue": 4096}


@contextmanager
def phalanx(config: Mapping[str, Any], cache: Path, front_end: str) -> Iterator[Target]:
    """The server of this configuration, its defaults but for front end and length of the queue; graphs are kept in `cache`."""
    batching = QUEUE | dict(config.get("batching", {}))
    with serve({**config, "batching": batching, "front_end": front_end}, cache) as process:
        await_serving(process)
        yield Target(process.address, next(iter(ServiceConfig.model_validate(dict(config)).ensembles)))
