"""When `benchmarks.gpu` calls the answers of two devices the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import TOLERANCE, Comparison, compared
from models.ensemble import Decision, Verdict
from service.config import DecisionConfig

RATES = DecisionConfig(review_rate=0.05, reject_rate=0.01)
LESS, MORE = TOLERANCE / 4, TOLERANCE * 4


def decision(probabilities: list[float], p_value: float = 0.5, verdict: Verdict = Verdict.CLEAN, **other: Any) -> Decision:
    """Of one image."""
    row, one = np.array([probabilities]), np.array([p_value])
    label = np.array([int(np.argmax(probabilities))])
    plain = Decision(
        probabilities=row,
        label=label,
        confidence=row.max(axis=1),
        votes=row[:, None],
        scores=np.array([[0.3]]),
        p_values=one[:, None],
        statistic=-np.log(one),
        p_value=one,
        verdict=np.array([int(verdict)]),
        reason=np.array([0]),
        finite=np.array([True]),
    )
    return replace(plain, **other)


SURE = decision([0.7, 0.2, 0.1])
TIED = decision([0.4 + LESS, 0.4, 0.2 - LESS])
FLIPPED = decision([0.4, 0.4 + LESS, 0.2 - LESS])
SUSPECT = decision([0.7, 0.2, 0.1], 0.05 - LESS, Verdict.SUSPECT)


@pytest.mark.parametrize(
    ("expected", "got", "moved", "ties"),
    [
        pytest.param(SURE, SURE, 0, 0, id="the same"),
        pytest.param(SURE, decision([0.2, 0.7, 0.1]), 1, 0, id="another label"),
        pytest.param(TIED, FLIPPED, 0, 1, id="another label, of two that tie"),
        pytest.param(TIED, decision([0.4 - MORE, 0.4 + MORE, 0.2]), 1, 0, id="a tie to the one and not to the other"),
        pytest.param(TIED, replace(FLIPPED, scores=np.array([[9.0]])), 0, 1, id="a tie, with what hangs on the label"),
        pytest.param(
            TIED, decision([0.4, 0.4 + LESS, 0.2 - LESS], 0.03, Verdict.SUSPECT), 0, 1, id="a tie, and the other label's verdict"
        ),
        pytest.param(
            decision([0.7, 0.2, 0.1], 0.05 + LESS),
            SUSPECT,
            0,
            1,
            id="another verdict, at the review rate",
        ),
        pytest.param(decision([0.7, 0.2, 0.1], 0.05 + MORE), SUSPECT, 1, 0, id="another verdict, from beyond it"),
        pytest.param(
            decision([0.7, 0.2, 0.1], 0.05 + LESS),
            decision([0.7, 0.2, 0.1], 0.01 - LESS, Verdict.REJECTED),
            1,
            0,
            id="at one rate each, and not at the same",
        ),
        pytest.param(
            decision([0.7, 0.2, 0.1], 0.01 + LESS, Verdict.SUSPECT),
            decision([0.7, 0.2, 0.1], 0.01 - LESS, Verdict.REJECTED, finite=np.array([False])),
            1,
            0,
            id="rejected for what is not finite",
        ),
    ],
)
def test_a_flip_is_excused_where_it_is_a_matter_of_less_than_the_tolerance(
    expected: Decision, got: Decision, moved: int, ties: int
) -> None:
    found = compared(got, expected, RATES)
    assert (found.moved, found.ties) == (moved, ties)
    if moved == 0:
        assert found.same


@pytest.mark.parametrize("column", ["probabilities", "confidence", "votes", "scores", "p_values", "p_value"])
@pytest.mark.parametrize("difference", [MORE, np.nan])
def test_numbers_further_apart_than_the_tolerance_are_told(column: str, difference: float) -> None:
    off = replace(SURE, **{column: getattr(SURE, column) + difference})
    assert not compared(off, SURE, RATES).same


def test_a_tie_does_not_excuse_other_probabilities() -> None:
    assert not compared(replace(FLIPPED, votes=FLIPPED.votes + MORE), TIED, RATES).same


def test_ties_are_told_apart() -> None:
    assert (
        str(Comparison(moved=0, ties=2, difference=3e-5))
        == "0 labels or verdicts differ, 2 more at a tie, numbers by 3.0e-05: same"
    )
    assert "DIFFERENT" in str(Comparison(moved=1, ties=0, difference=0.0))
