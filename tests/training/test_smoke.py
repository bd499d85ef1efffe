"""The whole way in small: train, calibrate, export, read back, serve, classify, and the same answers in torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from models.bundle import Bundle, InvalidBundle, read_bundle
from models.composition import EnsembleChoice, compose
from models.ensemble import Verdict, decide
from service.graph import build_graph
from service.graph_cache import GraphCache
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from tests.service.serving import serving
from tests.training.commands import answered, phalanx_train
from training.system import Members, load_networks
from training.train import SLOW, has_bfloat16_units


@pytest.fixture(scope="module")
def bundle(built: Path) -> Bundle:
    return read_bundle(built)


def test_the_bundle_says_where_it_comes_from_and_holds_a_row_for_every_subset(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert [member.name for member in manifest.members] == ["adversarial", "bayesian", "edge", "metric"]
    assert len(manifest.subsets) == 15
    assert manifest.provenance.recipe["name"] == "smoke"
    assert len(bundle.calibration) == 100
    assert manifest.member("bayesian").strength == "accurate"
    assert manifest.member("metric").centers
    assert all(member.temperature > 0 for member in manifest.members)


def test_the_fused_graph_of_real_members_is_free_of_control_flow(bundle: Bundle) -> None:
    model = onnx.load_from_string(build_graph(bundle, compose(bundle, EnsembleChoice(name="full"))))
    assert not {"If", "Loop", "Scan"} & {node.op_type for node in model.graph.node}


def test_torch_and_the_running_server_give_the_same_answer_on_real_tiles(
    built: Path, bundle: Bundle, example_tiles: list[Path], tmp_path: Path
) -> None:
    """What an attack differentiates is what is deployed: decoded, batched, fused, encoded."""
    pixels = np.stack([np.asarray(Image.open(tile)) for tile in example_tiles])
    ensemble = compose(bundle, EnsembleChoice(name="full"))
    members = Members(load_networks(bundle, torch.device("cpu")), bundle.manifest.masks.seed)
    with torch.inference_mode():
        expected = decide(ensemble, members.outputs(ensemble.members, torch.from_numpy(pixels)))

    images = [pb.Image(encoded=tile.read_bytes()) for tile in example_tiles]
    with serving(built, GraphCache(tmp_path), ensembles={"full": {}, "no-edge": {"without": ["edge"]}}) as running:
        answer = running.native.Classify(pb.ClassifyRequest(images=images))
        ablated = running.native.Classify(pb.ClassifyRequest(ensemble="no-edge", images=images))

    for i, result in enumerate(answer.results):
        got = result.classification
        assert np.allclose(got.probabilities, expected.probabilities[i], atol=1e-4)
        assert got.class_index == int(expected.label[i])
        assert got.verdict == int(expected.verdict[i]) + 1
        assert np.allclose([d.score for d in got.detections], expected.scores[i], rtol=1e-3, atol=1e-4)
        assert [vote.member for vote in got.votes] == [voter.name for voter in ensemble.voters]
    assert {vote.member for vote in ablated.results[0].classification.votes} == {"adversarial", "bayesian", "metric"}


def test_a_pixel_that_is_not_finite_is_rejected_in_torch(bundle: Bundle, example_tiles: list[Path]) -> None:
    """Bytes are always finite; a float attack need not be, and must not pass for clean."""
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(tile)) for tile in example_tiles[:2]])).float()
    pixels[1, 0, 0, 0] = float("nan")
    ensemble = compose(bundle, EnsembleChoice(name="full"))
    with torch.inference_mode():
        decision = decide(ensemble, Members(load_networks(bundle, torch.device("cpu")), 0).outputs(ensemble.members, pixels))
    assert int(decision.verdict[1]) == Verdict.REJECTED
    assert bool(decision.finite[0])
    assert not bool(decision.finite[1])


def test_weights_that_are_not_those_of_the_graph_are_refused(built: Path, tmp_path: Path) -> None:
    copied = tmp_path / "bundle"
    copied.mkdir()
    for file in built.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "edge.safetensors").write_bytes((copied / "metric.safetensors").read_bytes())
    with pytest.raises(InvalidBundle, match=r"edge\.safetensors"):
        read_bundle(copied)


def test_evaluate_prints_every_system_with_its_n(built: Path) -> None:
    ended = phalanx_train("evaluate", str(built), "--steps", "2", "--restarts", "1", "--frontier", "4")
    assert ended.returncode == 0, ended.stderr
    assert "margin-PGD-2, 1 starts, n = 4" in ended.stdout
    for system in ("adversarial", "bayesian", "edge", "metric", "full"):
        assert ended.stdout.count(f"\n  {system} ") >= 1
    assert "mixed rule over alpha" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["train", "eurosta"], "no recipe 'eurosta': shipped are", id="a recipe misspelt"),
        pytest.param(["train", "smoke", "--data", "/nowhere"], "cannot load images from '/nowhere'", id="data that is not there"),
        pytest.param(["train", "smoke", "--members", "magic"], "recipe smoke has no member magic; it has", id="a member misspelt"),
        pytest.param(["export", "smoke", "--runs", "/nowhere"], "train this member first", id="an export before training"),
        pytest.param(["evaluate", "/nowhere"], "/nowhere", id="a bundle that is not there"),
    ],
)
def test_a_clumsy_command_is_answered_in_one_sentence(arguments: list[str], says: str) -> None:
    ended = answered(*arguments)
    assert ended.returncode != 0
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_precision_may_be_chosen_and_is_not_changed_on_the_way(tmp_path: Path) -> None:
    train = ("train", "smoke", "--members", "metric", "--runs", str(tmp_path), "--threads", "1")
    ended = phalanx_train(*train, "--precision", "32-true")
    assert ended.returncode == 0, ended.stderr
    assert SLOW not in ended.stderr
    ended = phalanx_train(*train)
    assert ended.returncode == 2
    assert "was written by another recipe, precision or data" in ended.stderr
    assert (SLOW in ended.stderr) == (not has_bfloat16_units())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what the CPU has")
def test_what_the_cpu_has_is_what_linux_says() -> None:
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert has_bfloat16_units() == any(unit in cpu for unit in ("avx512_bf16", "amx_bf16", "bf16"))
