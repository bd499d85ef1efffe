"""One real session: what it answers, on which device, and what it refuses to start with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from models.bundle import Bundle, InvalidBundle, read_bundle
from models.composition import EnsembleChoice, compose
from models.ensemble import DetectorName
from models.masks import draw_masks
from service.config import DeviceConfig
from service.engine import CPU, CUDA, MOST_AT_ONCE, Engine, Lanes, ProviderUnavailable, cores, open_session
from service.graph import build_graph
from service.graph_cache import GraphCache
from tests.bundles import MASKS, MASKS_SEED, random_images, write_tiny_bundle

ON_CPU = DeviceConfig(provider="cpu")
no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is an NVIDIA device")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    found = Path("/dev/nvidiactl").exists()
    marked: Callable[..., None] = pytest.mark.gpu(pytest.mark.skipif(not found, reason="there is no NVIDIA device")(test))
    return marked


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(write_tiny_bundle(tmp_path_factory.mktemp("engine") / "bundle"))


class Load(Protocol):
    def __call__(self, bundle: Bundle, device: DeviceConfig = ..., threads: Lanes = ..., **choice: Any) -> Engine: ...


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Makes engines; a graph that is asked for twice is built once."""
    cache, single = GraphCache(tmp_path_factory.mktemp("cache")), Lanes(1)

    def load(bundle: Bundle, device: DeviceConfig = ON_CPU, threads: Lanes = single, **choice: Any) -> Engine:
        ensemble = compose(bundle, EnsembleChoice(name="full", **choice))
        return Engine(cache.fused(bundle, ensemble), bundle, ensemble, device, threads, largest_batch=64)

    yield load
    single.close()


@pytest.fixture(scope="module")
def engine(load: Load, bundle: Bundle) -> Engine:
    return load(bundle)


def test_the_answers_have_a_row_for_every_image(engine: Engine, bundle: Bundle) -> None:
    for n in (1, 2, 7):
        decision = engine.run(random_images(bundle.manifest.input, n, seed=3)).decision
        assert decision.probabilities.shape == (n, len(bundle.manifest.classes))
        assert decision.votes.shape[:2] == (n, 4)
        assert decision.verdict.shape == decision.label.shape == (n,)
        np.testing.assert_allclose(decision.probabilities.sum(axis=1), 1, atol=1e-5)


def test_batched_equals_unbatched(engine: Engine, bundle: Bundle) -> None:
    images = random_images(bundle.manifest.input, 7, seed=3)
    together = engine.run(images).decision
    for row in range(7):
        alone = engine.run(images[row : row + 1]).decision
        np.testing.assert_allclose(alone.probabilities[0], together.probabilities[row], atol=1e-5)
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-5, atol=1e-5)


def test_fixed_masks_are_the_bundles_and_answers_repeat(engine: Engine, bundle: Bundle) -> None:
    images = random_images(bundle.manifest.input, 3, seed=3)
    first, second = engine.run(images), engine.run(images)
    assert first.masks_seed == second.masks_seed == MASKS_SEED
    np.testing.assert_array_equal(first.decision.scores, second.decision.scores)


def test_fresh_masks_differ_from_run_to_run_and_their_seed_repeats_an_answer(load: Load, bundle: Bundle) -> None:
    engine = load(bundle, masks="fresh", detectors=("variance",))
    images = random_images(bundle.manifest.input, 3, seed=3)
    first, second = engine.run(images), engine.run(images)
    assert first.masks_seed is not None
    assert first.masks_seed != second.masks_seed
    assert not np.array_equal(first.decision.scores, second.decision.scores)
    again = engine.run(images, masks_seed=first.masks_seed)
    np.testing.assert_array_equal(first.decision.scores, again.decision.scores)
    assert not np.array_equal(
        draw_masks(first.masks_seed, MASKS.samples, MASKS.width, MASKS.keep),
        draw_masks(second.masks_seed or 0, MASKS.samples, MASKS.width, MASKS.keep),
    )


def test_dropout_is_alive_in_the_session(engine: Engine, bundle: Bundle) -> None:
    ensemble = compose(bundle, EnsembleChoice(name="full"))
    variance = [detector.name for detector in ensemble.detectors].index(DetectorName.VARIANCE)
    assert (engine.run(random_images(bundle.manifest.input, 5, seed=3)).decision.scores[:, variance] > 0).all()


def test_an_ensemble_without_a_stochastic_member_has_no_masks(load: Load, bundle: Bundle) -> None:
    engine = load(bundle, without=("bayesian",))
    assert engine.run(random_images(bundle.manifest.input, 2, seed=3)).masks_seed is None


def test_the_provider_is_the_sessions_own(engine: Engine) -> None:
    assert engine.provider == CPU


@no_gpu
@pytest.mark.parametrize("strict", [False, True])
def test_auto_without_a_gpu_is_the_cpu_without_a_complaint(
    load: Load, bundle: Bundle, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(bundle, DeviceConfig(provider="auto", strict=strict)).provider == CPU
    assert not caplog.records


@no_gpu
def test_cuda_that_is_not_to_be_had_is_complained_about(load: Load, bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(bundle, DeviceConfig(provider="cuda")).provider == CPU
    assert f"expected a session on {CUDA}" in caplog.text


@no_gpu
def test_strict_refuses_a_session_on_another_device(load: Load, bundle: Bundle) -> None:
    with pytest.raises(ProviderUnavailable, match=f"expected a session on {CUDA} .* got one on {CPU}"):
        load(bundle, DeviceConfig(provider="cuda", strict=True))


@no_gpu
def test_where_cuda_is_not_to_be_had_no_thread_is_kept_for_it(load: Load, bundle: Bundle) -> None:
    before = set(threading.enumerate())
    engine = load(bundle, DeviceConfig(provider="cuda"))
    assert engine.fallback
    assert not engine.cuda_graphs
    assert not set(threading.enumerate()) - before


def test_a_session_does_not_turn_into_one_on_the_cpu_in_the_middle_of_a_run(bundle: Bundle) -> None:
    graph = build_graph(bundle, compose(bundle, EnsembleChoice(name="full")))
    assert open_session(graph, ON_CPU)._enable_fallback is False


@on_gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_cuda_answers_as_the_cpu_does(
    load: Load, bundle: Bundle, engine: Engine, cuda_graphs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(load(bundle, DeviceConfig(provider="cuda", strict=True, cuda_graphs=cuda_graphs))) as other:
        assert "no CUDA graphs" not in caplog.text
        assert other.cuda_graphs == cuda_graphs
        for n in (1, 7, 64, 100):
            for seed in range(2):
                images = random_images(bundle.manifest.input, n, seed=seed)
                expected = engine.run(images).decision
                np.testing.assert_allclose(other.run(images).decision.probabilities, expected.probabilities, atol=1e-4)


@on_gpu
def test_calls_are_answered_while_another_engine_captures(load: Load, bundle: Bundle, engine: Engine) -> None:
    device = DeviceConfig(provider="cuda", strict=True)
    images = random_images(bundle.manifest.input, 7, seed=3)
    expected = engine.run(images).decision.probabilities
    loaded = threading.Event()

    def call() -> int:
        calls = 0
        while not loaded.is_set():
            np.testing.assert_allclose(serving.run(images).decision.probabilities, expected, atol=1e-4)
            calls += 1
        return calls

    with closing(load(bundle, device)) as serving, ThreadPoolExecutor(4) as callers:
        calls = [callers.submit(call) for _ in range(4)]
        try:
            others = [load(bundle, device) for _ in range(3)]
        finally:
            loaded.set()
        assert all(each.result() > 0 for each in calls)
        for other in others:
            assert other.cuda_graphs
            other.close()


@pytest.mark.parametrize(
    ("member", "choice"),
    [
        pytest.param("metric", {}, id="a voter that a detector listens to as well"),
        pytest.param("edge", {}, id="a voter"),
        pytest.param("bayesian", {}, id="a stochastic voter"),
        pytest.param("bayesian", {"masks": "fresh"}, id="a stochastic voter, where masks are fresh"),
        pytest.param("bayesian", {"roles": {"bayesian": ("detector",)}}, id="a stochastic detector without a vote"),
        pytest.param("metric", {"roles": {"metric": ("detector",)}}, id="a detector without a vote"),
    ],
)
def test_a_wrong_sample_output_is_refused_naming_member_and_image(
    load: Load, bundle: Bundle, member: str, choice: dict[str, Any]
) -> None:
    wrong = bundle.samples.expected[member].copy()
    wrong[5, wrong[5].argmax()] -= 2
    wrong[6, wrong[6].argmax()] -= 2
    samples = replace(bundle.samples, expected={**bundle.samples.expected, member: wrong})
    with pytest.raises(InvalidBundle, match=rf"member {member}, sample image 5: expected class .* 2 of 8 images differ"):
        load(replace(bundle, samples=samples), **choice)


def test_an_absent_member_is_not_tested(load: Load, bundle: Bundle) -> None:
    wrong = replace(bundle.samples, expected={**bundle.samples.expected, "edge": np.zeros((8, 10), np.float32)})
    load(replace(bundle, samples=wrong), without=("edge",))


def test_a_member_of_another_training_is_refused(load: Load, bundle: Bundle, tmp_path: Path) -> None:
    other = read_bundle(write_tiny_bundle(tmp_path / "other", seed=1))
    member = other.manifest.member("adversarial")
    members = tuple(member if each.name == member.name else each for each in bundle.manifest.members)
    swapped = replace(
        bundle,
        manifest=bundle.manifest.model_copy(update={"members": members}),
        onnx_bytes={**bundle.onnx_bytes, member.name: other.onnx_bytes[member.name]},
    )
    with pytest.raises(InvalidBundle, match="self-test: member adversarial, sample image"):
        load(swapped)


def test_a_member_that_answers_nan_is_refused(load: Load, bundle: Bundle) -> None:
    expected = {**bundle.samples.expected, "edge": np.full((8, 10), np.nan, np.float32)}
    with pytest.raises(InvalidBundle, match="member edge, sample image 0"):
        load(replace(bundle, samples=replace(bundle.samples, expected=expected)))


def test_lanes_are_taken_until_none_is_free_and_waited_for() -> None:
    lanes = Lanes(2)
    assert lanes.enter()
    assert lanes.enter(wait=False)
    assert not lanes.enter(wait=False)
    assert lanes.free == 0
    entered = threading.Event()

    def enter() -> None:
        lanes.await_free()
        lanes.enter()
        entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.05)
    lanes.leave()
    assert entered.wait(10)
    waiting.join()
    assert lanes.free == 0
    lanes.close()


def test_a_run_on_the_cpu_is_small(engine: Engine) -> None:
    assert engine.most_at_once == MOST_AT_ONCE


def test_threads_are_no_more_than_the_cores_this_process_may_use() -> None:
    assert cores() >= 1
