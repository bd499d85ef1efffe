"""A session on a GPU, and the one thread that opens it, captures its runs, runs it and lets it go.

ONNX Runtime keeps a captured graph for the thread that captured it: what is captured while loading is of use to no other thread,
and each of those would capture again, amid calls. So callers hand their images over to the session's own thread, and wait.

It captures in CUDA's global mode, which forbids the other threads of the process meanwhile to allocate, to free, or to wait for
the device; there is no option for another mode. So captures and all else take turns.

Nothing here has run on a GPU yet (docs/decisions/cuda-graphs.md).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.bound_runs import BoundRuns

log = logging.getLogger(__name__)

OpenSession: TypeAlias = Callable[[bool], ort.InferenceSession]  # told whether there will be graphs
Bind: TypeAlias = Callable[[ort.InferenceSession, bool], BoundRuns]  # told the same


class NotOnGpu(Exception):
    """A session that was to be on a GPU is elsewhere: says on which provider."""


class WrongGraph(Exception):
    """What was captured answers otherwise than what it was captured from."""


class Turns:
    """Runs go on beside each other; a capture waits for those under way, and those that come wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs = 0
        self._capture = False  # under way, or next

    @contextmanager
    def run(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._capture)
            self._runs += 1
        try:
            yield
        finally:
            with self._changed:
                self._runs -= 1
                self._changed.notify_all()

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._capture)
            self._capture = True
            self._changed.wait_for(lambda: not self._runs)
        try:
            yield
        finally:
            with self._changed:
                self._capture = False
                self._changed.notify_all()


OF_THIS_PROCESS = Turns()  # module-level, because CUDA's rule is the process's: sessions of two catalogues meet in a reload


class GpuRuns:
    """Thread-safe: what its callers hand over is computed one after the other. A run takes milliseconds and has no way to be
    stopped: a graph that was launched runs to its end.
    """

    def __init__(
        self,
        open_session: OpenSession,
        bind: Bind,
        samples: NDArray[np.uint8],
        graphs: bool,
        turns: Turns = OF_THIS_PROCESS,
    ) -> None:
        """Where `graphs` are wanted and refused, or answer the samples wrongly in any size, the session is opened again without
        them; `graphs` of this object says which it was. Every size runs once, so that none is slow for the first caller.

        Raises NotOnGpu where `open_session` does, and whatever goes wrong without graphs.
        """
        self._turns = turns
        self._runs: BoundRuns | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gpu")
        try:
            self.graphs = self._thread.submit(self._load, open_session, bind, samples, graphs).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def run(self, images: NDArray[np.uint8], others: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """As BoundRuns.run."""
        return self._thread.submit(self._run, images, others).result()

    def close(self) -> None:
        """Let the session and its memory go; nothing can be run any more."""
        if self._runs is not None:
            self._thread.submit(self._let_go)
            self._thread.shutdown()

    def _load(self, open_session: OpenSession, bind: Bind, samples: NDArray[np.uint8], graphs: bool) -> bool:
        """Whether there are graphs."""
        if graphs:
            try:
                self._runs = self._captured(open_session, bind, samples)
                return True
            except NotOnGpu:
                raise
            except Exception as error:  # of ONNX Runtime or of CUDA: theirs have no common base
                log.warning("no CUDA graphs, runs are launched kernel by kernel: %s", error)
        with self._turns.run():
            runs = bind(open_session(False), False)
            for size in runs.sizes:
                runs.warm_up(size)
        self._runs = runs
        return False

    def _captured(self, open_session: OpenSession, bind: Bind, samples: NDArray[np.uint8]) -> BoundRuns:
        with self._turns.run():
            runs = bind(open_session(True), True)
        for size in runs.sizes:
            with self._turns.capture():
                runs.warm_up(size)
        with self._turns.run():
            wrong = [size for size in runs.sizes if runs.differs(size, samples)]
        if wrong:
            raise WrongGraph(f"expected the samples to be answered as by a plain run, got other answers in sizes {wrong}")
        return runs

    def _run(self, images: NDArray[np.uint8], others: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        assert self._runs is not None
        with self._turns.run():
            return self._runs.run(images, others)

    def _let_go(self) -> None:
        with self._turns.run():
            self._runs = None
