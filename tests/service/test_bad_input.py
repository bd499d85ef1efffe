"""Bad requests and bad moments: the right code, a sentence, the field; and nobody else is harmed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from service.engine import Engine, Stop
from service.graph_cache import GraphCache
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from tests.service.serving import Running, random_pixels, raw, reason, request, retry_seconds, serving, violated_field
from tests.service.test_images import encoded, png

GOOD = random_pixels(1)[0]


def shaped(pixels: bytes, height: int, width: int, channels: int) -> pb.Image:
    return pb.Image(raw=pb.RawImage(pixels=pixels, height=height, width=width, channels=channels))


BAD_IMAGES = [
    pytest.param(pb.Image(encoded=encoded(GOOD)[:50]), "encoded", "expected a complete PNG", id="a truncated PNG"),
    pytest.param(pb.Image(encoded=png(64, 64)), "encoded", "expected a complete PNG", id="a lying PNG"),
    pytest.param(pb.Image(encoded=png(30_000, 30_000)), "encoded", "got 30,000 × 30,000", id="an enormous image"),
    pytest.param(pb.Image(encoded=b"GIF89a"), "encoded", "expected a PNG, JPEG or WebP", id="another format"),
    pytest.param(pb.Image(), "content", "expected `encoded` bytes or `raw` pixels", id="nothing"),
    pytest.param(shaped(bytes(256), 8, 8, 4), "raw.channels", "expected 3 channels, got 4", id="four channels"),
    pytest.param(shaped(bytes(191), 8, 8, 3), "raw.pixels", "expected 192 bytes", id="a byte too few"),
    pytest.param(shaped(b"", 0, 0, 3), "raw.height", "at least 1", id="no pixel"),
]


@pytest.mark.parametrize(("image", "field", "sentence"), BAD_IMAGES)
def test_a_bad_image_is_answered_in_place_and_its_mates_as_without_it(
    running: Running, image: pb.Image, field: str, sentence: str
) -> None:
    mates = random_pixels(2)
    results = running.native.Classify(pb.ClassifyRequest(images=[raw(mates[0]), image, raw(mates[1])])).results
    assert results[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert sentence in results[1].error.message
    assert results[1].error.field == f"images[1].{field}"
    expected = running.native.Classify(request(mates)).results
    for result, reference in zip((results[0], results[2]), expected, strict=True):
        np.testing.assert_allclose(result.classification.probabilities, reference.classification.probabilities, atol=1e-5)


def test_a_request_of_one_bad_image_is_answered(running: Running) -> None:
    assert running.native.Classify(pb.ClassifyRequest(images=[pb.Image()])).results[0].error.code == 3


@pytest.mark.parametrize(
    ("bad", "code", "field", "sentence"),
    [
        pytest.param(pb.ClassifyRequest(), "INVALID_ARGUMENT", "images", "expected 1 to 256 images, got 0", id="no image"),
        pytest.param(
            pb.ClassifyRequest(images=[pb.Image()] * 10_000),
            "INVALID_ARGUMENT",
            "images",
            "got 10000",
            id="10,000 images",
        ),
        pytest.param(
            pb.ClassifyRequest(ensemble="nobody", images=[raw(GOOD)]),
            "NOT_FOUND",
            "ensemble",
            "unknown ensemble 'nobody'; expected one of: full, no-edge",
            id="an unknown ensemble",
        ),
        pytest.param(
            pb.ClassifyRequest(images=[raw(GOOD)], disclosure=17),  # type: ignore[arg-type]
            "INVALID_ARGUMENT",
            "disclosure",
            "expected a disclosure of 0 to 4, got 17",
            id="an unknown disclosure",
        ),
    ],
)
def test_a_malformed_request_fails_whole(running: Running, bad: pb.ClassifyRequest, code: str, field: str, sentence: str) -> None:
    with pytest.raises(grpc.RpcError, match=sentence) as raised:
        running.native.Classify(bad)
    assert code in str(raised.value)
    assert violated_field(raised.value) == field


def test_an_unknown_ensemble_is_not_described(running: Running) -> None:
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        running.native.GetEnsemble(pb.GetEnsembleRequest(ensemble="nobody"))


@pytest.mark.parametrize(
    "method",
    [
        "/phalanx.v1.DefenseEnsemble/Classify",
        "/phalanx.v1.DefenseEnsemble/GetEnsemble",
        "/inference.GRPCInferenceService/ModelInfer",
    ],
)
def test_bytes_that_are_no_message_are_refused_and_counted(running: Running, method: str, caplog: pytest.LogCaptureFixture) -> None:
    name = method.split("/")[-1]
    series = f'phalanx_errors_total{{code="INVALID_ARGUMENT",ensemble="full",method="{name}"}}'
    before = running.scrape().get(series, 0)
    call: Any = running.channel.unary_unary(method)
    with pytest.raises(grpc.RpcError, match=r"got 4 bytes that cannot be parsed"):
        call(b"\xff\xff\xff\xff")
    assert running.scrape()[series] == before + 1
    assert not [record for record in caplog.records if record.name != "service.requests"]


def test_a_stream_survives_bytes_that_are_no_message(running: Running) -> None:
    good = pb.ClassifyStreamRequest(id="good", image=raw(random_pixels(1)[0])).SerializeToString()
    call: Any = running.channel.stream_stream("/phalanx.v1.DefenseEnsemble/ClassifyStream")
    bad, answer = map(pb.ClassifyStreamResponse.FromString, call(iter([b"\xff\xff", good])))
    assert bad.result.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (answer.id, answer.result.HasField("classification")) == ("good", True)


def test_an_oversized_message_is_refused_by_grpc(running: Running) -> None:
    with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED") as raised:
        running.native.Classify(pb.ClassifyRequest(images=[pb.Image(encoded=bytes(17 * 2**20))]))
    assert "larger than max" in str(raised.value)


def test_a_stream_survives_every_bad_image(running: Running) -> None:
    images = [cast(pb.Image, parameter.values[0]) for parameter in BAD_IMAGES]
    requests = [pb.ClassifyStreamRequest(id=str(n), image=image) for n, image in enumerate([*images, raw(GOOD)])]
    responses = list(running.native.ClassifyStream(iter(requests)))
    assert [response.id for response in responses] == [each.id for each in requests]
    assert [r.result.WhichOneof("outcome") for r in responses] == ["error"] * len(images) + ["classification"]


# --- bad moments


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The engine computes only when the second event is set, and sets the first when it waits for it."""
    waiting, go = threading.Event(), threading.Event()
    go.set()
    compute = Engine.run

    def run(self: Engine, images: np.ndarray, masks_seed: int | None = None, *, stop: Stop | None = None) -> object:
        if not go.is_set():
            waiting.set()
            assert go.wait(20)
        return compute(self, images, masks_seed, stop=stop)

    monkeypatch.setattr(Engine, "run", run)
    return waiting, go


def test_a_full_queue_says_when_to_come_back(
    tiny_bundle: Path, graphs: GraphCache, gated: tuple[threading.Event, threading.Event]
) -> None:
    waiting, go = gated
    batching = {"max_batch_size": 2, "max_delay_ms": 0, "max_queue": 4}
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, batching=batching) as running:
        running.native.Classify(request(random_pixels(1)))
        go.clear()
        computed = running.native.Classify.future(request(random_pixels(1)))
        assert waiting.wait(10)
        queued = running.native.Classify.future(request(random_pixels(4)))
        _wait_for(lambda: running.scrape()['phalanx_queue_images{ensemble="full"}'] == 4)
        with pytest.raises(grpc.RpcError, match="the queue holds 4 of at most 4 images") as raised:
            running.native.Classify(request(random_pixels(1)))
        assert "RESOURCE_EXHAUSTED" in str(raised.value)
        assert reason(raised.value) == ("phalanx", "QUEUE_FULL")
        assert (retry_seconds(raised.value) or 0) > 0
        go.set()
        assert len(computed.result().results) == 1
        assert len(queued.result().results) == 4


def test_too_many_calls_are_refused_at_once_but_health_is_answered(
    tiny_bundle: Path, graphs: GraphCache, gated: tuple[threading.Event, threading.Event]
) -> None:
    waiting, go = gated
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, limits={"max_concurrent_calls": 1}) as running:
        go.clear()
        first = running.native.Classify.future(request(random_pixels(1)))
        assert waiting.wait(10)
        with pytest.raises(grpc.RpcError, match="1 calls are being answered already") as raised:
            running.native.Classify(request(random_pixels(1)))
        assert reason(raised.value) == ("phalanx", "TOO_MANY_CALLS")
        assert (retry_seconds(raised.value) or 0) > 0
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED") as raised:
            next(running.native.ClassifyStream(iter([])))
        assert reason(raised.value) == ("phalanx", "TOO_MANY_CALLS")
        assert running.health.Check(health_pb2.HealthCheckRequest()).status
        go.set()
        assert first.result().results


@pytest.mark.parametrize("method", ["/phalanx.v1.DefenseEnsemble/Classify", "/inference.GRPCInferenceService/ModelInfer"])
def test_what_has_no_place_is_refused_unread(
    tiny_bundle: Path, graphs: GraphCache, gated: tuple[threading.Event, threading.Event], method: str
) -> None:
    waiting, go = gated
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, limits={"max_concurrent_calls": 1}) as running:
        call: Any = running.channel.unary_unary(method)
        go.clear()
        first = running.native.Classify.future(request(random_pixels(1)))
        assert waiting.wait(10)
        with pytest.raises(grpc.RpcError, match="1 calls are being answered already") as raised:
            call(b"\xff\xff\xff\xff")
        assert reason(raised.value) == ("phalanx", "TOO_MANY_CALLS")
        with pytest.raises(grpc.RpcError, match="1 calls are being answered already"):
            call(bytes(8 * 2**20))  # more than may be under way before it is read
        name = method.rpartition("/")[2]
        assert running.scrape()[f'phalanx_errors_total{{code="RESOURCE_EXHAUSTED",ensemble="full",method="{name}"}}'] == 2
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            running.native.GetEnsemble(pb.GetEnsembleRequest(ensemble="none"))  # what needs no place is read
        go.set()
        assert first.result().results
        with pytest.raises(grpc.RpcError, match="got 4 bytes that cannot be parsed"):
            call(b"\xff\xff\xff\xff")


def test_an_expired_deadline_is_told_and_the_rest_answered(
    tiny_bundle: Path, graphs: GraphCache, gated: tuple[threading.Event, threading.Event]
) -> None:
    waiting, go = gated
    with serving(tiny_bundle, graphs, ensembles={"full": {}}) as running:
        go.clear()
        first = running.native.Classify.future(request(random_pixels(1)))
        assert waiting.wait(10)
        with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
            running.native.Classify(request(random_pixels(1)), timeout=0.2)
        go.set()
        assert first.result().results
        assert running.native.Classify(request(random_pixels(1))).results


def test_what_a_caller_gave_up_is_not_computed(
    tiny_bundle: Path, graphs: GraphCache, gated: tuple[threading.Event, threading.Event]
) -> None:
    waiting, go = gated
    with serving(tiny_bundle, graphs, ensembles={"full": {}}) as running:
        go.clear()
        first = running.native.Classify.future(request(random_pixels(1)))
        assert waiting.wait(10)
        given_up = running.native.Classify.future(request(random_pixels(100)))
        _wait_for(lambda: _in_flight(running) == 2)
        given_up.cancel()
        _wait_for(lambda: _in_flight(running) == 1)
        go.set()
        assert first.result().results
        series = running.scrape()
    assert series['phalanx_batch_images_sum{ensemble="full"}'] == 1
    assert series['phalanx_errors_total{code="CANCELLED",ensemble="full",method="Classify"}'] == 1


def _in_flight(running: Running) -> float:
    return running.scrape()['phalanx_in_flight_requests{ensemble="full",method="Classify"}']


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end


def test_an_error_of_ours_is_logged_in_full_and_told_by_its_id(
    tiny_bundle: Path, graphs: GraphCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tiny_bundle, graphs, ensembles={"full": {}}) as running:

        def broken(*_: object, **__: object) -> object:
            raise RuntimeError("the secret path /etc/phalanx")

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "run", broken)
            with caplog.at_level(logging.ERROR), pytest.raises(grpc.RpcError, match="internal error") as raised:
                running.native.Classify(request(random_pixels(1)), metadata=(("x-request-id", "abc-123"),))
        assert "request id abc-123" in str(raised.value)
        assert "secret" not in str(raised.value)
        assert "request abc-123: internal error" in caplog.text
        assert "the secret path" in caplog.text
        with ThreadPoolExecutor(4) as pool:  # and the service goes on
            answers = pool.map(lambda seed: running.native.Classify(request(random_pixels(1, seed))), range(8))
            assert all(answer.results[0].HasField("classification") for answer in answers)
