"""`phalanx-train export`: trained weights -> calibrated members -> ONNX -> one bundle."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors

from models.bundle import (
    Bundle,
    BundleParts,
    InputSpec,
    MemberParts,
    NetworkSpec,
    Provenance,
    Samples,
    StochasticSpec,
    calibration_outputs,
    expected_outputs,
    link_weights,
    write_bundle,
)
from models.manifest import Strength
from models.masks import draw_masks
from models.member_session import onnx_member
from models.networks.bayesian import BayesianNetwork
from models.networks.metric import MetricNetwork
from models.outputs import CALIBRATION_BATCH
from training.calibrate import Fit, fit
from training.data import Images, Splits, load_splits
from training.loop import network_config, read_weights
from training.onnx_export import check_parity, export_onnx
from training.provenance import commit
from training.recipe import Recipe, add_precision, load_recipe
from training.refused import TrainingRefused
from training.system import Members, frozen_network

LIBRARIES = ("torch", "lightning-fabric", "datasets", "numpy", "onnx", "onnxscript", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx-train export`."""
    parser.add_argument("recipe", help="the recipe whose trained weights lie in <runs>/<recipe>")
    parser.add_argument("--data", help="a local folder, or another hub id, in place of the recipe's data source")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where training left its weights (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="the bundle to write (default: <runs>/<recipe>/bundle)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    add_precision(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate and export; prints what was fitted. Run again after a kill: attacks that are done are not run again."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = load_recipe(args.recipe, args.precision)
    folder = args.runs / recipe.name
    check_output(args.output or folder / "bundle")
    splits = load_splits(recipe.data, args.data)
    bundle = export_bundle(recipe, splits, folder, args.output or folder / "bundle")
    sys.stdout.write(f"{bundle.path}: bundle {bundle.manifest.name} {bundle.manifest.version}\n")
    return 0


def check_output(path: Path) -> None:
    """Refuse at the start what would be refused at the end, hours later: a place that holds something else."""
    if path.exists() and not (path / "manifest.json").is_file() and (path.is_file() or any(path.iterdir())):
        raise TrainingRefused(f"{path}: expected a free place or a bundle to replace, got something else")


def export_bundle(recipe: Recipe, splits: Splits, folder: Path, output: Path) -> Bundle:
    """From the weights in `folder` to a bundle at `output`."""
    weights: dict[str, bytes] = {kind: read_weights(recipe, kind, splits, folder) for kind in recipe.members}
    configs: dict[str, dict[str, Any]] = {kind: network_config(recipe, kind, splits) for kind in recipe.members}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks: dict[str, torch.nn.Module] = {
        kind: frozen_network(kind, configs[kind], load_tensors(data), device) for kind, data in weights.items()
    }
    strengths: dict[str, Strength] = {k: "robust" if recipe.hardened(k) else "accurate" for k in recipe.members}
    fitted = fit(
        Members(networks, recipe.seed), strengths, splits.held_out, recipe.epsilon, recipe.calibration, recipe.seed,
        cache=folder / "calibration", report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip

    members = []
    for kind, network in networks.items():
        part = _member(kind, network.cpu(), configs[kind], weights[kind], strengths[kind], fitted, splits.held_out, recipe.seed)
        members.append(part)
    runs = {part.name: onnx_member(f"{part.name}.onnx", part.onnx, part.stochastic) for part in members}
    samples = _samples(splits.calibration)
    parts = BundleParts(
        name=recipe.name,
        input=InputSpec.model_validate(dict(zip(("height", "width", "channels"), splits.shape, strict=True))),
        classes=splits.classes,
        members=members,
        subsets=fitted.subsets,
        deciding=recipe.calibration.deciding,
        masks_seed=recipe.seed,
        calibration=calibration_outputs(
            runs, _in_batches(splits.calibration.pixels), splits.calibration.labels.astype(np.int16), recipe.seed
        ),
        calibration_source=f"{splits.source}, calibration images",
        calibration_fingerprint=hashlib.sha256(splits.calibration.pixels.tobytes()).hexdigest(),
        samples=Samples(samples.pixels, samples.labels.astype(np.int16), expected_outputs(runs, samples.pixels, recipe.seed)),
        provenance=_provenance(recipe, splits),
        licenses=dict(recipe.licenses),
    )
    return write_bundle(output, parts)


def _member(
    kind: str,
    network: torch.nn.Module,
    config: dict[str, Any],
    weights: bytes,
    strength: Strength,
    fitted: Fit,
    images: Images,
    masks_seed: int,
) -> MemberParts:
    stochastic, masks = None, None
    if isinstance(network, BayesianNetwork):
        stochastic = StochasticSpec(samples=network.config.samples, width=network.mask_width, keep=network.config.keep)
        masks = draw_masks(masks_seed, stochastic.samples, stochastic.width, stochastic.keep)
    model = export_onnx(network, images.pixels)
    worst = check_parity(network, model, images.pixels, masks)
    print(f"{kind}: torch and ONNX Runtime agree within {worst:.1e} at batch 1, 2 and 7", file=sys.stderr)
    detects = stochastic is not None or isinstance(network, MetricNetwork)
    return MemberParts(
        name=kind,
        network=NetworkSpec(kind=kind, config=config),
        strength=strength,
        roles=("classifier", "detector") if detects else ("classifier",),
        onnx=link_weights(model, weights),
        weights=weights,
        temperature=fitted.temperatures[kind],
        parameters=sum(p.numel() for p in network.parameters()),
        stochastic=stochastic,
        centers=isinstance(network, MetricNetwork),
    )


def _samples(images: Images) -> Images:
    """The first image of every class."""
    first = [int(np.flatnonzero(images.labels == label)[0]) for label in np.unique(images.labels)]
    return images.take(np.array(first))


def _in_batches(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(pixels), CALIBRATION_BATCH):
        yield pixels[start : start + CALIBRATION_BATCH]


def _provenance(recipe: Recipe, splits: Splits) -> Provenance:
    return Provenance(
        recipe=recipe.model_dump(mode="json"),
        seed=recipe.seed,
        data_name=splits.source,
        data_fingerprint=splits.fingerprint,
        epsilon=recipe.epsilon,
        commit=commit(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
    )
