"""Suites of attacks: what is tried on every system, in order, and which figure each of them serves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from models.ensemble import RuleName
from training.attacks.detectors import joint, orthogonal, surely_wrong
from training.attacks.features import feature_adversary, has_centers
from training.attacks.libraries import apgd_ce, apgd_targeted, fab_targeted, square
from training.attacks.masks import fresh_masks, hears_masks
from training.attacks.noise import random_noise
from training.attacks.pgd import TOGETHER
from training.attacks.problem import Attack, Problem
from training.attacks.rule import reweighed, surrogate, whole_system
from training.attacks.surrogates import (
    foresighted,
    hears_edges,
    hears_thermometers,
    narrow_edges,
    other_ramps,
    soft_edges,
    soft_ramps,
)
from training.system import System

Access = Literal["gradient", "scores", "none"]
Aims = Literal["rule", "features", "everything"]
"""What of a system decides what an attack does: its voters and their rule, the metric member, or the detectors, too."""

CURVE = (0.25, 0.5, 0.75, 1.5, 2.0, 4.0, 8.0)
CONTROL = "margin-pgd"  # the attack that every system is put to, controls included
FEW_IMAGES = 50  # of the noise with many draws


@dataclass(frozen=True)
class Entry:
    """One attack of a suite; `images` is how many it is tried on, None for all of them.

    A sanity entry is there for checks and curves, and tried on the whole ensemble only.
    """

    name: str
    attack: Attack
    access: Access = "gradient"
    applies: Callable[[System], bool] = lambda _: True
    epsilon_factor: float = 1.0
    images: int | None = None
    sanity: bool = False
    aims: Aims = "rule"
    masks: int = 0  # draws that each step averages over, where it takes the masks to be unknown

    def identity(self, system: System) -> object:
        """Equal for two systems on which this attack would find the same images."""
        match self.aims:
            case "rule":
                return system.heard
            case "features":
                return "metric"
            case _:
                return system.decided_by

    @property
    def counts(self) -> bool:
        """Whether it attacks in the ball that the figures are about."""
        return self.epsilon_factor == 1.0


@dataclass(frozen=True)
class Suite:
    """Attacks in their order."""

    name: str
    entries: tuple[Entry, ...]
    images: int  # by default
    publishable: bool  # all that we have of the protocol's list; what is measured with less says so

    @property
    def names(self) -> frozenset[str]:
        """Of its attacks."""
        return frozenset(entry.name for entry in self.entries)

    @property
    def digest(self) -> str:
        """Of every attack and its settings: what was begun with others is not gone on with."""
        described = [f"{e.name} {_described(e.attack)} {e.epsilon_factor} {e.images} {e.sanity}" for e in self.entries]
        return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]


def suite(name: str) -> Suite:
    """`smoke` (seconds), `quick` (minutes on two cores) or `standard` (the protocol's whole list)."""
    match name:
        case "smoke":
            return assembled(
                name, images=8, steps=3, restarts=1, apgd=3, targets=2, queries=10, draws=3, weights=(1.0,), curve=0, masks=(1, 2)
            )
        case "quick":
            return assembled(
                name, images=300, steps=20, restarts=2, apgd=20, targets=3, queries=100, draws=10, weights=(0.5, 2.0), curve=100
            )
        case _:
            return assembled(
                "standard", images=1000, steps=40, restarts=5, apgd=100, targets=9, queries=5000, draws=100,
                weights=(0.1, 0.3, 1.0, 3.0, 10.0), curve=300, fab=100, masks=(1, 4, 16, 64),
            )  # fmt: skip


SUITES = ("smoke", "quick", "standard")


def assembled(
    name: str, *, images: int, steps: int, restarts: int, apgd: int, targets: int, queries: int, draws: int,
    weights: tuple[float, ...], curve: int, fab: int = 0, masks: tuple[int, ...] = (),
) -> Suite:  # fmt: skip
    """Every attack, with so much of each. `curve`: images that sanity checks are made on, 0 for none; `fab` 0 leaves out what
    only the whole list has; `masks`: over how many draws the attacks on fresh masks average.
    """
    several, screened = _has_several_voters, _has_detectors
    direct = partial(whole_system, steps=steps, restarts=restarts)
    once = partial(whole_system, steps=steps, restarts=1)
    pushed = partial(once, until_fooled=False)
    entries = [
        Entry(CONTROL, direct),
        Entry("pushed-margin-pgd", pushed),
        Entry("apgd-ce", partial(apgd_ce, iterations=apgd, restarts=1)),
        Entry("apgd-targeted", partial(apgd_targeted, iterations=apgd, targets=targets)),
        Entry("square", partial(square, queries=queries), "scores"),
        Entry("noise", partial(random_noise, draws=draws), "none"),
        Entry("reweighed", partial(reweighed, steps=steps, restarts=restarts), applies=several),
        Entry("logits-pgd", partial(surrogate, rule=RuleName.LOG_POOL, steps=steps, restarts=1), applies=several),
        Entry("probabilities-pgd", partial(surrogate, rule=RuleName.WEIGHTED, steps=steps, restarts=1), applies=several),
        Entry("votes-pgd", partial(surrogate, rule=RuleName.MAJORITY, steps=steps, restarts=1), applies=several),
        Entry(
            "narrow-edges-pgd", partial(_elsewhere, change=partial(narrow_edges, factor=0.5), attack=pushed), applies=hears_edges
        ),
        Entry("soft-edges-pgd", partial(_elsewhere, change=partial(soft_edges, factor=1.0), attack=pushed), applies=hears_edges),
        *(
            Entry(name, partial(_other_ramps, change=change, epsilons=epsilons, attack=pushed), applies=hears_thermometers)
            for name, change, epsilons in (
                ("wide-ramps-pgd", other_ramps, 2.0),
                ("narrow-ramps-pgd", other_ramps, 0.25),
                ("soft-ramps-pgd", soft_ramps, 0.5),
            )
        ),
        Entry("foresighted-pgd", partial(_foresighted, attack=partial(direct, until_fooled=False)), applies=hears_thermometers),
        Entry("features", partial(feature_adversary, steps=2 * steps), applies=has_centers, aims="features"),
        Entry("joint", partial(joint, steps=steps, weights=weights), applies=screened, aims="everything"),
        Entry("surely-wrong", partial(surely_wrong, iterations=apgd, targets=targets), applies=screened, aims="everything"),
        Entry("orthogonal", partial(orthogonal, steps=2 * steps), applies=screened, aims="everything"),
    ]
    for samples in masks:  # the most of them for the figures, fewer to see whether those were enough
        unknown = partial(fresh_masks, steps=steps, samples=samples)
        few = samples < masks[-1]
        entries.append(Entry(f"fresh-masks-pgd-{samples}", unknown, applies=hears_masks, sanity=few, masks=samples))
    if fab:
        low = partial(joint, steps=steps, weights=weights, accepted_at="reject")
        entries.append(Entry("joint-below-1%", low, applies=screened, aims="everything"))
        entries.append(Entry("fab-targeted", partial(fab_targeted, iterations=fab, targets=targets)))
        longer = partial(joint, steps=4 * steps, weights=weights)
        more = partial(joint, steps=steps, weights=3 * weights)
        entries += [
            Entry("longer-noise", partial(random_noise, draws=100 * draws), "none", images=FEW_IMAGES, sanity=True),
            Entry("longer-joint", longer, applies=screened, images=curve, sanity=True, aims="everything"),
            Entry("restarted-joint", more, applies=screened, images=curve, sanity=True, aims="everything"),
        ]
    if curve:
        entries.append(Entry("longer-margin-pgd", partial(whole_system, steps=4 * steps, restarts=1), images=curve, sanity=True))
        entries.append(
            Entry("restarted-margin-pgd", partial(whole_system, steps=steps, restarts=3 * restarts), images=curve, sanity=True)
        )
        entries += [
            Entry(f"margin-pgd-at-{factor:g}-epsilon", once, epsilon_factor=factor, images=curve, sanity=True) for factor in CURVE
        ]
    return Suite(name, tuple(entries), images, publishable=bool(fab))


def _elsewhere(problem: Problem, change: Callable[[System], System], attack: Attack) -> Tensor:
    """The attack on a changed system; its images must then fool the real one."""
    return attack(problem.against(change(problem.system)))


def _other_ramps(problem: Problem, change: Callable[[System, float], System], epsilons: float, attack: Attack) -> Tensor:
    """The attack on a system whose thermometers have ramps that reach so many epsilons further."""
    return _elsewhere(problem, lambda system: change(system, epsilons * problem.epsilon), attack)


def _foresighted(problem: Problem, attack: Attack) -> Tensor:
    """The attack with each image's ball known to its gradient, on as many at once as it keeps together: it may leave none out."""
    found = []
    for some in torch.arange(len(problem.pixels), device=problem.pixels.device).split(TOGETHER):
        part = replace(problem, pixels=problem.pixels[some], labels=problem.labels[some])
        found.append(attack(part.against(foresighted(part.system, part.pixels, part.epsilon))))
    return torch.cat(found)


def _described(function: Callable[..., object]) -> str:
    if not isinstance(function, partial):
        return function.__name__
    settings = (f"{key}={_described(value) if callable(value) else repr(value)}" for key, value in function.keywords.items())
    return f"{function.func.__name__}({', '.join(settings)})"


def _has_several_voters(system: System) -> bool:
    return sum(system.share(voter.name) > 0 for voter in system.ensemble.voters) > 1


def _has_detectors(system: System) -> bool:
    return bool(system.ensemble.detectors)
