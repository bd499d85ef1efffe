"""The one thread of a session on a GPU, and who waits for whom. On the CPU, where a graph is asked for and none is captured."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper

from service.bound_runs import BoundRuns, sizes_up_to
from service.config import DeviceConfig
from service.engine import open_session
from service.gpu_runs import GpuRuns, NotOnGpu, Turns
from tests.service.serving import random_pixels

SECONDS = 20
SAMPLES = random_pixels(3)
LARGEST = 5


class Watched(BoundRuns):
    """Notes which threads ran it, and lets a test do something while a size is warmed up."""

    def __init__(self, *args: Any, meanwhile: Callable[[], None], **kwargs: Any) -> None:
        self.threads, self._meanwhile = {threading.get_ident()}, meanwhile
        super().__init__(*args, **kwargs)

    def warm_up(self, size: int) -> None:
        self._meanwhile()
        super().warm_up(size)

    def run(self, images: NDArray[np.uint8], others: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        self.threads.add(threading.get_ident())
        return super().run(images, others)


def squares_but(wrong: int = 0) -> bytes:
    """A graph that squares every pixel; so many images in one run have noise besides, as if a captured graph went wrong."""
    shape = ["n", *SAMPLES.shape[1:]]
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "x"], ["squares"]),
        helper.make_node("RandomUniformLike", ["x"], ["noise"], low=1.0, high=9.0),
        helper.make_node("Shape", ["image"], ["n"], start=0, end=1),
        helper.make_node("Constant", [], ["wrong"], value_ints=[wrong]),
        helper.make_node("Equal", ["n", "wrong"], ["goes_wrong"]),
        helper.make_node("Cast", ["goes_wrong"], ["one"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["noise", "one"], ["error"]),
        helper.make_node("Add", ["squares", "error"], ["y"]),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, shape)
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    made = helper.make_graph(nodes, "squares", [image], [y])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def squares(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.astype(np.float32) ** 2


class Opened:
    """Opens sessions on the CPU, and keeps count."""

    def __init__(self, wrong: int = 0, refuse: bool = False, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._content, self._refuse, self._meanwhile = squares_but(wrong), refuse, meanwhile
        self.with_graphs: list[bool] = []
        self.threads: set[int] = set()
        self.bound: list[Watched] = []

    def __call__(self, graphs: bool) -> ort.InferenceSession:
        self.with_graphs.append(graphs)
        self.threads.add(threading.get_ident())
        if graphs and self._refuse:
            raise RuntimeError("these nodes are not on the device")
        return open_session(self._content, DeviceConfig(provider="cpu"))

    def bind(self, session: ort.InferenceSession, graphs: bool) -> BoundRuns:
        sizes = sizes_up_to(LARGEST)
        bound = Watched(session, graphs, columns=["y"], others={}, sizes=sizes, device="cpu", meanwhile=self._meanwhile)
        self.bound.append(bound)
        return bound


def gpu_runs(opened: Opened, graphs: bool = True, turns: Turns | None = None) -> GpuRuns:
    return GpuRuns(opened, opened.bind, SAMPLES, graphs, turns or Turns())


def test_all_is_done_in_one_thread_whoever_calls() -> None:
    opened = Opened()
    with closing(gpu_runs(opened)) as runs, ThreadPoolExecutor(8) as callers:
        pixels = [random_pixels(n, seed=n) for n in range(1, 2 * LARGEST + 2) for _ in range(4)]
        for images, (y,) in zip(pixels, callers.map(lambda images: runs.run(images, {}), pixels), strict=True):
            np.testing.assert_array_equal(y, squares(images))
    assert len(opened.threads | opened.bound[0].threads) == 1
    assert threading.get_ident() not in opened.threads


def test_a_session_is_opened_once(caplog: pytest.LogCaptureFixture) -> None:
    opened = Opened()
    with closing(gpu_runs(opened)) as runs:
        assert runs.graphs
    assert opened.with_graphs == [True]
    assert not caplog.records


def test_graphs_that_nobody_wants_are_not_asked_for() -> None:
    opened = Opened()
    with closing(gpu_runs(opened, graphs=False)) as runs:
        assert not runs.graphs
    assert opened.with_graphs == [False]


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        pytest.param(Opened(refuse=True), "these nodes are not on the device", id="refused"),
        *(
            pytest.param(Opened(wrong=size), f"got other answers in sizes [{size}]", id=f"wrong for {size} images")
            for size in sizes_up_to(LARGEST)
        ),
    ],
)
def test_where_graphs_are_no_good_it_is_served_without(opened: Opened, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), closing(gpu_runs(opened)) as runs:
        assert not runs.graphs
        (y,) = runs.run(SAMPLES, {})
        assert y.shape == SAMPLES.shape
    assert opened.with_graphs == [True, False]
    (line,) = caplog.messages
    assert line.startswith("no CUDA graphs, runs are launched kernel by kernel: ")
    assert said in line


def test_a_session_that_is_elsewhere_is_not_opened_again_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    opened: list[bool] = []

    def elsewhere(graphs: bool) -> ort.InferenceSession:
        opened.append(graphs)
        raise NotOnGpu("CPUExecutionProvider")

    with pytest.raises(NotOnGpu, match="CPUExecutionProvider"):
        GpuRuns(elsewhere, Opened().bind, SAMPLES, True, Turns())
    assert opened == [True]
    assert not set(threading.enumerate()) - before


def test_what_goes_wrong_in_a_run_is_its_callers_and_nobody_elses() -> None:
    with closing(gpu_runs(Opened())) as runs:
        with pytest.raises(ValueError, match="broadcast"):
            runs.run(SAMPLES[:, :3], {})
        (y,) = runs.run(SAMPLES, {})
    np.testing.assert_array_equal(y, squares(SAMPLES))


def test_closing_lets_the_session_and_the_thread_go() -> None:
    before = set(threading.enumerate())
    opened = Opened()
    runs = gpu_runs(opened)
    bound = weakref.ref(opened.bound.pop())
    assert bound() is not None
    runs.close()
    runs.close()
    assert bound() is None
    assert not set(threading.enumerate()) - before


class Visitor:
    """A thread that takes a turn as soon as it may, and keeps it until it is told to leave."""

    def __init__(self, turn: Callable[[], AbstractContextManager[None]]) -> None:
        self.came, self._leave = threading.Event(), threading.Event()
        self._turn = turn
        self._thread = threading.Thread(target=self._visit)
        self._thread.start()

    def let_go(self) -> None:
        self._leave.set()

    def leave(self) -> None:
        self.let_go()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def waits(self) -> bool:
        return not self.came.wait(0.05)

    def comes(self) -> bool:
        return self.came.wait(SECONDS)

    def _visit(self) -> None:
        with self._turn():
            self.came.set()
            self._leave.wait(SECONDS)


def test_runs_go_on_beside_each_other_and_a_capture_alone() -> None:
    turns = Turns()
    first, second = Visitor(turns.run), Visitor(turns.run)
    assert first.comes()
    assert second.comes()
    capture = Visitor(turns.capture)
    first.leave()
    assert capture.waits()
    second.leave()
    assert capture.comes()
    run, other = Visitor(turns.run), Visitor(turns.capture)
    assert run.waits()
    assert other.waits()
    capture.leave()
    run.let_go()  # whichever of the two is next
    other.let_go()
    run.leave()
    other.leave()


def test_a_capture_comes_before_runs_that_came_after_it() -> None:
    turns = Turns()
    running = Visitor(turns.run)
    assert running.comes()
    capture = Visitor(turns.capture)
    assert capture.waits()
    late = Visitor(turns.run)
    assert late.waits()
    running.leave()
    assert capture.comes()
    assert late.waits()
    capture.leave()
    assert late.comes()
    late.leave()


@pytest.mark.parametrize(("graphs", "waits"), [(True, True), (False, False)], ids=["captured", "run for the first time"])
def test_others_wait_while_a_size_is_captured(graphs: bool, waits: bool) -> None:
    turns, waited = Turns(), list[bool]()

    def meanwhile() -> None:
        other = Visitor(turns.run)
        waited.append(other.waits())
        other.let_go()

    gpu_runs(Opened(meanwhile=meanwhile), graphs, turns).close()
    assert waited == [waits] * len(sizes_up_to(LARGEST))


def test_a_run_waits_for_a_capture_of_another_session() -> None:
    turns = Turns()
    with closing(gpu_runs(Opened(), turns=turns)) as runs, ThreadPoolExecutor(1) as caller:
        capture = Visitor(turns.capture)
        assert capture.comes()
        answer = caller.submit(runs.run, SAMPLES, {})
        with pytest.raises(TimeoutError):
            answer.result(0.05)
        capture.leave()
        np.testing.assert_array_equal(answer.result(SECONDS)[0], squares(SAMPLES))
