"""The configuration: defaults, files, the environment over them, and refusals that say where and what instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.ensemble import RuleName
from service.config import Address, Disclosure, InvalidConfig, load_config

DESIGN = """\
bundle: bundles/mine
listen: 127.0.0.1:50061         # a comment
metrics: 127.0.0.1:9101
ensembles:
  full: {}
  no-edge: {without: [edge]}
  votes-only: {detectors: []}
  hard-vote: {rule: majority, masks: fresh, review_rate: 0.1}
  quiet: {roles: {bayesian: [detector]}}
decision: {review_rate: 0.05, reject_rate: 0.01}
batching: {max_batch_size: 32, max_delay_ms: 2, max_queue: 512}
device: {provider: cpu, strict: true}
limits: {disclosure: verdict}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "phalanx.yaml"
    path.write_text(text)
    return path


def test_no_file_serves_the_default_bundle_on_the_loopback_address() -> None:
    config = load_config(environment={})
    assert config.listen == Address("127.0.0.1", 50051)
    assert config.listen.loopback
    assert config.bundle_path.parts[-3:] == ("models", "bundles", "eurosat")
    assert list(config.ensembles) == ["full"]
    assert config.limits.disclosure is Disclosure.EVIDENCE


def test_a_file_as_the_design_has_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DESIGN), environment={})
    assert config.bundle_path == tmp_path / "bundles" / "mine"
    assert list(config.ensembles) == ["full", "no-edge", "votes-only", "hard-vote", "quiet"]
    assert config.ensembles["no-edge"].without == ("edge",)
    assert config.ensembles["full"].detectors is None
    assert config.ensembles["votes-only"].detectors == ()
    assert config.ensembles["hard-vote"].rule is RuleName.MAJORITY
    assert config.ensembles["quiet"].roles == {"bayesian": ("detector",)}
    assert config.rates("full").review_rate == 0.05
    assert (config.rates("hard-vote").review_rate, config.rates("hard-vote").reject_rate) == (0.1, 0.01)
    assert config.batching.max_queue == 512
    assert config.device.strict
    assert config.limits.disclosure is Disclosure.VERDICT


def test_the_environment_goes_over_the_file_and_the_command_line_over_both(tmp_path: Path) -> None:
    environment = {
        "PHALANX_CONFIG": str(write(tmp_path, DESIGN)),
        "PHALANX_LISTEN": "[::1]:50062",
        "PHALANX_METRICS": "off",
        "PHALANX_BATCHING__MAX_DELAY_MS": "7.5",
        "PHALANX_DEVICE__STRICT": "false",
        "PHALANX_ENSEMBLES__NO_EDGE__WITHOUT": "[edge, metric]",
        "PHALANX_ENSEMBLES__MINE": "{rule: soft}",
        "PHALANX_BUNDLE": "elsewhere",
        "HOME": "/nowhere",
    }
    config = load_config(environment=environment, overrides={"bundle": Path("here"), "listen": None})
    assert config.listen == Address("::1", 50062)
    assert str(config.listen) == "[::1]:50062"
    assert config.listen.loopback
    assert config.metrics is None
    assert config.batching.max_delay_ms == 7.5
    assert config.batching.max_batch_size == 32
    assert not config.device.strict
    assert config.ensembles["no-edge"].without == ("edge", "metric")
    assert config.ensembles["mine"].rule is RuleName.SOFT
    assert config.bundle == Path("here")


def test_what_kubernetes_injects_for_a_service_called_phalanx_is_not_ours() -> None:
    environment = {
        "PHALANX_SERVICE_HOST": "10.0.0.1",
        "PHALANX_SERVICE_PORT": "50051",
        "PHALANX_SERVICE_PORT_GRPC": "50051",
        "PHALANX_PORT": "tcp://10.0.0.1:50051",
        "PHALANX_PORT_50051_TCP": "tcp://10.0.0.1:50051",
    }
    assert load_config(environment=environment) == load_config(environment={})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param("listn: 127.0.0.1:1", r"line 1: unknown key `listn`; did you mean `listen`\?", id="a misspelled key"),
        pytest.param(
            "ensembles:\n  full: {}\n  x:\n    wihtout: [edge]",
            r"phalanx.yaml, line 4: unknown key `ensembles.x.wihtout`; did you mean `without`\?",
            id="a misspelled key deep inside",
        ),
        pytest.param("zzz: 1", r"unknown key `zzz`; valid keys here: admin, batching, bundle", id="a key like none"),
        pytest.param("listen: 127.0.0.1", "line 1: listen: expected host:port", id="an address without a port"),
        pytest.param("listen: 127.0.0.1:99999", "expected host:port", id="a port too high"),
        pytest.param("listen: ::1:50051", "expected host:port", id="an IPv6 host without brackets"),
        pytest.param("workers: 0", "workers", id="no worker"),
        pytest.param(
            "front_end: native\ntls: {certificate: a.pem, key: b.pem}",
            "speaks no TLS: leave it out, or have a proxy",
            id="native TLS",
        ),
        pytest.param(
            "front_end: native\nlimits: {max_connection_age_seconds: 5}",
            "closes no connection by its age",
            id="native connection age",
        ),
        pytest.param(
            "front_end: native\ninsecure: true\nlisten: 0.0.0.0:1", "expected a private address in `listen`", id="native in public"
        ),
        pytest.param(
            "front_end: native\nquota: {concurrent_calls: 4}",
            "does not know the address of a stream: name `callers`",
            id="native quota",
        ),
        pytest.param("listen: 0.0.0.0:1", "without encryption: set `tls:.*or say `insecure: true`", id="a public address"),
        pytest.param("metrics: 0.0.0.0:1", "`metrics: 0.0.0.0:1` is reachable", id="public metrics"),
        pytest.param("listen: myhost:1", "is reachable from other machines", id="a host name that may be public"),
        pytest.param("ensembles: {}", "ensembles: .*at least 1", id="no ensemble"),
        pytest.param("ensembles: {a b: {}}", "ensembles.a b: .*pattern", id="an ensemble's name with a space"),
        pytest.param("ensembles: {a: {rule: best}}", "ensembles.a.rule: .*'soft'", id="an unknown rule"),
        pytest.param("limits: {disclosure: all}", "limits.disclosure: expected one of label, verdict", id="a disclosure"),
        pytest.param("decision: {reject_rate: 0.2}", "reject_rate 0.2 is above review_rate 0.05", id="rates crossed"),
        pytest.param("decision: {reject_rate: 0}", "greater than 0", id="a rate of zero"),
        pytest.param("batching: {max_batch_size: 0}", "batching.max_batch_size: .*greater than", id="a batch of none"),
        pytest.param("batching: {max_batch_size: two}", "line 1: batching.max_batch_size: .*integer", id="a word"),
        pytest.param("tls: {certificate: a.pem}", "tls.key: Field required", id="a certificate without its key"),
        pytest.param("listen: a:1\nlisten: b:2", "line 2: `listen` was already given on line 1", id="a key given twice"),
        pytest.param("a: [", r"phalanx.yaml, line \d: not YAML", id="not YAML"),
        pytest.param("a: \x01", "phalanx.yaml: not YAML: .*special characters", id="a control character"),
        pytest.param("- a", "expected keys and values", id="a list"),
        pytest.param("a: &x [*x]", "line 1: expected at most 16 levels", id="an alias of itself"),
        pytest.param("bundle: ''", "line 1: bundle: expected the path of a bundle's folder, got nothing", id="no bundle"),
        pytest.param("shutdown: {drain_seconds: .inf}", "shutdown.drain_seconds: .*finite", id="for ever"),
        pytest.param("limits: {max_message_bytes: 9999999999}", "limits.max_message_bytes: .*less", id="more than gRPC can count"),
        pytest.param("device: {provider: tpu}", "device.provider: .*'cuda'", id="an unknown provider"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InvalidConfig, match=sentence):
        load_config(write(tmp_path, text), environment={})


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "listn: 1\nbatching: {max_batch_size: x}\ndevice: {strct: true}\n")
    with pytest.raises(InvalidConfig) as raised:
        load_config(path, environment={})
    places = [line.split(": ")[0] for line in str(raised.value).splitlines()]
    assert sorted(places) == [f"{path}, line {line}" for line in (1, 2, 3)]


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        pytest.param("PHALANX_LISTN", "x", r"PHALANX_LISTN: unknown key `listn`; did you mean `listen`\?", id="a key"),
        pytest.param("PHALANX_BATCHING__MAX_DELAY", "1", "did you mean `max_delay_ms`", id="a nested key"),
        pytest.param("PHALANX_LISTEN__PORT", "1", "unknown key `listen.port`", id="a key below a value"),
        pytest.param("PHALANX_LISTEN", "nonsense", "PHALANX_LISTEN: listen: expected host:port", id="a value"),
        pytest.param("PHALANX_LISTEN__HOST", "1", "unknown key `listen.host`; `listen` holds a value", id="another one"),
        pytest.param("PHALANX_ENSEMBLES", "{full: [}", "PHALANX_ENSEMBLES: not YAML", id="broken YAML"),
        pytest.param("PHALANX_ENSEMBLES", "{full: {}, full: {}}", "`full` was already given", id="a key given twice"),
    ],
)
def test_a_bad_variable_is_refused_by_its_name(variable: str, value: str, sentence: str) -> None:
    with pytest.raises(InvalidConfig, match=sentence):
        load_config(environment={variable: value})


@pytest.mark.parametrize("permission", ["insecure: true", "tls: {certificate: a.pem, key: b.pem}"])
def test_a_public_address_with_permission(tmp_path: Path, permission: str) -> None:
    config = load_config(write(tmp_path, f"listen: 0.0.0.0:50051\n{permission}\n"), environment={})
    assert not config.listen.loopback
    if config.tls:
        assert config.tls.key == tmp_path / "b.pem"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml", environment={})


def test_a_section_with_nothing_in_it_is_all_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "ensembles:\n  full:\n  other:\nbatching:\n"), environment={})
    assert list(config.ensembles) == ["full", "other"]
    assert config.batching == load_config(environment={}).batching


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n"), environment={}) == load_config(environment={})


HASH = 64 * "a"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("callers: {a: {scopes: [classify]}}", "expected `token_sha256` or `certificate`: by what is this caller known?"),
        (f"callers: {{a: {{token_sha256: {HASH}, scopes: []}}}}", "callers.a.scopes: Tuple should have at least 1 item"),
        (f"callers: {{a: {{token_sha256: {HASH}, scopes: [clasify]}}}}", "callers.a.scopes.0: Input should be 'classify'"),
        (f"callers: {{a: {{token_sha256: {HASH.upper()}, scopes: [admin]}}}}", "callers.a.token_sha256: String should match"),
        (f"callers: {{anonymous: {{token_sha256: {HASH}, scopes: [admin]}}}}", "`anonymous` is whoever calls"),
        (
            f"callers: {{a: {{token_sha256: {HASH}, scopes: [admin]}}, b: {{token_sha256: {HASH}, scopes: [classify]}}}}",
            "callers `a` and `b` have the same token_sha256",
        ),
        ("callers: {a: {certificate: a.example, scopes: [admin]}}", "known by a certificate: set `tls: {client_ca: FILE}`"),
        ("admin: 127.0.0.1:50052", "`admin` opens a port that changes what is served: name a caller with the scope `admin`"),
        (
            f"admin: 0.0.0.0:1\ncallers: {{a: {{token_sha256: {HASH}, scopes: [admin]}}}}",
            "`admin: 0.0.0.0:1` is reachable",
        ),
        ("scopes: {classify: {ensembles: [fulll]}}", "scopes.classify.ensembles: expected some of full, got fulll"),
        ("scopes: {classify: {disclosure: labels}}", "scopes.classify.disclosure: expected one of label, verdict"),
        ("quota: {images_per_second: 0}", "quota.images_per_second: Input should be greater than 0"),
        ("logging: {requests: some}", "logging.requests: Input should be 'none', 'notable' or 'all'"),
        ("signature: {}", "signature.public_key: Field required"),
    ],
)
def test_a_mistake_about_callers_is_told_where_it_stands(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        load_config(write(tmp_path, text), environment={})
    assert sentence in str(refused.value)


def test_paths_of_certificates_and_keys_are_relative_to_the_file(tmp_path: Path) -> None:
    text = "tls: {certificate: a.pem, key: b.pem, client_ca: c.pem}\nsignature: {public_key: d.pub}\n"
    config = load_config(write(tmp_path, text), environment={})
    assert config.tls is not None
    assert config.signature is not None
    assert config.tls.client_ca == tmp_path / "c.pem"
    assert config.signature.public_key == tmp_path / "d.pub"


def test_a_callers_token_is_no_key_of_the_configuration() -> None:
    assert load_config(environment={"PHALANX_TOKEN": "secret"}) == load_config(environment={})
