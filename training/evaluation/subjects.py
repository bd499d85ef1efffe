"""Which systems of a bundle are attacked: the ensemble, its members alone, every subset, and controls that must fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from models.composition import EnsembleChoice
from models.ensemble import RuleName
from models.manifest import Manifest

FULL = "full"
NAIVE = "naive-soft-vote"


@dataclass(frozen=True)
class Subject:
    """A system under attack; a control is one that must fall, attacked once and never part of a figure."""

    name: str
    choice: EnsembleChoice
    control: bool = False


def of_members(manifest: Manifest, members: Sequence[str]) -> Subject:
    """The ensemble of these classifiers alone, under the rule fitted for them; `full` if they are all there are."""
    others = tuple(name for name in manifest.classifiers if name not in members)
    name = "+".join(members) if others else FULL
    return Subject(name, EnsembleChoice(name, without=others))


def full_and_members(manifest: Manifest) -> list[Subject]:
    """Every classifier alone, then all together: what is made against one is shown to the others, too."""
    alone = [of_members(manifest, [name]) for name in manifest.classifiers]
    return alone if len(alone) == 1 else [*alone, of_members(manifest, manifest.classifiers)]


def every_subset(manifest: Manifest) -> list[Subject]:
    """All subsets with a classifier, smaller ones first."""
    sizes = range(1, len(manifest.classifiers) + 1)
    return [of_members(manifest, names) for size in sizes for names in combinations(manifest.classifiers, size)]


def canonical(manifest: Manifest) -> list[Subject]:
    """Every subset, those first that are always attacked."""
    mains = full_and_members(manifest)
    return [*mains, *(subject for subject in every_subset(manifest) if subject not in mains)]


def controls(manifest: Manifest) -> list[Subject]:
    """A plain soft vote of an undefended member and the weakest hardened one, which any sound attack breaks.

    The undefended members themselves are attacked alone in any case, and are controls, too.
    """
    accurate = [name for name in undefended(manifest) if name in manifest.classifiers]
    hardened = [name for name in manifest.classifiers if name not in accurate]
    if not accurate or not hardened:
        return []
    weakest = min(hardened, key=lambda name: manifest.subset([name]).robust)
    others = tuple(member.name for member in manifest.members if member.name not in (accurate[0], weakest))
    return [Subject(NAIVE, EnsembleChoice(NAIVE, without=others, rule=RuleName.SOFT, detectors=()), control=True)]


def undefended(manifest: Manifest) -> list[str]:
    """Members that were trained on clean images only."""
    return [member.name for member in manifest.members if member.strength == "accurate"]
