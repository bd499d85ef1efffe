"""From a bundle and a choice among its members to an ensemble, with the p-value tables of that very choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

import numpy as np

from models.bundle import Bundle, CalibrationOutputs, MemberManifest
from models.ensemble import (
    Detector,
    DetectorName,
    Ensemble,
    Floats,
    Reading,
    RuleName,
    Voter,
    at_least,
    combine,
    log_votes,
    rankable,
    resolved,
    scores,
    surprise,
)
from models.manifest import Role

NEEDS = {
    DetectorName.MUTUAL_INFORMATION: "a stochastic member with the role detector",
    DetectorName.VARIANCE: "a stochastic member with the role detector",
    DetectorName.DISAGREEMENT: "two classifiers or more",
    DetectorName.DISTANCE: "a member with class centers and the role detector",
    DetectorName.MARGIN: "a classifier",
}


class InvalidEnsemble(ValueError):
    """A choice that the bundle cannot fulfil."""


@dataclass(frozen=True)
class EnsembleChoice:
    """What is asked of a bundle; by default, all it has."""

    name: str
    without: tuple[str, ...] = ()  # these members are absent, and with them every detector that needs them
    roles: Mapping[str, tuple[Role, ...]] = field(default_factory=dict)  # instead of those in the manifest
    rule: RuleName | None = None  # None: the one found best for the classifiers present
    detectors: tuple[str, ...] | None = None  # all of these decide; None: all there are, and the manifest says which decide
    review_rate: float = 0.05
    reject_rate: float = 0.01
    masks: Literal["fixed", "fresh"] = "fixed"


def compose(bundle: Bundle, choice: EnsembleChoice) -> Ensemble:
    """The ensemble that was asked for, calibrated on the bundle's outputs; InvalidEnsemble where there is none."""
    try:
        ensemble = calibrate(_resolve(bundle, choice), bundle.calibration)
        _check_rates(ensemble)
    except InvalidEnsemble as error:
        raise InvalidEnsemble(f"ensemble {choice.name}: {error}") from None
    return ensemble


def calibrate(ensemble: Ensemble, outputs: CalibrationOutputs) -> Ensemble:
    """The ensemble with its detectors' scores, and their statistic, on the calibration images."""
    if not ensemble.detectors:
        return ensemble
    readings = {name: _reading(outputs, name, ensemble.masks) for name in ensemble.members}
    votes = log_votes(ensemble, readings)
    found = [rankable(score) for score in scores(ensemble, readings, votes, combine(ensemble, votes))]
    tables = tuple(np.sort(score) for score in found)
    # Every image is ranked as a new one is, against the others: 1 + #{others >= its score}, the 1 being itself.
    triples = zip(ensemble.detectors, tables, found, strict=True)
    ranks = [at_least(table, score) for detector, table, score in triples if detector.decides]
    statistic: Floats = np.sum([surprise(rank / len(outputs)) for rank in ranks], axis=0, dtype=np.float32)
    return replace(ensemble, tables=tables, combined=np.sort(statistic))


def _reading(outputs: CalibrationOutputs, name: str, masks: Literal["fixed", "fresh"]) -> Reading:
    member = outputs.members[name]
    if masks == "fresh" and member.fresh is not None:
        member = member.fresh
    return Reading(member.logits, member.mutual_information, member.variance)


def _resolve(bundle: Bundle, choice: EnsembleChoice) -> Ensemble:
    """The ensemble without its tables."""
    manifest = bundle.manifest
    roles = _roles(manifest.members, choice)
    voting = tuple(member for member in manifest.members if "classifier" in roles.get(member.name, ()))
    listening = tuple(member for member in manifest.members if "detector" in roles.get(member.name, ()))
    if not voting:
        raise InvalidEnsemble(f"expected at least one classifier among the members present: {_listed(roles)}")
    row = manifest.subset(member.name for member in voting)
    ensemble = Ensemble(
        name=choice.name,
        classes=len(manifest.classes),
        voters=tuple(Voter(m.name, m.temperature, m.strength, row.weights[m.name]) for m in voting),
        rule=row.rule if choice.rule is None else choice.rule,
        alpha=row.alpha,
        scale=row.scale,
        detectors=_detectors(voting, listening, choice, manifest.deciding),
        review_rate=choice.review_rate,
        reject_rate=choice.reject_rate,
        masks=choice.masks,
    )
    stochastic = [name for name in ensemble.members if manifest.member(name).stochastic]
    if len(stochastic) > 1:  # they would have to share the input `masks`
        raise InvalidEnsemble(f"expected at most one stochastic member, got {_listed(stochastic)}")
    return ensemble


def _roles(members: Sequence[MemberManifest], choice: EnsembleChoice) -> dict[str, tuple[Role, ...]]:
    """The roles of every member that is present."""
    known = [member.name for member in members]
    _check_names("without", choice.without, known)
    _check_names("roles", choice.roles, known)
    if both := sorted(choice.roles.keys() & set(choice.without)):
        raise InvalidEnsemble(f"{both[0]}: expected in one of without and roles, got it in both")
    for name, asked in choice.roles.items():
        member = next(member for member in members if member.name == name)
        _check_names(f"roles of {name}", asked, ("classifier", "detector"))
        if not asked:
            raise InvalidEnsemble(f"roles of {name}: expected classifier or detector, got none")
        if "classifier" in asked and "classifier" not in member.roles:
            raise InvalidEnsemble(f"roles of {name}: expected no classifier, as no weights were fitted for its vote")
        if "detector" in asked and not (member.stochastic or member.centers):
            raise InvalidEnsemble(f"roles of {name}: expected no detector, as it is neither stochastic nor has centers")
    return {m.name: choice.roles.get(m.name, _own_roles(m)) for m in members if m.name not in choice.without}


def _own_roles(member: MemberManifest) -> tuple[Role, ...]:
    """The manifest's; the distance to a class center comes for free where there are centers."""
    return (*member.roles, "detector") if member.centers else member.roles


def _detectors(
    voting: Sequence[MemberManifest],
    listening: Sequence[MemberManifest],
    choice: EnsembleChoice,
    deciding: Sequence[DetectorName] | None,
) -> tuple[Detector, ...]:
    """Those asked for, in the order of DetectorName; all decide that were asked for by name."""
    _check_names("detectors", choice.detectors or (), list(DetectorName))
    stochastic = [member.name for member in listening if member.stochastic]
    fed_by: dict[DetectorName, list[str | None]] = {
        DetectorName.MUTUAL_INFORMATION: [*stochastic],
        DetectorName.VARIANCE: [*stochastic],
        DetectorName.DISAGREEMENT: [None] if len(voting) > 1 else [],
        DetectorName.DISTANCE: [member.name for member in listening if member.centers],
        DetectorName.MARGIN: [None],
    }
    detectors = []
    for name, sources in fed_by.items():
        if choice.detectors is not None and name not in choice.detectors:
            continue
        if choice.detectors is not None and not sources:
            present = dict.fromkeys(member.name for member in (*voting, *listening))
            raise InvalidEnsemble(f"detector {name}: expected {NEEDS[name]}, got {_listed(present)}")
        if len(sources) > 1:
            raise InvalidEnsemble(f"detector {name}: expected one member to feed it, got {_listed(map(str, sources))}")
        decides = choice.detectors is not None or deciding is None or name in deciding
        detectors += [Detector(name, source, decides) for source in sources]
    if not any(detector.decides for detector in detectors):  # those that would are not fed: better all than none
        detectors = [replace(detector, decides=True) for detector in detectors]
    return tuple(detectors)


def _check_rates(ensemble: Ensemble) -> None:
    review, reject, n = ensemble.review_rate, ensemble.reject_rate, len(ensemble.combined)
    if not 0 <= reject <= review <= 1:
        raise InvalidEnsemble(f"expected 0 <= reject_rate <= review_rate <= 1, got {reject:g} and {review:g}")
    if ensemble.detectors and resolved(reject, n) < 1:
        raise InvalidEnsemble(
            f"expected a reject_rate of {1 / (n + 1):.3g} or more, which {n} calibration images resolve, got {reject:g}"
        )


def _check_names(where: str, names: Iterable[str], known: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise InvalidEnsemble(f"{where}: expected one of {_listed(known)}, got {name!r}; the nearest is {near[0]}")
        if name in seen:
            raise InvalidEnsemble(f"{where}: expected each once, got {name} twice")
        seen.add(name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
