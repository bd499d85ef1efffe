"""Everything a config names, loaded over one bundle; and the cache that makes a second start quick."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load, save

from models.bundle import Bundle, InvalidBundle, read_bundle
from models.composition import EnsembleChoice, InvalidEnsemble, compose
from models.ensemble import Ensemble, Verdict
from service.batcher import Draining
from service.config import ServiceConfig
from service.ensembles import load_ensembles
from service.graph_cache import KEPT, GraphCache, graph_key, user_cache
from service.inspect import inspect_bundle
from service.metrics import Metrics
from tests.bundles import random_images, replace_file, write_tiny_bundle

SECONDS = 20
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="there is no NVIDIA device"))
FOUR: dict[str, dict[str, Any]] = {
    "full": {},
    "no-edge": {"without": ["edge"]},
    "votes-only": {"detectors": []},
    "hard-vote": {"rule": "majority", "reject_rate": 0.02},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("ensembles") / "bundle")


@pytest.fixture(scope="module")
def bundle(path: Path) -> Bundle:
    return read_bundle(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> GraphCache:
    return GraphCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def full(bundle: Bundle) -> Ensemble:
    return compose(bundle, EnsembleChoice(name="full"))


def config(path: Path, ensembles: dict[str, dict[str, Any]], provider: str = "cpu") -> ServiceConfig:
    device = {"provider": provider, "strict": True, "threads": 1}
    return ServiceConfig.model_validate({"bundle": path, "ensembles": ensembles, "device": device})


def test_every_named_ensemble_answers_in_the_order_of_the_config(path: Path, cache: GraphCache) -> None:
    metrics = Metrics()
    with load_ensembles(config(path, FOUR), metrics, cache) as ensembles:
        ensembles.announce(metrics)
        assert list(ensembles) == list(FOUR)
        assert ensembles.default is ensembles["full"]
        images = random_images(ensembles.bundle.manifest.input, 3, seed=3)
        results = {name: each.batcher.submit(images).result(SECONDS).decision for name, each in ensembles.items()}
        assert {name: decision.votes.shape[1] for name, decision in results.items()} == {
            "full": 4,
            "no-edge": 3,
            "votes-only": 4,
            "hard-vote": 4,
        }
        assert (results["votes-only"].verdict == Verdict.UNSCREENED).all()
        np.testing.assert_allclose(results["full"].votes, results["hard-vote"].votes, atol=1e-6)
        assert ensembles["hard-vote"].ensemble.reject_rate == 0.02
        assert ensembles["full"].ensemble.reject_rate == 0.01
    value = metrics.registry.get_sample_value
    for name in FOUR:
        assert value("phalanx_provider_info", {"ensemble": name, "provider": "CPUExecutionProvider"}) == 1
        assert value("phalanx_cuda_graphs", {"ensemble": name}) == 0
        assert value("phalanx_batch_images_sum", {"ensemble": name}) == 3
    manifest = ensembles.bundle.manifest
    assert value("phalanx_bundle_info", {"bundle": "tiny", "version": manifest.version}) == 1


def test_what_loading_needed_is_let_go(path: Path, cache: GraphCache) -> None:
    with load_ensembles(config(path, {"full": {}}), Metrics(), cache) as ensembles:
        assert not ensembles.bundle.onnx_bytes
        assert not ensembles.bundle.weights


@pytest.mark.parametrize("provider", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_draining_ends_every_queue_and_every_thread(path: Path, cache: GraphCache, provider: str) -> None:
    before = set(threading.enumerate())
    ensembles = load_ensembles(config(path, FOUR, provider), Metrics(), cache)
    images = random_images(ensembles.bundle.manifest.input, 3, seed=3)
    futures = [each.batcher.submit(images) for each in ensembles.values() for _ in range(5)]
    assert ensembles.drain(SECONDS)
    assert all(future.exception(0) is None for future in futures)
    assert not set(threading.enumerate()) - before
    for each in ensembles.values():
        with pytest.raises(Draining, match="shutting down"):
            each.batcher.submit(images)


def _of_another_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "Nope"


def _of_swapped_inputs(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def _with_control_flow(model: onnx.ModelProto) -> None:
    branch = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["logits_"], ["out"])], "branch", [], [
        onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    ])  # fmt: skip
    model.graph.node[-1].output[0] = "logits_"
    yes = onnx.helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["always"], value=yes))
    model.graph.node.append(onnx.helper.make_node("If", ["always"], ["logits"], then_branch=branch, else_branch=branch))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (_of_another_operator, r"adversarial\.onnx: expected a graph that ONNX Runtime can run"),
        (_of_swapped_inputs, "adversarial"),
        (_with_control_flow, r"adversarial\.onnx: expected a graph without control flow, got If"),
    ],
)
def test_a_graph_that_cannot_be_fused_or_run_is_refused_by_name(
    path: Path, tmp_path: Path, edit: Callable[[onnx.ModelProto], None], sentence: str
) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "bundle"))
    model = onnx.load(copy / "adversarial.onnx")
    edit(model)
    replace_file(copy, "adversarial.onnx", model.SerializeToString())
    with pytest.raises(InvalidBundle, match=sentence):
        load_ensembles(config(copy, {"full": {}}), Metrics(), GraphCache(None))
    assert inspect_bundle(copy).problem is not None


@pytest.mark.parametrize(
    ("broken", "error", "sentence"),
    [
        pytest.param(
            {"without": ["metric", "edge", "adversarial", "bayesian"]},
            InvalidEnsemble,
            "classifier",
            id="no classifier left",
        ),
        pytest.param({"without": ["bayes"]}, InvalidEnsemble, "bayesian", id="an unknown member, and the nearest one named"),
        pytest.param(
            {"without": ["bayesian"], "detectors": ["variance"]},
            InvalidEnsemble,
            "variance",
            id="a detector without its member",
        ),
        pytest.param({"reject_rate": 0.001}, InvalidEnsemble, "0.001", id="a rate finer than 200 images resolve"),
    ],
)
def test_one_bad_ensemble_refuses_the_whole_start_and_leaves_nothing_running(
    path: Path, cache: GraphCache, broken: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    before = threading.active_count()
    with pytest.raises(error, match=sentence):
        load_ensembles(config(path, {"full": {}, "broken": broken}), Metrics(), cache)
    assert threading.active_count() == before


def test_a_bundle_altered_on_disk_is_refused(tmp_path: Path, cache: GraphCache) -> None:
    path = write_tiny_bundle(tmp_path / "bundle")
    with (path / "edge.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InvalidBundle, match=r"edge\.onnx: expected SHA-256"):
        load_ensembles(config(path, {"full": {}}), Metrics(), cache)


def test_a_sample_answer_that_was_altered_with_its_hash_is_refused(tmp_path: Path, cache: GraphCache) -> None:
    path = write_tiny_bundle(tmp_path / "bundle")
    tensors = load((path / "samples.safetensors").read_bytes())
    tensors["expected.edge"] = np.roll(tensors["expected.edge"], 1, axis=1)
    replace_file(path, "samples.safetensors", save(tensors))
    with pytest.raises(InvalidBundle, match="self-test: member edge, sample image"):
        load_ensembles(config(path, {"full": {}}), Metrics(), cache)


def test_a_second_start_does_not_import_what_builds_graphs(path: Path, tmp_path: Path) -> None:
    script = """if True:
        import json, sys
        from pathlib import Path
        from service.config import ServiceConfig
        from service.ensembles import load_ensembles
        from service.graph_cache import GraphCache
        from service.metrics import Metrics
        device = {"provider": "cpu", "threads": 1}
        config = ServiceConfig.model_validate({"bundle": sys.argv[1], "device": device})
        load_ensembles(config, Metrics(), GraphCache(Path(sys.argv[2]))).close()
        print(json.dumps([name for name in ("ndonnx", "spox", "torch") if name in sys.modules]))
    """
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "cache")]
    starts = [subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path.cwd()) for _ in range(2)]
    assert [json.loads(start.stdout) for start in starts] == [["ndonnx", "spox"], []]


def test_a_cached_graph_is_the_one_that_was_built(bundle: Bundle, full: Ensemble, tmp_path: Path) -> None:
    built = GraphCache(None).fused(bundle, full)
    cache = GraphCache(tmp_path / "a" / "b")
    assert cache.fused(bundle, full) == cache.fused(bundle, full) == built
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == [f"{graph_key(bundle, full)}.onnx"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-10], id="cut short"),
        pytest.param(lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], id="one bit flipped"),
        pytest.param(lambda data: data[:0], id="empty"),
    ],
)
def test_a_damaged_file_is_built_again(bundle: Bundle, full: Ensemble, tmp_path: Path, damage: Any) -> None:
    cache = GraphCache(tmp_path)
    graph = cache.fused(bundle, full)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert cache.fused(bundle, full) == graph
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_start(bundle: Bundle, full: Ensemble, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert GraphCache(tmp_path / "file" / "cache").fused(bundle, full)


def test_the_graphs_used_last_are_kept(bundle: Bundle, full: Ensemble, tmp_path: Path) -> None:
    cache = GraphCache(tmp_path)
    cache.fused(bundle, full)
    (own,) = tmp_path.iterdir()
    for age in range(KEPT):
        old = tmp_path / f"{age}.onnx"
        old.write_bytes(b"")
        os.utime(old, (1000 + age, 1000 + age))
    own.unlink()
    cache.fused(bundle, full)
    assert own.exists()
    assert len(list(tmp_path.iterdir())) == KEPT
    assert not (tmp_path / "0.onnx").exists()


def test_a_graphs_name_changes_with_all_that_it_is_made_of_and_with_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    def key(of: Bundle = bundle, **choice: Any) -> str:
        return graph_key(of, compose(of, EnsembleChoice(**({"name": "full"} | choice))))

    other = read_bundle(write_tiny_bundle(tmp_path / "bundle", seed=1))
    differing = [
        key(),
        key(without=("edge",)),
        key(rule="soft"),
        key(detectors=()),
        key(detectors=("distance",)),
        key(review_rate=0.1),
        key(masks="fresh"),
        key(roles={"bayesian": ("detector",)}),
        key(other),
    ]
    assert len(set(differing)) == len(differing)
    assert key(name="another") == key()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/phalanx/graphs", id="XDG_CACHE_HOME"),
        pytest.param({"HOME": "/h"}, "/h/.cache/phalanx/graphs", id="the home without it"),
        pytest.param({"XDG_CACHE_HOME": "x", "HOME": "/h"}, "/h/.cache/phalanx/graphs", id="a relative one is ignored"),
        pytest.param({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/phalanx/graphs", id="an empty one is ignored"),
        pytest.param({}, None, id="nowhere"),
    ],
)
def test_where_graphs_are_kept(environment: dict[str, str], expected: str | None) -> None:
    assert user_cache(environment) == (Path(expected) if expected else None)
