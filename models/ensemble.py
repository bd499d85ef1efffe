"""THE rule: from member outputs to votes, detector scores, p-values and a decision, written once against the Array API.

NumPy runs it in calibration and tests, torch inside the adaptive attack, and ndonnx turns it into nodes of the fused
graph: what is attacked is what is deployed.  Probabilities travel as their logarithms, so that a gradient survives
where one is 0; models/log_probability.py holds the arithmetic, and says what must not be used for the sake of ONNX.

Shapes: N images, M voters, K classes, D detectors, T masks, n calibration images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cached_property, reduce
from operator import and_
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import array_namespace, device, is_ndonnx_array
from numpy.typing import NDArray

from models.log_probability import (
    NEVER,
    average,
    divergence,
    first_largest,
    largest,
    log_average,
    log_softmax,
    pool,
    shares,
)

Array: TypeAlias = Any  # of NumPy, torch or ndonnx
Floats: TypeAlias = NDArray[np.float32]

OVERFLOW = 1e20  # an output this large counts as not finite: arithmetic on it could end in infinity
RESOLUTION = 1e-6  # scores below this are rounding errors of float32, and rank as equal
QUANTUM = 2.0**-16  # of -log p, see `surprise`


class RuleName(StrEnum):
    SOFT = "soft"
    WEIGHTED = "weighted"
    MAJORITY = "majority"
    MEDIAN = "median"
    LOG_POOL = "log-pool"
    MIXED = "mixed"


class DetectorName(StrEnum):
    MUTUAL_INFORMATION = "mutual_information"
    VARIANCE = "variance"
    DISAGREEMENT = "disagreement"
    DISTANCE = "distance"
    MARGIN = "margin"


class Verdict(IntEnum):
    CLEAN = 0
    SUSPECT = 1
    REJECTED = 2
    UNSCREENED = 3


class Reason(IntEnum):
    NONE = 0
    LOW_P_VALUE = 1
    NON_FINITE = 2


@dataclass(frozen=True)
class Voter:
    """A classifier's part in the rule.  Weights matter to weighted, log-pool and mixed; the other rules ignore them."""

    name: str
    temperature: float
    strength: Literal["accurate", "robust"]
    weight: float


@dataclass(frozen=True)
class Detector:
    name: DetectorName
    member: str | None = None  # None for disagreement and margin, which all voters feed
    decides: bool = True  # whether the verdict hangs on it; otherwise its p-value is told, and no more


@dataclass(frozen=True, eq=False)
class Ensemble:
    """All that the rule needs, resolved to numbers; models/composition.py makes it from a bundle and a choice."""

    name: str
    classes: int
    voters: tuple[Voter, ...]
    rule: RuleName
    alpha: float
    scale: float
    detectors: tuple[Detector, ...]
    review_rate: float
    reject_rate: float
    masks: Literal["fixed", "fresh"] = "fixed"
    tables: tuple[Floats, ...] = ()  # per detector its scores on the calibration images (n,), ascending
    combined: Floats = field(default_factory=lambda: np.zeros(0, np.float32))  # the statistic on them (n,), ascending

    @property
    def members(self) -> tuple[str, ...]:
        """The members present: those that vote and those that a detector listens to."""
        names = [voter.name for voter in self.voters] + [detector.member for detector in self.detectors]
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @cached_property
    def surprises(self) -> Floats:
        """-log p of every p-value there is, (1 + c) / (n + 1) for c = 0..n; (n + 1,)."""
        n = len(self.combined)
        return surprise(np.arange(1, n + 2) / (n + 1))


class Reading(NamedTuple):
    """What one member says."""

    logits: Array  # (N, K); of a stochastic member the log of its mean probability
    mutual_information: Array = None  # (N,), of a stochastic member
    variance: Array = None  # (N,), of a stochastic member


class Screening(NamedTuple):
    """What the detectors say."""

    p_values: Sequence[Array]  # D of (N,)
    statistic: Array  # (N,)
    p_value: Array  # (N,)
    verdict: Array  # (N,)
    reason: Array  # (N,)


@dataclass(frozen=True, eq=False)
class Decision:
    probabilities: Array  # (N, K) float32
    label: Array  # (N,) int64, the most probable class
    confidence: Array  # (N,) float32, its probability; 0 where not finite
    votes: Array  # (N, M, K) float32, every voter's own probabilities
    scores: Array  # (N, D) float32, higher is more suspicious
    p_values: Array  # (N, D) float32
    statistic: Array  # (N,) float32, -sum log p over the detectors that decide
    p_value: Array  # (N,) float32, of the statistic; 1 without detectors
    verdict: Array  # (N,) int64, a Verdict
    reason: Array  # (N,) int64, a Reason
    finite: Array  # (N,) bool, whether every output of every member is


def decide(ensemble: Ensemble, outputs: Mapping[str, Array]) -> Decision:
    """The whole rule.  outputs: for each member present its logits, (N, K), or (T, N, K) of a stochastic one."""
    present = {name: outputs[name] for name in ensemble.members}
    xp = array_namespace(*present.values())
    finite = reduce(and_, map(is_finite, present.values()))
    readings = {name: read(logits) for name, logits in present.items()}
    votes = log_votes(ensemble, readings)
    combined = combine(ensemble, votes)
    probabilities = xp.exp(combined)
    label = first_largest(probabilities)
    found = scores(ensemble, readings, votes, combined)
    screening = screen(ensemble, found, finite)
    return Decision(
        probabilities=probabilities,
        label=label,
        confidence=xp.where(finite, xp.squeeze(largest(probabilities, -1), axis=-1), 0.0),
        votes=xp.exp(votes),
        scores=_side_by_side(found, probabilities),
        p_values=_side_by_side(screening.p_values, probabilities),
        statistic=screening.statistic,
        p_value=screening.p_value,
        verdict=screening.verdict,
        reason=screening.reason,
        finite=finite,
    )


def _side_by_side(columns: Sequence[Array], like: Array) -> Array:
    """D of (N,) -> (N, D), D = 0 included; like: (N, K)."""
    return array_namespace(like).stack(columns, axis=1) if columns else like[:, :0]


# Members' outputs


def is_finite(logits: Array) -> Array:
    """Whether every output for an image is, over all masks; (N, K) or (T, N, K) -> bool (N,)."""
    xp = array_namespace(logits)
    wrong = xp.astype(~(xp.abs(logits) < OVERFLOW), xp.float32)  # so written, a NaN is wrong too
    return xp.sum(wrong, axis=(0, 2) if logits.ndim == 3 else 1) == 0


def read(logits: Array) -> Reading:
    """Logits (N, K) or (T, N, K); 0 for what is not finite, so that it spoils no batch-mate and no gradient."""
    xp = array_namespace(logits)
    clean = xp.where(xp.abs(logits) < OVERFLOW, logits, 0.0)
    return reduce_masks(clean) if clean.ndim == 3 else Reading(clean)


def reduce_masks(logits: Array) -> Reading:
    """Logits (T, N, K) reduced over masks.

    Mutual information H(mean_t p_t) - mean_t H(p_t) (Smith & Gal 2018) is the samples' divergence, and Feinman's (2017)
    mean_t |p_t|^2 - |mean_t p_t|^2 is mean_t |p_t - mean_t p_t|^2: so written, neither cancels where the samples agree.
    """
    xp = array_namespace(logits)
    log_p = log_softmax(logits)
    log_mean = log_average(log_p, 0)
    variance = average(xp.sum((xp.exp(log_p) - xp.exp(log_mean)) ** 2, axis=-1), 0)
    return Reading(xp.squeeze(log_mean, axis=0), divergence(log_p, 0), variance)


def log_votes(ensemble: Ensemble, readings: Mapping[str, Reading]) -> Array:
    """log softmax(logits / temperature) of every voter; (N, M, K)."""
    tempered = [readings[voter.name].logits / voter.temperature for voter in ensemble.voters]
    return log_softmax(array_namespace(*tempered).stack(tempered, axis=1))


# The six rules: the voters' log probabilities (N, M, K) -> the ensemble's (N, K)


def combine(ensemble: Ensemble, votes: Array) -> Array:
    weights = [voter.weight for voter in ensemble.voters]
    match ensemble.rule:
        case RuleName.SOFT:
            return soft(votes)
        case RuleName.WEIGHTED:
            return pool(votes, weights)
        case RuleName.MAJORITY:
            return majority(votes)
        case RuleName.MEDIAN:
            return median(votes)
        case RuleName.LOG_POOL:
            return log_pool(votes, weights)
        case RuleName.MIXED:
            return mixed(ensemble, votes)


def soft(votes: Array) -> Array:
    """mean_m p_m."""
    return array_namespace(votes).squeeze(log_average(votes, 1), axis=1)


def majority(votes: Array) -> Array:
    """(ballots_k + soft_k) / (M + 1): each voter's first choice gets a ballot; the soft vote splits one, for ties."""
    xp = array_namespace(votes)
    classes = xp.arange(0, votes.shape[-1], device=device(votes))
    passed_over = classes != xp.expand_dims(first_largest(xp.exp(votes)), axis=-1)
    ballots = xp.astype(passed_over, votes.dtype) * NEVER
    return soft(xp.concat([ballots, xp.expand_dims(soft(votes), axis=1)], axis=1))


def median(votes: Array) -> Array:
    """The median over voters for each class (the mean of the middle two where M is even), renormalised."""
    xp = array_namespace(votes)
    _, m, k = votes.shape
    ascending = xp.reshape(xp.sort(votes, axis=1), (-1, m, k))  # ndonnx's sort forgets the shape
    return log_softmax(soft(ascending[:, (m - 1) // 2 : m // 2 + 1, :]))


def log_pool(votes: Array, weights: Sequence[float]) -> Array:
    """prod_m p_m^w_m, renormalised."""
    xp = array_namespace(votes)
    w = xp.asarray(np.array(shares(weights))[:, None], dtype=votes.dtype, device=device(votes))
    return log_softmax(xp.sum(w * votes, axis=1))


def mixed(ensemble: Ensemble, votes: Array) -> Array:
    """(1 - alpha) p_accurate + alpha softmax(s log p_robust) (MixedNUTS, Bai et al. 2024).

    p_accurate is the mean of the accurate voters, p_robust the weighted mean of the robust ones.  Without one of the
    sides it is the weighted vote of the other.
    """
    accurate = [voter.strength == "accurate" for voter in ensemble.voters]
    weights = [voter.weight for voter in ensemble.voters]
    if all(accurate) or not any(accurate):
        return pool(votes, weights)
    robust = [0 if a else w for a, w in zip(accurate, weights, strict=True)]
    p_robust = pool(votes, robust if any(robust) else [not a for a in accurate])
    sides = [pool(votes, accurate), log_softmax(ensemble.scale * p_robust)]
    return pool(array_namespace(votes).stack(sides, axis=1), [1 - ensemble.alpha, ensemble.alpha])


# Detection


def scores(ensemble: Ensemble, readings: Mapping[str, Reading], votes: Array, combined: Array) -> list[Array]:
    """Every detector's score, D of (N,), higher is more suspicious.  combined (N, K): the ensemble's log-probabilities."""
    label = array_namespace(combined).expand_dims(first_largest(array_namespace(combined).exp(combined)), axis=-1)
    return [score(detector, readings, votes, combined, label) for detector in ensemble.detectors]


def score(detector: Detector, readings: Mapping[str, Reading], votes: Array, combined: Array, label: Array) -> Array:
    """One detector's score (N,).  label (N, 1): the ensemble's."""
    xp = array_namespace(combined)
    match detector.name:
        case DetectorName.MUTUAL_INFORMATION:
            return readings[_fed(detector)].mutual_information
        case DetectorName.VARIANCE:
            return readings[_fed(detector)].variance
        case DetectorName.DISAGREEMENT:
            return divergence(votes, 1)
        case DetectorName.DISTANCE:  # to the center of the label's class: the logits are negative squared distances
            return -xp.squeeze(xp.take_along_axis(readings[_fed(detector)].logits, label, axis=-1), axis=-1)
        case DetectorName.MARGIN:
            return runner_up(combined, label)


def runner_up(log_p: Array, label: Array) -> Array:
    """p_second / p_first, 1 where two classes tie: the exponential of the margin between them, negated.

    To be sure of a wrong class costs an attacker what it costs to get there, which is not so of the other scores.
    log_p (N, K), label (N, 1) -> (N,).
    """
    xp = array_namespace(log_p)
    classes = xp.arange(0, log_p.shape[-1], device=device(log_p))
    others = largest(xp.where(classes == label, NEVER, log_p), -1)
    return xp.exp(xp.squeeze(others - xp.take_along_axis(log_p, label, axis=-1), axis=-1))


def _fed(detector: Detector) -> str:
    if detector.member is None:
        raise ValueError(f"{detector.name}: expected a member to feed it, got none")
    return detector.member


def screen(ensemble: Ensemble, found: Sequence[Array], finite: Array) -> Screening:
    """From scores (D of (N,)) to p-values, and to a verdict on the statistic, -sum log p over those that decide."""
    xp = array_namespace(finite)
    n = len(ensemble.combined)
    none = xp.astype(finite, xp.int64) * 0
    # What is not finite ranks beyond every calibration image: whatever its score would have been, it must not pass.
    counts = [xp.where(finite, at_least(t, rankable(s)), 0) for t, s in zip(ensemble.tables, found, strict=True)]
    surprises = xp.asarray(ensemble.surprises, device=device(finite))
    deciding = [count for detector, count in zip(ensemble.detectors, counts, strict=True) if detector.decides]
    statistic = sum((xp.take(surprises, count, axis=0) for count in deciding), start=xp.astype(none, xp.float32))
    if counts:
        beyond = at_least(ensemble.combined, statistic)
        low = xp.astype(beyond < resolved(ensemble.review_rate, n), xp.int64)
        level = low + xp.astype(beyond < resolved(ensemble.reject_rate, n), xp.int64)  # CLEAN, SUSPECT, REJECTED
    else:
        beyond, low, level = none, none, none + int(Verdict.UNSCREENED)
    return Screening(
        p_values=[p_value(count, n) for count in counts],
        statistic=statistic,
        p_value=p_value(beyond, n),
        verdict=xp.where(finite, level, int(Verdict.REJECTED)),
        reason=xp.where(finite, low * int(Reason.LOW_P_VALUE), int(Reason.NON_FINITE)),
    )


def rankable(score: Array) -> Array:
    xp = array_namespace(score)
    return xp.clip(xp.astype(score, xp.float32), min=RESOLUTION)


def at_least(table: Floats, values: Array) -> Array:
    """#{entry of table >= value}, int64 (N,).  table: (n,) ascending, values: (N,)."""
    xp = array_namespace(values)
    entries = xp.asarray(table, device=device(values))
    if is_ndonnx_array(values):  # an ONNX graph cannot search, and ndonnx's way of comparing takes four times as long as this
        reached = xp.astype(entries[None, :] >= values[:, None], xp.float32)
        return xp.astype(xp.sum(reached, axis=1), xp.int64)
    return len(table) - xp.searchsorted(entries, values)


def p_value(count: Array, n: int) -> Array:
    """(1 + #{calibration score >= score}) / (n + 1) (split conformal), count: (N,)."""
    xp = array_namespace(count)
    return xp.astype(1 + count, xp.float32) / (n + 1)


def resolved(rate: float, n: int) -> int:
    """How many of the p-values (1 + c) / (n + 1) are <= rate: verdicts compare ranks, so that no rounding decides."""
    return math.floor(rate * (n + 1) + 1e-9)


def surprise(p: NDArray[np.float64]) -> Floats:
    """-log p in multiples of QUANTUM, whose sums are exact in float32: equal p-values tie on every back end."""
    return (np.round(-np.log(p) / QUANTUM) * QUANTUM).astype(np.float32)
