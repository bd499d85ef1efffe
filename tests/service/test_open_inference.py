"""The Open Inference Protocol: the same ensembles, the same answers, the same disclosure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from service.graph_cache import GraphCache
from service.pb.inference import open_inference_pb2 as pb
from tests.service.serving import ENSEMBLES, SIZE, Running, random_pixels, request, serving, violated_field

DTYPES: dict[str, Any] = {"FP32": np.float32, "INT64": np.int64}
OUTPUTS = {
    "label": ("INT64", [-1]),
    "verdict": ("INT64", [-1]),
    "reason": ("INT64", [-1]),
    "confidence": ("FP32", [-1]),
    "probabilities": ("FP32", [-1, 10]),
    "votes": ("FP32", [-1, 4, 10]),
    "p_value": ("FP32", [-1]),
    "statistic": ("FP32", [-1]),
    "scores": ("FP32", [-1, 5]),
    "p_values": ("FP32", [-1, 5]),
    "masks_seed": ("INT64", [-1]),
}


def tensor(shape: tuple[int, ...], **changed: Any) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(**{"name": "image", "datatype": "UINT8", "shape": shape, **changed})


def inference(
    pixels: NDArray[np.uint8], model: str = "full", outputs: tuple[str, ...] = (), **changed: Any
) -> pb.ModelInferRequest:
    plain = {
        "model_name": model,
        "id": "mine",
        "inputs": [tensor(pixels.shape)],
        "raw_input_contents": [pixels.tobytes()],
        "outputs": [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
    }
    return pb.ModelInferRequest(**{**plain, **changed})


def arrays(response: pb.ModelInferResponse) -> dict[str, NDArray[Any]]:
    return {
        output.name: np.frombuffer(content, DTYPES[output.datatype]).reshape(tuple(output.shape))
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def test_the_server_is_live_ready_and_known(running: Running) -> None:
    stub = running.open_inference
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    metadata = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert metadata.name == "phalanx"
    assert list(metadata.extensions) == ["model_configuration", "statistics"]
    for name in ENSEMBLES:
        assert stub.ModelReady(pb.ModelReadyRequest(name=name)).ready
        assert stub.ModelReady(pb.ModelReadyRequest(name=name, version="1")).ready


def test_the_metadata_names_the_input_and_every_output(running: Running) -> None:
    metadata = running.open_inference.ModelMetadata(pb.ModelMetadataRequest(name="full"))
    assert [(each.name, each.datatype, list(each.shape)) for each in metadata.inputs] == [("image", "UINT8", [-1, SIZE, SIZE, 3])]
    assert {each.name: (each.datatype, list(each.shape)) for each in metadata.outputs} == OUTPUTS
    assert list(metadata.versions) == ["1"]


def test_an_ensemble_without_detectors_has_no_outputs_of_theirs(running: Running) -> None:
    metadata = running.open_inference.ModelMetadata(pb.ModelMetadataRequest(name="votes-only"))
    assert set(OUTPUTS) - {each.name for each in metadata.outputs} == {"p_value", "statistic", "scores", "p_values"}


def test_both_apis_give_the_same_answers(running: Running) -> None:
    pixels = random_pixels(5)
    response = running.open_inference.ModelInfer(inference(pixels))
    assert (response.model_name, response.model_version, response.id) == ("full", "1", "mine")
    found = arrays(response)
    assert set(found) == set(OUTPUTS)
    native = [result.classification for result in running.native.Classify(request(pixels)).results]
    np.testing.assert_array_equal(found["label"], [answer.class_index for answer in native])
    np.testing.assert_array_equal(found["verdict"] + 1, [answer.verdict for answer in native])
    np.testing.assert_allclose(found["probabilities"], [answer.probabilities for answer in native], atol=1e-5)
    np.testing.assert_allclose(found["votes"], [[vote.probabilities for vote in a.votes] for a in native], atol=1e-5)
    np.testing.assert_allclose(found["scores"], [[d.score for d in a.detections] for a in native], rtol=1e-4, atol=1e-5)


def test_fresh_masks_are_answered_with_their_seed(running: Running) -> None:
    fixed = arrays(running.open_inference.ModelInfer(inference(random_pixels(3), outputs=("masks_seed",))))
    assert set(fixed["masks_seed"]) == {running.native.Classify(request(random_pixels(1))).results[0].classification.masks_seed}
    fresh = [arrays(running.open_inference.ModelInfer(inference(random_pixels(3), model="fresh"))) for _ in range(2)]
    assert len({int(seed) for found in fresh for seed in found["masks_seed"]}) == 2


def test_listed_contents_do_as_raw_ones(running: Running) -> None:
    pixels = random_pixels(2)
    listed = tensor(pixels.shape, contents=pb.InferTensorContents(uint_contents=pixels.ravel().tolist()))
    response = running.open_inference.ModelInfer(inference(pixels, inputs=[listed], raw_input_contents=[]))
    expected = running.open_inference.ModelInfer(inference(pixels))
    np.testing.assert_allclose(arrays(response)["votes"], arrays(expected)["votes"], atol=1e-5)


def test_only_the_outputs_asked_for_come_in_their_order(running: Running) -> None:
    response = running.open_inference.ModelInfer(inference(random_pixels(1), outputs=("verdict", "label")))
    assert [output.name for output in response.outputs] == ["verdict", "label"]


def test_the_configuration_says_what_perf_analyzer_asks(running: Running) -> None:
    config = running.open_inference.ModelConfig(pb.ModelConfigRequest(name="full")).config
    assert config.name == "full"
    assert config.max_batch_size == 256
    assert (config.input[0].name, config.input[0].data_type, list(config.input[0].dims)) == (
        "image", pb.TYPE_UINT8, [SIZE, SIZE, 3],
    )  # fmt: skip
    assert {output.name for output in config.output} == set(OUTPUTS)
    assert config.parameters["classes"].string_value.split("\n")[1] == "forest"
    assert not config.model_transaction_policy.decoupled


def test_the_statistics_count_what_was_done(tiny_bundle: Path, graphs: GraphCache) -> None:
    with serving(tiny_bundle, graphs, ensembles={"full": {}, "other": {"without": ["edge"]}}) as running:
        for n in (1, 2, 4):
            running.open_inference.ModelInfer(inference(random_pixels(n)))
        running.native.Classify(request(random_pixels(3)))
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
            running.open_inference.ModelInfer(inference(random_pixels(1), outputs=("nonsense",)))
        (full,) = running.open_inference.ModelStatistics(pb.ModelStatisticsRequest(name="full")).model_stats
        both = running.open_inference.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert (full.name, full.version, full.inference_count, full.execution_count) == ("full", "1", 10, 4)
    stats = full.inference_stats
    assert (stats.success.count, stats.fail.count) == (4, 1)
    assert stats.queue.count == stats.compute_infer.count == stats.compute_output.count == 4
    parts = stats.queue.ns + stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
    assert 0 < stats.compute_infer.ns < parts < stats.success.ns
    assert full.last_inference > 1_700_000_000_000
    assert [(model.name, model.inference_count) for model in both] == [("full", 10), ("other", 0)]


ONE = random_pixels(1)


@pytest.mark.parametrize(
    ("changed", "code", "field", "sentence"),
    [
        pytest.param(
            {"model_name": "nobody"},
            "NOT_FOUND",
            "model_name",
            "unknown model 'nobody'; expected one of: full",
            id="model",
        ),
        pytest.param({"model_name": ""}, "NOT_FOUND", "model_name", "unknown model ''", id="no model"),
        pytest.param({"model_version": "7"}, "NOT_FOUND", "model_version", "unknown version '7'", id="version"),
        pytest.param({"inputs": []}, "INVALID_ARGUMENT", "inputs", "expected one input, `image` UINT8", id="no input"),
        pytest.param(
            {"inputs": [tensor(ONE.shape, name="pixels")]},
            "INVALID_ARGUMENT",
            "inputs[0].name",
            "got one called 'pixels'",
            id="name",
        ),
        pytest.param(
            {"inputs": [tensor(ONE.shape, datatype="FP32")]},
            "INVALID_ARGUMENT",
            "inputs[0].datatype",
            "datatype 'FP32'",
            id="datatype",
        ),
        pytest.param(
            {"inputs": [tensor((1, 3, 8, 8))]},
            "INVALID_ARGUMENT",
            "inputs[0].shape",
            r"expected one input, `image` UINT8 \[-1, 8, 8, 3\], got shape \[1, 3, 8, 8\]",
            id="channels first",
        ),
        pytest.param({"inputs": [tensor((8, 8, 3))]}, "INVALID_ARGUMENT", "inputs[0].shape", "got shape", id="no batch"),
        pytest.param({"inputs": [tensor((0, 8, 8, 3))]}, "INVALID_ARGUMENT", "inputs[0].shape", "got 0", id="no image"),
        pytest.param(
            {"inputs": [tensor((2, 8, 8, 3))]},
            "INVALID_ARGUMENT",
            "raw_input_contents",
            "expected 384 bytes .* got 192",
            id="size",
        ),
        pytest.param({"raw_input_contents": []}, "INVALID_ARGUMENT", "inputs[0].contents.uint_contents", "got 0", id="nothing"),
        pytest.param(
            {"raw_input_contents": [ONE.tobytes()] * 2},
            "INVALID_ARGUMENT",
            "raw_input_contents",
            "got 2 raw",
            id="twice",
        ),
        pytest.param(
            {
                "inputs": [tensor(ONE.shape, contents=pb.InferTensorContents(uint_contents=[300] * 192))],
                "raw_input_contents": [],
            },
            "INVALID_ARGUMENT",
            "inputs[0].contents.uint_contents",
            "expected values of 0 to 255, got 300",
            id="value",
        ),
        pytest.param(
            {"inputs": [tensor(ONE.shape, parameters={"shared_memory_region": pb.InferParameter(string_param="x")})]},
            "INVALID_ARGUMENT",
            "inputs[0].parameters",
            "no shared memory",
            id="shared memory",
        ),
    ],
)
def test_a_bad_inference_is_refused(running: Running, changed: dict[str, Any], code: str, field: str, sentence: str) -> None:
    with pytest.raises(grpc.RpcError, match=sentence) as raised:
        running.open_inference.ModelInfer(inference(ONE, **changed))
    assert code in str(raised.value)
    assert violated_field(raised.value) == field


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [(("logits",), "expected outputs among label, .*got 'logits'"), (("label", "label"), "'label' twice")],
)
def test_bad_outputs_are_refused(running: Running, outputs: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(grpc.RpcError, match=sentence) as raised:
        running.open_inference.ModelInfer(inference(ONE, outputs=outputs))
    assert violated_field(raised.value).startswith("outputs[")


@pytest.mark.parametrize("limit", ["label", "verdict", "probabilities"])
def test_the_disclosure_limit_binds_both_apis(tiny_bundle: Path, graphs: GraphCache, limit: str) -> None:
    levels = {"label": 1, "verdict": 3, "probabilities": 7}
    allowed = [name for name in OUTPUTS if name not in ("votes", "scores", "p_values", "masks_seed")][: levels[limit]]
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, limits={"disclosure": limit}) as running:
        stub = running.open_inference
        assert [each.name for each in stub.ModelMetadata(pb.ModelMetadataRequest(name="full")).outputs] == allowed
        assert [each.name for each in stub.ModelConfig(pb.ModelConfigRequest(name="full")).config.output] == allowed
        assert [each.name for each in stub.ModelInfer(inference(ONE)).outputs] == allowed
        with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED"):
            stub.ModelInfer(inference(ONE, outputs=("label", "votes")))
        response = running.native.Classify(request(ONE))
        assert response.disclosure == {"label": 1, "verdict": 2, "probabilities": 3}[limit]
        answer = response.results[0].classification
        assert (answer.verdict > 0) == (limit != "label")
        assert answer.HasField("confidence") == answer.HasField("p_value") == (limit == "probabilities")
        assert not answer.votes
        with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED") as raised:
            running.native.Classify(request(ONE, disclosure=4))  # type: ignore[arg-type]
        assert violated_field(raised.value) == "disclosure"
