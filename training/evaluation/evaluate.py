"""`phalanx-train evaluate`: clean and robust accuracy, clean rejections and the alpha frontier of a bundle, on the test split."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from models.bundle import Bundle, read_bundle
from models.composition import EnsembleChoice, compose
from models.ensemble import Ensemble, RuleName, decide
from training.attacks import Logits, margin_pgd, to_uint8
from training.data import Images, load_splits
from training.recipe import DataRecipe
from training.refused import TrainingRefused
from training.step import step_generator
from training.system import Members, load_networks, log_probabilities

FRONTIER = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx-train evaluate`."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--data", help="a local folder, or another hub id, in place of the recipe's data source")
    parser.add_argument(
        "--images", type=int, default=500, help="test images attacked, the first n of a seeded shuffle (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of margin-PGD, of size epsilon/8 (default: %(default)s)")
    parser.add_argument("--restarts", type=int, default=5, help="starts of margin-PGD (default: %(default)s)")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="members by name, and full (default: all of them)")
    parser.add_argument(
        "--frontier", type=int, default=0, metavar="N", help="also attack the mixed rule at every alpha on N images"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of the starts (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument(
        "--other-data", action="store_true", help="score on data that the bundle was not made with, which is refused otherwise"
    )


@dataclass(frozen=True)
class Robustness:
    """Robust accuracy of one system on n attacked images, each figure the share right on the clean image and under:

    direct: margin-PGD on the system; transfer: that, and the images made against every member; uint8: the same images
    rounded to whole pixels inside the ball; robust: all of these, the headline, with its 95% Wilson interval.
    """

    system: str
    n: int
    clean: float
    direct: float
    transfer: float
    uint8: float
    robust: float
    interval: tuple[float, float]
    right: list[bool]


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; every figure carries its n, and the seed and attack stand above the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle = read_bundle(args.bundle)
    provenance = bundle.manifest.provenance
    if args.images < 1:
        raise TrainingRefused(f"--images: expected 1 or more, got {args.images}")
    if args.json is not None and not args.json.parent.is_dir():
        raise TrainingRefused(f"--json {args.json}: {args.json.parent} is no folder")
    splits = load_splits(DataRecipe.model_validate(provenance.recipe["data"]), args.data)
    if splits.fingerprint != provenance.data_fingerprint and not args.other_data:
        raise TrainingRefused(
            f"{splits.source}: expected the very images and splits that the bundle was made with ({provenance.data_name}); "
            f"the test split of others may hold what it was trained on; --other-data scores them all the same"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    members = Members(load_networks(bundle, device), bundle.manifest.masks.seed)
    names = [*members.networks, "full"]
    if unknown := [name for name in args.systems or () if name not in names]:
        raise TrainingRefused(f"no system {', '.join(unknown)}; there are {', '.join(names)}")

    _say(f"bundle {bundle.manifest.name} {bundle.manifest.version}, commit {provenance.commit}, seed {args.seed}")
    clean = clean_figures(bundle, members, splits.test)
    _say(f"\nclean, test split (n = {len(splits.test)}): accuracy, expected calibration error of the confidence")
    for name, (accuracy, calibration_error) in clean.items():
        _say(f"  {name:<12} {accuracy:.4f} {calibration_error:.4f}")
    rejections = rejection_figures(bundle, members, splits.test)
    _say(f"\nclean rejections, test split (n = {len(splits.test)}): at a rate of 5%, at 1%")
    for name, (five, one) in rejections.items():
        _say(f"  {name:<12} {five:.4f} {one:.4f}")

    chosen = np.random.default_rng(args.seed).permutation(len(splits.test))[: args.images]
    attack = Attack(members, provenance.epsilon, args.steps, args.restarts, args.seed)
    attacker = f"margin-PGD-{args.steps}, {args.restarts} starts, attacker knows weights, rule and masks; no rejection"
    _say(f"\nl-infinity, epsilon = {provenance.epsilon:g}/255, {attacker} (n = {len(chosen)})")
    _say("(fewer safeguards than a published figure has: one attack, one gradient surrogate of edges)")
    _say(f"  {'system':<12} clean  direct transfer  uint8  robust  95% interval")
    found = []
    for row in robustness(bundle, attack, splits.test.take(chosen), args.systems or names):
        low, high = row.interval
        _say(
            f"  {row.system:<12} {row.clean:.3f}  {row.direct:.3f}  {row.transfer:.3f}    {row.uint8:.3f}  {row.robust:.3f}   "
            f"{low:.3f} to {high:.3f}"
        )
        found.append(row)
    _compare(found, clean)
    frontier = []
    if args.frontier:
        tried = np.random.default_rng(args.seed).permutation(len(splits.test))[: args.frontier]
        _say(f"\nmixed rule over alpha: clean (n = {len(splits.test)}), robust (direct, n = {len(tried)})")
        for alpha, accuracy, robust in alpha_frontier(bundle, attack, splits.test, tried):
            _say(f"  {alpha:.2f} {accuracy:.4f} {robust:.3f}")
            frontier.append((alpha, accuracy, robust))
    if args.json:
        figures = {"clean": clean, "rejections": rejections, "robust": [asdict(row) for row in found], "frontier": frontier}
        settings = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(
            json.dumps({"bundle": bundle.manifest.version, "settings": settings, **figures}, indent=1), encoding="utf-8"
        )
    return 0


def _compare(found: Sequence[Robustness], clean: Mapping[str, tuple[float, float]]) -> None:
    """`full` beside the most robust of the members that were attacked."""
    full = next((row for row in found if row.system == "full"), None)
    members = [row for row in found if row.system != "full"]
    if full is None or not members:
        return
    best = max(members, key=lambda row: row.robust)
    won = sum(mine and not theirs for mine, theirs in zip(full.right, best.right, strict=True))
    lost = sum(theirs and not mine for mine, theirs in zip(full.right, best.right, strict=True))
    _say(
        f"\nfull against its most robust member, {best.system}: robust {100 * (full.robust - best.robust):+.1f} points "
        f"(+{won}/-{lost} images, McNemar p = {mcnemar(won, lost):.2f}), "
        f"clean {100 * (clean['full'][0] - clean[best.system][0]):+.2f} points"
    )


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test: a fair coin, thrown won + lost times (McNemar 1947)."""
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    return float(min(1.0, 2 * tail))


def clean_figures(bundle: Bundle, members: Members, test: Images) -> dict[str, tuple[float, float]]:
    """(accuracy, expected calibration error in 15 bins) on clean test images, of every member's vote and of `full`."""
    temperatures = {member.name: member.temperature for member in bundle.manifest.members}
    full = log_probabilities(compose(bundle, EnsembleChoice(name="full")), members)
    with torch.inference_mode():
        votes = {name: (logits / temperatures[name]).softmax(1).cpu() for name, logits in members.logits_on(test.pixels).items()}
        votes["full"] = torch.cat([full(part).exp().cpu() for part in _parts(test.pixels)])
    labels, k = torch.from_numpy(test.labels), len(bundle.manifest.classes)
    return {
        name: (
            float(multiclass_accuracy(vote, labels, k, average="micro")),
            float(multiclass_calibration_error(vote, labels, k, n_bins=15)),
        )
        for name, vote in votes.items()
    }


def rejection_figures(bundle: Bundle, members: Members, test: Images) -> dict[str, tuple[float, float]]:
    """Share of clean test images whose combined p-value is at most 5%, and at most 1%, for `full` and its ablations."""
    systems: dict[str, dict[str, object]] = {"full": {}, "hard-vote": {"rule": RuleName.MAJORITY}}
    systems |= {f"no-{name}": {"without": (name,)} for name in members.networks if len(members.networks) > 1}
    found = {}
    for name, choice in systems.items():
        ensemble = compose(bundle, EnsembleChoice(name=name, **choice))  # type: ignore[arg-type]
        p_values = np.concatenate([_p_values(ensemble, members, part) for part in _parts(test.pixels)])
        found[name] = (float((p_values <= 0.05).mean()), float((p_values <= 0.01).mean()))
    return found


def robustness(bundle: Bundle, attack: Attack, images: Images, systems: Sequence[str]) -> Iterator[Robustness]:
    """Attack every member, then every asked system as a whole; a system is also shown what was made against its members."""
    members = attack.members
    against = {name: attack.on(partial(members.logits, name), images, name) for name in members.networks}
    full = log_probabilities(compose(bundle, EnsembleChoice(name="full")), members)
    for system in systems:
        answer = full if system == "full" else partial(members.logits, system)
        made = against | ({"full": attack.on(full, images, "full")} if system == "full" else {})
        right = _right(answer, images.pixels, images.labels)
        survived = {name: right & _right(answer, pixels, images.labels) for name, pixels in made.items()}
        whole = {name: right & _right(answer, _rounded(pixels, images), images.labels) for name, pixels in made.items()}
        transfer = np.logical_and.reduce(list(survived.values()))
        uint8 = np.logical_and.reduce(list(whole.values()))
        robust = transfer & uint8
        yield Robustness(
            system=system,
            n=len(images),
            clean=float(right.mean()),
            direct=float(survived[system].mean()),
            transfer=float(transfer.mean()),
            uint8=float(uint8.mean()),
            robust=float(robust.mean()),
            interval=wilson(int(robust.sum()), len(images)),
            right=robust.tolist(),
        )


def alpha_frontier(bundle: Bundle, attack: Attack, test: Images, chosen: NDArray[np.int64]) -> list[tuple[float, float, float]]:
    """(alpha, clean accuracy, robust accuracy) of `full` under the mixed rule, attacked afresh at every alpha."""
    ensemble = compose(bundle, EnsembleChoice(name="full", rule=RuleName.MIXED))
    rows = []
    for alpha in FRONTIER:
        mixed = log_probabilities(replace(ensemble, alpha=alpha), attack.members)
        images = test.take(chosen)
        right = _right(mixed, images.pixels, images.labels)
        right &= _right(mixed, attack.on(mixed, images, f"alpha {alpha}"), images.labels)
        rows.append((alpha, _accuracy(mixed, test), float(right.mean())))
    return rows


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


class Attack:
    """One attack, the same for every system compared."""

    def __init__(self, members: Members, epsilon: float, steps: int, restarts: int, seed: int) -> None:
        self.members, self.epsilon, self.steps, self.restarts, self.seed = members, epsilon, steps, restarts, seed

    def on(self, target: Logits, images: Images, what: str) -> NDArray[np.float32]:
        """Adversarial pixels (n, h, w, c) against `target`."""
        started, device = time.monotonic(), self.members.device
        pixels, y = torch.from_numpy(images.pixels).to(device).float(), torch.from_numpy(images.labels).to(device)
        generator = step_generator(device, self.seed, "evaluate")
        found = margin_pgd(target, pixels, y, self.epsilon, self.steps, generator, self.restarts)
        fooled = float((found.margin > 0).float().mean())
        print(f"attacked {what}: {fooled:.3f} fooled, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return found.pixels.cpu().numpy()


def _parts(pixels: NDArray[np.generic], size: int = 256) -> list[Tensor]:
    return [torch.from_numpy(pixels[i : i + size]) for i in range(0, len(pixels), size)]


def _rounded(pixels: NDArray[np.float32], images: Images) -> NDArray[np.uint8]:
    return to_uint8(torch.from_numpy(pixels), torch.from_numpy(images.pixels).float()).numpy()


def _right(answer: Logits, pixels: NDArray[np.generic], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    with torch.inference_mode():
        found = torch.cat([answer(part).argmax(1).cpu() for part in _parts(pixels)])
    return np.asarray(found.numpy() == labels)


def _accuracy(answer: Logits, images: Images) -> float:
    return float(_right(answer, images.pixels, images.labels).mean())


def _p_values(ensemble: Ensemble, members: Members, pixels: Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(decide(ensemble, members.outputs(ensemble.members, pixels)).p_value.cpu().numpy())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
