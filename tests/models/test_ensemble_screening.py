"""p-values and verdicts: closed forms, ties, and the one thing that split conformal prediction promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.composition import calibrate
from models.ensemble import (
    QUANTUM,
    Detector,
    DetectorName,
    Ensemble,
    Reason,
    RuleName,
    Screening,
    Verdict,
    at_least,
    decide,
    p_value,
    rankable,
    resolved,
    screen,
    surprise,
)
from models.outputs import CalibrationOutputs, MemberOutputs
from tests.models.ensembles import DETECTORS, VOTERS, ensemble, random_outputs

Scores = NDArray[np.float32]


def calibrated(calibration: Scores, review_rate: float = 0.05, reject_rate: float = 0.01) -> Ensemble:
    """An ensemble of D detectors whose scores on n calibration images are calibration (n, D)."""
    n, d = calibration.shape
    detectors = tuple(Detector(DetectorName.VARIANCE, f"member{i}") for i in range(d))
    bare = Ensemble("test", 2, VOTERS[:1], RuleName.SOFT, 1.0, 1.0, detectors, review_rate, reject_rate)
    flat, zero = np.full((n, 2), np.log(0.5), np.float16), np.zeros(n, np.float32)
    members = {f"member{i}": MemberOutputs(flat, zero, zero, calibration[:, i]) for i in range(d)}
    return calibrate(bare, CalibrationOutputs({"metric": MemberOutputs(flat, zero), **members}, np.zeros(n, np.int16)))


def screened(under_test: Ensemble, scores: Scores) -> Screening:
    """scores: (N, D)"""
    return screen(under_test, list(scores.T), np.ones(len(scores), np.bool_))


def column(*values: float) -> Scores:
    return np.array(values, np.float32)[:, None]


def test_a_p_value_counts_calibration_scores_that_are_at_least_as_high() -> None:
    screening = screened(calibrated(column(1, 2, 2, 3)), column(0, 1, 2, 2.5, 3, 4))
    np.testing.assert_allclose(screening.p_values[0], np.array([5, 5, 4, 2, 2, 1]) / 5, rtol=1e-6)


def test_the_combined_p_value_of_one_detector_is_its_own() -> None:
    calibration = np.random.default_rng(0).normal(5, 1, (300, 1)).astype(np.float32)
    scores = np.random.default_rng(1).normal(5, 1.5, (300, 1)).astype(np.float32)
    screening = screened(calibrated(calibration), np.concatenate([scores, calibration]))
    np.testing.assert_array_equal(screening.p_value, screening.p_values[0])


def test_the_statistic_is_the_sum_of_minus_log_p() -> None:
    screening = screened(calibrated(np.random.default_rng(0).gamma(2, 1, (99, 3)).astype(np.float32)), np.eye(3, dtype=np.float32))
    np.testing.assert_allclose(screening.statistic, -np.log(screening.p_values).sum(axis=0), atol=3 * QUANTUM)


@pytest.mark.parametrize(
    "score, verdict, reason",
    [
        pytest.param(14.5, Verdict.CLEAN, Reason.NONE, id="p = 6/100 is clean"),
        pytest.param(15.5, Verdict.SUSPECT, Reason.LOW_P_VALUE, id="p = 5/100 is at the review rate: suspect"),
        pytest.param(18.5, Verdict.SUSPECT, Reason.LOW_P_VALUE, id="p = 2/100 is suspect"),
        pytest.param(19.5, Verdict.REJECTED, Reason.LOW_P_VALUE, id="p = 1/100 is at the reject rate: rejected"),
    ],
)
def test_a_rate_is_reached_by_a_p_value_equal_to_it(score: float, verdict: Verdict, reason: Reason) -> None:
    calibration = column(*np.arange(-79, 20) + 0.25)
    screening = screened(calibrated(calibration), column(score))
    assert (screening.verdict[0], screening.reason[0]) == (verdict, reason)


@pytest.mark.parametrize(
    "rate, n, expected",
    [(0.01, 99, 1), (0.05, 99, 5), (0.01, 98, 0), (0.29, 99, 29), (0.57, 99, 57), (0.01, 4050, 40), (1.0, 10, 11)],
)
def test_a_rate_resolves_into_a_number_of_ranks(rate: float, n: int, expected: int) -> None:
    assert resolved(rate, n) == expected


def test_scores_that_are_rounding_errors_rank_as_equal() -> None:
    screening = screened(calibrated(column(0, 1e-8, 3e-7, 1)), column(0, 2e-8, 9e-7))
    np.testing.assert_allclose(screening.p_values[0], 1)


def test_equal_p_values_tie_in_whatever_order_their_surprises_are_added() -> None:
    surprises = surprise(np.random.default_rng(0).integers(1, 10_001, (16, 1000)) / 10_001)
    np.testing.assert_array_equal(np.cumsum(surprises, axis=0)[-1], np.cumsum(surprises[::-1], axis=0)[-1])


def test_what_is_not_finite_has_the_lowest_p_value_there_is() -> None:
    under_test = calibrated(np.random.default_rng(0).gamma(2, 1, (99, 3)).astype(np.float32))
    screening = screen(under_test, [np.zeros(2, np.float32)] * 3, np.array([True, False]))
    assert screening.p_value.tolist() == [1, np.float32(0.01)]
    assert [p.tolist() for p in screening.p_values] == [[1, np.float32(0.01)]] * 3


# Super-uniformity


@given(scores=st.lists(st.integers(0, 12), min_size=2, max_size=40))
def test_of_exchangeable_scores_no_more_than_a_share_r_gets_a_p_value_of_at_most_r(scores: list[int]) -> None:
    """Any one of n + 1 scores may be the new one: over that choice P(p <= r) <= r for every r, ties or not."""
    p = []
    for new in range(len(scores)):
        table = np.sort(rankable(np.delete(np.array(scores, np.float32), new)))
        p.append(float(p_value(at_least(table, rankable(column(scores[new])[:, 0])), len(table))[0]))
    for rate in np.arange(1, len(scores) + 1) / len(scores):
        assert np.mean(np.array(p) <= rate + 1e-6) <= rate + 1e-6


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("n", [19, 99])
def test_the_combined_p_value_is_super_uniform(n: int, correlation: float, d: int) -> None:
    """500 calibration sets, 20 new images each; within three standard errors.

    Were calibration images counted among those that their own p-values compare them with, (1 + rank) / (n + 1), a rate
    of 5% would reject 10% for n = 19.
    """
    rng = np.random.default_rng(n + d)
    p = []
    for _ in range(500):
        common, own = rng.normal(size=(n + 20, 1)), rng.normal(size=(n + 20, d))
        scores = np.exp(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own).astype(np.float32)
        p.append(screened(calibrated(scores[:n]), scores[n:]).p_value)
    rejected = np.array(p)  # (500, 20): the images that share a calibration set are not independent
    for rate in (0.05, 0.1, 0.2, 0.5):
        share = (rejected <= rate + 1e-6).mean(axis=1)
        assert share.mean() <= rate + 3 * share.std() / np.sqrt(500)
        assert share.mean() >= rate - 2 / (n + 1) - 3 * share.std() / np.sqrt(500)  # nor is it idle


@pytest.mark.parametrize("rule", RuleName)
def test_the_clean_false_positive_rate_is_the_one_that_was_asked_for(rule: RuleName) -> None:
    under_test = replace(ensemble(rule, VOTERS, DETECTORS, 999), review_rate=0.05, reject_rate=0.01)
    verdict = decide(under_test, random_outputs(4000, seed=7)).verdict
    assert np.mean(verdict >= Verdict.SUSPECT) == pytest.approx(0.05, abs=0.025)
    assert np.mean(verdict == Verdict.REJECTED) == pytest.approx(0.01, abs=0.011)
