"""From what a campaign kept to outcomes: per image the worst case over everything that was tried on it.

An image is robust if its clean version and every perturbed one get the right class.  With rejection at a rate r, the
clean version must be right and accepted (p > r), and no perturbed one wrong and accepted: an attack that is only
rejected has not won, and a clean image that is rejected has not been answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from models.card import Share
from models.ensemble import Ensemble, decide
from training.evaluation.campaign import FLOAT, ROUNDED, Campaign, Outputs, Unit
from training.evaluation.suites import Access
from training.system import label_of

Bools = NDArray[np.bool_]
REVIEW, REJECT = 0.05, 0.01  # the clean rejection rates that figures are given at


class Outcome(IntEnum):
    """Of one version of one image; higher is worse."""

    CORRECT = 0  # and accepted
    REJECTED = 1
    WRONG = 2  # and accepted


@dataclass(frozen=True)
class Row:
    """Which attack, made against which system, in which version of its pixels."""

    against: str
    entry: str
    version: str
    access: Access
    counts: bool


@dataclass(frozen=True, eq=False)
class Ledger:
    """Everything one system answered: on n clean images, and on a attacked versions of them.

    labels (n,); clean_label, clean_p (n,); label, p (a, n), meaningful where `tried` (a, n).
    """

    labels: NDArray[np.int64]
    clean_label: NDArray[np.int64]
    clean_p: NDArray[np.float32]
    rows: Sequence[Row]
    label: NDArray[np.int64]
    p: NDArray[np.float32]
    tried: Bools

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: Callable[[Row], bool]) -> Ledger:
        """The ledger of some of the rows."""
        kept = [i for i, row in enumerate(self.rows) if keep(row)]
        return Ledger(
            self.labels,
            self.clean_label,
            self.clean_p,
            [self.rows[i] for i in kept],
            self.label[kept],
            self.p[kept],
            self.tried[kept],
        )

    def first(self, n: int) -> Ledger:
        """The ledger of the first n images."""
        return Ledger(
            self.labels[:n], self.clean_label[:n], self.clean_p[:n], self.rows, self.label[:, :n], self.p[:, :n], self.tried[:, :n]
        )

    @property
    def right(self) -> Bools:
        """Whether the clean image is classified rightly; (n,)."""
        return np.asarray(self.clean_label == self.labels)

    @property
    def robust(self) -> Bools:
        """Right on the clean image, and on every version tried; (n,)."""
        return np.asarray(self.right & ~((self.label != self.labels) & self.tried).any(axis=0))

    def robust_at(self, rate: float) -> Bools:
        """Right and accepted on the clean image, and no version tried is wrong and accepted; (n,)."""
        return np.asarray(self.right & (self.clean_p > rate) & ~self.wrong_and_accepted(rate))

    def wrong_and_accepted(self, rate: float) -> Bools:
        """Some version tried is; (n,)."""
        return np.asarray(((self.label != self.labels) & (self.p > rate) & self.tried).any(axis=0))

    def outcomes(self, rate: float) -> NDArray[np.int64]:
        """The worst Outcome of every image over its clean version and all that was tried; (n,)."""
        label = np.concatenate([self.clean_label[None], np.where(self.tried, self.label, self.clean_label)])
        p = np.concatenate([self.clean_p[None], np.where(self.tried, self.p, self.clean_p)])
        each = np.where(p <= rate, Outcome.REJECTED, np.where(label == self.labels, Outcome.CORRECT, Outcome.WRONG))
        return np.asarray(each.max(axis=0))

    def robust_error(self, tau: float) -> float:
        """RErr(tau) of Stutz et al. 2020, eq. 5: wrong among the accepted, clean and attacked alike, accepted meaning p >= tau."""
        clean_accepted = self.clean_p >= tau
        attacked = ((self.label != self.labels) & (self.p >= tau) & self.tried).any(axis=0)
        wrong, counted = (~self.right & clean_accepted) | attacked, clean_accepted | attacked
        return float(wrong.sum() / counted.sum()) if counted.any() else 0.0


def ledger(campaign: Campaign, ensemble: Ensemble, units: Sequence[Unit]) -> Ledger:
    """What a system answers to every unit, whoever it was made against."""
    n = len(campaign.images)
    outputs, labels = campaign.clean("test")
    clean = {name: output[..., campaign.index, :] for name, output in outputs.items()}
    clean_label, clean_p = answer(ensemble, clean)
    rows: dict[Row, int] = {}
    for unit in units:
        for version in (FLOAT, ROUNDED):
            rows.setdefault(_row(unit, version), len(rows))
    label, p, tried = np.zeros((len(rows), n), np.int64), np.ones((len(rows), n), np.float32), np.zeros((len(rows), n), np.bool_)
    for unit in units:
        found = campaign.found(unit)
        for version in (FLOAT, ROUNDED):
            place = (rows[_row(unit, version)], slice(found.start, found.stop))
            label[place], p[place] = answer(ensemble, found.outputs[version])
            tried[place] = True
    return Ledger(labels[campaign.index], clean_label, clean_p, list(rows), label, p, tried)


def answer(ensemble: Ensemble, outputs: Outputs) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Label, NO_CLASS for none, and combined p-value (n,) of the deployed rule."""
    decision = decide(ensemble, outputs)
    return np.asarray(label_of(decision)), np.asarray(decision.p_value)


def share(hits: Bools) -> Share:
    """A share of n images with its 95% Wilson interval (1927)."""
    n, z = len(hits), 1.959964
    p = float(hits.mean())
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(value=p, low=max(0.0, (centre - half) / (1 + z * z / n)), high=min(1.0, (centre + half) / (1 + z * z / n)), n=n)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test: a fair coin, thrown won + lost times (McNemar 1947)."""
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    return float(min(1.0, 2 * tail))


def _row(unit: Unit, version: str) -> Row:
    entry = unit.entry
    return Row(unit.subject.name, entry.name, version, entry.access, entry.counts and not unit.subject.control)
