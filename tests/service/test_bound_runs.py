"""Runs in bound memory answer as any others do. On the CPU; what needs a GPU is in test_engine.py and benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle, read_bundle
from models.composition import EnsembleChoice, InvalidEnsemble, compose
from models.ensemble import Decision, RuleName
from models.masks import draw_masks
from service.bound_runs import SIZES, BoundRuns
from service.config import DeviceConfig
from service.engine import open_session
from service.graph_cache import GraphCache
from tests.service.serving import random_pixels

COLUMNS = [column.name for column in fields(Decision)]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


def session_and_masks(
    bundle: Bundle, graphs: GraphCache, choice: EnsembleChoice, seed: int = 1
) -> tuple[ort.InferenceSession, dict[str, NDArray[Any]]]:
    ensemble = compose(bundle, choice)
    spec = next((found for name in ensemble.members if (found := bundle.manifest.member(name).stochastic)), None)
    masks = {} if spec is None else {"masks": draw_masks(seed, spec.samples, spec.width, spec.keep)}
    return open_session(graphs.fused(bundle, ensemble), DeviceConfig(provider="cpu")), masks


def assert_same(got: list[NDArray[Any]], session: ort.InferenceSession, feeds: Mapping[str, Any]) -> None:
    for name, mine, expected in zip(COLUMNS, got, session.run(COLUMNS, dict(feeds)), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5, err_msg=name)
        assert mine.dtype == expected.dtype


@pytest.mark.parametrize("rule", list(RuleName))
def test_padding_changes_no_answer_under_any_rule(bundle: Bundle, graphs: GraphCache, rule: RuleName) -> None:
    try:
        session, masks = session_and_masks(bundle, graphs, EnsembleChoice("full", rule=rule))
    except InvalidEnsemble:
        pytest.skip(f"the tiny bundle does not serve {rule}")
    bound = BoundRuns(session, COLUMNS, masks, "cpu", graphs=False)
    for n in (1, 2, 3, 5, 16, 33, 64):
        images = random_pixels(n, seed=n)
        assert_same(bound.run(images, masks), session, {"image": images, **masks})


def test_more_images_than_the_largest_size_are_several_runs(bundle: Bundle, graphs: GraphCache) -> None:
    session, masks = session_and_masks(bundle, graphs, EnsembleChoice("full"))
    images = random_pixels(2 * SIZES[-1] + 3)
    assert_same(BoundRuns(session, COLUMNS, masks, "cpu", graphs=False).run(images, masks), session, {"image": images, **masks})


def test_answers_stay_when_memory_is_used_again(bundle: Bundle, graphs: GraphCache) -> None:
    session, masks = session_and_masks(bundle, graphs, EnsembleChoice("full"))
    bound = BoundRuns(session, COLUMNS, masks, "cpu", graphs=False)
    first = random_pixels(4, seed=1)
    answers = bound.run(first, masks)
    bound.run(random_pixels(4, seed=2), masks)
    assert_same(answers, session, {"image": first, **masks})


def test_other_masks_are_other_answers(bundle: Bundle, graphs: GraphCache) -> None:
    session, masks = session_and_masks(bundle, graphs, EnsembleChoice("full", masks="fresh"))
    assert masks
    bound = BoundRuns(session, COLUMNS, masks, "cpu", graphs=False)
    _, others = session_and_masks(bundle, graphs, EnsembleChoice("full", masks="fresh"), seed=2)
    images = random_pixels(5)
    for each in (masks, others, masks):
        assert_same(bound.run(images, each), session, {"image": images, **each})


def test_an_ensemble_without_masks_has_no_such_input(bundle: Bundle, graphs: GraphCache) -> None:
    stochastic = tuple(member.name for member in bundle.manifest.members if member.stochastic)
    session, masks = session_and_masks(bundle, graphs, EnsembleChoice("plain", without=stochastic))
    assert not masks
    images = random_pixels(3)
    assert_same(BoundRuns(session, COLUMNS, masks, "cpu", graphs=False).run(images, masks), session, {"image": images})
