"""Joint scoring on outcomes made by hand, and the statistics on them against known figures."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.card import bootstrap, shapley
from training.evaluation.scores import Ledger, Outcome, Row, mcnemar, share

ROWS = [Row("full", "a", "float", "gradient", True), Row("metric", "b", "uint8", "scores", True)]


@pytest.fixture
def ledger() -> Ledger:
    """Six images of class 0: unharmed; wrong when clean; rejected when clean; fooled and accepted; fooled but rejected;
    fooled by an attack that was never tried on it."""
    return Ledger(
        labels=np.zeros(6, np.int64),
        clean_label=np.array([0, 1, 0, 0, 0, 0]),
        clean_p=np.array([0.5, 0.5, 0.03, 0.5, 0.5, 0.5], np.float32),
        rows=ROWS,
        label=np.array([[0, 0, 0, 2, 2, 0], [0, 0, 0, 0, 0, 2]]),
        p=np.array([[0.5, 0.5, 0.5, 0.5, 0.02, 0.5], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]], np.float32),
        tried=np.array([[True] * 6, [True] * 5 + [False]]),
    )


def test_an_image_is_robust_if_no_tried_version_of_it_gets_another_class(ledger: Ledger) -> None:
    assert ledger.right.tolist() == [True, False, True, True, True, True]
    assert ledger.robust.tolist() == [True, False, True, False, False, True]


def test_with_rejection_a_rejected_attack_has_not_won_and_a_rejected_clean_image_is_not_answered(ledger: Ledger) -> None:
    assert ledger.robust_at(0.05).tolist() == [True, False, False, False, True, True]
    assert ledger.robust_at(0.01).tolist() == [True, False, True, False, False, True]


def test_the_worst_outcome_of_an_image_is_wrong_and_accepted_then_rejected(ledger: Ledger) -> None:
    expected = [Outcome.CORRECT, Outcome.WRONG, Outcome.REJECTED, Outcome.WRONG, Outcome.REJECTED, Outcome.CORRECT]
    assert ledger.outcomes(0.05).tolist() == expected


def test_a_part_of_the_ledger_knows_only_its_own_attacks(ledger: Ledger) -> None:
    assert ledger.where(lambda row: row.against == "metric").robust.tolist() == [True, False, True, True, True, True]
    assert ledger.first(4).robust.tolist() == [True, False, True, False]
    assert ledger.where(lambda _: False).robust.tolist() == ledger.right.tolist()


def test_robust_error_counts_the_wrong_among_the_accepted(ledger: Ledger) -> None:
    # At tau = 0.1: image 1 is wrong, image 3 is made wrong; image 2 is rejected and made wrong by nothing, so it is left out.
    assert ledger.robust_error(0.1) == pytest.approx(2 / 5)
    # At tau = 0.01 all are accepted, and image 4 is made wrong, too.
    assert ledger.robust_error(0.01) == pytest.approx(3 / 6)


def test_a_share_has_the_wilson_interval() -> None:
    """Of 10 in 100: Newcombe 1998, table I gives 0.0552 to 0.1744."""
    hits = np.arange(100) < 10
    found = share(hits)
    assert (found.value, found.n) == (0.1, 100)
    assert found.low == pytest.approx(0.0552, abs=1e-4)
    assert found.high == pytest.approx(0.1744, abs=1e-4)


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        pytest.param(0, 0, 1.0, id="nothing differs"),
        pytest.param(5, 5, 1.0, id="an even split"),
        pytest.param(0, 6, 2 / 64, id="six to none"),
        pytest.param(1, 7, 2 * 9 / 256, id="seven to one"),
    ],
)
def test_mcnemar_is_a_fair_coin(won: int, lost: int, p: float) -> None:
    assert mcnemar(won, lost) == pytest.approx(p)


def test_shapley_values_share_out_the_whole_and_give_a_dummy_nothing() -> None:
    """v = right if a is there, or b and c are; d changes nothing."""
    players = ("a", "b", "c", "d")
    subsets = [tuple(p for i, p in enumerate(players) if bits >> i & 1) for bits in range(1, 16)]
    value = {s: np.array(["a" in s or {"b", "c"} <= set(s)] * 3) for s in subsets}
    found = {player: shapley(player, players, value) for player in players}
    assert found["d"].tolist() == [0.0] * 3
    assert np.allclose(found["b"], found["c"])
    assert np.allclose(sum(found.values()), 1.0)
    assert np.allclose(found["a"], 2 / 3)


def test_the_bootstrap_of_what_never_varies_is_exact() -> None:
    found = bootstrap(np.full(50, 0.25))
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)
