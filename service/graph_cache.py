"""Fused graphs, kept between starts: a second start need not build them, nor import what builds them (0.4 s, 30 MB).

A graph's name is a hash over all that it is made of: the members' files, the resolved ensemble with its calibration
tables, the sources that build it and the libraries they use. Whatever changes, changes the name. A file starts with
the hash of the graph in it, so that one that was cut short or altered on disk is built again. A folder that cannot be
written is no reason not to start.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from models.bundle import Bundle
from models.ensemble import Ensemble

log = logging.getLogger(__name__)

LIBRARIES = ("ndonnx", "numpy", "onnx", "spox")
PACKAGES = Path(__file__).parents[1]
SOURCES = ("models/*.py", "service/graph*.py")  # what the rule is, and how it becomes a graph
KEPT = 32  # graphs: some ten megabytes each


def user_cache(environment: Mapping[str, str]) -> Path | None:
    """phalanx/graphs under XDG_CACHE_HOME, or under ~/.cache; None for a user without a home."""
    places = (Path(environment.get("XDG_CACHE_HOME", "")), Path(environment.get("HOME", "")) / ".cache")
    # the XDG specification: a relative path is to be ignored
    return next((place / "phalanx" / "graphs" for place in places if place.is_absolute()), None)


class GraphCache:
    """`fused` gives an ensemble's graph, from the folder if it is there; without a folder it is built every time."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def fused(self, bundle: Bundle, ensemble: Ensemble) -> bytes:
        path = self._folder / f"{graph_key(bundle, ensemble)}.onnx" if self._folder else None
        if path is not None and (graph := _read(path)) is not None:
            return graph
        from service.graph import build_graph  # onnx, spox and ndonnx: not needed where the graph is known

        graph = build_graph(bundle, ensemble)
        if path is not None:
            _write(path, graph)
        return graph


def graph_key(bundle: Bundle, ensemble: Ensemble) -> str:
    """SHA-256 over everything that a fused graph is made of, in hexadecimal."""
    digest = hashlib.sha256()
    manifest = bundle.manifest
    members = [manifest.member(name).model_dump_json() for name in ensemble.members]  # with the hash of its ONNX file
    sources = [path.read_text() for pattern in SOURCES for path in sorted(PACKAGES.glob(pattern))]
    libraries = [f"{name} {version(name)}" for name in LIBRARIES]
    texts = [manifest.input.model_dump_json(), repr(len(manifest.classes)), *members, *sources, *libraries]
    for part in (*map(str.encode, texts), *_content(ensemble)):
        digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def _content(value: object) -> Iterator[bytes]:
    """A dataclass of numbers, names and arrays as bytes; an ensemble's own name is not part of its graph."""
    if is_dataclass(value):
        for column in fields(value):
            if not (isinstance(value, Ensemble) and column.name == "name"):
                yield column.name.encode()
                yield from _content(getattr(value, column.name))
    elif isinstance(value, tuple):
        yield f"tuple {len(value)}".encode()
        for item in value:
            yield from _content(item)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype.str} {value.shape}".encode()
        yield value.tobytes()
    else:
        assert value is None or isinstance(value, str | int | float | bool), type(value)
        yield repr(value).encode()


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None  # somebody else's file says nothing about what we would have built
            digest, graph = file.read(32), file.read()
    except OSError:
        return None
    if hashlib.sha256(graph).digest() != digest:
        log.warning("the cached graph %s is damaged: it is built again", path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the graphs used last are kept
    return graph


def _write(path: Path, graph: bytes) -> None:
    try:
        path.parent.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            try:
                file.write(hashlib.sha256(graph).digest() + graph)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        by_use = sorted(path.parent.glob("*.onnx"), key=lambda found: found.stat().st_mtime, reverse=True)
        for old in by_use[KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.info("the fused graph is not kept for the next start: %s", error)
