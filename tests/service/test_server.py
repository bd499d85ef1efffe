"""A real server and a real client: what is answered, in which order, to whom, and how it ends."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from service.cli import main
from service.config import Address
from service.graph_cache import GraphCache
from service.pb.inference.open_inference_pb2 import ServerReadyRequest
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc
from service.server import CannotStart, Server
from tests.service.serving import ENSEMBLES, SIZE, Running, configured, connected, random_pixels, raw, request, serving

REPOSITORY = Path(__file__).resolve().parents[2]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
MEMBERS = ["metric", "edge", "adversarial", "bayesian"]


both = pytest.mark.parametrize("front_end", ["grpcio", "native"])


def classify_one(running: Running, pixels: np.ndarray, ensemble: str = "") -> pb.Classification:
    return running.native.Classify(request(pixels[None], ensemble)).results[0].classification


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """Set at the end of a test, whatever becomes of it: a thread of gRPC's that waits for it would wait for ever."""
    event = threading.Event()
    yield event
    event.set()


# --- answers


def test_an_answer_has_all_its_evidence(running: Running) -> None:
    response = running.native.Classify(request(random_pixels(1)))
    assert (response.ensemble, response.disclosure) == ("full", pb.DISCLOSURE_EVIDENCE)
    answer = response.results[0].classification
    assert answer.confidence == pytest.approx(max(answer.probabilities))
    assert sum(answer.probabilities) == pytest.approx(1, abs=1e-5)
    assert answer.verdict in (pb.VERDICT_CLEAN, pb.VERDICT_SUSPECT, pb.VERDICT_REJECTED)
    assert 0 < answer.p_value <= 1
    assert sorted(vote.member for vote in answer.votes) == sorted(MEMBERS)
    for vote in answer.votes:
        assert vote.confidence == pytest.approx(vote.probabilities[vote.class_index])
        assert vote.confidence == max(vote.probabilities)
        assert vote.class_name
    assert [detection.detector for detection in answer.detections] == [
        "mutual_information", "variance", "disagreement", "distance", "margin",
    ]  # fmt: skip
    assert answer.HasField("masks_seed")


def test_many_images_are_answered_as_each_alone(running: Running) -> None:
    pixels = random_pixels(70)  # more than one run
    together = [result.classification for result in running.native.Classify(request(pixels)).results]
    for index in (0, 1, 63, 64, 69):
        alone = classify_one(running, pixels[index])
        assert alone.class_index == together[index].class_index
        np.testing.assert_allclose(alone.probabilities, together[index].probabilities, atol=1e-5)


def test_calls_at_once_get_each_their_own_answer(running: Running) -> None:
    pixels = random_pixels(48, seed=1)
    expected = [result.classification for result in running.native.Classify(request(pixels)).results]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda image: classify_one(running, image), pixels))
    for answer, reference in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.probabilities, reference.probabilities, atol=1e-5)


def test_an_ablated_member_is_absent_everywhere(running: Running) -> None:
    answer = classify_one(running, random_pixels(1)[0], "no-edge")
    assert sorted(vote.member for vote in answer.votes) == ["adversarial", "bayesian", "metric"]
    description = running.native.GetEnsemble(pb.GetEnsembleRequest(ensemble="no-edge")).ensemble
    assert "edge" not in [member.name for member in description.members]
    assert not description.is_default


def test_without_detectors_the_verdict_is_unscreened(running: Running) -> None:
    answer = classify_one(running, random_pixels(1)[0], "votes-only")
    assert answer.verdict == pb.VERDICT_UNSCREENED
    assert not answer.detections
    assert not answer.HasField("p_value")


def test_fresh_masks_are_drawn_for_every_run_and_their_seed_is_told(running: Running) -> None:
    seeds = {classify_one(running, random_pixels(1)[0], "fresh").masks_seed for _ in range(3)}
    assert len(seeds) == 3
    fixed = {classify_one(running, random_pixels(1)[0]).masks_seed for _ in range(3)}
    assert len(fixed) == 1


def test_the_ensembles_are_listed_the_default_first(running: Running) -> None:
    listed = running.native.ListEnsembles(pb.ListEnsemblesRequest()).ensembles
    assert [ensemble.name for ensemble in listed] == list(ENSEMBLES)
    assert [ensemble.is_default for ensemble in listed] == [True, False, False, False]
    default = running.native.GetEnsemble(pb.GetEnsembleRequest()).ensemble
    assert default == listed[0]
    assert (default.input.height, default.input.width, default.input.channels) == (SIZE, SIZE, 3)
    assert (default.rates.review, default.rates.reject) == (0.05, 0.01)
    assert default.provider == "CPUExecutionProvider"
    assert default.masks == pb.MASKS_FIXED
    assert listed[3].masks == pb.MASKS_FRESH
    assert sum(member.weight for member in default.members if member.votes) == pytest.approx(1)


# --- streams


def test_a_stream_keeps_order_and_ids_and_survives_bad_images(running: Running) -> None:
    pixels = random_pixels(200, seed=2)
    bad = {5: pb.Image(encoded=b"not an image"), 77: pb.Image()}

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        for index, image in enumerate(pixels):
            ensemble = ("", "no-edge", "nobody")[2 if index == 120 else index % 2]
            yield pb.ClassifyStreamRequest(id=f"tile {index}", image=bad.get(index, raw(image)), ensemble=ensemble)

    responses = list(running.native.ClassifyStream(requests()))
    assert [response.id for response in responses] == [f"tile {index}" for index in range(200)]
    errors = {index: r.result.error for index, r in enumerate(responses) if r.result.HasField("error")}
    assert {index: error.code for index, error in errors.items()} == {5: 3, 77: 3, 120: 5}
    assert errors[5].field == "image.encoded"
    expected = running.native.Classify(request(pixels[:2])).results
    np.testing.assert_allclose(
        responses[0].result.classification.probabilities, expected[0].classification.probabilities, atol=1e-5
    )
    assert responses[1].ensemble == "no-edge"
    assert len(responses[1].result.classification.votes) == 3


def test_a_stream_answers_while_it_is_still_open(running: Running) -> None:
    answered = threading.Event()

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        yield pb.ClassifyStreamRequest(id="first", image=raw(random_pixels(1)[0]))
        assert answered.wait(10)
        yield pb.ClassifyStreamRequest(id="second", image=raw(random_pixels(1)[0]))

    responses = running.native.ClassifyStream(requests())
    assert next(responses).id == "first"
    answered.set()
    assert next(responses).id == "second"
    assert next(responses, None) is None


def test_a_stream_given_up_is_counted_out(tiny_bundle: Path, graphs: GraphCache) -> None:
    with serving(tiny_bundle, graphs, ensembles={"full": {}}) as running:
        closed = threading.Event()

        def requests() -> Iterator[pb.ClassifyStreamRequest]:
            for index in range(100):
                yield pb.ClassifyStreamRequest(id=str(index), image=raw(random_pixels(1)[0]))
            closed.wait(10)

        responses = running.native.ClassifyStream(requests())
        next(responses)
        responses.cancel()
        closed.set()
        running.server.drain()  # waits for every handler
        labels = {"ensemble": "full", "method": "ClassifyStream"}
        assert running.server.metrics.registry.get_sample_value("phalanx_in_flight_requests", labels) == 0


# --- health, reflection, metrics


def test_health_is_told_for_the_server_each_api_and_each_ensemble(running: Running) -> None:
    for service in ("", "phalanx.v1.DefenseEnsemble", "inference.GRPCInferenceService", *ENSEMBLES):
        assert running.health.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        running.health.Check(health_pb2.HealthCheckRequest(service="nobody"))


def test_reflection_lists_the_services_and_describes_them(running: Running) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(running.channel)  # published untyped
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="phalanx.v1.DefenseEnsemble"),
    ]
    listed, described = list(stub.ServerReflectionInfo(iter(asked)))
    assert {service.name for service in listed.list_services_response.service} == {
        "phalanx.v1.DefenseEnsemble", "inference.GRPCInferenceService",
        "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection",
    }  # fmt: skip
    assert described.file_descriptor_response.file_descriptor_proto


def test_calls_stages_and_errors_are_counted(tiny_bundle: Path, graphs: GraphCache) -> None:
    with serving(tiny_bundle, graphs) as running:
        for _ in range(3):
            running.native.Classify(request(random_pixels(2)))
        running.native.Classify(pb.ClassifyRequest(ensemble="no-edge", images=[pb.Image(encoded=b"x"), raw(random_pixels(1)[0])]))
        for ensemble in ("nobody", "no such thing"):
            with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
                running.native.Classify(request(random_pixels(1), ensemble))
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
            running.native.Classify(pb.ClassifyRequest())
        series = running.scrape()
    assert series['phalanx_request_seconds_count{ensemble="full",method="Classify"}'] == 4
    assert series['phalanx_errors_total{code="INVALID_ARGUMENT",ensemble="full",method="Classify"}'] == 1
    assert series['phalanx_errors_total{code="NOT_FOUND",ensemble="",method="Classify"}'] == 2
    assert series['phalanx_image_errors_total{code="INVALID_ARGUMENT",ensemble="no-edge"}'] == 1
    assert series['phalanx_in_flight_requests{ensemble="full",method="Classify"}'] == 0
    for stage in ("decode", "queue", "compute", "encode"):
        assert series[f'phalanx_stage_seconds_count{{ensemble="full",stage="{stage}"}}'] >= 3
    assert not any("nobody" in name for name in series)  # what a caller writes never becomes a label


# --- starting and ending


def test_a_busy_port_is_refused(tiny_bundle: Path, graphs: GraphCache) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=f"listen: cannot have 127.0.0.1:{port}: another process uses it"):
            Server(configured(tiny_bundle, listen=f"127.0.0.1:{port}"), graphs)
        with pytest.raises(CannotStart, match=f"metrics: cannot have 127.0.0.1:{port}"):
            Server(configured(tiny_bundle, metrics=f"127.0.0.1:{port}"), graphs)


def test_a_name_is_one_address_so_that_a_busy_one_is_noticed(tiny_bundle: Path, graphs: GraphCache, running: Running) -> None:
    port = running.server.address.port
    with pytest.raises(CannotStart, match=f"cannot have localhost:{port}"):
        Server(configured(tiny_bundle, listen=f"localhost:{port}"), graphs)
    with pytest.raises(CannotStart, match=r"cannot have no\.such\.host\.invalid:1"):
        Server(configured(tiny_bundle, listen="no.such.host.invalid:1", insecure=True), graphs)


def test_two_servers_do_not_share_a_port(tiny_bundle: Path, graphs: GraphCache, running: Running) -> None:
    with pytest.raises(CannotStart, match="cannot have"):
        Server(configured(tiny_bundle, listen=str(running.server.address)), graphs)


@both
def test_draining_says_not_serving_first_and_answers_what_was_accepted(
    tiny_bundle: Path, graphs: GraphCache, front_end: str
) -> None:
    shutdown = {"notice_seconds": 0.3}
    server = Server(configured(tiny_bundle, ensembles={"full": {}}, shutdown=shutdown, front_end=front_end), graphs)
    running = connected(server)
    with running.channel:
        watched = running.health.Watch(health_pb2.HealthCheckRequest(service="full"))
        assert next(watched).status == SERVING
        accepted = running.native.Classify.future(request(random_pixels(200)))
        draining = threading.Thread(target=server.drain)
        draining.start()
        assert next(watched).status == NOT_SERVING
        # still answering, while load balancers look away
        assert running.native.Classify(request(random_pixels(1))).results
        assert not running.open_inference.ServerReady(ServerReadyRequest()).ready
        assert len(accepted.result().results) == 200
        draining.join(5)  # whoever watches does not hold it up
        assert not draining.is_alive()
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            running.native.Classify(request(random_pixels(1)))


@contextmanager
def relayed(address: Address, flowing: threading.Event) -> Iterator[str]:
    """A way to the server for one connection, back from which nothing comes unless it flows."""

    def relay(source: socket.socket, target: socket.socket, gate: threading.Event | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if gate is not None:
                    gate.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection((address.host, address.port)) as server:

        def accept() -> None:
            client, _ = listening.accept()
            with client:
                back = threading.Thread(target=relay, args=(server, client, flowing))
                back.start()
                relay(client, server, None)
                back.join()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@both
def test_an_end_waits_for_an_answer_that_is_long_on_its_way(tiny_bundle: Path, graphs: GraphCache, front_end: str) -> None:
    flowing = threading.Event()
    flowing.set()
    n = 12_000  # whose answer of 5.6 MB no buffer of the system holds
    limits = {"max_images_per_request": n}
    server = Server(configured(tiny_bundle, ensembles={"full": {}}, front_end=front_end, limits=limits), graphs)
    options = [("grpc.max_receive_message_length", -1)]
    with relayed(server.address, flowing) as address, grpc.insecure_channel(address, options) as channel:
        grpc.channel_ready_future(channel).result(10)
        flowing.clear()
        accepted = defense_ensemble_pb2_grpc.DefenseEnsembleStub(channel).Classify.future(request(random_pixels(n)))
        called = {"ensemble": "full", "method": "Classify"}
        while not server.metrics.registry.get_sample_value("phalanx_request_seconds_count", called):
            assert not accepted.done(), accepted.exception()
            time.sleep(0.01)
        draining = threading.Thread(target=server.drain)
        draining.start()
        draining.join(1.0)
        assert draining.is_alive()
        flowing.set()
        assert len(accepted.result(10).results) == n
        draining.join(5)
        assert not draining.is_alive()


@both
def test_a_silent_stream_does_not_hold_up_the_end(
    tiny_bundle: Path, graphs: GraphCache, hold: threading.Event, caplog: pytest.LogCaptureFixture, front_end: str
) -> None:
    server = Server(configured(tiny_bundle, ensembles={"full": {}}, front_end=front_end), graphs)
    running = connected(server)

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        yield pb.ClassifyStreamRequest(id="a", image=raw(random_pixels(1)[0]))
        hold.wait()

    with running.channel:
        answers = running.native.ClassifyStream(requests())
        assert next(answers).id == "a"
        began = time.monotonic()
        server.drain()
        assert time.monotonic() - began < 5  # of the 10 that it would have
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            next(answers)
    assert "not finished" not in caplog.text


@both
def test_a_call_that_comes_while_the_server_ends_is_sent_elsewhere(tiny_bundle: Path, graphs: GraphCache, front_end: str) -> None:
    server = Server(configured(tiny_bundle, ensembles={"full": {}}, front_end=front_end), graphs)
    codes: set[grpc.StatusCode] = set()

    def call() -> None:
        with connected(server).channel as channel:
            stub = defense_ensemble_pb2_grpc.DefenseEnsembleStub(channel)
            try:
                while True:
                    stub.Classify(request(random_pixels(1)))
            except grpc.RpcError as error:
                codes.add(error.code())

    with ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            pool.submit(call)
        server.drain()
    assert codes == {grpc.StatusCode.UNAVAILABLE}


def test_a_stream_that_asks_nothing_gives_its_place_back(tiny_bundle: Path, graphs: GraphCache, hold: threading.Event) -> None:
    limits = {"stream_idle_seconds": 0.2, "max_concurrent_calls": 2}

    def silent() -> Iterator[pb.ClassifyStreamRequest]:
        hold.wait()
        yield from ()

    with serving(tiny_bundle, graphs, ensembles={"full": {}}, limits=limits) as running:
        first = running.native.ClassifyStream(silent())
        with pytest.raises(grpc.RpcError, match="ABORTED.*no request came for 0.2 s".replace(".*", r"[\s\S]*")):
            next(first)
        assert running.native.Classify(request(random_pixels(1))).results


def test_a_stream_that_its_caller_cancels_gives_its_place_back_at_once(
    tiny_bundle: Path, graphs: GraphCache, hold: threading.Event
) -> None:
    """And not when it has been silent for too long, which is minutes by default."""

    def silent() -> Iterator[pb.ClassifyStreamRequest]:
        yield pb.ClassifyStreamRequest(image=raw(random_pixels(1)[0]))
        hold.wait()

    with serving(tiny_bundle, graphs, ensembles={"full": {}}, limits={"max_concurrent_calls": 1}) as running:
        for _ in range(5):  # whether the end of a stream is seen was once a matter of who came first
            stream = running.native.ClassifyStream(silent())
            next(stream)
            stream.cancel()
            until, answered = time.monotonic() + 20, False
            while not answered and time.monotonic() < until:
                with contextlib.suppress(grpc.RpcError):  # while its place is taken
                    answered = bool(running.native.Classify(request(random_pixels(1))).results)
            assert answered


def test_streams_leave_places_for_calls(tiny_bundle: Path, graphs: GraphCache, hold: threading.Event) -> None:

    def silent() -> Iterator[pb.ClassifyStreamRequest]:
        yield pb.ClassifyStreamRequest(image=raw(random_pixels(1)[0]))
        hold.wait()

    with serving(tiny_bundle, graphs, ensembles={"full": {}}, limits={"max_concurrent_calls": 4}) as running:
        streams = [running.native.ClassifyStream(silent()) for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(grpc.RpcError, match="2 streams are being answered already"):
            next(running.native.ClassifyStream(silent()))
        assert running.scrape()['phalanx_errors_total{code="RESOURCE_EXHAUSTED",ensemble="full",method="ClassifyStream"}'] == 1
        assert running.native.Classify(request(random_pixels(1))).results


def test_reflection_streams_are_few_so_that_health_is_answered(
    tiny_bundle: Path, graphs: GraphCache, hold: threading.Event
) -> None:

    def silent() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        hold.wait()

    with serving(tiny_bundle, graphs, ensembles={"full": {}}) as running:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(running.channel)
        streams = [stub.ServerReflectionInfo(silent()) for _ in range(4)]
        for stream in streams:
            next(stream)
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            next(stub.ServerReflectionInfo(silent()))
        assert running.health.Check(health_pb2.HealthCheckRequest()).status == SERVING
        for stream in streams:
            stream.cancel()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_is_spoken_under_the_certificate_of_the_config(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key, tile = tmp_path / "certificate.pem", tmp_path / "key.pem", tmp_path / "tile.png"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=phalanx "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    Image.fromarray(random_pixels(1)[0]).save(tile)
    tls = {"certificate": certificate, "key": key}
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, tls=tls) as running:
        address = str(running.server.address)
        assert main(["classify", "--server", address, "--ca", str(certificate), str(tile)]) == 0
        assert main(["classify", "--server", address, "--timeout", "5", str(tile)]) == 1
    assert "no server answers" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "sentence"), [(None, "No such file"), ("not PEM", "PEM")])
def test_a_certificate_that_cannot_be_used_is_refused(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, content: str | None, sentence: str
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    if content is not None:
        certificate.write_text(content)
        key.write_text(content)
    with pytest.raises(CannotStart, match=f"tls: .*certificate.pem.*: .*{sentence}"):
        Server(configured(tiny_bundle, tls={"certificate": certificate, "key": key}), graphs)


def test_sigterm_ends_the_process_in_good_order(tiny_bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "phalanx.yaml"
    config.write_text(
        f"bundle: {tiny_bundle}\nlisten: 127.0.0.1:0\nmetrics: off\nensembles: {{full: {{}}}}\n"
        "device: {provider: cpu, threads: 1}\nshutdown: {notice_seconds: 0}\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "service.cli", "serve", "--config", str(config)]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = _serving_address(process)
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(10)
                process.send_signal(signal.SIGTERM)
                _, rest = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert rest.index("NOT_SERVING") < rest.index("stopped")


def _serving_address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    seen = []
    while select.select([process.stderr], [], [], 60)[0] and (line := process.stderr.readline()):
        seen.append(line)
        if "SERVING" in line:
            return line.split(" on ")[1].split(";")[0]
    raise AssertionError("".join(seen))
