"""`phalanx-train evaluate`: clean accuracy, calibration error, rejections and proofs of a bundle, its frontier over alpha."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
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
from training.attacks.pgd import Logits, margin_pgd
from training.data import Images, splits_of
from training.evaluation.proofs import proven_on
from training.evaluation.subjects import full_and_members
from training.refused import TrainingRefused
from training.step import step_generator
from training.system import Members, System, load_networks, log_probabilities

FRONTIER = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx-train evaluate`."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--data", help="a local folder, or another hub id, in place of the recipe's data source")
    parser.add_argument(
        "--frontier", type=int, default=0, metavar="N", help="also attack the mixed rule at every alpha on N images"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of the frontier's margin-PGD (default: %(default)s)")
    parser.add_argument("--restarts", type=int, default=5, help="starts of the frontier's margin-PGD (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of the starts (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument(
        "--other-data", action="store_true", help="score on data that the bundle was not made with, which is refused otherwise"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; every figure carries its n. What attacks leave is `phalanx-train attack`'s to say."""
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle = read_bundle(args.bundle)
    if args.json is not None and not args.json.parent.is_dir():
        raise TrainingRefused(f"--json {args.json}: {args.json.parent} is no folder")
    splits = splits_of(bundle, args.data, args.other_data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    members = Members(load_networks(bundle, device), bundle.manifest.masks.seed)

    _say(f"bundle {bundle.manifest.name} {bundle.manifest.version}, commit {bundle.manifest.provenance.commit}, seed {args.seed}")
    clean = clean_figures(bundle, members, splits.test)
    _say(f"\nclean, test split (n = {len(splits.test)}): accuracy, expected calibration error of the confidence")
    for name, (accuracy, calibration_error) in clean.items():
        _say(f"  {name:<12} {accuracy:.4f} {calibration_error:.4f}")
    if proofs := proven_figures(bundle, members, splits.test):
        _say(f"\nproven by interval bounds at epsilon {bundle.manifest.provenance.epsilon:g}, test split (n = {len(splits.test)})")
        for name, share in proofs.items():
            _say(f"  {name:<12} {share:.4f}")
    rejections = rejection_figures(bundle, members, splits.test)
    _say(f"\nclean rejections, test split (n = {len(splits.test)}): at a rate of 5%, at 1%")
    for name, (five, one) in rejections.items():
        _say(f"  {name:<12} {five:.4f} {one:.4f}")
    frontier = []
    if args.frontier:
        tried = np.random.default_rng(args.seed).permutation(len(splits.test))[: args.frontier]
        attack = f"margin-PGD-{args.steps}, {args.restarts} starts"
        _say(f"\nmixed rule over alpha: clean (n = {len(splits.test)}), robust ({attack}, n = {len(tried)})")
        for alpha, accuracy, robust in alpha_frontier(bundle, members, splits.test, tried, args.steps, args.restarts, args.seed):
            _say(f"  {alpha:.2f} {accuracy:.4f} {robust:.3f}")
            frontier.append((alpha, accuracy, robust))
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        figures = {"clean": clean, "proven": proofs, "rejections": rejections, "frontier": frontier}
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


def proven_figures(bundle: Bundle, members: Members, test: Images) -> dict[str, float]:
    """Share of test images on all of whose ball bounds prove the class right, of `full` and of members alone that have bounds."""
    manifest = bundle.manifest
    systems = {subject.name: System(compose(bundle, subject.choice), members) for subject in full_and_members(manifest)}
    found = {name: proven_on(system, test, manifest.provenance.epsilon) for name, system in systems.items()}
    return {name: float(proven.mean()) for name, proven in found.items() if proven is not None}


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


def alpha_frontier(
    bundle: Bundle, members: Members, test: Images, chosen: NDArray[np.int64], steps: int, restarts: int, seed: int
) -> Iterator[tuple[float, float, float]]:
    """(alpha, clean accuracy, robust accuracy) of `full` under the mixed rule, attacked afresh at every alpha."""
    ensemble = compose(bundle, EnsembleChoice(name="full", rule=RuleName.MIXED))
    images, device = test.take(chosen), members.device
    pixels, y = torch.from_numpy(images.pixels).to(device).float(), torch.from_numpy(images.labels).to(device)
    attack = partial(margin_pgd, pixels=pixels, y=y, epsilon=bundle.manifest.provenance.epsilon, steps=steps, restarts=restarts)
    for alpha in FRONTIER:
        mixed = System(replace(ensemble, alpha=alpha), members)
        found = attack(mixed.log_probabilities, generator=step_generator(device, seed, "evaluate"))
        robust = (found.margin <= 0) & (mixed.judge(found.pixels).label == y)
        yield alpha, float(_right(mixed.log_probabilities, test.pixels, test.labels).mean()), float(robust.float().mean())


def _parts(pixels: NDArray[np.generic], size: int = 256) -> list[Tensor]:
    return [torch.from_numpy(pixels[i : i + size]) for i in range(0, len(pixels), size)]


def _right(answer: Logits, pixels: NDArray[np.generic], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    with torch.inference_mode():
        found = torch.cat([answer(part).argmax(1).cpu() for part in _parts(pixels)])
    return np.asarray(found.numpy() == labels)


def _p_values(ensemble: Ensemble, members: Members, pixels: Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(decide(ensemble, members.outputs(ensemble.members, pixels)).p_value.cpu().numpy())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
