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
from service.bound_runs import BoundRuns, sizes_up_to
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
    spec = bundle.manifest.masks_of(ensemble.members)
    masks = {} if spec is None else {"masks": draw_masks(seed, spec.samples, spec.width, spec.keep)}
    return open_session(graphs.fused(bundle, ensemble), DeviceConfig(provider="cpu")), masks


def bound_runs(session: ort.InferenceSession, masks: Mapping[str, NDArray[Any]], most: int = 64) -> BoundRuns:
    return BoundRuns(session, False, columns=COLUMNS, others=masks, sizes=sizes_up_to(most), device="cpu")


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
    bound = bound_runs(session, masks)
    for n in (1, 2, 3, 5, 16, 33, 64):
        images = random_pixels(n, seed=n)
        assert_same(bound.run(images, masks), session, {"image": images, **masks})


def test_more_images_than_the_largest_size_are_several_runs(bundle: Bundle, graphs: GraphCache) -> None:
    session, masks = session_and_masks(bundle, graphs, EnsembleChoice("full"))
    images = random_pixels(2 * 12 + 3)
    assert_same(bound_runs(session, masks, most=12).run(images, masks), session, {"image": images, **masks})


def test_answers_stay_when_memory_is_used_again(bundle: Bundle, graphs: GraphCache) -> None:
    session, masks = session_and_masks(bundle, graphs, EnsembleChoice("full"))
    bound = bound_runs(session, masks)
    first = random_pixels(4, seed=1)
    answers = bound.run(first, masks)
    bound.run(random_pixels(4, seed=2), masks)
    assert_same(answers, session, {"image": first, **masks})


def test_other_masks_are_other_answers(bundle: Bundle, graphs: GraphCache) -> None:
    images, choice = random_pixels(5), EnsembleChoice("full", masks="fresh")
    session, masks = session_and_masks(bundle, graphs, choice)
    plain, others = session_and_masks(bundle, graphs, choice, seed=2)
    expected = {
        id(each): plain.run(COLUMNS, {"image": images} | {name: value.copy() for name, value in each.items()})
        for each in (masks, others)
    }
    scores = COLUMNS.index("scores")
    assert not np.allclose(expected[id(masks)][scores], expected[id(others)][scores])
    bound = bound_runs(session, masks)
    for each in (masks, others, masks):
        for name, mine, theirs in zip(COLUMNS, bound.run(images, each), expected[id(each)], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=name)


def test_what_a_caller_gave_is_never_written_into(bundle: Bundle, graphs: GraphCache) -> None:
    session, masks = session_and_masks(bundle, graphs, EnsembleChoice("full"))
    _, others = session_and_masks(bundle, graphs, EnsembleChoice("full"), seed=2)
    before = {name: value.copy() for name, value in masks.items()}
    bound_runs(session, masks, most=2).run(random_pixels(2), others)
    for name, value in masks.items():
        np.testing.assert_array_equal(value, before[name])


def test_an_ensemble_without_masks_has_no_such_input(bundle: Bundle, graphs: GraphCache) -> None:
    stochastic = tuple(member.name for member in bundle.manifest.members if member.stochastic)
    session, masks = session_and_masks(bundle, graphs, EnsembleChoice("plain", without=stochastic))
    assert not masks
    images = random_pixels(3)
    assert_same(bound_runs(session, masks).run(images, masks), session, {"image": images})


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (48, (1, 2, 4, 8, 16, 32, 48)), (64, (1, 2, 4, 8, 16, 32, 64))],
)
def test_sizes_are_powers_of_two_and_the_largest_batch(most: int, sizes: tuple[int, ...]) -> None:
    assert sizes_up_to(most) == sizes
