"""A tiny but real bundle for tests: four members of random weights as ONNX files, calibrated through ONNX Runtime.

    path = write_tiny_bundle(tmp_path / "bundle")

`metric` answers with squared distances to centers, `edge` sees thresholded edges, `adversarial` is a convolution, and
`bayesian` is stochastic.  All four may vote, so that there are 15 subsets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import spox.opset.ai.onnx.v17 as op
from numpy.typing import NDArray
from safetensors.numpy import save
from spox import Tensor, Var, argument, build

from models.bundle import (
    BundleParts,
    InputSpec,
    MemberParts,
    NetworkSpec,
    Provenance,
    Samples,
    StochasticSpec,
    SubsetRow,
    calibration_outputs,
    expected_outputs,
    link_weights,
    write_bundle,
)
from models.ensemble import RuleName
from models.manifest import Role, Strength, content_version
from models.member_session import onnx_member
from models.outputs import CALIBRATION_BATCH

CLASSES = ("annual crop", "forest", "meadow", "highway", "industrial", "pasture", "orchard", "houses", "river", "lake")
MASKS = StochasticSpec(samples=32, width=16, keep=0.7)
MASKS_SEED = 7

Weights = dict[str, NDArray[np.float32]]


def write_tiny_bundle(
    path: Path,
    seed: int = 0,
    height: int = 8,
    width: int = 8,
    images: int = 200,
    channels: int = 3,
    classes: Sequence[str] = CLASSES,
) -> Path:
    """Write the bundle that `tiny_parts` describes, and say where."""
    write_bundle(path, tiny_parts(seed, height, width, images, channels, classes))
    return path


def tiny_parts(
    seed: int = 0,
    height: int = 8,
    width: int = 8,
    images: int = 200,
    channels: int = 3,
    classes: Sequence[str] = CLASSES,
) -> BundleParts:
    """All of a tiny bundle, calibrated on `images` images; dataclasses.replace makes a different one of it."""
    image = InputSpec.model_validate({"height": height, "width": width, "channels": channels})
    members = tiny_members(image, len(classes), seed)
    runs = {member.name: onnx_member(member.name, member.onnx, member.stochastic) for member in members}
    calibration_images, sample_images = random_images(image, images, seed), random_images(image, 8, seed + 1)
    batches = [calibration_images[start : start + CALIBRATION_BATCH] for start in range(0, images, CALIBRATION_BATCH)]
    expected = expected_outputs(runs, sample_images, MASKS_SEED)
    return BundleParts(
        name="tiny",
        input=image,
        classes=classes,
        members=members,
        subsets=subset_rows([member.name for member in members], seed),
        masks_seed=MASKS_SEED,
        calibration=calibration_outputs(runs, batches, None, MASKS_SEED),
        calibration_source="random images",
        calibration_fingerprint=hashlib.sha256(calibration_images.tobytes()).hexdigest(),
        samples=Samples(sample_images, expected["adversarial"].argmax(axis=1).astype(np.int16), expected),
        provenance=Provenance(
            recipe={"name": "tiny", "steps": 0},
            seed=seed,
            data_name="random images",
            data_fingerprint="none",
            epsilon=4.0,
            commit="0000000",
            created="2026-11-24T00:00:00+00:00",
            libraries={"numpy": np.__version__},
        ),
        licenses={"weights": "MIT"},
        documents={"CARD.md": b"# A card\n"},
    )


def random_images(image: InputSpec, n: int, seed: int) -> NDArray[np.uint8]:
    """(n, h, w, c): a colour of its own for every image, and noise, so that members do not answer all alike."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(30, 225, (n, 1, 1, image.channels))
    return np.clip(base + rng.normal(0, 40, (n, *image.shape)), 0, 255).astype(np.uint8)


def subset_rows(classifiers: Sequence[str], seed: int = 0) -> tuple[SubsetRow, ...]:
    """A row for every subset, with weights that differ; mixed where there is an accurate and a robust side."""
    rng = np.random.default_rng(seed)
    rows = []
    for size in range(1, len(classifiers) + 1):
        for subset in combinations(sorted(classifiers), size):
            mixed = "bayesian" in subset and size > 1
            row = SubsetRow(
                classifiers=subset,
                rule=RuleName.MIXED if mixed else RuleName.WEIGHTED if size > 1 else RuleName.SOFT,
                weights=dict(zip(subset, rng.dirichlet(np.ones(size)).tolist(), strict=True)),
                alpha=0.75,
                scale=2.0,
                clean=0.9,
                robust=0.5,
                n=100,
            )
            rows.append(row)
    return tuple(rows)


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change manifest.json as `edit` does, and make its version agree again where it can."""
    manifest = bundle / "manifest.json"
    document = json.loads(manifest.read_text())
    edit(document)
    if isinstance(document.get("provenance"), dict):
        document["version"] = content_version(document)
    manifest.write_text(json.dumps(document))


def replace_file(bundle: Path, file: str, data: bytes) -> None:
    """Change a file of the bundle and its hash in the manifest, as somebody would who wants it accepted."""
    (bundle / file).write_bytes(data)

    def rehash(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("file") == file:
                node["sha256"] = hashlib.sha256(data).hexdigest()
            for child in node.values():
                rehash(child)
        elif isinstance(node, list):
            for child in node:
                rehash(child)

    edit_manifest(bundle, rehash)


def tiny_members(image: InputSpec, classes: int, seed: int = 0) -> list[MemberParts]:
    rng = np.random.default_rng(seed)
    pixels = image.height * image.width * image.channels

    def normal(*shape: int, std: float) -> NDArray[np.float32]:
        return rng.normal(0, std, shape).astype(np.float32)

    def colours(*shape: int, std: float) -> NDArray[np.float32]:
        """(pixels, ...): alike at every pixel, so that an image's colour matters more than its noise."""
        of_channel = rng.normal(0, std, (image.channels, *shape)) / (image.height * image.width)
        noise = rng.normal(0, std / pixels, (pixels, *shape))
        return (np.tile(of_channel, (image.height * image.width, *[1] * len(shape))) + noise).astype(np.float32)

    metric: Weights = {"weight": colours(classes, std=1.0), "centers": np.eye(classes, dtype=np.float32) * 2}
    edge: Weights = {"weight": normal(pixels // image.channels, classes, std=0.5), "bias": normal(classes, std=0.1)}
    adversarial: Weights = {
        "kernel": normal(8, image.channels, 3, 3, std=0.3),
        "weight": normal(8, classes, std=1.0),
        "bias": normal(classes, std=0.1),
    }
    bayesian: Weights = {
        "features": colours(MASKS.width, std=1.0),
        "weight": normal(MASKS.width, classes, std=0.8),
        "bias": normal(classes, std=0.1),
    }
    return [
        _member("metric", image, metric, _metric, roles=("classifier", "detector"), temperature=1.3, centers=True),
        _member("edge", image, edge, _edge, temperature=1.1),
        _member("adversarial", image, adversarial, _adversarial, temperature=0.9),
        _member(
            "bayesian",
            image,
            bayesian,
            _bayesian,
            strength="accurate",
            roles=("classifier", "detector"),
            temperature=1.2,
            stochastic=MASKS,
        ),
    ]


def _member(
    name: str,
    image: InputSpec,
    weights: Weights,
    network: Callable[[Var, Weights, dict[str, Var]], Var],
    *,
    temperature: float,
    strength: Strength = "robust",
    roles: tuple[Role, ...] = ("classifier",),
    stochastic: StochasticSpec | None = None,
    centers: bool = False,
) -> MemberParts:
    inputs = {"image": argument(Tensor(np.uint8, ("N", *image.shape)))}
    if stochastic:
        inputs["masks"] = argument(Tensor(np.float32, ("T", stochastic.width)))
    scaled = op.div(op.sub(op.cast(inputs["image"], to=np.float32), _constant(127.5)), _constant(64))
    stored = save(weights)
    return MemberParts(
        name=name,
        network=NetworkSpec(kind=name, config={"tiny": True}),
        strength=strength,
        roles=roles,
        onnx=link_weights(build(inputs, {"logits": network(scaled, weights, inputs)}).SerializeToString(), stored),
        weights=stored,
        temperature=temperature,
        parameters=sum(array.size for array in weights.values()),
        stochastic=stochastic,
        centers=centers,
    )


def _metric(image: Var, weights: Weights, _: dict[str, Var]) -> Var:
    """-|z - mu_k|^2  (n, K)."""
    z = op.matmul(_flat(image), op.constant(value=weights["weight"]))
    difference = op.sub(op.unsqueeze(z, _integers(1)), op.constant(value=weights["centers"]))  # (n, K, d)
    return op.neg(op.reduce_sum(op.mul(difference, difference), _integers(2), keepdims=0))


def _edge(_: Var, weights: Weights, inputs: dict[str, Var]) -> Var:
    grey = op.reduce_sum(op.cast(inputs["image"], to=np.float32), _integers(3))  # (n, h, w, 1), whole numbers
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32)[None, None]
    laplacian = op.conv(op.transpose(grey, perm=[0, 3, 1, 2]), op.constant(value=kernel), pads=[1, 1, 1, 1])
    edges = op.cast(op.greater(laplacian, _constant(60.5)), to=np.float32)
    return _linear(_flat(edges), weights)


def _adversarial(image: Var, weights: Weights, _: dict[str, Var]) -> Var:
    kernel = op.constant(value=weights["kernel"])
    features = op.relu(op.conv(op.transpose(image, perm=[0, 3, 1, 2]), kernel, pads=[1, 1, 1, 1]))
    return _linear(op.reduce_mean(features, axes=[2, 3], keepdims=0), weights)


def _bayesian(image: Var, weights: Weights, inputs: dict[str, Var]) -> Var:
    """Masks after the features: (T, n, K)."""
    features = op.relu(op.matmul(_flat(image), op.constant(value=weights["features"])))
    return _linear(op.mul(op.unsqueeze(inputs["masks"], _integers(1)), features), weights)


def _linear(x: Var, weights: Weights) -> Var:
    return op.add(op.matmul(x, op.constant(value=weights["weight"])), op.constant(value=weights["bias"]))


def _flat(x: Var) -> Var:
    return op.reshape(x, _integers(0, -1))


def _constant(value: float) -> Var:
    return op.constant(value=np.array(value, np.float32))


def _integers(*values: int) -> Var:
    return op.constant(value=np.array(values, np.int64))
