"""`phalanx-train evaluate`: clean and robust accuracy, clean rejections and the alpha frontier of a bundle, on the test split."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
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
from training.step import step_generator
from training.system import Members, load_networks, log_probabilities

FRONTIER = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
REJECTION_SYSTEMS: dict[str, dict[str, object]] = {
    "full": {}, "no-edge": {"without": ("edge",)}, "no-metric": {"without": ("metric",)}, "hard-vote": {"rule": RuleName.MAJORITY},
}  # fmt: skip


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


@dataclass(frozen=True)
class Robustness:
    """Robust accuracy of one system on n attacked images, each figure the share right on the clean image and under:

    direct: margin-PGD on the system; transfer: that, and the images made against every member; uint8: all of that
    rounded to whole pixels inside the ball. `interval` is the 95% Wilson interval of `transfer`, the headline.
    """

    system: str
    n: int
    clean: float
    direct: float
    transfer: float
    uint8: float
    interval: tuple[float, float]
    right: list[bool]


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; every figure carries its n, and the seed and attack stand above the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle = read_bundle(args.bundle)
    provenance = bundle.manifest.provenance
    splits = load_splits(DataRecipe.model_validate(provenance.recipe["data"]), args.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    members = Members(load_networks(bundle, device), bundle.manifest.masks.seed)
    names = [*members.networks, "full"]
    if unknown := [name for name in args.systems or () if name not in names]:
        raise SystemExit(f"no system {', '.join(unknown)}; there are {', '.join(names)}")

    _say(f"bundle {bundle.manifest.name} {bundle.manifest.version}, commit {provenance.commit}, seed {args.seed}")
    clean = clean_figures(bundle, members, splits.test)
    _say(f"\nclean, test split (n = {len(splits.test)}): accuracy, expected calibration error of the confidence")
    for name, (accuracy, calibration_error) in clean.items():
        _say(f"  {name:<12} {accuracy:.4f} {calibration_error:.4f}")
    rejections = rejection_figures(bundle, members, splits.test)
    _say("\nclean rejections, test split: at a rate of 5%, at 1%")
    for name, (five, one) in rejections.items():
        _say(f"  {name:<12} {five:.4f} {one:.4f}")

    chosen = np.random.default_rng(args.seed).permutation(len(splits.test))[: args.images]
    attack = Attack(members, provenance.epsilon, args.steps, args.restarts, args.seed)
    attacker = f"margin-PGD-{args.steps}, {args.restarts} starts, attacker knows weights, rule and masks; no rejection"
    _say(f"\nl-infinity, epsilon = {provenance.epsilon:g}/255, {attacker} (n = {len(chosen)})")
    _say(f"  {'system':<12} clean  direct transfer  uint8  95% interval")
    found = []
    for row in robustness(bundle, attack, splits.test.take(chosen), args.systems or names):
        low, high = row.interval
        _say(
            f"  {row.system:<12} {row.clean:.3f}  {row.direct:.3f}  {row.transfer:.3f}    {row.uint8:.3f}  {low:.3f} to {high:.3f}"
        )
        found.append(row)
    frontier = []
    if args.frontier:
        _say(f"\nmixed rule over alpha: clean (n = {len(splits.test)}), robust (direct, n = {args.frontier})")
        for alpha, accuracy, robust in alpha_frontier(bundle, attack, splits.test, chosen[: args.frontier]):
            _say(f"  {alpha:.2f} {accuracy:.4f} {robust:.3f}")
            frontier.append((alpha, accuracy, robust))
    if args.json:
        figures = {"clean": clean, "rejections": rejections, "robust": [asdict(row) for row in found], "frontier": frontier}
        settings = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(
            json.dumps({"bundle": bundle.manifest.version, "settings": settings, **figures}, indent=1), encoding="utf-8"
        )
    return 0


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
    """Share of clean test images whose combined p-value is at most 5%, and at most 1%, for `full` and three ablations."""
    found = {}
    for name, choice in REJECTION_SYSTEMS.items():
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
        yield Robustness(
            system=system,
            n=len(images),
            clean=float(right.mean()),
            direct=float(survived[system].mean()),
            transfer=float(transfer.mean()),
            uint8=float(np.logical_and.reduce(list(whole.values())).mean()),
            interval=wilson(int(transfer.sum()), len(images)),
            right=transfer.tolist(),
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
