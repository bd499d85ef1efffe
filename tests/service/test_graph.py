"""The fused graph is the members and the rule, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from PIL import Image

import models
from models.bundle import Bundle, read_bundle
from models.composition import EnsembleChoice, compose
from models.ensemble import Decision, Ensemble, RuleName, decide
from models.masks import draw_masks
from models.member_session import member_runs
from service.graph import CONTROL_FLOW, build_graph, op_types
from tests.bundles import random_images, write_tiny_bundle
from tests.models.ensembles import assert_alike, on_torch

Feed = dict[str, NDArray[Any]]

SHIPPED = [manifest.parent for manifest in sorted(Path(models.__file__).parent.glob("bundles/*/manifest.json"))]
CHOICES: dict[str, dict[str, Any]] = {
    "full": {},
    "no edge": {"without": ("edge",)},
    "no bayesian": {"without": ("bayesian",)},
    "no vote for bayesian": {"roles": {"bayesian": ("detector",)}},
    "votes only": {"detectors": ()},
    "adversarial alone": {"without": ("metric", "edge", "bayesian")},
    "hard vote": {"rule": RuleName.MAJORITY},
    "median": {"rule": RuleName.MEDIAN},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(write_tiny_bundle(tmp_path_factory.mktemp("graph") / "bundle", height=64, width=64))


@pytest.fixture(scope="module")
def tiles(example_tiles: list[Path]) -> NDArray[np.uint8]:
    """Real ones, (20, 64, 64, 3)."""
    return np.stack([np.asarray(Image.open(tile).convert("RGB")) for tile in example_tiles])


class Fused:
    """A fused graph in a session, beside the ensemble that it was built from."""

    def __init__(self, bundle: Bundle, **choice: Any) -> None:
        self.bundle = bundle
        self.ensemble: Ensemble = compose(bundle, EnsembleChoice(name="fused", **choice))
        self.graph = build_graph(bundle, self.ensemble)
        self.model = onnx.load_model_from_string(self.graph)
        self.session = ort.InferenceSession(self.graph, providers=["CPUExecutionProvider"])

    def __call__(self, images: NDArray[np.uint8], masks: NDArray[np.float32] | None = None) -> Decision:
        feed: Feed = {"image": images}
        if "bayesian" in self.ensemble.members:
            feed["masks"] = fixed_masks(self.bundle) if masks is None else masks
        return Decision(*self.session.run([column.name for column in fields(Decision)], feed))


def fixed_masks(bundle: Bundle) -> NDArray[np.float32]:
    spec = bundle.manifest.member("bayesian").stochastic
    assert spec is not None
    return draw_masks(bundle.manifest.masks.seed, spec.samples, spec.width, spec.keep)


@pytest.fixture(scope="module", params=CHOICES)
def fused(request: pytest.FixtureRequest, bundle: Bundle) -> Fused:
    return Fused(bundle, **CHOICES[request.param])


@pytest.fixture(scope="module")
def full(bundle: Bundle) -> Fused:
    return Fused(bundle)


def separately(fused: Fused, images: NDArray[np.uint8]) -> Feed:
    """What each member answers in a session of its own."""
    masks, runs = fixed_masks(fused.bundle), member_runs(fused.bundle)
    return {name: runs[name].logits(images, masks if runs[name].stochastic else None) for name in fused.ensemble.members}


def test_the_graph_answers_as_its_members_and_the_rule_do(fused: Fused, tiles: NDArray[np.uint8]) -> None:
    images = np.concatenate([tiles, random_images(fused.bundle.manifest.input, 12, seed=3)])
    assert_alike(fused.ensemble, decide(fused.ensemble, separately(fused, images)), fused(images))


@pytest.mark.parametrize("rule", RuleName)
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_members_get_one_answer_from_all_back_ends(folder: Path, rule: RuleName, tiles: NDArray[np.uint8]) -> None:
    shipped = Fused(read_bundle(folder, weights=False), rule=rule)
    images = shipped.bundle.samples.images
    images = np.concatenate([images, tiles]) if images.shape[1:] == tiles.shape[1:] else images
    outputs = separately(shipped, images)
    expected = decide(shipped.ensemble, outputs)
    assert_alike(shipped.ensemble, expected, shipped(images))
    assert_alike(shipped.ensemble, expected, on_torch(shipped.ensemble, outputs))


def test_there_is_no_control_flow(fused: Fused) -> None:
    assert not CONTROL_FLOW.intersection(op_types(fused.model))


def test_control_flow_is_found_wherever_it_hides() -> None:
    branch = onnx.helper.make_graph([onnx.helper.make_node("Scan", [], ["y"])], "branch", [], [])
    outer = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    function = onnx.helper.make_function("d", "f", [], ["y"], [onnx.helper.make_node("Loop", [], ["y"])], [])
    model = onnx.helper.make_model(onnx.helper.make_graph([outer], "outer", [], []), functions=[function])
    assert set(op_types(model)) == {"If", "Scan", "Loop"}


def test_inputs_are_the_image_and_masks_where_they_are_needed(fused: Fused) -> None:
    inputs = {value.name: (value.type, value.shape) for value in fused.session.get_inputs()}
    expected = {"image": ("tensor(uint8)", ["N", 64, 64, 3])}
    if "bayesian" in fused.ensemble.members:
        expected["masks"] = ("tensor(float)", [32, 16])
    assert inputs == expected


def test_outputs_are_the_columns_of_a_decision(fused: Fused, tiles: NDArray[np.uint8]) -> None:
    assert [value.name for value in fused.session.get_outputs()] == [column.name for column in fields(Decision)]
    voters, detectors = len(fused.ensemble.voters), len(fused.ensemble.detectors)
    decision = fused(tiles[:5])
    shapes = {"probabilities": (5, 10), "votes": (5, voters, 10), "scores": (5, detectors), "p_values": (5, detectors)}
    for column in fields(Decision):
        value = getattr(decision, column.name)
        assert value.shape == shapes.get(column.name, (5,)), column.name
        whole = {"label": "int64", "verdict": "int64", "reason": "int64", "finite": "bool"}
        assert value.dtype == whole.get(column.name, "float32"), column.name


def weights(model: onnx.ModelProto) -> Iterator[bytes]:
    for tensor in model.graph.initializer:
        yield onnx.numpy_helper.to_array(tensor).tobytes()
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from (onnx.numpy_helper.to_array(attribute.t).tobytes() for attribute in node.attribute)


def test_of_an_absent_member_there_is_no_trace(fused: Fused, full: Fused) -> None:
    held = set(weights(fused.model))
    for name, data in fused.bundle.onnx_bytes.items():
        large = {content for content in weights(onnx.load_model_from_string(data)) if len(content) > 256}
        assert large
        assert (large <= held) if name in fused.ensemble.members else not (large & held), name
    assert len(fused.graph) <= len(full.graph) + 4096


def test_batched_equals_unbatched(full: Fused, tiles: NDArray[np.uint8]) -> None:
    together = full(tiles[:7])
    for size in (1, 2):
        alone = full(tiles[:size])
        for column in ("probabilities", "votes", "scores"):
            expected = getattr(together, column)[:size]
            np.testing.assert_allclose(getattr(alone, column), expected, rtol=1e-5, atol=1e-5, err_msg=column)
        for column in ("label", "verdict"):
            np.testing.assert_array_equal(getattr(alone, column), getattr(together, column)[:size])


def test_uncertainty_survives_the_runtimes_optimisers(full: Fused, tiles: NDArray[np.uint8]) -> None:
    """ONNX Runtime removes a Dropout in training mode without a word; masks are an input, and stay."""
    variance = full(tiles).scores[:, 1]
    assert (variance > 1e-6).all()
    others = full(tiles, draw_masks(8, 32, 16, 0.7)).scores[:, 1]
    assert (variance != others).all()
    assert full(tiles, np.ones((32, 16), np.float32)).scores[:, :2].max() < 1e-6


def test_the_same_ensemble_gives_the_same_bytes(bundle: Bundle, full: Fused) -> None:
    assert build_graph(bundle, full.ensemble) == full.graph
