"""Several processes on one port: all answer, all change together, and one that is killed costs nobody an answer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, generate_latest

from benchmarks.processes import Process, await_serving, free_port, workers_of
from models.bundle import read_manifest
from service.access import token_digest
from service.config import load_config
from service.connect import Bearer
from service.pb.phalanx.v1 import admin_pb2, admin_pb2_grpc
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc
from service.workers import supervisor
from service.workers.gathered import GatheredMetrics
from service.workers.lines import Line, NoAnswer, answer
from service.workers.supervisor import Seat
from tests.bundles import write_tiny_bundle
from tests.service.serving import random_pixels, request

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux divides the connections of a port")

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = grpc.StatusCode
SECONDS = 30.0
OPS = {"ops": {"token_sha256": token_digest("ops"), "scopes": ["admin", "ablate", "describe", "classify"]}}
SERVING = "phalanx_workers"
PAUSE = 0.1  # before a call is made once more


@dataclass(frozen=True)
class Served:
    """`phalanx serve` with two workers, as an operator and a caller see it."""

    file: Path
    bundle: Path
    process: Process
    admin: str
    metrics: str
    log: Path

    @contextmanager
    def stub(self) -> Iterator[pb_grpc.DefenseEnsembleStub]:
        """Over a connection of its own, which may be any worker's."""
        with grpc.insecure_channel(self.process.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield pb_grpc.DefenseEnsembleStub(grpc.intercept_channel(channel, Bearer("ops")))

    @contextmanager
    def operator(self) -> Iterator[admin_pb2_grpc.AdminStub]:
        with grpc.insecure_channel(self.admin) as channel:
            yield admin_pb2_grpc.AdminStub(grpc.intercept_channel(channel, Bearer("ops")))

    def scrape(self) -> dict[str, float]:
        with urlopen(f"http://{self.metrics}/metrics") as response:
            lines = response.read().decode().splitlines()
        return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def everywhere(self, ask: Callable[[pb_grpc.DefenseEnsembleStub], Any], connections: int = 12) -> list[Any]:
        """What so many connections are answered; all go to one worker once in 2^11 times."""
        answers = []
        for _ in range(connections):
            with self.stub() as stub:
                answers.append(ask(stub))
        return answers

    def names(self) -> set[tuple[str, ...]]:
        """What the workers offer: one element where they agree."""
        listed = self.everywhere(lambda stub: stub.ListEnsembles(pb.ListEnsemblesRequest()).ensembles)
        return {tuple(each.name for each in ensembles) for ensembles in listed}

    def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    @property
    def ends(self) -> float:
        return sum(value for series, value in self.scrape().items() if series.startswith("phalanx_worker_ends_total"))

    def kill_one(self) -> None:
        """The oldest worker, which has most connections, the hard way; returns when another serves in its place."""
        before = self.ends
        os.kill(workers_of(self.process.pid)[0], signal.SIGKILL)
        self.until(lambda: self.ends == before + 1)
        self.until(lambda: self.scrape()[SERVING] == 2)


def write(file: Path, bundle: Path, ports: Mapping[str, str], **changes: Any) -> None:
    plain = {
        "bundle": str(bundle),
        "workers": 2,
        "callers": OPS,
        "ensembles": {"full": {}},
        "device": {"provider": "cpu", "threads": 1},
        "shutdown": {"notice_seconds": 0, "drain_seconds": 10},
        **ports,
    }
    file.write_text(yaml.safe_dump({**plain, **changes}))


@contextmanager
def served(folder: Path, **changes: Any) -> Iterator[Served]:
    file, bundle, log = folder / "phalanx.yaml", write_tiny_bundle(folder / "bundle"), folder / "log"
    ports = {key: f"127.0.0.1:{free_port()}" for key in ("listen", "metrics", "admin")}
    write(file, bundle, ports, **changes)
    with log.open("w") as stderr, started(file, stderr, folder) as process:
        its = Served(file, bundle, Process(process.pid, ports["listen"]), ports["admin"], ports["metrics"], log)
        await_serving(its.process)
        its.until(lambda: its.scrape()[SERVING] == 2)
        yield its


@contextmanager
def started(file: Path, stderr: Any, cache: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "service.cli", "serve", "--config", str(file)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(SECONDS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """For tests that leave two workers that serve `full`."""
    with served(tmp_path_factory.mktemp("workers")) as its:
        yield its


def test_connections_are_divided_among_the_workers_and_each_counts_for_itself(pair: Served) -> None:
    pixels = random_pixels(2)
    answers = pair.everywhere(lambda stub: stub.Classify(request(pixels)).results)
    assert all(answer == answers[0] for answer in answers)
    count = 'phalanx_request_seconds_count{ensemble="full",method="Classify"'
    calls = [value for series, value in pair.scrape().items() if series.startswith(count)]
    assert len(calls) == 2
    assert min(calls) > 0
    assert sum(calls) >= len(answers)


def test_workers_share_a_port_behind_the_native_front_end_too(tmp_path: Path) -> None:
    with served(tmp_path, front_end="native") as its:
        its.everywhere(lambda stub: stub.Classify(request(random_pixels(2))))
        count = 'phalanx_request_seconds_count{ensemble="full",method="Classify"'
        calls = [value for series, value in its.scrape().items() if series.startswith(count)]
        assert sum(calls) == 12
        assert min(calls) > 0
        its.kill_one()
        assert its.names() == {("full",)}


def test_a_killed_worker_costs_nobody_an_answer_who_asks_once_more(pair: Served) -> None:
    expected, over, lost = request(random_pixels(2)), threading.Event(), list[grpc.RpcError]()
    with pair.stub() as stub:
        right = stub.Classify(expected).results

    def ask() -> int:
        answered = 0
        with pair.stub() as stub:
            while not over.is_set():
                try:
                    answer = stub.Classify(expected, timeout=20)
                except grpc.RpcError as error:
                    lost.append(error)
                    time.sleep(PAUSE)  # a dying process resets one connection after the other, those it has not accepted yet, too
                    answer = stub.Classify(expected, timeout=20, wait_for_ready=True)  # once: a second failure fails the test
                assert answer.results == right
                answered += 1
        return answered

    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(ask) for _ in range(8)]
        try:
            for _ in range(3):
                time.sleep(0.2)
                pair.kill_one()
        finally:
            over.set()
        assert all(caller.result(SECONDS) > 0 for caller in callers)
    assert {error.code() for error in lost} == {CODE.UNAVAILABLE}, "somebody was being answered by who was killed"


def test_an_admin_changes_what_all_workers_offer_and_later_ones_too(pair: Served) -> None:
    with pair.operator() as operator:
        done = operator.AddEnsemble(admin_pb2.AddEnsembleRequest(name="hard", choice="{rule: majority}"))
        assert tuple(done.ensembles) == ("full", "hard")
        assert pair.names() == {("full", "hard")}
        pair.kill_one()
        assert pair.names() == {("full", "hard")}
        assert tuple(operator.Reload(admin_pb2.ReloadRequest(), wait_for_ready=True).ensembles) == ("full",)
        assert pair.names() == {("full",)}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"ensembles": {"full": {"without": ["egde"]}}}, "worker [01]: ensemble full: without: .*the nearest is edge"),
        ({"workers": 3}, "workers: expected 2, as at the start, got 3: this takes a restart"),
        ({"calers": {}}, "unknown key `calers`"),
    ],
)
def test_what_one_worker_cannot_offer_none_offers(pair: Served, changes: dict[str, Any], sentence: str) -> None:
    def failed() -> list[float]:
        return [pair.scrape()[f'phalanx_reloads_total{{outcome="failed",worker="{worker}"}}'] for worker in range(2)]

    before, text = failed(), pair.file.read_text()
    pair.file.write_text(yaml.safe_dump({**yaml.safe_load(text), **changes}))
    with pair.operator() as operator, pytest.raises(grpc.RpcError, match=sentence) as refused:
        operator.Reload(admin_pb2.ReloadRequest())
    pair.file.write_text(text)
    assert refused.value.code() is CODE.FAILED_PRECONDITION
    assert failed() == [count + 1 for count in before]
    assert pair.names() == {("full",)}


def test_sighup_reaches_all_workers(pair: Served) -> None:
    text = pair.file.read_text()
    pair.file.write_text(yaml.safe_dump({**yaml.safe_load(text), "ensembles": {"full": {}, "new": {}}}))
    os.kill(pair.process.pid, signal.SIGHUP)
    pair.until(lambda: "audit: reload by SIGHUP: full, new over tiny" in pair.log.read_text())
    assert pair.names() == {("full", "new")}
    pair.file.write_text(text)
    os.kill(pair.process.pid, signal.SIGHUP)
    pair.until(lambda: "audit: reload by SIGHUP: full over tiny" in pair.log.read_text())


def test_a_worker_never_serves_another_bundle_than_the_others(tmp_path: Path) -> None:
    with served(tmp_path) as its:
        other = write_tiny_bundle(tmp_path / "other", seed=9)
        old, new = read_manifest(its.bundle).version, read_manifest(other).version
        its.bundle.rename(tmp_path / "away")
        other.rename(its.bundle)
        os.kill(workers_of(its.process.pid)[-1], signal.SIGKILL)
        its.until(lambda: f"the bundle is {new} by now, and the others serve {old}" in its.log.read_text())
        versions = its.everywhere(lambda stub: stub.Classify(request(random_pixels(1))).bundle_version, 4)
        assert set(versions) == {old}
        with its.operator() as operator:
            operator.Reload(admin_pb2.ReloadRequest(), timeout=SECONDS, wait_for_ready=True)
        its.until(lambda: its.scrape()[SERVING] == 2)
        versions = its.everywhere(lambda stub: stub.Classify(request(random_pixels(1))).bundle_version)
        assert set(versions) == {new}


def test_sigterm_answers_what_was_accepted_and_ends_all(tmp_path: Path) -> None:
    with served(tmp_path) as its, its.stub() as stub:
        stub.Classify(request(random_pixels(1)))
        workers = workers_of(its.process.pid)
        pending = [stub.Classify.future(request(random_pixels(200)), timeout=SECONDS) for _ in range(4)]
        its.until(lambda: any(value for key, value in its.scrape().items() if key.startswith("phalanx_in_flight")))
        os.kill(its.process.pid, signal.SIGTERM)
        assert {each.code() for each in pending} <= {CODE.OK, CODE.UNAVAILABLE}
        assert any(each.code() is CODE.OK for each in pending)
        its.until(lambda: not any(map(alive, [its.process.pid, *workers])))
        assert "stopped" in its.log.read_text()


def test_workers_whose_supervisor_is_killed_answer_what_they_accepted_and_end(tmp_path: Path) -> None:
    with served(tmp_path) as its, its.stub() as stub:
        workers = workers_of(its.process.pid)
        assert len(workers) == 2
        pending = [stub.Classify.future(request(random_pixels(200)), timeout=SECONDS) for _ in range(4)]
        its.until(lambda: any(value for key, value in its.scrape().items() if key.startswith("phalanx_in_flight")))
        os.kill(its.process.pid, signal.SIGKILL)
        assert {each.code() for each in pending} <= {CODE.OK, CODE.UNAVAILABLE}  # those that were not accepted yet
        assert any(each.code() is CODE.OK for each in pending)
        its.until(lambda: not any(map(alive, workers)))


def test_a_port_whose_last_connections_linger_can_be_had(tmp_path: Path) -> None:
    file, bundle = tmp_path / "phalanx.yaml", write_tiny_bundle(tmp_path / "bundle")
    ports = {"listen": f"127.0.0.1:{free_port()}", "metrics": "off"}
    for workers in (1, 2):
        write(file, bundle, ports, workers=workers, ensembles={"full": {}})
        with started(file, subprocess.DEVNULL, tmp_path) as process:
            await_serving(Process(process.pid, ports["listen"]))
            with grpc.insecure_channel(ports["listen"]) as channel:  # which the server closes first
                pb_grpc.DefenseEnsembleStub(grpc.intercept_channel(channel, Bearer("ops"))).Classify(request(random_pixels(1)))
                process.terminate()
                assert process.wait(SECONDS) == 0


def test_a_worker_that_hangs_is_killed_and_another_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PULSE_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "BEAT_SECONDS", 0.5)
    write(tmp_path / "phalanx.yaml", write_tiny_bundle(tmp_path / "bundle"), {"listen": "127.0.0.1:0"}, metrics="off", callers={})
    config = load_config(tmp_path / "phalanx.yaml", {})
    with supervisor.Supervisor(config, lambda: config) as workers:
        hung, other = (seat._process.pid for seat in workers._seats)
        for pid in (hung, other):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(other, signal.SIGCONT)  # a short sleep is forgiven
        end = time.monotonic() + SECONDS
        while workers._seats[0]._process is None or workers._seats[0]._process.pid == hung or len(workers._serving) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert workers._seats[1]._process.pid == other
        with grpc.insecure_channel(str(workers.address)) as channel:
            assert pb_grpc.DefenseEnsembleStub(channel).Classify(request(random_pixels(2)), timeout=SECONDS).results


def test_a_worker_that_cannot_be_started_is_tried_again_for_ever_but_not_at_once() -> None:
    seat, pauses = Seat(0), list[float]()
    for _ in range(2000):
        before = time.monotonic()
        seat.put_off()
        pauses.append(seat.due - before)
    assert pauses[0] < 0.5
    assert pauses[-1] == pytest.approx(30, abs=0.1)


def test_sigterm_during_a_reload_drains_at_once(tmp_path: Path) -> None:
    """A change under way does not keep the workers SERVING."""
    with served(tmp_path) as its, its.operator() as operator, its.stub() as stub:
        stub.Classify(request(random_pixels(1)))
        many = {f"e{n}": {"without": ["edge"], "review_rate": 0.02 + n / 1000} for n in range(40)}  # which take long to load
        its.file.write_text(yaml.safe_dump({**yaml.safe_load(its.file.read_text()), "ensembles": {"full": {}, **many}}))
        change = operator.Reload.future(admin_pb2.ReloadRequest(), timeout=SECONDS)
        time.sleep(0.3)
        os.kill(its.process.pid, signal.SIGTERM)
        its.until(lambda: its.log.read_text().count("NOT_SERVING; draining") == 3)  # the supervisor's line and the workers'
        assert not change.done() or change.code() is not CODE.OK
        its.until(lambda: not alive(its.process.pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("shares", [False, True])
def test_a_port_that_another_process_has_is_refused_even_if_it_would_share(tmp_path: Path, shares: bool) -> None:
    file, bundle = tmp_path / "phalanx.yaml", write_tiny_bundle(tmp_path / "bundle")
    with socket.socket() as other:
        if shares:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        write(file, bundle, {"listen": taken, "metrics": "off"})
        with started(file, subprocess.PIPE, tmp_path) as process:
            _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert said == f"phalanx serve: listen: cannot have {taken}: Address already in use\n"


def test_a_bundle_that_cannot_be_served_ends_the_start(tmp_path: Path) -> None:
    file, bundle = tmp_path / "phalanx.yaml", write_tiny_bundle(tmp_path / "bundle")
    (bundle / "edge.onnx").write_bytes(b"?")
    write(file, bundle, {"listen": "127.0.0.1:0", "metrics": "off"})
    with started(file, subprocess.PIPE, tmp_path) as process:
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "phalanx serve: " in said
    assert "edge.onnx: expected SHA-256" in said


# --- its parts


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one() -> None:
    ours, theirs = multiprocessing.Pipe()
    proceed, asked = threading.Event(), list[str]()

    def handle(question: str) -> str:
        if question == "slow":
            proceed.wait(SECONDS)
        asked.append(question)
        return f"{question} answered"

    thread = threading.Thread(target=answer, args=(theirs, handle))
    thread.start()
    line = Line(ours)
    for _ in range(2):  # the second time nothing is asked: what is not answered shall not pile up
        with pytest.raises(NoAnswer, match=r"no answer within 0\.05 s"):
            line.ask("slow", 0.05)
    proceed.set()
    assert line.ask("quick", SECONDS) == "quick answered"
    assert asked == ["slow", "quick"]
    line.close()
    thread.join(SECONDS)
    assert not thread.is_alive()
    with pytest.raises(NoAnswer, match="ended"):
        line.ask("anybody", SECONDS)


def test_series_of_all_workers_are_one_family_and_told_apart() -> None:
    registries = {worker: CollectorRegistry() for worker in range(2)}
    for worker, registry in registries.items():
        Counter("calls", "Calls.", ("method",), registry=registry).labels("Classify").inc(worker + 1)
    gathered = GatheredMetrics(lambda: {worker: registry.collect() for worker, registry in registries.items()}, 2, lambda: 2)
    for _ in range(2):  # a scrape changes nothing
        lines = generate_latest(gathered.registry).decode().splitlines()
        assert [line for line in lines if line.startswith("calls_total")] == [
            'calls_total{method="Classify",worker="0"} 1.0',
            'calls_total{method="Classify",worker="1"} 2.0',
        ]
        assert lines.count("# TYPE calls_total counter") == 1
