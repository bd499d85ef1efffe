"""A share of the traffic runs through another ensemble, too; nobody's answer is another or later for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.config import InvalidConfig, ServiceConfig, load_config, with_ensembles
from service.engine import Lanes, Stop
from service.ensembles import Ensembles, load_ensembles
from service.graph_cache import GraphCache
from service.metrics import Metrics
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.servicers.catalogue import Catalogue
from service.shadow import MOST_WAITING, QUIET_SECONDS, Shadow
from service.witnesses import Answered
from tests.service.serving import Running, configured, random_pixels, request, serving

IMAGES = 24
COUNTED = "phalanx_shadow_images_total"


def shadowed(by: str, **others: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"full": {"shadow": {"ensemble": by, "share": 1}}, **others}


def counted(running: Running, by: str) -> dict[tuple[str, str], float]:
    """Images by whether label and verdict agreed, once all have been compared."""
    running.server.catalogue.ensembles.shadows["full"].settle()
    series = running.scrape()
    found = {}
    for label in ("same", "other"):
        for verdict in ("same", "other"):
            name = f'{COUNTED}{{ensemble="full",label="{label}",shadow="{by}",verdict="{verdict}"}}'
            if series[name]:
                found[label, verdict] = series[name]
    return found


@pytest.mark.parametrize("front_end", ["grpcio", "native"])
def test_answers_are_the_same_to_the_last_bit(tiny_bundle: Path, graphs: GraphCache, front_end: str) -> None:
    plain, watched = (
        {"ensembles": ensembles, "front_end": front_end}
        for ensembles in ({"full": {}, "no-edge": {"without": ["edge"]}}, shadowed("no-edge", **{"no-edge": {"without": ["edge"]}}))
    )
    answers = []
    for sections in (plain, watched):
        with serving(tiny_bundle, graphs, **sections) as running:
            answers.append([running.native.Classify(request(image[None])) for image in random_pixels(IMAGES)])
    assert [each.SerializeToString() for each in answers[0]] == [each.SerializeToString() for each in answers[1]]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        pytest.param({}, {("same", "same"): IMAGES}, id="the same choice agrees"),
        pytest.param({"detectors": []}, {("same", "other"): IMAGES}, id="without detectors there is no verdict to agree on"),
    ],
)
def test_agreement_is_counted(
    tiny_bundle: Path, graphs: GraphCache, choice: dict[str, Any], expected: dict[tuple[str, str], int]
) -> None:
    with serving(tiny_bundle, graphs, ensembles=shadowed("other", other=choice)) as running:
        running.native.Classify(request(random_pixels(IMAGES)))
        assert counted(running, "other") == expected
        series = running.scrape()
    assert series['phalanx_verdicts_total{ensemble="other",reason="none",verdict="clean"}'] == 0 or "detectors" in choice
    assert series['phalanx_batch_images_count{ensemble="other"}'] == 0
    assert not any(name.startswith('phalanx_request_seconds_count{ensemble="other"') for name in series)


def test_another_choice_disagrees_where_its_own_answers_do(tiny_bundle: Path, graphs: GraphCache) -> None:
    pixels, decision = random_pixels(96), {"review_rate": 0.9999, "reject_rate": 0.975}  # so that verdicts differ, too
    ensembles = shadowed("no-edge", **{"no-edge": {"without": ["edge"]}})
    with serving(tiny_bundle, graphs, ensembles=ensembles, decision=decision) as running:
        mine = running.native.Classify(request(pixels)).results
        found = counted(running, "no-edge")
        theirs = running.native.Classify(request(pixels, "no-edge")).results
    expected: dict[tuple[str, str], float] = {}
    for one, other in zip(mine, theirs, strict=True):
        a, b = one.classification, other.classification
        key = tuple("same" if same else "other" for same in (a.class_index == b.class_index, a.verdict == b.verdict))
        expected[key] = expected.get(key, 0) + 1  # type: ignore[index, arg-type]
    assert found == expected
    assert len(found) > 1


# What is computed, and when


@pytest.fixture
def ensembles(tiny_bundle: Path, graphs: GraphCache) -> Iterator[Ensembles]:
    config = configured(tiny_bundle, ensembles={"full": {}, "other": {}}, device={"provider": "cpu", "threads": 2})
    with load_ensembles(config, Metrics(), graphs) as loaded:
        yield loaded


@pytest.fixture
def seen(ensembles: Ensembles) -> Answered:
    """As many images as may wait."""
    pixels = random_pixels(MOST_WAITING)
    served = Catalogue(ServiceConfig(), ensembles).default
    result = served.loaded.batcher.submit(pixels).result()
    return Answered(served.name, served.bundle_version, served.names, pixels, result, "somebody", "a-request")


def compared(metrics: Metrics) -> tuple[float, float]:
    """Images that were compared, and that were dropped."""
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    names = (COUNTED, "phalanx_shadow_dropped_images_total")
    first, second = (sum(sample.value for sample in samples if sample.name == name) for name in names)
    return first, second


def shadow_of(ensembles: Ensembles, metrics: Metrics, share: float = 1.0, draws: Iterator[float] | None = None) -> Shadow:
    engine, beside = ensembles["other"].engine, ensembles["full"].engine.lanes
    draw = (lambda: 0.0) if draws is None else draws.__next__
    return Shadow(engine, beside, share, metrics.shadow("full", "other"), draw)


def test_it_gets_its_share(ensembles: Ensembles, seen: Answered) -> None:
    metrics = Metrics()
    shadow = shadow_of(ensembles, metrics, 0.25, iter(np.random.default_rng(0).random(MOST_WAITING).tolist()))
    shadow.saw(seen)
    shadow.settle()
    shadow.close()
    assert compared(metrics) == (int((np.random.default_rng(0).random(MOST_WAITING) < 0.25).sum()), 0)


def test_nothing_runs_while_anything_is_computed_and_what_is_too_much_is_dropped(ensembles: Ensembles, seen: Answered) -> None:
    metrics, lanes = Metrics(), ensembles["full"].engine.lanes
    shadow = shadow_of(ensembles, metrics)
    lanes.enter()  # one of two
    shadow.saw(seen)
    shadow.saw(seen)
    assert compared(metrics) == (0, MOST_WAITING)
    lanes.leave()
    shadow.settle()
    shadow.close()
    assert compared(metrics) == (MOST_WAITING, MOST_WAITING)


@pytest.mark.parametrize("count", [1, 2])
def test_who_enters_a_lane_has_it_at_once_and_the_borrower_stopped(count: int) -> None:
    lanes, stop = Lanes(count), Stop()
    assert lanes.borrow(stop)
    assert not lanes.borrow(Stop())  # one at a time
    assert lanes.enter(wait=False)
    assert stop.asked
    lanes.give_back()
    assert not lanes.borrow(Stop())  # while somebody computes
    lanes.leave()
    assert lanes.borrow(Stop())
    lanes.close()


def test_many_lanes_lend_while_more_than_half_of_them_are_free() -> None:
    lanes, stop = Lanes(8), Stop()
    for _ in range(3):
        lanes.enter()
    assert lanes.await_idle(60.0, lambda: False)  # there always was time to spare
    assert lanes.borrow(stop)
    before = stop.asked
    lanes.enter()
    assert (before, stop.asked) == (False, True)
    lanes.give_back()
    assert not lanes.borrow(Stop())
    lanes.close()


def test_no_image_is_lost_where_runs_are_stopped_over_and_over(ensembles: Ensembles, seen: Answered) -> None:
    metrics, lanes, over = Metrics(), ensembles["full"].engine.lanes, threading.Event()

    def come_and_go() -> None:
        while not over.wait(QUIET_SECONDS * 1.2):  # a run begins, and is stopped more often than not
            lanes.enter()
            lanes.leave()

    callers = threading.Thread(target=come_and_go)
    callers.start()
    shadow = shadow_of(ensembles, metrics)
    shadow.saw(seen)
    shadow.settle()
    over.set()
    callers.join()
    shadow.close()
    assert compared(metrics) == (MOST_WAITING, 0)
    assert lanes.free == lanes.count


def test_it_ends_at_once_whatever_waits(ensembles: Ensembles, seen: Answered) -> None:
    lanes = ensembles["full"].engine.lanes
    shadow = shadow_of(ensembles, Metrics())
    lanes.enter()
    shadow.saw(seen)
    shadow.close()  # returns although the lane was never left
    shadow.saw(seen)
    shadow.settle()
    lanes.leave()


# Configuration and change


@pytest.mark.parametrize(
    ("ensembles", "says"),
    [
        pytest.param("full: {shadow: {ensemble: other}}", "(there are none), got other", id="nobody else"),
        pytest.param("full: {shadow: {ensemble: full}}\n  b: {}", "among the other ensembles (b), got full", id="its own"),
        pytest.param("full: {shadow: {ensemble: b, share: 0}}\n  b: {}", "shadow.share", id="no share"),
        pytest.param("full: {shadow: {share: 0.5}}\n  b: {}", "shadow.ensemble", id="of what"),
    ],
)
def test_a_shadow_that_cannot_be_is_refused(ensembles: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "phalanx.yaml").write_text(f"ensembles:\n  {ensembles}\n")
    with pytest.raises(InvalidConfig) as refused:
        load_config(tmp_path / "phalanx.yaml", {})
    assert says in str(refused.value)


def test_an_ensemble_is_not_removed_while_it_is_a_shadow() -> None:
    callers = {"ops": {"token_sha256": "0" * 64, "scopes": ["admin"]}}
    config = ServiceConfig.model_validate({"ensembles": shadowed("other", other={}), "callers": callers})
    with pytest.raises(InvalidConfig, match="expected a shadow among the other ensembles"):
        with_ensembles(config, {"other": None})
    without = with_ensembles(config, {"full": "{}", "other": None})
    assert list(without.ensembles) == ["full"]


def test_a_reload_ends_the_old_shadow_and_begins_the_new(tiny_bundle: Path, graphs: GraphCache) -> None:
    with serving(tiny_bundle, graphs, ensembles=shadowed("other", other={})) as running:
        before = running.server.catalogue.ensembles.shadows["full"]
        running.server.offer.replace(configured(tiny_bundle, ensembles=shadowed("third", third={})))
        running.server.offer.finish(10.0)
        assert not before._thread.is_alive()
        running.native.Classify(pb.ClassifyRequest(images=request(random_pixels(IMAGES)).images))
        assert counted(running, "third") == {("same", "same"): IMAGES}
