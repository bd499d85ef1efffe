"""One queue in front of a real engine: order, bounds, deadlines, failures and the end."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import Bundle, read_bundle
from models.composition import EnsembleChoice, compose
from models.ensemble import Decision
from service.batcher import Batcher, DeadlineExceeded, Draining, QueueFull, Result
from service.config import BatchingConfig, DeviceConfig
from service.engine import Engine, Images, Lanes, Run, Stop, Stopped
from service.graph import build_graph
from service.metrics import Closed, EnsembleFacts, Metrics
from tests.bundles import random_images, write_tiny_bundle

SECONDS = 20  # how long a test waits for what must happen


class GatedEngine:
    """A real engine whose runs a test can hold, watch and break."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self.input_shape = engine.input_shape
        self.lanes, self.most_at_once = Lanes(1), engine.most_at_once
        self.runs: list[int] = []  # images in each
        self.callers: set[int] = set()  # threads
        self.entered = threading.Semaphore(0)  # once for every run that began
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.before: Callable[[int], None] = lambda _: None  # gets the number of the run, from 1
        self.stopped: list[int] = []  # numbers of the runs that were stopped
        self.stops: list[Stop | None] = []  # of the runs

    def run(self, images: Images, *, stop: Stop | None = None) -> Run:
        with self._lock:
            self.runs.append(len(images))
            self.stops.append(stop)
            number = len(self.runs)
        self.callers.add(threading.get_ident())
        self.entered.release()
        assert self.gate.wait(SECONDS)
        if self.error is not None:
            raise self.error
        self.before(number)
        try:
            return self._engine.run(images, stop=stop)
        except Stopped:
            self.stopped.append(number)
            raise

    @contextmanager
    def held(self) -> Iterator[None]:
        """No run ends inside; the runs before are over."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    def await_run(self) -> None:
        assert self.entered.acquire(timeout=SECONDS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(write_tiny_bundle(tmp_path_factory.mktemp("batcher") / "bundle"))


def load(bundle: Bundle, threads: Lanes, **choice: Any) -> Engine:
    ensemble = compose(bundle, EnsembleChoice(name="full", **choice))
    return Engine(build_graph(bundle, ensemble), bundle, ensemble, DeviceConfig(provider="cpu"), threads, largest_batch=64)


@pytest.fixture(scope="module")
def threads() -> Iterator[Lanes]:
    threads = Lanes(2)
    yield threads
    threads.close()


@pytest.fixture(scope="module")
def real(bundle: Bundle, threads: Lanes) -> Engine:
    return load(bundle, threads)


@pytest.fixture
def engine(real: Engine) -> GatedEngine:
    return GatedEngine(real)


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> Images:
    return random_images(bundle.manifest.input, 96, seed=5)


@pytest.fixture(scope="module")
def alone(real: Engine, images: Images) -> list[Decision]:
    """What every image is answered by itself."""
    return [real.run(images[i : i + 1]).decision for i in range(len(images))]


@contextmanager
def batcher(
    engine: GatedEngine, metrics: Metrics | None = None, clock: Callable[[], float] = time.monotonic, **limits: Any
) -> Iterator[Batcher]:
    metrics = metrics or Metrics()
    own = metrics.ensemble("full", ["metric", "edge", "adversarial", "bayesian"], ["a", "b", "c", "d", "e"])
    made = Batcher(engine, BatchingConfig.model_validate({"max_delay_ms": 0} | limits), own, "full", clock)
    metrics.offer("full", own, EnsembleFacts("CPUExecutionProvider", False, 0.05, 0.01, 1024), made.depth)
    try:
        yield made
    finally:
        engine.gate.set()
        assert made.drain(SECONDS)


def assert_same(result: Result, expected: list[Decision]) -> None:
    """Batched equals unbatched within 1e-5, in every column."""
    for column in fields(Decision):
        got = getattr(result.decision, column.name)
        want = np.concatenate([getattr(each, column.name) for each in expected])
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=column.name)
    assert len(result.masks_seeds) == len(expected)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    max_batch_size=st.integers(1, 16),
    order=st.randoms(use_true_random=False),
)
def test_every_request_gets_the_answers_of_its_own_images_in_their_order(
    real: Engine, images: Images, alone: list[Decision], sizes: list[int], max_batch_size: int, order: Any
) -> None:
    engine = GatedEngine(real)
    rows = [[order.randrange(len(images)) for _ in range(size)] for size in sizes]
    with batcher(engine, max_batch_size=max_batch_size) as queue:
        with engine.held():
            futures = [queue.submit(images[row]) for row in rows]
        for row, future in zip(rows, futures, strict=True):
            assert_same(future.result(SECONDS), [alone[i] for i in row])
    assert max(engine.runs) <= max_batch_size
    assert sum(engine.runs) == sum(sizes)


@settings(max_examples=40, deadline=None)
@given(
    fates=st.lists(st.sampled_from(["wanted", "cancelled", "expired"]), min_size=1, max_size=10),
    size=st.integers(1, 6),
)
def test_only_what_is_still_wanted_is_computed(
    real: Engine, images: Images, alone: list[Decision], fates: list[str], size: int
) -> None:
    engine, now = GatedEngine(real), [100.0]
    with batcher(engine, clock=lambda: now[0], max_batch_size=4) as queue:
        with engine.held():
            busy = queue.submit(images[:1])
            engine.await_run()
            futures = [queue.submit(images[:size], 101.0 if fate == "expired" else 200.0) for fate in fates]
            for fate, future in zip(fates, futures, strict=True):
                assert fate != "cancelled" or future.cancel()
            now[0] = 101.0
        busy.result(SECONDS)
        for fate, future in zip(fates, futures, strict=True):
            if fate == "wanted":
                assert_same(future.result(SECONDS), alone[:size])
            else:
                with pytest.raises(CancelledError if fate == "cancelled" else DeadlineExceeded, match=r"passed|^$"):
                    future.result(SECONDS)
        assert queue.depth() == 0
    assert sum(engine.runs) == 1 + size * fates.count("wanted")


def test_requests_that_arrive_during_a_run_share_the_next(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_batch_size=64) as queue:
        with engine.held():
            first = queue.submit(images[:1])
            engine.await_run()
            others = [queue.submit(images[i : i + 1]) for i in range(5)]
        assert first.result(SECONDS).batch_size == 1
        assert {other.result(SECONDS).batch_size for other in others} == {5}
    assert engine.runs == [1, 5]


def test_a_large_request_is_split_and_those_behind_it_wait_for_one_run_only(engine: GatedEngine, images: Images) -> None:
    finished: list[str] = []
    with batcher(engine, max_batch_size=8) as queue:
        with engine.held():
            large = queue.submit(images[:30])
            engine.await_run()
            small = queue.submit(images[:1])
            large.add_done_callback(lambda _: finished.append("large"))
            small.add_done_callback(lambda _: finished.append("small"))
        wait([large, small], SECONDS)
    assert engine.runs == [8, 8, 8, 7]  # 8 | 1 + 7 | 8 | 7
    assert finished == ["small", "large"]
    assert large.result().batch_size == 8


def answered_together(queue: Batcher, engine: GatedEngine, images: Images) -> None:
    """A run for one caller, then one for three in step, all of whom are expected back."""
    with engine.held():
        first = queue.submit(images[:1])
        engine.await_run()
        together = [queue.submit(images[:1]) for _ in range(2)]
    first.result(SECONDS)
    together.append(queue.submit(images[:1]))  # the first caller is back: nobody was waited for in vain
    wait(together, SECONDS)


def test_a_lone_caller_never_waits_for_company(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_delay_ms=1000) as queue:
        waited = [queue.submit(images[:1]).result(SECONDS).queue_seconds for _ in range(5)]
    assert max(waited) < 0.5


def test_callers_who_were_answered_together_are_waited_for(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_delay_ms=1000) as queue:
        answered_together(queue, engine, images)
        together = [queue.submit(images[:1]) for _ in range(3)]
        assert [each.result(SECONDS).batch_size for each in together] == [3, 3, 3]
    assert engine.runs == [1, 3, 3]


def test_nobody_is_waited_for_beyond_a_deadline(engine: GatedEngine, images: Images) -> None:
    now = 100.0  # stands still, so that waiting would be for the full delay
    with batcher(engine, clock=lambda: now, max_delay_ms=1000) as queue:
        answered_together(queue, engine, images)
        began = time.monotonic()
        assert queue.submit(images[:1], deadline=now + 0.5).result(SECONDS).batch_size == 1
        assert time.monotonic() - began < 0.9


def test_callers_take_turns(engine: GatedEngine, images: Images) -> None:
    """Whoever sent twenty requests first does not keep another's two waiting."""
    finished: list[str] = []
    with batcher(engine, max_batch_size=2) as queue:
        with engine.held():
            queue.submit(images[:1], caller="many")
            engine.await_run()
            futures = [queue.submit(images[:1], caller="many") for _ in range(20)] + [
                queue.submit(images[:1], caller="few") for _ in range(2)
            ]
            for name, future in zip(["many"] * 20 + ["few"] * 2, futures, strict=True):
                future.add_done_callback(lambda _, name=name: finished.append(name))  # type: ignore[misc]
        wait(futures, SECONDS)
    assert finished[:4].count("few") == 2
    assert len(finished) == 22


def test_a_known_caller_leaves_room_in_the_queue_for_others(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_queue=18, max_batch_size=2) as queue, engine.held():
        queue.submit(images[:1], caller="many")
        engine.await_run()
        for _ in range(16):  # eight times what is left free, which is two
            queue.submit(images[:1], caller="many")
        with pytest.raises(QueueFull, match="holds 16 of at most 18 images"):
            queue.submit(images[:1], caller="many")
        queue.submit(images[:2], caller="few")


@pytest.mark.parametrize("still_there", [0, 1, 3])
def test_a_run_is_stopped_when_the_last_who_awaited_it_gives_up(
    engine: GatedEngine, images: Images, alone: list[Decision], still_there: int
) -> None:
    together: list[Future[Result]] = []

    def give_up(run: int) -> None:
        if run == 2:
            for future in together[still_there:]:
                future.cancel()

    engine.before = give_up
    with batcher(engine) as queue:
        with engine.held():
            first = queue.submit(images[:1])
            engine.await_run()
            together += [queue.submit(images[i : i + 1]) for i in range(3)]
        first.result(SECONDS)
        engine.await_run()  # what comes now is not in it any more
        for index, future in enumerate(together[:still_there]):
            assert_same(future.result(SECONDS), alone[index : index + 1])
        assert_same(queue.submit(images[:1]).result(SECONDS), alone[:1])
    assert engine.runs == [1, 3, 1]
    assert engine.stopped == ([2] if still_there == 0 else [])


@pytest.mark.parametrize(
    "reason, size, deadline", [("full", 3, None), ("delay", 1, None), ("deadline", 1, 100.01)], ids=lambda value: str(value)
)
def test_a_batch_says_why_it_took_in_no_more(
    engine: GatedEngine, images: Images, reason: str, size: int, deadline: float | None
) -> None:
    metrics, now = Metrics(), 100.0  # stands still, so that the delay is not over before it is waited for

    def closed() -> dict[str, float]:
        get = metrics.registry.get_sample_value
        return {why: get("phalanx_batches_total", {"ensemble": "full", "reason": why}) or 0 for why in Closed}

    with batcher(engine, metrics, clock=lambda: now, max_delay_ms=50, max_batch_size=3) as queue:
        answered_together(queue, engine, images)
        before = closed()
        queue.submit(images[:size], deadline).result(SECONDS)
        assert {why: count - before[why] for why, count in closed().items() if count > before[why]} == {reason: 1}
        assert sum(closed().values()) == len(engine.runs)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_queue=4, max_batch_size=2) as queue:
        queue.submit(images[:1]).result(SECONDS)  # so that the time of an image is known
        engine.await_run()
        with engine.held():
            queue.submit(images[:1])
            engine.await_run()
            waiting = [queue.submit(images[:2]), queue.submit(images[:2])]
            assert queue.depth() == 4
            with pytest.raises(QueueFull, match="holds 4 of at most 4 images and has no room for 1 more") as refused:
                queue.submit(images[:1])
            assert 0 < refused.value.retry_seconds < 60
        assert [len(each.result(SECONDS).decision.label) for each in waiting] == [2, 2]
        assert len(queue.submit(images[:1]).result(SECONDS).decision.label) == 1


def test_a_request_larger_than_the_queue_enters_an_empty_one(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_queue=4, max_batch_size=8) as queue:
        assert len(queue.submit(images[:20]).result(SECONDS).decision.label) == 20


def test_work_that_cannot_be_done_in_time_is_refused_at_once(engine: GatedEngine, images: Images) -> None:
    now = [100.0]

    def clock() -> float:
        now[0] += 0.5  # each look at it: a run takes half a second
        return now[0]

    with batcher(engine, clock=clock, max_batch_size=1) as queue:
        queue.submit(images[:1]).result(SECONDS)
        engine.await_run()
        with pytest.raises(DeadlineExceeded, match=r"0\.000 s are left"):
            queue.submit(images[:1], deadline=now[0])


@pytest.mark.parametrize(
    ("running", "waiting", "asked", "left", "said"),
    [
        pytest.param(0, 0, 20, 10.0, r"about 10\.000 s, after 0\.000 s .* \(0 images wait\)", id="by itself"),
        pytest.param(0, 0, 20, 10.1, None, id="in time by itself"),
        pytest.param(1, 0, 20, 10.4, r"about 10\.000 s, after 0\.500 s .* \(0 images wait\)", id="after a run"),
        pytest.param(1, 10, 1, 6.0, r"about 0\.500 s, after 5\.500 s .* \(10 images wait\)", id="after a run and a queue"),
        pytest.param(1, 10, 1, 6.1, None, id="in time, after both"),
    ],
)
def test_what_a_request_needs_is_held_against_its_deadline(
    engine: GatedEngine, images: Images, running: int, waiting: int, asked: int, left: float, said: str | None
) -> None:
    """Of half a second an image: its own, what waits, and what is under way."""
    now = [100.0]
    with batcher(engine, clock=lambda: now[0], max_batch_size=1) as queue:
        engine.before = lambda _: now.__setitem__(0, now[0] + 0.5)
        queue.submit(images[:1]).result(SECONDS)
        engine.await_run()
        engine.before = lambda _: None
        with engine.held():
            if running:
                queue.submit(images[:running])
                engine.await_run()
            if waiting:
                queue.submit(images[:waiting])
            with nullcontext() if said is None else pytest.raises(DeadlineExceeded, match=said):
                queue.submit(images[:asked], deadline=now[0] + left)


def test_what_is_left_of_a_large_request_is_not_computed_when_it_is_cancelled(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_batch_size=8) as queue:
        with engine.held():
            large = queue.submit(images[:64])
            engine.await_run()
            assert large.cancel()
        queue.submit(images[:1]).result(SECONDS)
        assert queue.depth() == 0
    assert engine.runs == [8, 1]


def test_an_engine_that_fails_fails_its_own_batch_only(
    engine: GatedEngine, images: Images, alone: list[Decision], caplog: pytest.LogCaptureFixture
) -> None:
    with batcher(engine, max_batch_size=4) as queue:
        engine.error = RuntimeError("the device is lost")
        with engine.held():
            doomed = [queue.submit(images[:3]), queue.submit(images[:6])]  # the second one's rest is not tried
            engine.await_run()
        for future in doomed:
            with pytest.raises(RuntimeError, match="the device is lost"):
                future.result(SECONDS)
        engine.error = None
        assert_same(queue.submit(images[:2]).result(SECONDS), alone[:2])
        assert queue.depth() == 0
    assert "a run of" in caplog.text


def test_a_callback_that_fails_kills_nobody(engine: GatedEngine, images: Images, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Future[Result]) -> None:
        raise ValueError("a careless callback")

    with batcher(engine) as queue:
        with engine.held():
            futures = [queue.submit(images[:1]) for _ in range(3)]
            for future in futures:
                future.add_done_callback(fail)
        assert len(wait(futures, SECONDS).done) == 3
        assert queue.submit(images[:1]).result(SECONDS).batch_size == 1
    assert "a careless callback" in caplog.text


def test_draining_answers_all_that_is_queued_and_takes_no_more(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_batch_size=4) as queue, ThreadPoolExecutor(1) as pool:
        with engine.held():
            futures = [queue.submit(images[:3]) for _ in range(5)]
            engine.await_run()
            drained = pool.submit(queue.drain, SECONDS)
            with pytest.raises(Draining, match="shutting down"):
                while True:  # until the other thread has begun to drain
                    futures.append(queue.submit(images[:1]))
        assert drained.result(SECONDS)
        assert all(future.done() and future.exception() is None for future in futures)


def test_what_cannot_be_drained_in_time_is_told_so(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_batch_size=4) as queue, engine.held():
        futures = [queue.submit(images[:3]) for _ in range(5)]
        engine.await_run()
        assert not queue.drain(0.0)
        for future in futures:
            with pytest.raises(Draining, match="shut down before"):
                future.result(SECONDS)


def test_callers_are_told_why_before_their_run_is_stopped_for_it(engine: GatedEngine, images: Images) -> None:
    """Who finds its run stopped takes its callers for gone, and would tell them nothing else."""
    with batcher(engine, max_batch_size=4) as queue, engine.held():
        future, asked = queue.submit(images[:3]), list[bool]()
        engine.await_run()
        (stop,) = engine.stops
        assert stop is not None
        future.add_done_callback(lambda _: asked.append(stop.asked))
        queue.drain(0.0)
        assert (asked, stop.asked) == ([False], True)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(np.zeros((0, 8, 8, 3), np.uint8), id="no image"),
        pytest.param(np.zeros((1, 8, 9, 3), np.uint8), id="another width"),
        pytest.param(np.zeros((8, 8, 3), np.uint8), id="a single image without its axis"),
        pytest.param(np.zeros((1, 8, 8, 3), np.float32), id="floats"),
    ],
)
def test_images_of_another_shape_or_type_are_refused(engine: GatedEngine, broken: Any) -> None:
    with (
        batcher(engine) as queue,
        pytest.raises(ValueError, match=r"expected at least one uint8 image \(8, 8, 3\), got"),
    ):
        queue.submit(broken)


def test_fresh_masks_are_those_of_the_seed_in_the_answer(bundle: Bundle, threads: Lanes, images: Images) -> None:
    fresh = load(bundle, threads, masks="fresh")
    with batcher(GatedEngine(fresh), max_batch_size=4) as queue:
        result = queue.submit(images[:12]).result(SECONDS)
    assert [len(set(result.masks_seeds[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(result.masks_seeds)) == 3
    for row, seed in enumerate(result.masks_seeds):
        again = fresh.run(images[row : row + 1], masks_seed=seed).decision
        np.testing.assert_allclose(again.votes[0], result.decision.votes[row], atol=1e-5)


def test_a_caller_who_need_not_wait_computes_in_its_own_thread(engine: GatedEngine, images: Images, alone: list[Decision]) -> None:
    metrics = Metrics()
    with batcher(engine, metrics, max_batch_size=8) as queue:
        for n in (1, 3):
            result = queue.compute_now(images[:n])
            assert result is not None
            assert_same(result, alone[:n])
            assert (result.batch_size, result.queue_seconds) == (n, 0.0)
    assert engine.callers == {threading.get_ident()}
    assert metrics.registry.get_sample_value("phalanx_batch_images_sum", {"ensemble": "full"}) == 4
    for stage in ("queue", "compute"):
        assert metrics.registry.get_sample_value("phalanx_stage_seconds_count", {"ensemble": "full", "stage": stage}) == 2


def test_a_caller_who_must_wait_is_told_to_queue(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_batch_size=8, max_delay_ms=1000) as queue:
        assert queue.compute_now(images[:9]) is None, "more images than fit into a run"
        with engine.held():
            running = queue.submit(images[:1])
            engine.await_run()
            assert queue.compute_now(images[:1]) is None, "a run is under way"
        running.result(SECONDS)
        answered_together(queue, engine, images)
        assert queue.compute_now(images[:1]) is None, "company is expected"


def test_what_is_queued_waits_for_a_caller_who_computes_and_draining_waits_for_both(
    engine: GatedEngine, images: Images, alone: list[Decision]
) -> None:
    with batcher(engine, max_batch_size=8) as queue, ThreadPoolExecutor(2) as pool:
        with engine.held():
            own = pool.submit(queue.compute_now, images[:1])
            engine.await_run()
            queued = [queue.submit(images[:1]) for _ in range(3)]
            drained = pool.submit(queue.drain, SECONDS)
            with pytest.raises(Draining, match="shutting down"):
                while True:  # until the other thread has begun to drain
                    queued.append(queue.submit(images[:1]))
            assert not own.done()
            assert not drained.done()
            assert not any(future.done() for future in queued)
        assert drained.result(SECONDS)
        result = own.result(SECONDS)
        assert result is not None
        assert_same(result, alone[:1])
        assert all(future.result(0).batch_size > 1 for future in queued)
        with pytest.raises(Draining, match="shutting down"):
            queue.compute_now(images[:1])


def test_an_engine_that_fails_a_caller_lets_the_next_one_compute(engine: GatedEngine, images: Images) -> None:
    with batcher(engine) as queue:
        engine.error = RuntimeError("the device is lost")
        with pytest.raises(RuntimeError, match="the device is lost"):
            queue.compute_now(images[:1])
        engine.error = None
        assert queue.compute_now(images[:1]) is not None
        assert queue.submit(images[:1]).result(SECONDS).batch_size == 1


def test_every_answered_request_and_run_is_measured(engine: GatedEngine, images: Images) -> None:
    metrics = Metrics()
    with batcher(engine, metrics, max_batch_size=4) as queue:
        with engine.held():
            busy = queue.submit(images[:1])
            engine.await_run()
            queue.submit(images[:2])
            queue.submit(images[:6])
            assert metrics.registry.get_sample_value("phalanx_queue_images", {"ensemble": "full"}) == 8
        busy.result(SECONDS)
    value = metrics.registry.get_sample_value
    assert value("phalanx_batch_images_count", {"ensemble": "full"}) == 3
    assert value("phalanx_batch_images_sum", {"ensemble": "full"}) == 9
    for stage in ("queue", "compute"):
        assert value("phalanx_stage_seconds_count", {"ensemble": "full", "stage": stage}) == 3
    assert value("phalanx_p_value_count", {"ensemble": "full", "detector": "combined"}) == 9


def test_many_callers_at_once_get_each_their_own(engine: GatedEngine, images: Images, alone: list[Decision]) -> None:
    def call(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
            rows = rng.integers(len(images), size=rng.integers(1, 5))
            result = (queue.compute_now(images[rows]) if seed % 2 else None) or queue.submit(images[rows]).result(SECONDS)
            assert_same(result, [alone[i] for i in rows])

    with batcher(engine, max_batch_size=6, max_delay_ms=1) as queue, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(call, seed) for seed in range(8)]:
            done.result(SECONDS)


def test_nothing_stays_behind_when_it_is_over(engine: GatedEngine) -> None:
    before = threading.active_count()
    with batcher(engine):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_lone_caller_who_gives_up_stops_the_run(engine: GatedEngine, images: Images, alone: list[Decision]) -> None:
    stop = Stop()
    with batcher(engine) as queue:
        engine.before = lambda run: stop.now() if run == 1 else None
        with pytest.raises(CancelledError):
            queue.compute_now(images[:8], None, stop)
        result = queue.compute_now(images[:2])
        assert result is not None
        assert_same(result, alone[:2])
    assert engine.stopped == [1]


def test_callers_get_as_many_images_of_a_batch_each(engine: GatedEngine, images: Images) -> None:
    """Whoever sends whole batches does not get 63 of 64 beside one who sends single images."""
    with batcher(engine, max_batch_size=8) as queue:
        with engine.held():
            queue.submit(images[:1])
            engine.await_run()
            bulk = queue.submit(images[:64], caller="bulk")
            singles = [queue.submit(images[i : i + 1], caller="stream") for i in range(8)]
        results = [single.result(SECONDS) for single in singles]
        assert not bulk.done()
        bulk.result(SECONDS)
    assert {result.batch_size for result in results} == {8}
    assert engine.runs == [1, 8, 8, 8, 8, 8, 8, 8, 8, 8]  # 4 and 4 twice, and then the rest


def test_what_is_given_up_leaves_its_place_at_once(engine: GatedEngine, images: Images) -> None:
    with batcher(engine, max_queue=4, max_batch_size=2) as queue, engine.held():
        queue.submit(images[:1])
        engine.await_run()
        waiting = [queue.submit(images[:2]), queue.submit(images[:2])]
        with pytest.raises(QueueFull):
            queue.submit(images[:1])
        waiting[0].cancel()
        assert queue.depth() == 2
        again = queue.submit(images[:2])
        engine.gate.set()
        assert len(again.result(SECONDS).decision.label) == 2
        assert queue.depth() == 0


@pytest.mark.parametrize("queued", [False, True], ids=["at once", "queued"])
def test_one_slow_run_does_not_refuse_everybody_for_good(engine: GatedEngine, images: Images, queued: bool) -> None:
    """A refusal computes nothing, from which a better estimate could come."""
    now = [100.0]
    with batcher(engine, clock=lambda: now[0]) as queue:
        engine.before = lambda _: now.__setitem__(0, now[0] + 2.0)  # two seconds, as on a machine that was frozen
        queue.compute_now(images[:1])
        engine.before = lambda _: None
        refusals = 0
        while True:
            try:
                if queued:
                    queue.submit(images[:1], deadline=now[0] + 1.0).result(SECONDS)
                else:
                    assert queue.compute_now(images[:1], deadline=now[0] + 1.0) is not None
            except DeadlineExceeded:
                refusals += 1
            else:
                break
        assert 1 <= refusals < 20


# --- several lanes


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change as often as they can, so that races show."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hasty")
def test_lanes_swap_lose_and_repeat_nothing(engine: GatedEngine, images: Images, alone: list[Decision]) -> None:
    """Requests of one image to more than a run holds, some given up, some computed by their callers, in three lanes."""
    engine.lanes, engine.most_at_once = Lanes(3), 4
    with batcher(engine, max_delay_ms=0.5) as queue:

        def ask(caller: int) -> int:
            draw, answered = random.Random(caller), 0
            for _ in range(40):
                rows = [draw.randrange(len(images)) for _ in range(draw.choice((1, 1, 2, 3, 5, 13)))]
                expected = [alone[row] for row in rows]
                result = queue.compute_now(images[rows]) if len(rows) == 1 else None
                if result is None:
                    future = queue.submit(images[rows], caller=f"caller {caller % 3}")
                    if draw.random() < 0.1 and future.cancel():
                        continue
                    result = future.result(SECONDS)
                assert_same(result, expected)
                assert len(result.masks_seeds) == len(rows)
                answered += 1
            return answered

        with ThreadPoolExecutor(10) as pool:
            assert sum(pool.map(ask, range(10))) > 300
        assert queue.depth() == 0
    assert max(engine.runs) <= 4
    assert engine.lanes.free == 3


def test_what_waits_is_divided_among_the_lanes_that_are_free(engine: GatedEngine, images: Images) -> None:
    engine.lanes = Lanes(2)
    with batcher(engine) as queue:
        with engine.held():
            request = queue.submit(images[:10])
            engine.await_run()
            engine.await_run()
            assert engine.runs == [5, 5]  # both at once
            behind = [queue.submit(images[:1]) for _ in range(4)]
        assert request.result(SECONDS).batch_size == 5
        wait(behind, SECONDS)


def test_a_large_request_is_joined_in_its_order_whichever_run_ends_first(
    engine: GatedEngine, images: Images, alone: list[Decision]
) -> None:
    engine.lanes, engine.most_at_once = Lanes(2), 4
    first = threading.Event()
    engine.before = lambda number: None if number > 1 else assert_set(first)
    with batcher(engine) as queue:
        request = queue.submit(images[:8])
        engine.await_run()
        engine.await_run()
        time.sleep(0.05)  # for the second to end
        assert not request.done()
        first.set()
        assert_same(request.result(SECONDS), alone[:8])


def assert_set(event: threading.Event) -> None:
    assert event.wait(SECONDS)


def test_one_lane_that_fails_leaves_the_others_answers(engine: GatedEngine, images: Images, alone: list[Decision]) -> None:
    engine.lanes = Lanes(2)

    def fail(number: int) -> None:
        if number == 1:
            raise RuntimeError("the device is lost")

    engine.before = fail
    with batcher(engine) as queue:
        with engine.held():
            first = queue.submit(images[:1])
            engine.await_run()
            second = queue.submit(images[1:2])
            engine.await_run()
        with pytest.raises(RuntimeError, match="the device is lost"):
            first.result(SECONDS)
        assert_same(second.result(SECONDS), alone[1:2])
    assert engine.lanes.free == 2
