"""Who may do what: tokens, certificates, scopes, disclosure and quotas, over real connections, through both APIs."""

from __future__ import annotations

import contextlib
import datetime
import hmac
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.access import token_digest
from service.config import TlsConfig
from service.connect import Bearer
from service.graph_cache import GraphCache
from service.pb.inference import open_inference_pb2 as inference
from service.pb.inference import open_inference_pb2_grpc as inference_grpc
from service.pb.phalanx.v1 import admin_pb2, admin_pb2_grpc
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc
from service.server import CannotStart, Server
from service.servicers import admin
from service.tls import Certificates, InvalidCertificate
from tests.service.certificates import Authority
from tests.service.serving import Running, configured, random_pixels, reason, request, retry_seconds, serving

CODE = grpc.StatusCode
REFLECT = reflection_pb2.ServerReflectionRequest(list_services="")
TOKENS = {name: f"the token of {name}" for name in ("shop", "lab", "ops", "slow", "narrow")}
CALLERS: dict[str, dict[str, Any]] = {
    "shop": {"scopes": ["classify"], "disclosure": "label"},
    "lab": {"scopes": ["classify", "ablate", "describe"]},
    "ops": {"scopes": ["admin"]},
    "slow": {"scopes": ["classify"], "quota": {"images_per_second": 2, "burst_images": 3}},
    "narrow": {"scopes": ["classify"], "quota": {"concurrent_calls": 1}},
}
KNOWN = {name: {**caller, "token_sha256": token_digest(TOKENS[name])} for name, caller in CALLERS.items()}


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Path, graphs: GraphCache) -> Iterator[Running]:
    with serving(tiny_bundle, graphs, callers=KNOWN, admin="127.0.0.1:0") as server:
        yield server


class As:
    """The server as one caller sees it."""

    def __init__(self, channel: grpc.Channel, name: str | None) -> None:
        self.channel = grpc.intercept_channel(channel, Bearer(TOKENS.get(name, name))) if name else channel
        self.native = pb_grpc.DefenseEnsembleStub(self.channel)
        self.open_inference = inference_grpc.GRPCInferenceServiceStub(self.channel)
        self.reflection: Any = reflection_pb2_grpc.ServerReflectionStub(self.channel)  # its published types know no methods


def caller(running: Running, name: str | None) -> As:
    return As(running.channel, name)


def infer(ensemble: str = "full", outputs: tuple[str, ...] = ()) -> inference.ModelInferRequest:
    pixels = random_pixels(1)
    tensor = inference.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=pixels.shape)
    asked = [inference.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    return inference.ModelInferRequest(model_name=ensemble, inputs=[tensor], outputs=asked, raw_input_contents=[pixels.tobytes()])


def refusal(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


EVERYTHING: dict[str, Callable[[As], object]] = {
    "Classify": lambda at: at.native.Classify(request(random_pixels(1))),
    "ClassifyStream": lambda at: list(at.native.ClassifyStream(iter([pb.ClassifyStreamRequest()]))),
    "ListEnsembles": lambda at: at.native.ListEnsembles(pb.ListEnsemblesRequest()),
    "GetEnsemble": lambda at: at.native.GetEnsemble(pb.GetEnsembleRequest()),
    "ModelInfer": lambda at: at.open_inference.ModelInfer(infer()),
    "ModelReady": lambda at: at.open_inference.ModelReady(inference.ModelReadyRequest(name="full")),
    "ModelMetadata": lambda at: at.open_inference.ModelMetadata(inference.ModelMetadataRequest(name="full")),
    "ModelConfig": lambda at: at.open_inference.ModelConfig(inference.ModelConfigRequest(name="full")),
    "ModelStatistics": lambda at: at.open_inference.ModelStatistics(inference.ModelStatisticsRequest(name="full")),
    "ServerReflectionInfo": lambda at: list(at.reflection.ServerReflectionInfo(iter([REFLECT]))),
    "ServerMetadata": lambda at: at.open_inference.ServerMetadata(inference.ServerMetadataRequest()),
}
ALLOWED = {
    "shop": {"Classify", "ClassifyStream", "ModelInfer", "ModelReady", "ServerMetadata"},
    "lab": set(EVERYTHING) - {"ModelStatistics"},
    "ops": {"ModelStatistics", "ServerMetadata"},
}


@pytest.mark.parametrize("method", EVERYTHING)
@pytest.mark.parametrize("name", [None, "nobody's token"])
def test_without_valid_credentials_nothing_is_answered(guarded: Running, method: str, name: str | None) -> None:
    assert refusal(lambda: EVERYTHING[method](caller(guarded, name))) is CODE.UNAUTHENTICATED


def test_every_method_of_both_apis_is_among_them() -> None:
    methods = {
        method.name
        for file, service in ((pb, "DefenseEnsemble"), (inference, "GRPCInferenceService"))
        for method in file.DESCRIPTOR.services_by_name[service].methods
    }
    assert methods - {"ServerLive", "ServerReady"} == set(EVERYTHING) - {"ServerReflectionInfo"}


def test_health_is_answered_to_anybody(guarded: Running) -> None:
    answer = guarded.health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert caller(guarded, None).open_inference.ServerLive(inference.ServerLiveRequest()).live
    assert caller(guarded, None).open_inference.ServerReady(inference.ServerReadyRequest()).ready


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("method", EVERYTHING)
def test_a_scope_allows_what_it_is_for(guarded: Running, method: str, name: str) -> None:
    if method in ALLOWED[name]:
        EVERYTHING[method](caller(guarded, name))
    elif method == "ClassifyStream":  # where every request has an error of its own
        (answer,) = caller(guarded, name).native.ClassifyStream(iter([pb.ClassifyStreamRequest()]))
        assert answer.result.error.code == CODE.PERMISSION_DENIED.value[0]
    else:
        assert refusal(lambda: EVERYTHING[method](caller(guarded, name))) is CODE.PERMISSION_DENIED


def test_a_caller_is_told_the_label_only_through_either_api(guarded: Running) -> None:
    shop = caller(guarded, "shop")
    answer = shop.native.Classify(request(random_pixels(1)))
    assert answer.disclosure == pb.DISCLOSURE_LABEL
    told = {field.name for field, _ in answer.results[0].classification.ListFields()}
    assert told <= {"class_index", "class_name"}
    assert [output.name for output in shop.open_inference.ModelInfer(infer()).outputs] == ["label"]
    assert refusal(lambda: shop.open_inference.ModelInfer(infer(outputs=("probabilities",)))) is CODE.PERMISSION_DENIED
    more = request(random_pixels(1), disclosure=pb.DISCLOSURE_VERDICT)
    assert refusal(lambda: shop.native.Classify(more)) is CODE.PERMISSION_DENIED


@pytest.mark.parametrize("ensemble", ["no-edge", "no-such-ensemble"])
def test_other_ensembles_need_a_scope_and_are_not_even_denied_by_name(guarded: Running, ensemble: str) -> None:
    """Whether there is one of this name is not told either."""
    shop = caller(guarded, "shop")
    sentences = set()
    for ask in (
        lambda: shop.native.Classify(request(random_pixels(1), ensemble)),
        lambda: shop.open_inference.ModelInfer(infer(ensemble)),
        lambda: shop.open_inference.ModelReady(inference.ModelReadyRequest(name=ensemble)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            ask()
        assert caught.value.code() is CODE.PERMISSION_DENIED
        sentences.add(caught.value.details())
    assert sentences == {"caller `shop` may ask full; others need the scope `ablate`"}


def test_with_the_scope_every_ensemble_is_answered(guarded: Running) -> None:
    lab = caller(guarded, "lab")
    assert lab.native.Classify(request(random_pixels(1), "no-edge")).ensemble == "no-edge"
    assert lab.open_inference.ModelInfer(infer("no-edge")).model_name == "no-edge"


def test_a_scope_may_name_its_ensembles(tiny_bundle: Path, graphs: GraphCache) -> None:
    scopes = {"classify": {"ensembles": ["full", "no-edge"], "disclosure": "verdict"}, "ablate": {"ensembles": ["votes-only"]}}
    with serving(tiny_bundle, graphs, callers=KNOWN, scopes=scopes) as running:
        slow, lab = caller(running, "slow"), caller(running, "lab")
        assert slow.native.Classify(request(random_pixels(1), "no-edge")).disclosure == pb.DISCLOSURE_VERDICT
        assert refusal(lambda: slow.native.Classify(request(random_pixels(1), "votes-only"))) is CODE.PERMISSION_DENIED
        assert lab.native.Classify(request(random_pixels(1), "votes-only")).disclosure == pb.DISCLOSURE_EVIDENCE
        assert refusal(lambda: lab.native.Classify(request(random_pixels(1), "fresh"))) is CODE.PERMISSION_DENIED


@pytest.mark.parametrize("value", ["Basic abc", "the token of shop", "Bearer", "Bearer ", f"Bearer {token_digest(TOKENS['shop'])}"])
def test_other_kinds_of_authorization_are_refused(guarded: Running, value: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        guarded.native.Classify(request(random_pixels(1)), metadata=(("authorization", value),))
    assert caught.value.code() is CODE.UNAUTHENTICATED


def test_the_scheme_is_written_in_any_case(guarded: Running) -> None:
    guarded.native.Classify(request(random_pixels(1)), metadata=(("authorization", f"bEARER {TOKENS['shop']}"),))


# --- quotas


def test_who_asks_too_fast_is_told_when_to_come_back(guarded: Running) -> None:
    slow = caller(guarded, "slow")
    slow.native.Classify(request(random_pixels(5)))  # more than the bucket holds, and so into debt
    with pytest.raises(grpc.RpcError) as caught:
        slow.open_inference.ModelInfer(infer())
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert reason(caught.value) == ("phalanx", "QUOTA")
    wait = retry_seconds(caught.value)
    assert wait is not None
    assert 0.5 < wait <= 1.5  # 5 of 3 tokens: 3 are missing, at 2 a second
    caller(guarded, "shop").native.Classify(request(random_pixels(1)))  # nobody else is
    time.sleep(wait)
    slow.native.Classify(request(random_pixels(1)))


def test_a_callers_calls_at_once_are_limited(guarded: Running) -> None:
    narrow, over = caller(guarded, "narrow"), threading.Event()

    def waiting() -> Iterator[pb.ClassifyStreamRequest]:
        yield pb.ClassifyStreamRequest()
        over.wait(20)

    stream = narrow.native.ClassifyStream(waiting())
    next(stream)
    assert refusal(lambda: narrow.native.Classify(request(random_pixels(1)))) is CODE.RESOURCE_EXHAUSTED
    assert refusal(lambda: list(narrow.native.ClassifyStream(iter(())))) is CODE.RESOURCE_EXHAUSTED
    over.set()
    assert list(stream) == []
    _eventually(lambda: narrow.native.Classify(request(random_pixels(1))))


def test_without_callers_every_address_has_a_quota(tiny_bundle: Path, graphs: GraphCache) -> None:
    with serving(tiny_bundle, graphs, quota={"images_per_second": 0.1, "burst_images": 2}) as running:
        running.native.Classify(request(random_pixels(2)))
        assert refusal(lambda: running.native.Classify(request(random_pixels(1)))) is CODE.RESOURCE_EXHAUSTED


# --- TLS


@contextlib.contextmanager
def connection(server: Server, authority: Authority, shown: Any = None) -> Iterator[As]:
    files = (authority.pem, shown.key if shown else None, shown.certificate if shown else None)
    options = [("grpc.ssl_target_name_override", "phalanx.test")]
    with grpc.secure_channel(str(server.address), grpc.ssl_channel_credentials(*files), options) as channel:
        yield As(channel, None)


@pytest.fixture
def authority() -> Authority:
    return Authority()


def certified(tmp_path: Path, authority: Authority, mutual: bool) -> dict[str, Path]:
    certificate, key = authority.issue("phalanx.test", ("phalanx.test",)).write(tmp_path, "server")
    if not mutual:
        return {"certificate": certificate, "key": key}
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    return {"certificate": certificate, "key": key, "client_ca": tmp_path / "ca.pem"}


def test_a_certificate_says_who_calls(tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, authority: Authority) -> None:
    callers = {
        "lab": {"certificate": "lab.example", "scopes": ["classify", "ablate"]},
        "old": {"certificate": "Old Client", "scopes": ["describe"]},
    }
    with Server(configured(tiny_bundle, callers=callers, tls=certified(tmp_path, authority, True)), graphs) as server:
        with connection(server, authority, authority.issue("anything", ("other.example", "lab.example"))) as lab:
            lab.native.Classify(request(random_pixels(1), "no-edge"))
            assert refusal(lambda: lab.native.ListEnsembles(pb.ListEnsemblesRequest())) is CODE.PERMISSION_DENIED
        with connection(server, authority, authority.issue("Old Client")) as old:
            old.native.ListEnsembles(pb.ListEnsemblesRequest())
        with connection(server, authority, authority.issue("stranger", ("stranger.example",))) as stranger:
            assert refusal(lambda: stranger.native.Classify(request(random_pixels(1)))) is CODE.UNAUTHENTICATED


@pytest.mark.parametrize("shown", ["none", "expired", "of another authority"])
def test_a_certificate_that_does_not_count_is_no_connection(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, authority: Authority, shown: str
) -> None:
    pair = {
        "none": None,
        "expired": authority.issue("lab", ("lab.example",), -datetime.timedelta(minutes=1)),
        "of another authority": Authority("other").issue("lab", ("lab.example",)),
    }[shown]
    callers = {"lab": {"certificate": "lab.example", "scopes": ["classify"]}}
    with Server(configured(tiny_bundle, callers=callers, tls=certified(tmp_path, authority, True)), graphs) as server:
        with connection(server, authority, pair) as lab:
            assert refusal(lambda: lab.native.Classify(request(random_pixels(1)), timeout=5)) is CODE.UNAVAILABLE
        with connection(server, authority, authority.issue("lab", ("lab.example",))) as lab:  # and nobody else suffers
            lab.native.Classify(request(random_pixels(1)))


def test_a_new_certificate_needs_no_restart(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    tls, other = certified(tmp_path, authority, False), Authority("the next one")

    def answered(by: Authority) -> None:
        with connection(server, by) as anybody:
            anybody.native.Classify(request(random_pixels(1)), timeout=5)

    def expiry() -> float:
        return server.metrics.registry.get_sample_value("phalanx_tls_certificate_expiry_timestamp_seconds") or 0

    with Server(configured(tiny_bundle, tls=tls), graphs) as server, connection(server, authority) as early:
        early.native.Classify(request(random_pixels(1)))
        assert expiry() == pytest.approx(time.time() + 3600, abs=120)
        tls["certificate"].write_bytes(b"half writ")
        answered(authority)  # what cannot be used changes nothing, and the log says so
        assert "the certificate read before stays in use" in caplog.text
        other.issue("phalanx.test", ("phalanx.test",), datetime.timedelta(hours=5)).write(tmp_path, "server")
        answered(other)
        assert expiry() == pytest.approx(time.time() + 5 * 3600, abs=120)
        assert refusal(lambda: answered(authority)) is CODE.UNAVAILABLE
        early.native.Classify(request(random_pixels(1)))  # who was connected stays so


def test_an_authority_that_is_none_is_refused_at_the_start(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, authority: Authority
) -> None:
    tls = certified(tmp_path, authority, True)
    tls["client_ca"].write_text("nothing")
    with pytest.raises(CannotStart, match=r"ca\.pem"):
        Server(configured(tiny_bundle, tls=tls), graphs)


def encrypted(key: bytes) -> bytes:
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    return serialization.load_pem_private_key(key, None).private_bytes(*form)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(lambda _: Authority().issue("phalanx.test").key, "expected the key of the first certificate", id="another"),
        pytest.param(encrypted, "Password was not given", id="encrypted"),
        pytest.param(lambda key: key[:-40], "Unable to load PEM", id="half written"),
    ],
)
def test_a_key_that_is_not_the_certificates_is_refused(
    tmp_path: Path, authority: Authority, change: Callable[[bytes], bytes], sentence: str
) -> None:
    tls = certified(tmp_path, authority, False)
    tls["key"].write_bytes(change(tls["key"].read_bytes()))
    with pytest.raises(InvalidCertificate, match=f"server.key: .*{sentence}"):
        Certificates(TlsConfig(**tls), lambda _: None).credentials()


def test_what_is_checked_of_a_certificate_is_what_was_read(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files are replaced just when one of them has been read."""
    tls, read_bytes = certified(tmp_path, authority, False), Path.read_bytes

    def overtaken(path: Path) -> bytes:
        content = read_bytes(path)
        if path == tls["key"]:
            authority.issue("phalanx.test", ("phalanx.test",)).write(tmp_path, "server")
        return content

    monkeypatch.setattr(Path, "read_bytes", overtaken)
    with pytest.raises(InvalidCertificate, match="expected the key of the first certificate, got another one"):
        Certificates(TlsConfig(**tls), lambda _: None).credentials()


@pytest.mark.parametrize("name", ["shop", "narrow", "nobody"])  # the first, the last, none
def test_a_token_is_compared_with_every_known_one_in_constant_time(
    guarded: Running, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    compare_digest, compared = hmac.compare_digest, list[tuple[str, str]]()

    def noted(known: str, presented: str) -> bool:
        compared.append((known, presented))
        return compare_digest(known, presented)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    with contextlib.suppress(grpc.RpcError):
        caller(guarded, name).native.GetEnsemble(pb.GetEnsembleRequest())
    presented = token_digest(TOKENS.get(name, name))
    assert compared == [(its["token_sha256"], presented) for its in KNOWN.values()]


# --- what is not on the public port


def test_the_admin_api_is_on_its_own_port_only(guarded: Running) -> None:
    ops = caller(guarded, "ops")
    assert refusal(lambda: admin_pb2_grpc.AdminStub(ops.channel).Reload(admin_pb2.ReloadRequest())) is CODE.UNIMPLEMENTED


@pytest.mark.parametrize("name, code", [(None, CODE.UNAUTHENTICATED), ("lab", CODE.PERMISSION_DENIED)])
def test_the_admin_port_wants_its_scope_and_notes_who_lacks_it(
    guarded: Running,
    name: str | None,
    code: grpc.StatusCode,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admin, "QUIET_SECONDS", 60.0)
    with grpc.insecure_channel(str(guarded.server.admin_address)) as channel:
        stub = admin_pb2_grpc.AdminStub(As(channel, name).channel)
        calls: list[tuple[Any, Message]] = [
            (stub.Reload, admin_pb2.ReloadRequest()),
            (stub.AddEnsemble, admin_pb2.AddEnsembleRequest(name="x", choice="{}")),
            (stub.RemoveEnsemble, admin_pb2.RemoveEnsembleRequest(name="no-edge")),
        ]
        for method, message in calls:
            with pytest.raises(grpc.RpcError) as caught:
                method(message)
            assert caught.value.code() is code
    assert "no-edge" in guarded.server.ensembles
    audits = [record.message for record in caplog.records if hasattr(record, "audit")]
    assert len(audits) == 1
    assert audits[0].startswith(f"audit: Reload by {name or 'a stranger'} from ipv4:127.0.0.1:")


def test_health_of_the_admin_port_is_not_there(guarded: Running) -> None:
    with grpc.insecure_channel(str(guarded.server.admin_address)) as channel:
        check: Any = health_pb2_grpc.HealthStub(channel)
        assert refusal(lambda: check.Check(health_pb2.HealthCheckRequest())) is CODE.UNIMPLEMENTED


def _eventually(ask: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            ask()
        except grpc.RpcError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


# --- what a reviewer found


def test_what_two_scopes_give_is_given_of_each_ensemble_by_itself(tiny_bundle: Path, graphs: GraphCache) -> None:
    scopes = {"classify": {"disclosure": "label"}, "ablate": {"ensembles": ["votes-only"], "disclosure": "evidence"}}
    with serving(tiny_bundle, graphs, callers=KNOWN, scopes=scopes) as running:
        lab = caller(running, "lab")
        assert lab.native.Classify(request(random_pixels(1))).disclosure == pb.DISCLOSURE_LABEL
        assert lab.native.Classify(request(random_pixels(1), "votes-only")).disclosure == pb.DISCLOSURE_EVIDENCE
        assert [output.name for output in lab.open_inference.ModelInfer(infer()).outputs] == ["label"]
        limits = lab.native.GetEnsemble(pb.GetEnsembleRequest()).ensemble.limits
        assert limits.disclosure == pb.DISCLOSURE_LABEL


def test_the_common_name_counts_only_where_there_is_no_other(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, authority: Authority
) -> None:
    callers = {"lab": {"certificate": "lab.example", "scopes": ["classify"]}}
    with (
        Server(configured(tiny_bundle, callers=callers, tls=certified(tmp_path, authority, True)), graphs) as server,
        connection(server, authority, authority.issue("lab.example", ("mallory.example",))) as mallory,
    ):
        assert refusal(lambda: mallory.native.Classify(request(random_pixels(1)))) is CODE.UNAUTHENTICATED


def test_both_ports_speak_tls_and_hear_of_new_certificates(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, authority: Authority
) -> None:
    tls, other = certified(tmp_path, authority, False), Authority("the next one")
    options = [("grpc.ssl_target_name_override", "phalanx.test")]

    def reachable(by: Authority) -> set[grpc.StatusCode]:
        codes = set()
        for address in (server.address, server.admin_address):
            with grpc.secure_channel(str(address), grpc.ssl_channel_credentials(by.pem), options) as channel:
                stub = admin_pb2_grpc.AdminStub(channel)
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Reload(admin_pb2.ReloadRequest(), timeout=5)
                codes.add(caught.value.code())
        return codes

    with Server(configured(tiny_bundle, tls=tls, callers=KNOWN, admin="127.0.0.1:0"), graphs) as server:
        assert reachable(authority) == {CODE.UNIMPLEMENTED, CODE.UNAUTHENTICATED}
        other.issue("phalanx.test", ("phalanx.test",)).write(tmp_path, "server")
        assert reachable(other) == {CODE.UNIMPLEMENTED, CODE.UNAUTHENTICATED}
        assert reachable(authority) == {CODE.UNAVAILABLE}


def test_one_request_of_too_many_images_costs_no_quota(tiny_bundle: Path, graphs: GraphCache) -> None:
    with serving(tiny_bundle, graphs, quota={"images_per_second": 0.001, "burst_images": 1}) as running:
        assert refusal(lambda: running.native.Classify(pb.ClassifyRequest(images=[pb.Image()] * 10_000))) is CODE.INVALID_ARGUMENT
        running.native.Classify(request(random_pixels(1)))


def test_a_greedy_caller_leaves_places_for_others(tiny_bundle: Path, graphs: GraphCache) -> None:
    callers = {name: {"token_sha256": token_digest(TOKENS[name]), "scopes": ["classify"]} for name in ("shop", "lab")}
    over = threading.Event()

    def silent() -> Iterator[pb.ClassifyStreamRequest]:
        yield pb.ClassifyStreamRequest()
        over.wait(30)

    with serving(tiny_bundle, graphs, callers=callers, limits={"max_concurrent_calls": 36}) as running:
        shop, lab = caller(running, "shop"), caller(running, "lab")
        streams = [shop.native.ClassifyStream(silent()) for _ in range(18)]
        codes = [_code(lambda stream=stream: next(stream)) for stream in streams]  # type: ignore[misc]
        assert codes.count(CODE.RESOURCE_EXHAUSTED) == 2  # of 18 places for streams
        assert codes.count(CODE.OK) == 16
        mine = lab.native.ClassifyStream(silent())
        next(mine)
        lab.native.Classify(request(random_pixels(1)))
        over.set()


def test_a_stranger_is_told_so_and_not_that_all_places_are_taken(tiny_bundle: Path, graphs: GraphCache) -> None:
    callers = {name: {"token_sha256": token_digest(TOKENS[name]), "scopes": ["classify"]} for name in ("shop", "lab")}
    over = threading.Event()

    def silent() -> Iterator[pb.ClassifyStreamRequest]:
        yield pb.ClassifyStreamRequest()
        over.wait(30)

    with serving(tiny_bundle, graphs, callers=callers, limits={"max_concurrent_calls": 1}) as running:
        stream = caller(running, "shop").native.ClassifyStream(silent())
        next(stream)
        for method in ("Classify", "ModelInfer"):
            assert refusal(lambda method=method: EVERYTHING[method](caller(running, None))) is CODE.UNAUTHENTICATED  # type: ignore[misc]
            assert refusal(lambda method=method: EVERYTHING[method](caller(running, "lab"))) is CODE.RESOURCE_EXHAUSTED  # type: ignore[misc]
        over.set()


def test_strangers_learn_of_no_ensemble_through_health(guarded: Running) -> None:
    def check(name: str, who: str | None) -> grpc.StatusCode:
        health: Any = health_pb2_grpc.HealthStub(caller(guarded, who).channel)
        return _code(lambda: health.Check(health_pb2.HealthCheckRequest(service=name)))

    service = "phalanx.v1.DefenseEnsemble"
    assert [check(name, None) for name in ("", service, "full", "no-edge")] == [CODE.OK, CODE.OK, CODE.NOT_FOUND, CODE.NOT_FOUND]
    assert [check(name, "shop") for name in ("full", "no-edge")] == [CODE.OK, CODE.NOT_FOUND]
    assert [check(name, "lab") for name in ("full", "no-edge", "none")] == [CODE.OK, CODE.OK, CODE.NOT_FOUND]


def _code(ask: Callable[[], object]) -> grpc.StatusCode:
    try:
        ask()
    except grpc.RpcError as error:
        return error.code()
    return CODE.OK
