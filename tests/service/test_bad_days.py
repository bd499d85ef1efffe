"""Callers who are slow, many, dead or deaf, a clock that jumps, a bundle that vanishes: everybody else is answered as ever."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.context import Context
from service.graph_cache import GraphCache
from service.native_front import QUICKLY_READ, NativeServer
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.server import SPARE_THREADS, Server, _options
from service.servicers.gate import A_YEAR, MOST_AWAITED, deadline_of
from service.servicers.health import DEFENSE_ENSEMBLE
from service.servicers.native import DefenseEnsembleServicer
from service.servicers.stream import WINDOW
from tests.bundles import write_tiny_bundle
from tests.service.certificates import Authority
from tests.service.serving import Running, configured, random_pixels, request, retry_seconds, serving

both = pytest.mark.parametrize("front_end", ["grpcio", "native"])

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
ACK, END_HEADERS = 1, 4


@pytest.fixture
def server(tiny_bundle: Path, graphs: GraphCache) -> Iterator[Running]:
    with serving(tiny_bundle, graphs, ensembles={"full": {}}) as running:
        yield running


def dial(running: Running) -> socket.socket:
    address = running.server.address
    return socket.create_connection((address.host, address.port), timeout=10)


def answered(running: Running, times: int = 5, seconds: float = 10.0) -> None:
    """A new caller, on a connection of its own, is answered in time."""
    with grpc.insecure_channel(str(running.server.address)) as channel:
        stub = type(running.native)(channel)
        for seed in range(times):
            answer = stub.Classify(request(random_pixels(2, seed)), timeout=seconds)
            assert len(answer.results) == 2


def test_a_thousand_connections_that_say_nothing(server: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * 1000 + 200  # both ends are in this process
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        with contextlib.ExitStack() as open_ones:
            for _ in range(1000):
                open_ones.enter_context(dial(server))
            answered(server)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_caller_that_sends_a_byte_at_a_time(server: Running) -> None:
    over = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError), dial(server) as slow:  # gRPC may hang up on it
            for byte in HTTP2_PREFACE + bytes(1000):
                slow.send(bytes([byte]))
                if over.wait(0.02):
                    return

    with ThreadPoolExecutor(20) as pool:
        for _ in range(20):
            pool.submit(drip)
        try:
            answered(server)
        finally:
            over.set()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Of HTTP/2 (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def read_frame(connection: socket.socket) -> tuple[int, int]:
    """The kind and the flags of the next frame."""
    header = connection.recv(9, socket.MSG_WAITALL)
    connection.recv(int.from_bytes(header[:3], "big"), socket.MSG_WAITALL)
    return header[3], header[4]


def half_a_call(running: Running, path: str) -> socket.socket:
    """A call that has begun, and ten bytes of a hundred of its message."""
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "phalanx", "content-type": "application/grpc"}
    fields = [(name.encode(), value.encode()) for name, value in {**headers, "te": "trailers"}.items()]
    block = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)  # RFC 7541, 6.2.2
    connection = dial(running)
    message = b"\0" + (100).to_bytes(4, "big") + bytes(10)
    connection.sendall(HTTP2_PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, 0, 1, message))
    connection.sendall(frame(PING, 0, 0, bytes(8)))
    while read_frame(connection) != (PING, ACK):  # then the server has read all of it
        pass
    return connection


@both
@pytest.mark.parametrize("method", ["phalanx.v1.DefenseEnsemble/Classify", "phalanx.v1.DefenseEnsemble/ListEnsembles"])
def test_callers_that_send_half_a_message(tiny_bundle: Path, graphs: GraphCache, front_end: str, method: str) -> None:
    """They are more than there are threads, and nobody waits for the other half for long."""
    limits = {"max_concurrent_calls": 4, "message_seconds": 1}
    with (
        serving(tiny_bundle, graphs, ensembles={"full": {}}, limits=limits, front_end=front_end) as running,
        contextlib.ExitStack() as open_ones,
    ):
        for _ in range(2 * (4 + SPARE_THREADS)):
            open_ones.enter_context(half_a_call(running, f"/{method}"))
        for _ in range(50):  # some of them come when all calls have come to their threads
            assert running.health.Check(health_pb2.HealthCheckRequest(), timeout=20).status
            time.sleep(0.01)
        end, served = time.monotonic() + 20, False
        while not served and time.monotonic() < end:
            with contextlib.suppress(grpc.RpcError):  # while they have the places
                served = bool(running.native.Classify(request(random_pixels(1)), timeout=20).results)
        assert served


def test_who_may_not_ask_sends_in_vain(tiny_bundle: Path, graphs: GraphCache) -> None:
    """But for a few, strangers are refused before the messages that they do not finish."""
    callers = {"shop": {"token_sha256": "0" * 64, "scopes": ["classify"]}}
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, callers=callers) as running, contextlib.ExitStack() as open_ones:
        for _ in range(MOST_AWAITED):
            open_ones.enter_context(half_a_call(running, "/phalanx.v1.DefenseEnsemble/Classify"))
        while running.server._gate.watchdog.watched < MOST_AWAITED:
            time.sleep(0.01)
        stranger = open_ones.enter_context(half_a_call(running, "/phalanx.v1.DefenseEnsemble/Classify"))
        while read_frame(stranger)[0] != HEADERS:  # with its status
            pass
        assert running.scrape()['phalanx_errors_total{code="UNAUTHENTICATED",ensemble="full",method="Classify"}'] == 1


class Deaf:
    """A caller that asks without end and never reads an answer."""

    def __init__(self, running: Running, number: int) -> None:
        self.asked = 0
        little = [("grpc.lb", number), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]  # fits on its way
        self._channel = grpc.insecure_channel(str(running.server.address), little)
        self.call = type(running.native)(self._channel).ClassifyStream(self._requests())

    def _requests(self) -> Iterator[pb.ClassifyStreamRequest]:
        image = request(random_pixels(1)).images[0]
        while True:
            self.asked += 1
            yield pb.ClassifyStreamRequest(image=image)

    def await_stuck(self) -> None:
        """Until nothing more fits into the way there, as nothing more fits into the way back."""
        before = -1
        while self.asked != before or self.asked < 2 * WINDOW:
            assert self.call.is_active()
            before = self.asked
            time.sleep(0.5)

    def close(self) -> None:
        self.call.cancel()
        self._channel.close()


def test_callers_that_never_read_their_streams(tiny_bundle: Path, graphs: GraphCache) -> None:
    """Their answers fill the way back until nothing more fits; their places are theirs, everybody else's are not."""
    quick_end = {"notice_seconds": 0, "drain_seconds": 1}
    with (
        serving(tiny_bundle, graphs, ensembles={"full": {}}, shutdown=quick_end) as running,
        contextlib.ExitStack() as open_ones,
    ):
        callers = [Deaf(running, number) for number in range(4)]
        for caller in callers:
            open_ones.callback(caller.close)
        for caller in callers:
            caller.await_stuck()
        answered(running, times=20)
        before = time.monotonic()
        running.server.drain()  # nor do they hold up its end
        assert time.monotonic() - before < 10


def test_a_caller_that_never_reads_its_stream_loses_its_place(tiny_bundle: Path, graphs: GraphCache) -> None:
    """Of which there are two, as of all places half is for streams."""
    limits = {"max_concurrent_calls": 4, "stream_idle_seconds": 2}
    one = pb.ClassifyStreamRequest(image=request(random_pixels(1)).images[0])
    with (
        serving(tiny_bundle, graphs, ensembles={"full": {}}, limits=limits) as running,
        contextlib.ExitStack() as open_ones,
    ):
        callers = [Deaf(running, number) for number in range(2)]
        for caller in callers:
            open_ones.callback(caller.close)
            while caller.asked < 2 * WINDOW:  # which it could not without a place
                time.sleep(0.01)
        with pytest.raises(grpc.RpcError, match="2 streams are being answered already"):
            next(running.native.ClassifyStream(iter([one])))
        end, seen = time.monotonic() + 20, False
        while not seen and time.monotonic() < end:
            with contextlib.suppress(grpc.RpcError):  # while the places are on their way back
                seen = not next(running.native.ClassifyStream(iter([one]))).result.HasField("error")
        assert seen
        for caller in callers:
            with pytest.raises(grpc.RpcError, match="CANCELLED"):
                list(caller.call)


def test_watchers_of_health_that_come_and_go_stop_nothing(server: Running) -> None:
    """Each hangs up while others are told: a lock held over a send would meet one that waits for it."""

    def churn() -> None:
        with grpc.insecure_channel(str(server.server.address), [("grpc.use_local_subchannel_pool", 1)]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            for _ in range(60):
                watch = health.Watch(health_pb2.HealthCheckRequest())
                with contextlib.suppress(grpc.RpcError):
                    next(watch)
                watch.cancel()

    with ThreadPoolExecutor(6) as pool:
        for each in [pool.submit(churn) for _ in range(6)]:
            each.result(60)
    answered(server)
    deaf = [server.health.Watch(health_pb2.HealthCheckRequest(service=f"no such thing {i}")) for i in range(8)]
    for watch in deaf:
        next(watch)
    with pytest.raises(grpc.RpcError) as refused:
        next(server.health.Watch(health_pb2.HealthCheckRequest()))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answered(server)


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"])
def test_bytes_that_are_no_health_request_are_no_error_of_ours(
    server: Running, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    call = server.channel.unary_stream(f"/{method}") if method.endswith("Watch") else server.channel.unary_unary(f"/{method}")
    with pytest.raises(grpc.RpcError) as refused:
        list(call(b"\x0a\xff"))  # type: ignore[operator]
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not [record for record in caplog.records if record.exc_info]


def test_a_scraper_that_says_nothing_stops_no_other_nor_the_servers_end(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path
) -> None:
    authority = Authority()
    certificate, key = authority.issue("phalanx.test", ("phalanx.test",)).write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    tls = {"certificate": certificate, "key": key, "client_ca": tmp_path / "ca.pem"}
    shown = authority.issue("prometheus").write(tmp_path, "prometheus")

    def scrape(server: Server, by: Authority, pair: tuple[Path, Path] | None) -> bytes:
        assert server.metrics_address is not None
        context = ssl.create_default_context(cadata=by.pem.decode())
        if pair is not None:
            context.load_cert_chain(*pair)
        with (
            socket.create_connection(("127.0.0.1", server.metrics_address.port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="phalanx.test") as wrapped,
        ):
            wrapped.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: wrapped.recv(65536), b""))

    with Server(configured(tiny_bundle, tls=tls, metrics="0.0.0.0:0"), graphs) as server:
        assert server.metrics_address is not None
        with socket.create_connection(("127.0.0.1", server.metrics_address.port)):
            assert b"phalanx_queue_images" in scrape(server, authority, shown)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                scrape(server, authority, None)
            other = Authority("the next one")
            other.issue("phalanx.test", ("phalanx.test",)).write(tmp_path, "server")
            assert b"phalanx_queue_images" in scrape(server, other, shown)
            before = time.monotonic()
            server.drain()
            assert time.monotonic() - before < 5


def test_a_caller_that_is_killed_takes_nobody_with_it(server: Running) -> None:
    program = textwrap.dedent(
        f"""
        import grpc
        from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc
        from tests.service.serving import random_pixels, request
        stub = defense_ensemble_pb2_grpc.DefenseEnsembleStub(grpc.insecure_channel("{server.server.address}"))
        stub.Classify(request(random_pixels(1)))
        print("asking", flush=True)
        while True:
            for call in [stub.Classify.future(request(random_pixels(16))) for _ in range(8)]:
                call.result()
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as doomed:
        assert doomed.stdout is not None
        assert doomed.stdout.readline() == "asking\n"
        with ThreadPoolExecutor(4) as pool:
            mates = [pool.submit(answered, server, 15) for _ in range(4)]
            time.sleep(0.1)
            doomed.send_signal(signal.SIGKILL)
            for mate in mates:
                mate.result(60)
    answered(server)
    end = time.monotonic() + 10
    while _in_flight(server) and time.monotonic() < end:
        time.sleep(0.05)
    assert _in_flight(server) == 0


def _in_flight(running: Running) -> float:
    return sum(value for key, value in running.scrape().items() if key.startswith("phalanx_in_flight_requests"))


@pytest.mark.parametrize("days", [1, -1], ids=["forward", "back"])
def test_a_clock_that_jumps(tiny_bundle: Path, graphs: GraphCache, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """In the middle of a stream that has an hour: deadlines, delays and quotas go by the monotonic clock."""
    real, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])
    jumped = threading.Event()

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        image = request(random_pixels(1)).images[0]
        yield pb.ClassifyStreamRequest(id="before", image=image)
        jumped.wait(20)
        yield pb.ClassifyStreamRequest(id="after", image=image)

    quota = {"images_per_second": 0.01, "burst_images": 5}
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, quota=quota) as server:
        stream = server.native.ClassifyStream(requests(), timeout=3600)
        assert not next(stream).result.HasField("error")
        jump[0] = days * 86400.0
        jumped.set()
        assert [(answer.id, answer.result.HasField("error")) for answer in stream] == [("after", False)]
        timeout = 60 if days > 0 else None  # the caller's clock jumps, too, but gRPC's own does not: back, it would be over
        assert len(server.native.Classify(request(random_pixels(3)), timeout=timeout).results) == 3
        with pytest.raises(grpc.RpcError, match=r"more than its 0\.01 images a second") as refused:
            server.native.Classify(request(random_pixels(1)))
        assert 0 < (retry_seconds(refused.value) or 0) <= 100


@pytest.mark.parametrize("left", [0.0, 5.0, A_YEAR])
def test_a_deadline_is_of_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch, left: float) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    before = time.monotonic()
    deadline = deadline_of(_with_time_left(left))
    assert deadline is not None
    assert before + left <= deadline <= time.monotonic() + left


def test_a_deadline_in_the_far_future_is_none() -> None:
    assert deadline_of(_with_time_left(2 * A_YEAR)) is None


def _with_time_left(seconds: float) -> Context:
    return cast(Context, SimpleNamespace(time_remaining=lambda: seconds))


def test_a_bundle_that_vanishes_under_the_servers_feet(tmp_path: Path, graphs: GraphCache) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    with serving(bundle, graphs, ensembles={"full": {}, "no-edge": {"without": ["edge"]}}) as running:
        before = running.native.Classify(request(random_pixels(3)))
        shutil.rmtree(bundle)
        assert running.native.Classify(request(random_pixels(3))).results == before.results
        assert running.native.GetEnsemble(pb.GetEnsembleRequest(ensemble="no-edge")).ensemble.name == "no-edge"


def test_an_expired_caller_in_a_batch_changes_nothing_for_its_mates(server: Running) -> None:
    expected = server.native.Classify(request(random_pixels(4)))

    def patient() -> pb.ClassifyResponse:
        return server.native.Classify(request(random_pixels(4)))

    def hasty() -> grpc.StatusCode:
        try:
            server.native.Classify(request(random_pixels(32)), timeout=0.004)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    with ThreadPoolExecutor(12) as pool:
        late = [pool.submit(hasty) for _ in range(60)]
        for mate in [pool.submit(patient) for _ in range(60)]:
            for got, want in zip(mate.result(30).results, expected.results, strict=True):
                assert got.classification.probabilities == pytest.approx(list(want.classification.probabilities), abs=1e-5)
    assert {call.result() for call in late} <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.OK}


@pytest.mark.parametrize("size", [10, 2 * QUICKLY_READ], ids=["small", "large"])
def test_a_message_for_which_there_is_no_memory_is_answered(server: Running, size: int) -> None:
    """And does not hold up the end, as a call would that nobody answers."""

    def parse(_: bytes) -> pb.ClassifyRequest:
        raise MemoryError

    with ThreadPoolExecutor(2) as pool:
        front = NativeServer(pool, _options(server.server.catalogue.config))
        front.add_inference(DEFENSE_ENSEMBLE, parse, DefenseEnsembleServicer(server.server._gate).classify)
        port = front.add_insecure_port("127.0.0.1:0")
        front.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            classify: Any = channel.unary_unary(f"/{DEFENSE_ENSEMBLE}/Classify")
            with pytest.raises(grpc.RpcError, match="internal error"):
                classify(bytes(size), timeout=5)
            assert front.stop(10).wait(5)
