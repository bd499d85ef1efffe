"""Temperatures and voting weights, fitted on held-out training images for the worst case under a quick attack.

The fit plays against an adversary, in rounds. Every member is attacked, so that transfer from each is in the pool; then
for every subset of classifiers the candidate is taken that does best against the whole pool, and is attacked as a system;
what that finds joins the pool, and the fit is repeated. A weight may become 0: a weak voter drags a system below its best
member, and then the fit says so.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from models.bundle import SubsetRow
from models.durable import replace_file
from models.ensemble import Ensemble, Reading, RuleName, Voter, combine, log_votes
from models.log_probability import TIE
from models.manifest import Strength
from training.attacks.pgd import margin_pgd
from training.data import Images
from training.recipe import CalibrationRecipe
from training.step import step_generator
from training.system import Members, log_probabilities

Logits = Mapping[str, NDArray[np.float32]]
"""Member name -> logits (n, k) on the same images."""

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
SCALES = (1.0, 2.0, 4.0)
WEIGHT_STEPS = 5
"""Weights are multiples of 1/5."""
SURE = 1000.0  # a logit beside zeros that is certain at any temperature

Report = Callable[[str], None]


@dataclass(frozen=True)
class Pool:
    """Clean and attacked versions of the same images, as every member answers them.

    labels (n,); clean: logits (n, k); attacked: variant name -> logits (n, k). `everything` is clean logits on all
    held-out images, for clean accuracy.
    """

    labels: NDArray[np.int64]
    clean: Logits
    attacked: Mapping[str, Logits]
    everything: Logits
    every_label: NDArray[np.int64]


@dataclass(frozen=True)
class Fit:
    """What calibration decides: a temperature per member, a row per subset."""

    temperatures: Mapping[str, float]
    subsets: tuple[SubsetRow, ...]


def fit(
    members: Members,
    strengths: Mapping[str, Strength],
    held_out: Images,
    epsilon: float,
    settings: CalibrationRecipe,
    seed: int,
    cache: Path,
    report: Report = print,
) -> Fit:
    """Fit temperatures, then weights, alpha and s for every subset. Attacks already in `cache` are not run again."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(held_out))[: settings.images])
    images = held_out.take(chosen)
    attacks = _Attacks(members, images, epsilon, settings.steps, seed, cache)
    everything = {name: logits.cpu().numpy() for name, logits in members.logits_on(held_out.pixels).items()}
    pool = Pool(images.labels, {name: logits[chosen] for name, logits in everything.items()}, {}, everything, held_out.labels)

    temperatures = {}
    for name, strength in strengths.items():
        pool = replace(pool, attacked={**pool.attacked, f"transfer from {name}": attacks.on_member(name)})
        # A natural network under its own attack is always wrong, and the best temperature for that is infinite; what
        # the rule wants of an accurate voter is calibrated confidence on clean images.
        if strength == "robust":
            fitted_on, labels = pool.attacked[f"transfer from {name}"][name], pool.labels
        else:
            fitted_on, labels = everything[name], held_out.labels
        temperatures[name] = fit_temperature(fitted_on, labels)
        alone = (fitted_on.argmax(1) == labels).mean()
        report(f"{name}: temperature {temperatures[name]:.3f}, accuracy {alone:.3f} on what it was fitted on (n = {len(labels)})")

    subsets = [tuple(sorted(names)) for size in range(len(strengths)) for names in combinations(strengths, size + 1)]
    rows: dict[tuple[str, ...], SubsetRow] = {}
    classes = next(iter(pool.clean.values())).shape[1]
    for round_ in range(settings.rounds + 1):
        for subset in subsets:
            rows[subset] = fit_subset(subset, strengths, temperatures, pool, settings)
        for subset, row in rows.items():
            if max(row.weights.values()) == 1.0 and row.rule != RuleName.MIXED:
                continue  # one member alone, which has been attacked already
            ensemble = as_ensemble(row, strengths, temperatures, classes)
            name = f"round {round_ + 1}: {'+'.join(subset)}"
            pool = replace(pool, attacked={**pool.attacked, name: attacks.on_system(ensemble)})
            report(f"{name}: fitted robust accuracy {row.robust:.3f}, under its own attack {worst_case(ensemble, pool):.3f}")
    # What is fitted last was chosen before it was attacked: the figure that stays is the one under all that was found.
    return Fit(
        temperatures,
        tuple(
            row.model_copy(update={"robust": worst_case(as_ensemble(row, strengths, temperatures, classes), pool)})
            for row in rows.values()
        ),
    )


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """argmin_T mean -log softmax_y(z/T), T in [0.05, 20] (Guo et al. 2017); logits (n, k)."""
    low, high = np.log(0.05), np.log(20.0)
    for _ in range(4):  # each pass narrows a grid of 41 to the neighbourhood of its best point
        grid = np.linspace(low, high, 41)
        losses = [_negative_log_likelihood(logits / np.exp(t), labels) for t in grid]
        best = int(np.argmin(losses))
        low, high = grid[max(0, best - 1)], grid[min(40, best + 1)]
    return float(np.exp(grid[best]))


def fit_subset(
    subset: Sequence[str],
    strengths: Mapping[str, Strength],
    temperatures: Mapping[str, float],
    pool: Pool,
    settings: CalibrationRecipe,
) -> SubsetRow:
    """The candidate with the best worst case over the pool; among those within `robust_slack` of it, the best clean one.

    Clean accuracy may not fall below that of the subset's most robust member by more than `clean_tolerance`.
    """
    classes = next(iter(pool.clean.values())).shape[1]
    judged: list[SubsetRow] = []
    for row in candidates(subset, strengths):
        ensemble = as_ensemble(row, strengths, temperatures, classes)
        clean = float((_labels(ensemble, pool.everything) == pool.every_label).mean())
        judged.append(row.model_copy(update={"clean": clean, "robust": worst_case(ensemble, pool), "n": len(pool.labels)}))
    singles = [row for row in judged if row.rule == RuleName.WEIGHTED and max(row.weights.values()) == 1.0]
    floor = max(singles, key=lambda row: row.robust).clean - settings.clean_tolerance
    allowed = [row for row in judged if row.clean >= floor]
    chosen = _best(allowed, settings.robust_slack)
    if chosen.rule != RuleName.MIXED and (mixtures := [row for row in judged if row.rule == RuleName.MIXED]):
        # An operator may still ask for the mixed rule: alpha and s are what would then be best, at these weights.
        mixture = _best([row for row in mixtures if row.weights == chosen.weights], settings.robust_slack)
        chosen = chosen.model_copy(update={"alpha": mixture.alpha, "scale": mixture.scale})
    return chosen


def _best(rows: Sequence[SubsetRow], slack: float) -> SubsetRow:
    """Of those within `slack` of the best worst case, the one that is best on clean images."""
    best = max(row.robust for row in rows)
    return max((row for row in rows if row.robust >= best - slack), key=lambda row: (row.clean, row.robust))


def candidates(subset: Sequence[str], strengths: Mapping[str, Strength]) -> Iterator[SubsetRow]:
    """Every rule, weighting, alpha and s that the fit considers for these classifiers; accuracies not yet known.

    Natural networks get no weight beside robust ones: only the mixed rule lets them speak, and bounds what they say.
    """
    robust = [name for name in subset if strengths[name] == "robust"]
    accurate = [name for name in subset if strengths[name] == "accurate"]
    for shares in _simplex(len(robust or accurate), WEIGHT_STEPS):
        weights = dict.fromkeys(subset, 0.0) | dict(zip(robust or accurate, shares, strict=True))
        row = SubsetRow(
            classifiers=tuple(subset), rule=RuleName.WEIGHTED, weights=weights, alpha=1.0, scale=1.0, clean=0, robust=0, n=1
        )
        yield row
        if sum(share > 0 for share in shares) > 1:
            yield row.model_copy(update={"rule": RuleName.LOG_POOL})
        if robust and accurate:
            for alpha, scale in product(ALPHAS, SCALES):
                yield row.model_copy(update={"rule": RuleName.MIXED, "alpha": alpha, "scale": scale})


def as_ensemble(row: SubsetRow, strengths: Mapping[str, Strength], temperatures: Mapping[str, float], classes: int) -> Ensemble:
    """The votes of a row as an ensemble without detectors."""
    voters = tuple(Voter(name, temperatures[name], strengths[name], row.weights[name]) for name in row.classifiers)
    return Ensemble(
        name="+".join(row.classifiers), classes=classes, voters=voters, rule=row.rule, alpha=row.alpha, scale=row.scale,
        detectors=(), review_rate=0.05, reject_rate=0.01,
    )  # fmt: skip


def worst_case(ensemble: Ensemble, pool: Pool) -> float:
    """Share of images that are classified rightly in every version of the pool; under attack, accurate voters are at their worst.

    A natural network says what an attacker of it likes, who may be better at it than the fit's quick attack. A tie is lost, too.
    """
    right, rows = _labels(ensemble, pool.clean) == pool.labels, np.arange(len(pool.labels))
    for logits in pool.attacked.values():
        found = _log_probabilities(ensemble, misled(ensemble, logits, pool.labels))
        own = found[rows, pool.labels]
        found[rows, pool.labels] = -np.inf
        right &= own > found.max(axis=1) + TIE
    return float(right.mean())


def misled(ensemble: Ensemble, logits: Logits, labels: NDArray[np.int64]) -> Logits:
    """The logits of a mixture's voters, the accurate ones sure of the wrong class that the robust side finds likeliest."""
    accurate = [voter.name for voter in ensemble.voters if voter.strength == "accurate"]
    if ensemble.rule != RuleName.MIXED:
        return logits
    robust_side = _log_probabilities(replace(ensemble, alpha=1.0), logits)
    robust_side[np.arange(len(labels)), labels] = -np.inf
    sure = np.float32(SURE) * np.eye(ensemble.classes, dtype=np.float32)[robust_side.argmax(axis=1)]
    return {**logits, **dict.fromkeys(accurate, sure)}


def _labels(ensemble: Ensemble, logits: Logits) -> NDArray[np.int64]:
    return np.asarray(_log_probabilities(ensemble, logits).argmax(axis=1))


def _log_probabilities(ensemble: Ensemble, logits: Logits) -> NDArray[np.float32]:
    readings = {voter.name: Reading(logits[voter.name]) for voter in ensemble.voters}
    return np.array(combine(ensemble, log_votes(ensemble, readings)))


def _simplex(parts: int, steps: int) -> Iterator[tuple[float, ...]]:
    """All ways to give `parts` members multiples of 1/steps that sum to 1."""
    for shares in product(range(steps + 1), repeat=parts):
        if sum(shares) == steps:
            yield tuple(share / steps for share in shares)


def _negative_log_likelihood(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).mean())


class _Attacks:
    """Quick attacks on the chosen images; each result is kept on disk, so that a killed calibration goes on."""

    def __init__(self, members: Members, images: Images, epsilon: float, steps: int, seed: int, cache: Path) -> None:
        self.members, self.epsilon, self.steps, self.seed, self.cache = members, epsilon, steps, seed, cache
        self.pixels = torch.from_numpy(images.pixels).to(members.device).float()
        self.labels = torch.from_numpy(images.labels).to(members.device)
        digest = hashlib.sha256(images.pixels.tobytes() + images.labels.tobytes())
        digest.update(repr((epsilon, steps, seed, members.masks_seed)).encode())
        for name, network in members.networks.items():
            digest.update(f"{name} {getattr(network, 'config', None)!r} {network}".encode())
            for value in network.state_dict().values():
                digest.update(value.cpu().numpy().tobytes())
        self.context = digest.hexdigest()

    def on_member(self, name: str) -> Logits:
        """Every member's answers to the attack on member `name` alone."""
        return self._run(name, lambda x: self.members.logits(name, x))

    def on_system(self, ensemble: Ensemble) -> Logits:
        """Every member's answers to the attack on a whole ensemble."""
        described = repr((ensemble.voters, ensemble.rule, ensemble.alpha, ensemble.scale))
        return self._run(described, log_probabilities(ensemble, self.members))

    def _run(self, what: str, target: Callable[[torch.Tensor], torch.Tensor]) -> Logits:
        key = hashlib.sha256(f"{self.context}:{what}".encode()).hexdigest()[:24]
        path = self.cache / f"{key}.safetensors"
        with contextlib.suppress(FileNotFoundError, SafetensorError):  # one that was cut short is made again
            return load_file(path)
        generator = step_generator(self.pixels.device, self.seed, "calibration")
        found = margin_pgd(target, self.pixels, self.labels, self.epsilon, self.steps, generator, restarts=1)
        answers = {name: logits.cpu().numpy() for name, logits in self.members.logits_on(found.pixels.cpu().numpy()).items()}
        self.cache.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(answers))
        return answers
