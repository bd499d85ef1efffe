"""The robustness card: what was tried on a bundle's ensembles, and what held, as one JSON document inside the bundle.

A card belongs to the members, weights and rules it was measured on, its `subject`; read_card refuses another bundle's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.ensemble import Ensemble
from models.manifest import InvalidBundle, Manifest, validation_sentence

CARD_FILE = "robustness-card.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Share(_Frozen):
    """A share of n images, with its 95% interval."""

    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    n: int = Field(ge=1)


class Estimate(_Frozen):
    """A difference between shares, -1 to 1, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class AttackRow(_Frozen):
    """One attack alone on one system; `rejecting` is robust accuracy with rejection at the review rate."""

    name: str
    against: str  # the system it was made against; another one than the row's is transfer
    access: Literal["gradient", "scores", "none"]
    robust: Share
    rejecting: Share


class CurvePoint(_Frozen):
    """Robust accuracy at a multiple of epsilon, under one attack."""

    factor: float = Field(ge=0)
    robust: Share


class RocCurve(_Frozen):
    """A detector on clean images (false positives) against images that fool the class (true positives)."""

    detector: str
    false_positives: tuple[float, ...]
    true_positives: tuple[float, ...]
    area: float = Field(ge=0, le=1)
    fooling: int = Field(ge=1)  # how many images fooled the class


class SystemCard(_Frozen):
    """One system. Robust figures are the worst case per image over all attacks, of every system on the card, tried on it."""

    name: str
    members: tuple[str, ...]  # those that vote
    rule: str
    detectors: tuple[str, ...]  # the names of those that decide
    clean: Share  # of the whole test split
    clean_rejected_5: Share | None  # of the whole test split; None without detectors
    clean_rejected_1: Share | None
    robust: Share
    robust_float: Share  # as the attack left the pixels
    robust_uint8: Share  # rounded to whole pixels, as served
    rejecting_5: Share  # robust accuracy with rejection
    rejecting_1: Share
    rejected_5: Share | None = (
        None  # images whose worst version at 5% is rejected; the rest of 1 - rejecting_5 is wrong and accepted
    )
    wrong_5: Share | None = None  # images of which some version is wrong and accepted at 5%
    certified: Share | None = None  # images whose class is proven right within epsilon; None where the vote has no bounds
    robust_error: float  # RErr(tau), Stutz et al. 2020
    tau: float  # the p-value that 99% of rightly classified calibration images reach
    attacks: tuple[AttackRow, ...]
    curve: tuple[CurvePoint, ...] = ()
    roc: tuple[RocCurve, ...] = ()


class Comparison(_Frozen):
    """A system against another on the same images, image by image: robust accuracy, unless a field says otherwise."""

    system: str
    other: str
    robust: float  # difference, -1 to 1
    won: int  # images that only the first gets right
    lost: int
    p_value: float  # McNemar, exact, two-sided
    clean: float  # difference on the whole test split


class EqualSize(_Frozen):
    """The ensemble against one adversarially trained network as large as all its members, attacked on the same images."""

    bundle: str  # of the one network
    parameters: int = Field(ge=1)
    members_parameters: int = Field(ge=1)  # of all members together
    clean: Share  # of the whole test split
    robust: Share
    rejecting_5: Share
    compared: Comparison
    compared_rejecting_5: Comparison  # the same of robust accuracy with rejection


class MaskPoint(_Frozen):
    """What attacks that average over so many draws of masks leave, under masks drawn after them; 0: the served masks, known."""

    samples: int = Field(ge=0)
    robust: float = Field(ge=0, le=1)  # share of images that are classified rightly, mean over the draws
    n: int = Field(ge=1)
    draws: int = Field(ge=1)


class Check(_Frozen):
    """A sanity check or a positive control; one that failed means that the figures prove nothing."""

    name: str
    passed: bool
    measured: str


class SubsetCard(_Frozen):
    """One row of the ablation, attacked afresh."""

    members: tuple[str, ...]
    clean: Share
    robust: Share
    rejecting_5: Share


class Worth(_Frozen):
    """What a member adds: its Shapley value, v(nothing) = 0, and its marginal value to all the others."""

    member: str
    figure: Literal["clean", "robust", "rejecting_5"]
    attacker: Literal["adaptive", "oblivious"]
    shapley: Estimate
    marginal: Estimate


class Ablation(_Frozen):
    suite: str
    n: int  # the first of the card's images
    subsets: tuple[SubsetCard, ...]
    worths: tuple[Worth, ...]

    def earned(self, member: str) -> tuple[str, ...]:
        """The attackers against whom its Shapley value for robust accuracy with rejection is above 0, error allowed for."""
        mine = (worth for worth in self.worths if (worth.member, worth.figure) == (member, "rejecting_5"))
        return tuple(worth.attacker for worth in mine if worth.shapley.low > 0)


class Matrix(_Frozen):
    """Square, over `names`; what row and column mean is in the field's comment."""

    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    n: int = Field(ge=1)  # images


class Orthogonality(_Frozen):
    transfer: Matrix  # row: made against, column: judged by; share fooled
    gradient_cosine: Matrix  # mean over images, of the gradients of the margins
    error_correlation: Matrix  # phi coefficient of failing under the worst case


class Oblivious(_Frozen):
    """Images made against one member alone, shown to the ensemble."""

    member: str
    wrong_and_accepted: Share  # of all images, those among them that are wrong without any attack
    induced: Share  # of all images: right and accepted when clean, wrong and accepted when attacked


class Query(_Frozen):
    """A query attack on the running server."""

    attack: str
    ensemble: str
    disclosure: str
    queries: int  # at most, per image
    median_queries: float  # spent, per image
    wrong_and_accepted: Share

    @property
    def identity(self) -> tuple[str, str, str, int]:
        """Which attack it was, on however many images."""
        return self.attack, self.ensemble, self.disclosure, self.queries


class Deployment(_Frozen):
    """The stored adversarial images, shown to the running server."""

    images: int
    labels_differ: int
    p_value_difference: float  # the largest
    verdicts_differ: int = 0  # accepted or not, at the ensemble's review rate
    probability_difference: float = 0.0  # the largest


class Headline(_Frozen):
    """What an application is told about its ensemble."""

    ensemble: str
    epsilon: float
    clean: Share
    robust: Share
    rejecting_5: Share
    suite: str
    publishable: bool  # the protocol's whole list on 1,000 images or more
    conjecture: str  # whether the ensemble beat its best member, and against whom, in one sentence


class Card(_Frozen):
    schema_version: Literal[1] = 1
    bundle: str
    subject: str  # Manifest.subject of what was attacked
    threat_model: str
    data: str
    epsilon: float = Field(gt=0, le=255)  # l-infinity, in pixel units
    n: int = Field(ge=1)
    seed: int
    suite: str
    missing: tuple[str, ...]  # safeguards of a published figure that this one lacks
    commit: str
    libraries: dict[str, str]
    commands: tuple[str, ...]
    headline: Headline
    systems: tuple[SystemCard, ...]
    comparisons: tuple[Comparison, ...]
    equal_size: EqualSize | None = None
    fresh_masks: tuple[MaskPoint, ...] = ()  # of the headline's ensemble
    checks: tuple[Check, ...]
    oblivious: tuple[Oblivious, ...]
    ablation: Ablation | None = None
    orthogonality: Orthogonality | None = None
    queries: tuple[Query, ...] = ()
    deployment: Deployment | None = None

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def publishable(self) -> bool:
        """Whether nothing on the card speaks against telling its figures as they are."""
        return self.headline.publishable and not self.missing and not self.failed

    def system(self, name: str) -> SystemCard:
        return next(system for system in self.systems if system.name == name)


def encode_card(card: Card) -> bytes:
    return card.model_dump_json(indent=1).encode() + b"\n"


def read_card(manifest: Manifest, documents: Mapping[str, bytes]) -> Card | None:
    """The card among a bundle's documents, None where there is none; InvalidBundle if it is not this bundle's."""
    if CARD_FILE not in documents:
        return None
    try:
        card = Card.model_validate(json.loads(documents[CARD_FILE]))
    except ValidationError as error:
        raise InvalidBundle(f"{CARD_FILE}: {validation_sentence(error)}") from error
    except (ValueError, RecursionError) as error:  # of json; a ValidationError is a ValueError too
        raise InvalidBundle(f"{CARD_FILE}: expected JSON, got {error}") from error
    if card.subject != manifest.subject:
        raise InvalidBundle(f"{CARD_FILE}: expected figures of these members, {manifest.subject}, got those of {card.subject}")
    if contradiction := _contradiction(card):
        raise InvalidBundle(f"{CARD_FILE}: {contradiction}")
    return card


def _contradiction(card: Card) -> str | None:
    """Why the headline cannot be told of the system it names; it is read instead of that system's own figures."""
    names, headline = [system.name for system in card.systems], card.headline
    if len(set(names)) < len(names):
        return f"expected every system once, got {', '.join(names)}"
    if headline.ensemble not in names:
        return f"expected a headline of one of {', '.join(names) or 'no systems'}, got {headline.ensemble}"
    system = card.system(headline.ensemble)
    if (headline.clean, headline.robust, headline.rejecting_5) != (system.clean, system.robust, system.rejecting_5):
        return f"expected a headline with the figures of its system {system.name}, got others"
    if headline.epsilon != card.epsilon:
        return f"expected a headline at epsilon {card.epsilon:g}, got {headline.epsilon:g}"
    return None


def measured_on(card: Card, manifest: Manifest, ensemble: Ensemble) -> SystemCard | None:
    """The figures of this very ensemble; None where it is put together in any other way than what was attacked.

    Weights, alpha and scale follow from the voters. The card knows no fresh masks, nor which of two members fed a detector.
    """
    stochastic = {member.name for member in manifest.members if member.stochastic}
    centered = {member.name for member in manifest.members if member.centers}
    if ensemble.masks == "fresh" and stochastic.intersection(ensemble.members):
        return None
    if ensemble.detectors and max(len(stochastic), len(centered)) > 1:
        return None
    voters = sorted(voter.name for voter in ensemble.voters)
    detectors = sorted(detector.name for detector in ensemble.detectors if detector.decides)
    for system in card.systems:
        if (sorted(system.members), system.rule, sorted(system.detectors)) == (voters, ensemble.rule, detectors):
            return system
    return None
