"""Change without downtime: what is reloaded, added and removed under callers who must not notice, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from models.bundle import InvalidBundle, read_bundle, read_manifest
from service.access import token_digest
from service.config import InvalidConfig, ServiceConfig, load_config
from service.connect import Bearer
from service.graph_cache import GraphCache
from service.pb.phalanx.v1 import admin_pb2, admin_pb2_grpc
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc
from service.reload import ReloadFailed, told
from service.server import Server
from tests.bundles import write_tiny_bundle
from tests.service.serving import ENSEMBLES, Running, connected, random_pixels, request

CODE = grpc.StatusCode
REPOSITORY = Path(__file__).resolve().parents[2]
OPS = {"ops": {"token_sha256": token_digest("ops"), "scopes": ["admin", "ablate", "describe", "classify"]}}


@dataclass(frozen=True)
class Configured:
    """A server whose configuration is a file, and an operator of it."""

    file: Path
    bundle: Path
    running: Running
    native: pb_grpc.DefenseEnsembleStub
    admin: admin_pb2_grpc.AdminStub

    def write(self, **changes: Any) -> None:
        write(self.file, self.bundle, **changes)

    def count(self, outcome: str) -> float:
        return self.running.scrape()[f'phalanx_reloads_total{{outcome="{outcome}"}}']


def write(file: Path, bundle: Path, **changes: Any) -> ServiceConfig:
    plain = {
        "bundle": str(bundle),
        "listen": "127.0.0.1:0",
        "metrics": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "callers": OPS,
        "ensembles": {name: dict(choice) for name, choice in ENSEMBLES.items()},
        "device": {"provider": "cpu", "threads": 1},
        "shutdown": {"notice_seconds": 0, "drain_seconds": 10},
    }
    file.write_text(yaml.safe_dump({**plain, **changes}, sort_keys=False))
    return load_config(file, environment={})


@contextmanager
def configured(folder: Path, graphs: GraphCache, **changes: Any) -> Iterator[Configured]:
    file, bundle = folder / "phalanx.yaml", write_tiny_bundle(folder / "bundle")
    config = write(file, bundle, **changes)
    with Server(config, graphs, lambda: load_config(file, environment={})) as server:
        running = connected(server)
        with running.channel as public, grpc.insecure_channel(str(server.admin_address)) as private:
            as_ops = Bearer("ops")
            native = pb_grpc.DefenseEnsembleStub(grpc.intercept_channel(public, as_ops))
            yield Configured(file, bundle, running, native, admin_pb2_grpc.AdminStub(grpc.intercept_channel(private, as_ops)))


@pytest.fixture
def served(tmp_path: Path, graphs: GraphCache) -> Iterator[Configured]:
    with configured(tmp_path, graphs) as server:
        yield server


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is CODE.FAILED_PRECONDITION
    return str(caught.value.details())


def names(served: Configured) -> list[str]:
    return [ensemble.name for ensemble in served.native.ListEnsembles(pb.ListEnsemblesRequest()).ensembles]


def health(served: Configured, name: str) -> int:
    asked: Any = health_pb2_grpc.HealthStub(grpc.intercept_channel(served.running.channel, Bearer("ops")))
    return int(asked.Check(health_pb2.HealthCheckRequest(service=name)).status)


# --- what a reload takes up


def test_a_reload_serves_what_the_configuration_says_now(served: Configured) -> None:
    served.write(ensembles={"full": {}, "hard": {"rule": "majority"}}, decision={"review_rate": 0.2})
    done = served.admin.Reload(admin_pb2.ReloadRequest())
    assert list(done.ensembles) == names(served) == ["full", "hard"]
    assert served.native.Classify(request(random_pixels(1), "hard")).ensemble == "hard"
    assert served.native.GetEnsemble(pb.GetEnsembleRequest()).ensemble.rates.review == pytest.approx(0.2)
    with pytest.raises(grpc.RpcError) as caught:
        served.native.Classify(request(random_pixels(1), "no-edge"))
    assert caught.value.code() is CODE.NOT_FOUND
    assert health(served, "hard") == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as gone:
        health(served, "no-edge")
    assert gone.value.code() is CODE.NOT_FOUND
    series = served.running.scrape()
    assert 'phalanx_queue_images{ensemble="hard"}' in series
    assert 'phalanx_queue_images{ensemble="no-edge"}' not in series
    assert served.count("ok") == 1


def test_a_reload_serves_another_bundle(served: Configured, tmp_path: Path) -> None:
    before = served.native.Classify(request(random_pixels(1)))
    other = write_tiny_bundle(tmp_path / "other", seed=9)
    write(served.file, other)
    served.admin.Reload(admin_pb2.ReloadRequest())
    after = served.native.Classify(request(random_pixels(1)))
    assert (before.bundle_version, after.bundle_version) == (read_manifest(served.bundle).version, read_manifest(other).version)
    assert before.results[0].classification.probabilities != after.results[0].classification.probabilities
    assert [key for key in served.running.scrape() if key.startswith("phalanx_bundle_info")] == [
        f'phalanx_bundle_info{{bundle="tiny",version="{after.bundle_version}"}}'
    ]


def test_counts_go_on_over_a_reload(served: Configured) -> None:
    def clean() -> float:
        return sum(
            value for key, value in served.running.scrape().items() if key.startswith('phalanx_verdicts_total{ensemble="full"')
        )

    served.native.Classify(request(random_pixels(7)))
    served.admin.Reload(admin_pb2.ReloadRequest())
    served.native.Classify(request(random_pixels(5)))
    assert clean() == 12


# --- what is wrong changes nothing


def bad_typo(served: Configured) -> None:
    served.file.write_text(served.file.read_text().replace("callers:", "calers:"))


def bad_yaml(served: Configured) -> None:
    served.file.write_text("ensembles: {full: [")


def bad_date(served: Configured) -> None:
    served.file.write_text("bundle: 2024-13-45")  # of which PyYAML makes a date, or a bare ValueError


def bad_depth(served: Configured) -> None:
    served.file.write_text("ensembles: " + 600 * "[" + 600 * "]")


def opened(served: Configured) -> None:
    served.write(callers={}, admin="off")


def other_logging(served: Configured) -> None:
    served.write(logging={"requests": "all"})


def other_tls(served: Configured) -> None:
    served.write(tls={"certificate": "our keys/server.pem", "key": "our keys/server.key"})


def bad_member(served: Configured) -> None:
    served.write(ensembles={"full": {"without": ["egde"]}})


def bad_port(served: Configured) -> None:
    served.write(listen="127.0.0.1:1")


def bad_places(served: Configured) -> None:
    served.write(limits={"max_concurrent_calls": 3})


def no_file(served: Configured) -> None:
    served.file.unlink()


def no_bundle(served: Configured) -> None:
    shutil.rmtree(served.bundle)


def bad_hash(served: Configured) -> None:
    file = served.bundle / "edge.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (bad_typo, "phalanx.yaml, line [0-9]+: unknown key `calers`; did you mean `callers`?"),
        (bad_yaml, "phalanx.yaml, line 1: not YAML"),
        (bad_date, "phalanx.yaml: not YAML"),
        (bad_depth, "phalanx.yaml: not YAML|levels of keys"),
        (opened, "admin: expected|callers: expected some, as before, got none"),
        (other_logging, "logging: expected .*: this takes a restart to change"),
        (other_tls, r"tls: expected None, .* got certificate=PosixPath\('server.pem'\) key=PosixPath\('server.key'\)"),
        (bad_member, "ensemble full: without: .*got 'egde'; the nearest is edge"),
        (bad_port, "listen: expected 127.0.0.1:0, as at the start, got 127.0.0.1:1: this takes a restart"),
        (bad_places, "limits.max_concurrent_calls: expected 128, as at the start, got 3"),
        (no_file, "phalanx.yaml: cannot be read"),
        (no_bundle, "bundle"),
        (bad_hash, "edge.onnx: expected SHA-256"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_changes_nothing(
    served: Configured, caplog: pytest.LogCaptureFixture, spoil: Callable[[Configured], None], sentence: str
) -> None:
    before = served.native.Classify(request(random_pixels(3)))
    spoil(served)
    told = refused(lambda: served.admin.Reload(admin_pb2.ReloadRequest()))
    assert re.search(sentence, told), told
    assert str(served.file.parent) not in told  # no path leaves the process; the log has it
    assert "audit: reload by ops failed, what was served before goes on" in caplog.text
    assert served.count("failed") == 1
    assert served.native.Classify(request(random_pixels(3))).results == before.results
    assert names(served) == list(ENSEMBLES)


@pytest.mark.parametrize("folder", ["conf", "../prod", "our models", "/no such folder", "/"])
def test_no_folder_is_told_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.chdir(tmp_path)
    file, bundle = Path(folder, "none.yaml"), Path(folder, "none")
    with pytest.raises(InvalidConfig, match=str(file)) as unread:
        load_config(file, environment={})
    assert told(unread.value) == "none.yaml: cannot be read: [Errno 2] No such file or directory: 'none.yaml'"
    for path in (bundle, bundle.resolve()):
        with pytest.raises(InvalidBundle, match=str(path)) as unfound:
            read_bundle(path)
        assert told(unfound.value, ServiceConfig(bundle=bundle)) == "none: expected a folder with a bundle, got nothing"


def test_what_is_no_path_is_told_as_it_is() -> None:
    sentence = "data/x, 1 / 2: expected http://127.0.0.1:4317, got http://collector/"
    assert told(InvalidConfig(sentence), ServiceConfig(bundle=Path("a/bundle"))) == sentence


# --- ensembles that come and go


def test_an_ensemble_is_added_replaced_and_removed_live(served: Configured) -> None:
    done = served.admin.AddEnsemble(admin_pb2.AddEnsembleRequest(name="hard", choice="{rule: majority, without: [edge]}"))
    assert list(done.ensembles) == [*ENSEMBLES, "hard"]
    assert len(served.native.Classify(request(random_pixels(1), "hard")).results[0].classification.votes) == 3
    served.admin.AddEnsemble(admin_pb2.AddEnsembleRequest(name="hard", choice=""))
    assert len(served.native.Classify(request(random_pixels(1), "hard")).results[0].classification.votes) == 4
    served.admin.RemoveEnsemble(admin_pb2.RemoveEnsembleRequest(name="hard"))
    assert names(served) == list(ENSEMBLES)
    served.admin.AddEnsemble(admin_pb2.AddEnsembleRequest(name="brief", choice="{}"))
    served.admin.Reload(admin_pb2.ReloadRequest())
    assert names(served) == list(ENSEMBLES)  # the configuration's


@pytest.mark.parametrize(
    "name, choice, sentence",
    [
        ("no/such name", "{}", "String should match pattern"),
        ("hard", "{rule: hard}", "Input should be 'soft'"),
        ("hard", "{wihtout: [edge]}", "unknown key `ensembles.hard.wihtout`; did you mean `without`?"),
        ("hard", "{", "choice of hard: not YAML"),
        ("hard", "[edge]", "hard"),
        ("hard", "{without: [metric, edge, adversarial, bayesian]}", "expected at least one classifier"),
    ],
)
def test_an_ensemble_that_cannot_be_is_not_added(served: Configured, name: str, choice: str, sentence: str) -> None:
    told = refused(lambda: served.admin.AddEnsemble(admin_pb2.AddEnsembleRequest(name=name, choice=choice)))
    assert sentence in told
    assert names(served) == list(ENSEMBLES)


@pytest.mark.parametrize("name", ["full", "none"])
def test_the_default_ensemble_and_one_that_is_not_there_cannot_be_removed(served: Configured, name: str) -> None:
    told = refused(lambda: served.admin.RemoveEnsemble(admin_pb2.RemoveEnsembleRequest(name=name)))
    assert told == f"remove: expected one of the ensembles beside the default one (no-edge, votes-only, fresh), got '{name}'"


# --- under load


def test_reloads_under_load_lose_and_mix_up_nothing(served: Configured, tmp_path: Path) -> None:
    """Two bundles in turn; every answer is wholly one's or wholly the other's, and none fails."""
    bundles = [served.bundle, write_tiny_bundle(tmp_path / "other", seed=9)]
    pixels = random_pixels(3)
    expected: dict[str, list[pb.ImageResult]] = {}
    for bundle in reversed(bundles):
        write(served.file, bundle)
        served.admin.Reload(admin_pb2.ReloadRequest())
        answer = served.native.Classify(request(pixels))
        expected[answer.bundle_version] = list(answer.results)
    assert len(expected) == 2
    over, seen = threading.Event(), dict.fromkeys(expected, 0)

    def check(version: str, results: list[pb.ImageResult]) -> None:
        seen[version] += 1
        for got, want in zip(results, expected[version], strict=True):
            assert got.classification.class_index == want.classification.class_index
            assert got.classification.probabilities == pytest.approx(list(want.classification.probabilities), abs=1e-5)

    def ask() -> None:
        while not over.is_set():
            answer = served.native.Classify(request(pixels), timeout=20)
            check(answer.bundle_version, list(answer.results))

    def stream() -> None:
        def requests() -> Iterator[pb.ClassifyStreamRequest]:
            while not over.is_set():
                yield pb.ClassifyStreamRequest(image=request(pixels[:1]).images[0])

        for answer in served.native.ClassifyStream(requests(), timeout=60):
            assert not answer.result.HasField("error"), answer.result.error
            label = expected[answer.bundle_version][0].classification.class_index
            assert answer.result.classification.class_index == label

    with ThreadPoolExecutor(7) as pool:
        callers = [pool.submit(ask) for _ in range(6)] + [pool.submit(stream)]
        try:
            for turn in range(12):
                write(served.file, bundles[turn % 2])
                served.admin.Reload(admin_pb2.ReloadRequest())
        finally:
            over.set()
        for each in callers:
            each.result(30)
    assert min(seen.values()) > 0
    assert served.running.scrape()['phalanx_reloads_total{outcome="failed"}'] == 0
    errors = {key: value for key, value in served.running.scrape().items() if key.startswith("phalanx_errors_total") and value}
    assert errors == {}
    assert not [
        thread for thread in threading.enumerate() if thread.name == "drain-replaced" and thread.is_alive() and _stuck(thread)
    ]


def _stuck(thread: threading.Thread) -> bool:
    thread.join(10)
    return thread.is_alive()


def test_a_revoked_token_ends_an_open_stream(served: Configured) -> None:
    asked, over = threading.Event(), threading.Event()

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        image = request(random_pixels(1)).images[0]
        yield pb.ClassifyStreamRequest(id="before", image=image)
        asked.wait(20)
        yield pb.ClassifyStreamRequest(id="after", image=image)
        over.wait(20)

    stream = served.native.ClassifyStream(requests())
    assert next(stream).id == "before"
    served.write(callers={"other": {**OPS["ops"], "token_sha256": token_digest("another")}})
    served.admin.Reload(admin_pb2.ReloadRequest())
    asked.set()
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    over.set()
    assert caught.value.code() is CODE.UNAUTHENTICATED
    with pytest.raises(grpc.RpcError) as again:
        served.admin.Reload(admin_pb2.ReloadRequest())
    assert again.value.code() is CODE.UNAUTHENTICATED


# --- SIGHUP


def test_sighup_reloads_a_real_server_and_a_typo_does_not_stop_it(tmp_path: Path) -> None:
    file, bundle = tmp_path / "phalanx.yaml", write_tiny_bundle(tmp_path / "bundle")
    write(file, bundle, admin="off", callers={}, ensembles={"full": {}})
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "service.cli", "serve", "--config", str(file)]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        try:
            address = _until(lines, "SERVING").split(" on ")[1].split(";")[0]
            with grpc.insecure_channel(address) as channel:
                stub = pb_grpc.DefenseEnsembleStub(channel)
                write(file, bundle, admin="off", callers={}, ensembles={"full": {}, "new": {}})
                process.send_signal(signal.SIGHUP)
                assert "audit: reload by SIGHUP: full, new over tiny" in _until(lines, "audit")
                assert len(stub.ListEnsembles(pb.ListEnsemblesRequest()).ensembles) == 2
                file.write_text("ensembels: {}")
                process.send_signal(signal.SIGHUP)
                assert "unknown key `ensembels`; did you mean `ensembles`?" in _until(lines, "audit")
                assert len(stub.ListEnsembles(pb.ListEnsemblesRequest()).ensembles) == 2
        finally:
            process.terminate()
            process.communicate(timeout=30)
    assert process.returncode == 0


def _until(lines: Iterator[str], word: str) -> str:
    for line in lines:
        if word in line:
            return line
    raise AssertionError(f"the server ended before it said {word}")


def test_what_was_replaced_gives_its_threads_back(tmp_path: Path, graphs: GraphCache) -> None:
    others = {thread for thread in threading.enumerate() if thread.name.startswith("batcher-")}  # of the session's server
    with configured(tmp_path, graphs) as served:
        for _ in range(3):
            served.admin.Reload(admin_pb2.ReloadRequest())
        _only_its_own_threads_are_left(others)


def _only_its_own_threads_are_left(others: set[threading.Thread]) -> None:

    def batchers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("batcher-")}

    end = time.monotonic() + 10
    while len(batchers() - others) > len(ENSEMBLES) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(batchers() - others) == len(ENSEMBLES)


def test_an_error_nobody_foresaw_changes_nothing_either(
    served: Configured, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the secret path /etc/phalanx")

    with monkeypatch.context() as patch:
        patch.setattr("service.reload.load_ensembles", broken)
        assert refused(lambda: served.admin.Reload(admin_pb2.ReloadRequest())) == "internal error; the log has it"
    assert "the secret path" in caplog.text
    assert served.count("failed") == 1
    assert served.native.Classify(request(random_pixels(1))).ensemble == "full"


def test_a_reload_never_opens_a_server_that_names_its_callers(tmp_path: Path, graphs: GraphCache) -> None:
    """As an empty file would, where all else comes from the environment."""
    with configured(tmp_path, graphs, admin="off") as served:
        served.write(callers={}, admin="off")
        with pytest.raises(ReloadFailed, match="callers: expected some, as before, got none"):
            served.running.server.reload("the test")
        with pytest.raises(grpc.RpcError) as caught:
            served.running.native.Classify(request(random_pixels(1)))
        assert caught.value.code() is CODE.UNAUTHENTICATED


def test_gauges_are_at_rest_after_an_ensemble_went_in_the_middle_of_a_call(served: Configured) -> None:
    gone = threading.Event()

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        image = request(random_pixels(1)).images[0]
        for _ in range(20):
            yield pb.ClassifyStreamRequest(ensemble="no-edge", image=image)
        gone.wait(20)

    stream = served.native.ClassifyStream(requests())
    next(stream)
    served.admin.RemoveEnsemble(admin_pb2.RemoveEnsembleRequest(name="no-edge"))
    gone.set()
    assert len(list(stream)) == 19
    in_flight = {key: value for key, value in served.running.scrape().items() if key.startswith("phalanx_in_flight_requests")}
    assert set(in_flight.values()) == {0}
