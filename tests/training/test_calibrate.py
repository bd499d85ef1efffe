"""The fit on hand-made answers: who is strong, who is weak, and who misleads is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from models.ensemble import Ensemble, Reading, RuleName, combine, log_votes
from models.manifest import Strength
from training.calibrate import Pool, as_ensemble, candidates, fit_subset, fit_temperature, worst_case
from training.recipe import CalibrationRecipe

N, K = 400, 5
LABELS = np.arange(N) % K
ONES = dict.fromkeys(("a", "b", "natural"), 1.0)
STRENGTHS: dict[str, Strength] = {"a": "robust", "b": "robust", "natural": "accurate"}
SETTINGS = CalibrationRecipe(robust_slack=0.0)


def answers(right: float, confidence: float = 3.0, seed: int = 0) -> NDArray[np.float32]:
    """Logits (n, k) that are right on a random share `right` of images, with a margin of `confidence`."""
    rng = np.random.default_rng(seed)
    wrong = (LABELS + rng.integers(1, K, N)) % K
    chosen = np.where(rng.random(N) < right, LABELS, wrong)
    return (np.eye(K)[chosen] * confidence + rng.normal(0, 0.1, (N, K))).astype(np.float32)


def pool(clean: dict[str, NDArray[np.float32]], **attacked: dict[str, NDArray[np.float32]]) -> Pool:
    return Pool(LABELS, clean, attacked, clean, LABELS)


def test_a_voter_that_attacks_break_gets_no_weight() -> None:
    clean = {"a": answers(0.9, confidence=0.8), "b": answers(0.95, confidence=9, seed=1)}
    broken = {"a": answers(0.8, confidence=0.8, seed=2), "b": answers(0.0, confidence=9, seed=3)}
    row = fit_subset(("a", "b"), STRENGTHS, ONES, pool(clean, broken=broken), SETTINGS.model_copy(update={"clean_tolerance": 1.0}))
    assert row.weights == {"a": 1.0, "b": 0.0}
    assert row.robust == ((clean["a"].argmax(1) == LABELS) & (broken["a"].argmax(1) == LABELS)).mean()


def test_voters_that_fail_apart_share_the_weight() -> None:
    clean = {"a": answers(1.0), "b": answers(1.0, seed=1)}
    one = {"a": answers(0.3, confidence=1.0, seed=2), "b": answers(1.0, seed=3)}
    other = {"a": answers(1.0, seed=4), "b": answers(0.3, confidence=1.0, seed=5)}
    row = fit_subset(("a", "b"), STRENGTHS, ONES, pool(clean, one=one, other=other), SETTINGS)
    assert 0 < row.weights["a"] < 1
    assert row.robust > 0.95


def test_clean_accuracy_does_not_fall_below_that_of_the_most_robust_member() -> None:
    clean = {"a": answers(0.9), "b": answers(0.5, seed=1)}
    attacked = {"a": answers(0.6, seed=2), "b": answers(0.4, seed=1)}
    row = fit_subset(("a", "b"), STRENGTHS, ONES, pool(clean, attack=attacked), SETTINGS)
    assert row.clean >= (clean["a"].argmax(1) == LABELS).mean()


def test_a_natural_network_gets_no_weight_beside_a_robust_one() -> None:
    rows = list(candidates(("a", "b", "natural"), STRENGTHS))
    assert all(row.weights["natural"] == 0.0 for row in rows)
    assert {row.rule for row in rows} == {RuleName.WEIGHTED, RuleName.LOG_POOL, RuleName.MIXED}
    assert all(0.5 <= row.alpha <= 1 for row in rows)
    alone = list(candidates(("natural",), STRENGTHS))
    assert [row.weights for row in alone] == [{"natural": 1.0}]


def test_every_weighting_sums_to_one() -> None:
    for row in candidates(("a", "b"), STRENGTHS):
        assert sum(row.weights.values()) == pytest.approx(1)


def test_the_worst_case_counts_an_image_only_if_every_version_is_right() -> None:
    right = (np.eye(K)[LABELS] * 3).astype(np.float32)
    first, second = right.copy(), right.copy()
    first[:100] = np.roll(first[:100], 1, axis=1)
    second[50:150] = np.roll(second[50:150], 1, axis=1)
    row = next(candidates(("a",), STRENGTHS))
    attacked = {"one": {"a": first}, "two": {"a": second}}
    assert (
        worst_case(as_ensemble(row, STRENGTHS, ONES, K), Pool(LABELS, {"a": right}, attacked, {"a": right}, LABELS)) == 1 - 150 / N
    )


def mixture(alpha: float, scale: float = 1.0) -> Ensemble:
    row = next(row for row in candidates(("a", "natural"), STRENGTHS) if row.rule == RuleName.MIXED)
    return as_ensemble(row.model_copy(update={"alpha": alpha, "scale": scale}), STRENGTHS, ONES, K)


def test_under_attack_an_accurate_voter_is_expected_to_say_what_the_attacker_likes() -> None:
    """It is right in this attack and outvotes an unsure robust side; a better attack would turn it."""
    right, unsure = (np.eye(K)[LABELS] * 6).astype(np.float32), (np.eye(K)[LABELS] * 0.5).astype(np.float32)
    readings = {"a": Reading(unsure), "natural": Reading(right)}
    assert (combine(mixture(0.5), log_votes(mixture(0.5), readings)).argmax(axis=1) == LABELS).all()

    def left(ensemble: Ensemble, robust_side: NDArray[np.float32]) -> float:
        clean = {"a": right, "natural": right}
        return worst_case(ensemble, pool(clean, attack={"a": robust_side, "natural": right}))

    shares = np.log(np.array([0.55, 0.01, 0.02, 0.40, 0.02], np.float32))  # of the label first
    torn = np.stack([np.roll(shares, label) for label in LABELS])
    assert left(mixture(0.5), unsure) == 0.0
    assert left(mixture(0.8), torn) == 0.0  # .8 x .40 + .2 > .8 x .55, of the one class that can win
    assert left(mixture(0.5, scale=4.0), 9 * right) == 0.0  # tied
    assert left(mixture(0.95), right) == 1.0


@pytest.mark.parametrize("truth", [0.2, 1.0, 4.0])
def test_the_temperature_that_generated_the_labels_is_found(truth: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (40_000, K)).astype(np.float32)
    p = np.exp(logits / truth)
    p /= p.sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) > rng.random((len(p), 1))).argmax(axis=1)
    assert fit_temperature(logits, labels) == pytest.approx(truth, rel=0.05)
