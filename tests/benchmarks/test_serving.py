"""benchmarks/serving without the peers: what is written for them, what they compute, and what is made of the figures."""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.bare import BareGraph, bare_graph
from benchmarks.serving import agreement, bare, mlserver, peers, report, triton
from benchmarks.serving.perf_analyzer import Figures, LoadFailed, input_data, read_report
from benchmarks.serving.results import BARE, BATCHES, CONCURRENCY, MLSERVER, NATIVE, PHALANX, SERVERS, TRITON, Cell, Results, Tried
from benchmarks.serving.rule_file import OUTPUTS, read_rule, write_rule
from benchmarks.throughput import Setting
from models.bundle import Bundle, read_bundle
from models.composition import EnsembleChoice, compose
from models.ensemble import Ensemble, decide
from service.config import DeviceConfig, ServiceConfig
from service.engine import open_session
from service.pb.inference import open_inference_pb2 as pb
from tests.bundles import write_tiny_bundle

REPORT = """Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency
16,841.3,12,18754,20011,21500,30250
"""
FACTS = {
    "bundle": "eurosat 0123",
    "machine": "a machine",
    "triton": "t",
    "mlserver": "m",
    "client": "c",
    "cores": 2,
    "seconds": 1.0,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"))


@pytest.fixture(scope="module")
def graph(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> BareGraph:
    return bare_graph(ServiceConfig(bundle=bundle.path), tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def ensemble(bundle: Bundle) -> Ensemble:
    return compose(bundle, EnsembleChoice(name="full"))


# Its report, its input


def test_figures_are_read_from_the_report_of_perf_analyzer() -> None:
    assert read_report(REPORT) == Figures(images_per_second=841.3, p50=18.754, p99=30.25)


def test_a_report_without_a_row_is_a_failure() -> None:
    with pytest.raises(LoadFailed, match="expected one row"):
        read_report(REPORT.splitlines()[0])


def test_it_is_given_the_very_bytes_of_every_image() -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    entries = json.loads(input_data(images))["data"]
    assert [base64.b64decode(entry["image"]["b64"]) for entry in entries] == [image.tobytes() for image in images]


# Triton


def test_a_rule_read_back_decides_as_the_ensemble_it_was_written_from(ensemble: Ensemble, tmp_path: Path) -> None:
    write_rule(tmp_path, ensemble)
    again = read_rule(tmp_path)
    assert (again.voters, again.rule, again.detectors, again.members) == (
        ensemble.voters,
        ensemble.rule,
        ensemble.detectors,
        ensemble.members,
    )
    assert (again.alpha, again.scale, again.review_rate) == (ensemble.alpha, ensemble.scale, ensemble.review_rate)
    for mine, theirs in zip((*again.tables, again.combined), (*ensemble.tables, ensemble.combined), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@dataclass
class Tensor:
    """Of Triton's Python backend."""

    tensor_name: str
    values: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.values


Request = Mapping[str, Tensor]


def served(repository: Path, model: str) -> Callable[[list[Request]], list[dict[str, NDArray[Any]]]]:
    """A model of the repository, as its backend would load and ask it."""
    backend = ModuleType("triton_python_backend_utils")
    backend.__dict__.update(
        Tensor=Tensor,
        InferenceResponse=lambda output_tensors: {each.tensor_name: each.values for each in output_tensors},
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    spec = importlib.util.spec_from_file_location(f"triton_{model}", repository / model / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, backend.__name__, backend)
        spec.loader.exec_module(module)
    loaded = module.TritonPythonModel()
    loaded.initialize({"model_repository": str(repository / model), "model_version": "1"})
    execute: Callable[[list[Request]], list[dict[str, NDArray[Any]]]] = loaded.execute
    return execute


@pytest.mark.parametrize("onnx_rule", [pytest.param(False, id="rule in NumPy"), pytest.param(True, id="rule in ONNX Runtime")])
def test_the_steps_of_the_repository_answer_as_the_fused_graph(
    bundle: Bundle, ensemble: Ensemble, graph: BareGraph, tmp_path: Path, onnx_rule: bool
) -> None:
    """Requests of one, three and twenty images together; the last are computed in two parts."""
    triton.write_repository(tmp_path, bundle, ensemble, triton.TritonSetting(1, 0, onnx_rule))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, *graph.shape), dtype=np.uint8) for n in (1, 3, 20)]
    asked: list[Request] = [{"image": Tensor("image", each)} for each in images]
    steps = {name: served(tmp_path, name)(asked) for name in ensemble.members}
    gathered: list[Request] = [
        {name: Tensor(name, answers[index]["logits"]) for name, answers in steps.items()} for index in range(len(images))
    ]
    expected = open_session(graph.content, DeviceConfig())
    for given, found in zip(images, served(tmp_path, "rule")(gathered), strict=True):
        columns = dict(zip(OUTPUTS, expected.run(list(OUTPUTS), graph.feeds(given)), strict=True))
        wanted = {name: np.asarray(column).reshape(len(given), -1) for name, column in columns.items()}
        agreement.check("triton", found, wanted, rank=1 / (len(bundle.calibration) + 1))


def test_the_configuration_of_every_step_names_its_tensors_and_its_instances(
    bundle: Bundle, ensemble: Ensemble, tmp_path: Path
) -> None:
    triton.write_repository(tmp_path, bundle, ensemble, triton.TritonSetting(2, 500, preferred=(4, 8)))
    assert {folder.name for folder in tmp_path.iterdir()} == {*ensemble.members, "rule", triton.MODEL}
    member = (tmp_path / "bayesian" / "config.pbtxt").read_text()
    assert "dynamic_batching { max_queue_delay_microseconds: 500, preferred_batch_size: [4, 8] }" in member
    assert "count: 2" in member
    assert '{ name: "logits", data_type: TYPE_FP32, dims: [32, 10] }' in member  # masks, classes
    assert (tmp_path / "bayesian" / "1" / "masks.npy").exists()
    whole = (tmp_path / triton.MODEL / "config.pbtxt").read_text()
    assert whole.count("model_name") == len(ensemble.members) + 1
    for name in OUTPUTS:
        assert f'output_map {{ key: "{name}", value: "{name}" }}' in whole


def test_a_rule_graph_is_the_rule(bundle: Bundle, ensemble: Ensemble) -> None:
    import onnxruntime as ort

    rng = np.random.default_rng(1)
    shapes = {name: (32, 5, 10) if name == "bayesian" else (5, 10) for name in ensemble.members}
    logits = {name: rng.normal(0, 3, shape).astype(np.float32) for name, shape in shapes.items()}
    found = ort.InferenceSession(triton.rule_graph(bundle, ensemble)).run(list(OUTPUTS), logits)
    decision = decide(ensemble, logits)
    for name, column in zip(OUTPUTS, found, strict=True):
        np.testing.assert_allclose(column, getattr(decision, name), atol=1e-5, err_msg=name)


# MLServer


def test_mlserver_keeps_the_answers_that_perf_analyzer_wants(graph: BareGraph, tmp_path: Path) -> None:
    mlserver.write_model(tmp_path, graph, 10, mlserver.MlserverSetting(2, 8, 2.0))
    config = pb.ModelConfigResponse.FromString((tmp_path / "ModelConfig").read_bytes()).config
    assert [list(each.dims) for each in config.input] == [[8, 8, 3]]
    assert {each.name: list(each.dims) for each in config.output}["probabilities"] == [10]
    statistics = pb.ModelStatisticsResponse.FromString((tmp_path / "ModelStatistics").read_bytes())
    assert [each.name for each in statistics.model_stats] == [mlserver.MODEL]
    settings = json.loads((tmp_path / "model-settings.json").read_text())
    assert (settings["max_batch_size"], settings["max_batch_time"]) == (8, 0.002)
    assert settings["parameters"]["extra"]["threads"] == 1  # in each of the two workers
    assert json.loads((tmp_path / "settings.json").read_text())["parallel_workers"] == 2


def test_every_setting_has_a_name_of_its_own() -> None:
    names = [setting.name for setting in (*triton.SETTINGS, *mlserver.SETTINGS)]
    assert len(set(names)) == len(names)


def test_peers_that_were_not_made_are_told_how_to(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.serving\.peers"):
        peers.find(tmp_path)


# The bare session


def test_the_bare_session_takes_no_more_images_than_are_waiting(graph: BareGraph) -> None:
    two = Setting("two", open_session(graph.content, DeviceConfig()), 2, {})
    eights = replace(two, batch=8)
    swept = [bare.Swept(two, 10.0), bare.Swept(eights, 40.0), bare.Swept(replace(eights, callers=1), 30.0)]
    assert [bare.fastest(swept, images).images_per_second for images in (2, 8, 16)] == [10.0, 30.0, 40.0]


# Answers that agree


def answers(**changed: object) -> dict[str, NDArray[Any]]:
    columns = {"label": [[1], [2]], "verdict": [[0], [1]], "p_value": [[0.5], [0.01]], "probabilities": [[0.9, 0.1], [0.2, 0.8]]}
    return {name: np.array(value) for name, value in {**columns, **changed}.items()}


def test_answers_within_a_rank_and_a_rounding_agree() -> None:
    agreement.check("t", answers(p_value=[[0.51], [0.01]], probabilities=[[0.900001, 0.1], [0.2, 0.8]]), answers(), rank=0.01)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        pytest.param({"label": [[1], [1]]}, "expected label within 0", id="another label"),
        pytest.param({"verdict": [[0], [2]]}, "expected verdict within 0", id="another verdict"),
        pytest.param({"p_value": [[0.55], [0.01]]}, "expected p_value", id="a p-value ranks away"),
        pytest.param({"probabilities": [[0.9, np.nan], [0.2, 0.8]]}, "expected probabilities", id="not a number"),
        pytest.param({"p_value": [[0.5]]}, "of shape", id="an answer too few"),
    ],
)
def test_a_server_that_answers_otherwise_is_not_timed(changed: dict[str, object], says: str) -> None:
    with pytest.raises(agreement.Disagreement, match=says):
        agreement.check("t", answers(**changed), answers(), rank=0.01)


# Results and report


def filled(file: Path, triton_rate: float = 100.0, triton_p99: float = 60.0, bundle: str = "eurosat 0123") -> Results:
    results = Results(file)
    results.begin(FACTS | {"bundle": bundle})
    own = {
        TRITON: (triton_rate, triton_p99),
        PHALANX: (210.0, 20.0),
        NATIVE: (250.0, 15.0),
        MLSERVER: (50.0, 90.0),
        BARE: (300.0, 5.0),
    }
    for batch in BATCHES:
        for turn, (slow, fast) in enumerate([(10.0, 20.0), (40.0, 38.0)]):
            results.add(Tried(TRITON, batch, "slow", turn), Figures(slow, 1.0, 2.0))
            results.add(Tried(TRITON, batch, "fast", turn), Figures(fast, 1.0, 2.0))
        for server in SERVERS:
            rate, p99 = own[server]
            for concurrency in CONCURRENCY:
                for turn in range(2):
                    results.add(Cell(server, batch, concurrency, turn), Figures(rate + turn, p99 / 2, p99, client=2.0))
    return results


def test_a_run_that_was_cut_short_knows_what_it_has(tmp_path: Path) -> None:
    first = filled(tmp_path / "found.jsonl")
    again = Results(tmp_path / "found.jsonl")
    assert (again.facts, again.cells, again.tried) == (first.facts, first.cells, first.tried)
    assert again.chosen(TRITON, 1) == "fast"
    assert again.ratios("images_per_second", 1, 16) == [2.1, 211 / 101]


def test_what_a_server_that_costs_nothing_would_reach(tmp_path: Path) -> None:
    """300 images/s keep two cores busy for 6.67 ms an image; with 2 ms of the client that is 8.67, or 230.8 images/s."""
    most = filled(tmp_path / "found.jsonl").free_of_charge(1, 16)
    assert most[0] == pytest.approx(2000 / (2000 / 300 + 2) / 100)


def test_figures_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    filled(tmp_path / "found.jsonl")
    with pytest.raises(ValueError, match="the same machine"):
        Results(tmp_path / "found.jsonl").begin(FACTS | {"machine": "another"})


@pytest.mark.parametrize(
    ("rate", "p99", "bundle", "missed"),
    [
        pytest.param(100.0, 60.0, "eurosat 0123", False, id="twice as fast, a third of p99"),
        pytest.param(150.0, 60.0, "eurosat 0123", True, id="too slow"),
        pytest.param(100.0, 30.0, "eurosat 0123", True, id="p99 too long"),
        pytest.param(100.0, 60.0, "smoke 0123", True, id="more is asked of tiny members"),
        pytest.param(150.0, 20.0, "other 0123", False, id="nothing is asked of other bundles"),
    ],
)
def test_a_missed_floor_is_told(rate: float, p99: float, bundle: str, missed: bool, tmp_path: Path) -> None:
    assert report.missed(filled(tmp_path / "found.jsonl", rate, p99, bundle)) == missed


def test_the_page_has_every_cell_and_the_setting_that_was_chosen(tmp_path: Path) -> None:
    results = filled(tmp_path / "found.jsonl")
    page = report.page([results], "plot.svg")
    assert page.count("| 210 ± 1; 10.0 ± 0.0; 20.0 ± 0.0 | 250 ± 1; ") == len(BATCHES) * len(CONCURRENCY)
    assert page.count(" | 100 ± 1; 30.0 ± 0.0; 60.0 ± 0.0 |") == len(BATCHES) * len(CONCURRENCY)
    assert "| Triton: fast | **29 ± 13**; 2 ± 0 | **29 ± 13**; 2 ± 0 |" in page
    assert "throughput **2.09 ± 0.01 ×**, p99 **0.33 ± 0.00 ×** (aims ≥ 1.5 and ≤ 0.5): reached.\n" in page
    assert "With the native front end: throughput **2.49 ± 0.01 ×**, p99 **0.25 ± 0.00 ×**." in page
    assert "would reach **2.30 ± 0.01 ×**: of an image's CPU time 2.00 ± 0.00 ms are the client's, and 6.66 ± 0.02 ms the" in page


def test_the_plot_shows_every_server(tmp_path: Path) -> None:
    report.plot([filled(tmp_path / "found.jsonl")], tmp_path / "plot.svg")
    assert "Inferences" not in (tmp_path / "plot.svg").read_text()
    assert (tmp_path / "plot.svg").stat().st_size > 10_000
