"""The rule against closed forms, and what must hold of it whatever the outputs are."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from models.ensemble import (
    Decision,
    Detector,
    DetectorName,
    Ensemble,
    Reason,
    RuleName,
    Verdict,
    Voter,
    combine,
    decide,
    log_votes,
    read,
    reduce_masks,
)
from models.log_probability import divergence
from tests.models.ensembles import DETECTORS, VOTERS, K, T, ensemble, random_outputs, votes_as_outputs

THREE = tuple(Voter(name, 1.0, "robust", weight) for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2)))
SIDES = (Voter("a", 1.0, "accurate", 0.0), Voter("b", 1.0, "robust", 0.75), Voter("c", 1.0, "robust", 0.25))

Votes = list[list[float]]


def probabilities(rule: RuleName, voters: tuple[Voter, ...], votes: Votes, alpha: float = 0.8, scale: float = 2.0) -> Any:
    """The ensemble's probabilities (K,) where voter m votes votes[m]."""
    bare = Ensemble("test", len(votes[0]), voters, rule, alpha, scale, (), review_rate=0.05, reject_rate=0.01)
    return decide(bare, votes_as_outputs(np.array([votes]), voters)).probabilities[0]


# The six rules


def normalised(x: NDArray[np.float64]) -> Any:
    return x / x.sum()


DISTINCT: Votes = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.35, 0.4]]
CERTAIN: Votes = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
P = np.array(DISTINCT)
RULES = [
    pytest.param(RuleName.SOFT, THREE, DISTINCT, P.mean(axis=0), id="soft is the mean"),
    pytest.param(RuleName.WEIGHTED, THREE, DISTINCT, P.T @ [0.5, 0.3, 0.2], id="weighted is the weighted mean"),
    pytest.param(
        RuleName.WEIGHTED,
        tuple(replace(voter, weight=0.0) for voter in THREE),
        DISTINCT,
        P.mean(axis=0),
        id="without any weight all voters are alike",
    ),
    pytest.param(
        RuleName.MAJORITY,
        THREE,
        [[0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.0, 1.0, 0.0]],
        (np.array([2, 1, 0]) + [1 / 3, 0.6, 0.2 / 3]) / 4,
        id="two ballots outdo one of any confidence",
    ),
    pytest.param(
        RuleName.MAJORITY,
        THREE,
        DISTINCT,
        (1 + P.mean(axis=0)) / 4,
        id="three ballots that tie are decided by the soft vote",
    ),
    pytest.param(RuleName.MEDIAN, THREE, DISTINCT, normalised(np.median(P, axis=0)), id="median of three"),
    pytest.param(RuleName.MEDIAN, THREE[:2], DISTINCT[:2], P[:2].mean(axis=0), id="median of two is the mean of the middle two"),
    pytest.param(RuleName.MEDIAN, THREE, CERTAIN, np.full(3, 1 / 3), id="median of 0 everywhere is renormalised too"),
    pytest.param(
        RuleName.LOG_POOL,
        THREE,
        DISTINCT,
        normalised(np.prod(P ** np.array([[0.5], [0.3], [0.2]]), axis=0)),
        id="log-pool is the weighted geometric mean",
    ),
    pytest.param(RuleName.LOG_POOL, THREE[:1], CERTAIN[:1], [1, 0, 0], id="log-pool of one certain voter"),
    pytest.param(
        RuleName.MIXED,
        SIDES,
        DISTINCT,
        0.2 * P[0] + 0.8 * normalised((0.75 * P[1] + 0.25 * P[2]) ** 2),
        id="mixed sharpens the robust side",
    ),
    pytest.param(
        RuleName.MIXED,
        tuple(replace(voter, weight=0.0) for voter in SIDES),
        DISTINCT,
        0.2 * P[0] + 0.8 * normalised((P[1] + P[2]) ** 2),
        id="a robust side without weights is its mean",
    ),
    pytest.param(RuleName.MIXED, THREE, DISTINCT, P.T @ [0.5, 0.3, 0.2], id="mixed of one side is a weighted vote"),
]


@pytest.mark.parametrize("rule, voters, votes, expected", RULES)
def test_a_rule_has_its_closed_form(rule: RuleName, voters: tuple[Voter, ...], votes: Votes, expected: Any) -> None:
    np.testing.assert_allclose(probabilities(rule, voters, votes), expected, atol=1e-6)


def test_mixed_with_alpha_1_is_the_robust_side_alone() -> None:
    got = probabilities(RuleName.MIXED, SIDES, [[1, 0, 0], *DISTINCT[1:]], alpha=1.0, scale=1.0)
    np.testing.assert_allclose(got, 0.75 * P[1] + 0.25 * P[2], atol=1e-6)


def test_votes_are_tempered_after_the_reduction_over_masks() -> None:
    logits = random_outputs(3)["bayesian"].astype(np.float64)  # (T, n, K)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = p.mean(axis=0) ** (1 / 1.5)
    decision = decide(ensemble(RuleName.SOFT, VOTERS[3:], ()), {"bayesian": logits})
    np.testing.assert_allclose(decision.votes[:, 0], expected / expected.sum(axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("rule", RuleName)
def test_ties_go_to_the_first_class(rule: RuleName) -> None:
    """Whatever the last bits say: 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1."""
    votes = np.array([[[0.1, 0.3, 0.3, 0.3], [0.2, 0.2, 0.3, 0.3], [0.3, 0.1, 0.2, 0.4], [0.1, 0.5, 0.3, 0.1]]])
    votes = np.concatenate([votes, votes[:, :, [0, 2, 1, 3]]], axis=1)  # classes 1 and 2 in each other's place
    voters = tuple(Voter(f"v{m}", 1.0, "robust", 1 / 8) for m in range(8))
    bare = Ensemble("test", 4, voters, rule, 0.8, 2.0, (), review_rate=0.05, reject_rate=0.01)
    outputs = votes_as_outputs(votes, voters)
    decision = decide(bare, {name: logits.astype(np.float32) for name, logits in outputs.items()})
    assert decision.label[0] in (1, 3)


# What must hold


@pytest.mark.parametrize("rule", RuleName)
def test_permuting_members_keeps_the_answer(rule: RuleName) -> None:
    outputs, full = random_outputs(20), ensemble(rule)
    order = [2, 0, 3, 1]
    shuffled = replace(full, voters=tuple(full.voters[i] for i in order))
    expected, got = decide(full, outputs), decide(shuffled, outputs)
    np.testing.assert_allclose(got.votes, expected.votes[:, order], atol=1e-6)
    for column in ("probabilities", "scores"):
        np.testing.assert_allclose(getattr(got, column), getattr(expected, column), atol=1e-5)
    for column in ("label", "verdict", "reason"):
        np.testing.assert_array_equal(getattr(got, column), getattr(expected, column))


@pytest.mark.parametrize("rule", RuleName)
def test_permuting_images_permutes_the_answers_and_each_is_as_if_alone(rule: RuleName) -> None:
    outputs, full = random_outputs(12), ensemble(rule)
    together = decide(full, outputs)
    order = np.random.default_rng(1).permutation(12)
    shuffled = decide(full, {name: logits[..., order, :] for name, logits in outputs.items()})
    for column in fields(Decision):
        expected = getattr(together, column.name)
        np.testing.assert_array_equal(getattr(shuffled, column.name), expected[order], err_msg=column.name)
        for image in range(3):
            alone = decide(full, {name: logits[..., image : image + 1, :] for name, logits in outputs.items()})
            np.testing.assert_allclose(getattr(alone, column.name)[0], expected[image], atol=1e-6, err_msg=column.name)


@pytest.mark.parametrize("rule", RuleName)
def test_permuting_classes_permutes_the_probabilities(rule: RuleName) -> None:
    outputs, order = random_outputs(20), np.array([3, 1, 4, 0, 2])
    expected = decide(ensemble(rule), outputs)
    got = decide(ensemble(rule), {name: logits[..., order] for name, logits in outputs.items()})
    np.testing.assert_allclose(got.probabilities, expected.probabilities[:, order], atol=1e-6)
    np.testing.assert_allclose(got.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("rule", RuleName)
@settings(max_examples=25)
@given(data=st.data())
def test_an_answer_is_a_distribution_and_the_label_its_mode(rule: RuleName, data: st.DataObject) -> None:
    logits = st.floats(-1e4, 1e4, width=32)
    outputs = {name: data.draw(arrays(np.float32, (2, K), elements=logits)) for name in ("metric", "edge", "adversarial")}
    outputs["bayesian"] = data.draw(arrays(np.float32, (T, 2, K), elements=logits))
    decision = decide(ensemble(rule), outputs)
    np.testing.assert_allclose(decision.probabilities.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(decision.votes.sum(axis=2), 1, atol=1e-5)
    chosen = np.take_along_axis(decision.probabilities, decision.label[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(decision.confidence, chosen, atol=1e-6)
    np.testing.assert_allclose(decision.confidence, decision.probabilities.max(axis=1), atol=1e-6)
    assert (decision.scores >= 0).all() or (outputs["metric"] > 0).any()
    assert all(np.isfinite(getattr(decision, column.name)).all() for column in fields(Decision))


def test_outputs_are_left_as_they_were() -> None:
    outputs = random_outputs(4)
    outputs["edge"][1, 2] = np.nan
    kept = {name: logits.copy() for name, logits in outputs.items()}
    decide(ensemble(RuleName.MIXED), outputs)
    for name, logits in outputs.items():
        np.testing.assert_array_equal(logits, kept[name])


# Detectors' scores


def entropy(p: NDArray[np.float64]) -> Any:
    return -np.sum(p * np.log(p), axis=-1)


def test_mutual_information_and_variance_have_their_published_forms() -> None:
    logits = random_outputs(50)["bayesian"]
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    log_mean, mutual_information, variance = reduce_masks(logits)
    np.testing.assert_allclose(log_mean, np.log(p.mean(axis=0)), atol=1e-5)
    np.testing.assert_allclose(mutual_information, entropy(p.mean(axis=0)) - entropy(p).mean(axis=0), atol=1e-6)
    feinman = np.square(p).sum(axis=-1).mean(axis=0) - np.square(p.mean(axis=0)).sum(axis=-1)
    np.testing.assert_allclose(variance, feinman, atol=1e-6)


def test_disagreement_runs_from_0_to_the_logarithm_of_the_number_of_voters() -> None:
    agreed = np.tile(np.log(P[0]), (1, 3, 1))
    opposed = np.where(np.eye(3) == 1, 0.0, -1e4)[None]
    np.testing.assert_allclose(divergence(agreed, 1), 0, atol=1e-12)
    np.testing.assert_allclose(divergence(opposed, 1), np.log(3), atol=1e-12)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-5])
def test_scores_of_votes_that_nearly_agree_are_not_rounding_errors(distance: float) -> None:
    """In float32; the difference of entropies is off by its own size from a distance of 1e-3 on."""
    logits = np.random.default_rng(0).normal(0, 1, (1, 200, K)) + distance * np.random.default_rng(1).normal(size=(T, 200, K))
    exact, got = reduce_masks(logits), reduce_masks(logits.astype(np.float32))
    np.testing.assert_allclose(got.mutual_information, exact.mutual_information, rtol=1e-3, atol=3e-7)
    np.testing.assert_allclose(got.variance, exact.variance, rtol=2e-3, atol=1e-9)
    assert (got.mutual_information >= 0).all()


def test_the_distance_is_to_the_center_of_the_ensembles_class() -> None:
    """Not to that of the class which the metric member itself would choose."""
    voters = tuple(Voter(name, 1.0, "robust", 1 / 3) for name in ("metric", "edge", "adversarial"))
    distance = ensemble(RuleName.MAJORITY, voters, (Detector(DetectorName.DISTANCE, "metric"),))
    others = np.array([[9, 0, 0, 0, 0]], np.float32)
    decision = decide(distance, {"metric": -np.array([[4, 3, 2, 1, 5]], np.float32), "edge": others, "adversarial": others})
    assert decision.label[0] == 0
    assert decision.scores[0, 0] == 4


def test_the_margin_is_the_runner_up_over_the_label() -> None:
    alone = ensemble(RuleName.SOFT, VOTERS[2:3], (Detector(DetectorName.MARGIN),))
    p = np.array([[0.6, 0.3, 0.1, 0, 0], [0.1, 0.2, 0.2, 0.45, 0.05], [0.4, 0.4, 0.2, 0, 0], [1, 0, 0, 0, 0]])
    found = decide(alone, votes_as_outputs(p[:, None], VOTERS[2:3])).scores[:, 0]
    np.testing.assert_allclose(found, [0.5, 0.2 / 0.45, 1, 0], rtol=1e-6)


# What is not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20, -3e38])
@pytest.mark.parametrize("member", [voter.name for voter in VOTERS])
def test_what_is_not_finite_is_rejected_and_leaves_its_batch_mates_alone(member: str, value: float) -> None:
    outputs, full = random_outputs(6), ensemble(RuleName.MIXED)
    before = decide(full, outputs)
    outputs[member][(5, 2, 1) if member == "bayesian" else (2, 1)] = value  # one mask sample is enough
    after = decide(full, outputs)
    assert after.finite.tolist() == [True, True, False, True, True, True]
    assert (after.verdict[2], after.reason[2]) == (Verdict.REJECTED, Reason.NON_FINITE)
    assert after.confidence[2] == 0
    assert after.p_value[2] == np.float32(1 / 200)
    np.testing.assert_allclose(after.probabilities[2].sum(), 1, atol=1e-6)
    for column in fields(Decision):
        assert np.isfinite(getattr(after, column.name)).all(), column.name
        expected, got = (np.delete(getattr(decision, column.name), 2, axis=0) for decision in (before, after))
        np.testing.assert_array_equal(got, expected, err_msg=column.name)


def test_a_member_that_only_feeds_a_detector_must_be_finite_too() -> None:
    outputs = random_outputs(2)
    outputs["bayesian"][0, 1, 0] = np.nan
    decision = decide(ensemble(RuleName.SOFT, VOTERS[:3], DETECTORS[:1]), outputs)
    assert decision.verdict.tolist()[1] == Verdict.REJECTED
    assert decision.finite.tolist() == [True, False]


def test_without_detectors_nothing_is_screened_but_what_is_not_finite() -> None:
    outputs = random_outputs(3)
    outputs["edge"][1, 0] = np.inf
    decision = decide(ensemble(RuleName.SOFT, detectors=()), outputs)
    assert decision.verdict.tolist() == [Verdict.UNSCREENED, Verdict.REJECTED, Verdict.UNSCREENED]
    assert decision.reason.tolist() == [Reason.NONE, Reason.NON_FINITE, Reason.NONE]
    assert decision.p_value.tolist() == [1, 1, 1]
    assert decision.scores.shape == decision.p_values.shape == (3, 0)


def test_logits_are_reduced_alike_alone_and_within_the_rule() -> None:
    outputs, full = random_outputs(4), ensemble(RuleName.LOG_POOL)
    votes = log_votes(full, {name: read(logits) for name, logits in outputs.items()})
    np.testing.assert_array_equal(np.exp(combine(full, votes)), decide(full, outputs).probabilities)
