"""What an operator writes: a YAML file, with environment variables over it.  Every key has a default; no file at all
serves the bundle that ships with Phalanx on the loopback address.

    PHALANX_CONFIG=phalanx.yaml                    the file, as --config
    PHALANX_LISTEN=127.0.0.1:50052                 a key
    PHALANX_BATCHING__MAX_DELAY_MS=5               a nested key: two underscores between the levels
    PHALANX_ENSEMBLES__NO_EDGE__WITHOUT='[edge]'   a list or a mapping is written as YAML; NO_EDGE finds `no-edge`

This is the only module that reads what the environment says of the configuration.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from models.ensemble import RuleName
from service.config_source import ConfigSource, InvalidConfig, parsed, read_source, with_environment

__all__ = [
    "Address",
    "BatchingConfig",
    "CallerConfig",
    "DecisionConfig",
    "DeviceConfig",
    "Disclosure",
    "EnsembleConfig",
    "InvalidConfig",
    "LimitsConfig",
    "LoggingConfig",
    "QuarantineConfig",
    "QuotaConfig",
    "Scope",
    "ScopeConfig",
    "ScopesConfig",
    "ServiceConfig",
    "ShadowConfig",
    "ShutdownConfig",
    "SignatureConfig",
    "TlsConfig",
    "TracingConfig",
    "load_config",
    "with_ensembles",
]

ENSEMBLE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Disclosure(IntEnum):
    """How much of an answer leaves the server: each level holds the ones above it.  The numbers are the proto's."""

    LABEL = 1  # the class and nothing else
    VERDICT = 2  # and whether to trust it: what a decision-based attack sees
    PROBABILITIES = 3  # and confidence, probabilities, combined p-value: what a score-based attack sees
    EVIDENCE = 4  # and every vote and every detector


class Scope(StrEnum):
    """What a caller may do."""

    CLASSIFY = "classify"  # ask the default ensemble
    ABLATE = "ablate"  # ask every ensemble
    DESCRIBE = "describe"  # learn what an ensemble is made of
    ADMIN = "admin"  # reload, add and remove ensembles, read statistics


@dataclass(frozen=True)
class Address:
    """host:port, an IPv6 host in brackets; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name: where it leads is not ours to guess
            return False

    @property
    def private(self) -> bool:
        """Of this machine or of a private network, and not every address there is."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self.loopback
        return address.is_private and not address.is_unspecified


def _address(value: object) -> object:
    if isinstance(value, Address):
        return value
    host, separator, port = str(value).rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not separator or not host or not port.isdigit() or int(port) > 65535 or (":" in host and "[" not in str(value)):
        raise ValueError(f"expected host:port such as 127.0.0.1:50051 or [::1]:50051, got {str(value)!r}")
    return Address(host, int(port))


def _switched_off(value: object) -> object:
    """`metrics: off` is the boolean False in YAML, and the string "off" in an environment variable."""
    return None if value is None or value is False or value in ("", "off", "null") else _address(value)


def _folder(value: object) -> object:
    if value == "":
        raise ValueError("expected the path of a bundle's folder, got nothing")
    return value


def _quarantine_folder(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"expected the path of a folder for nothing but the quarantine, got {value!r}")
    return value


def _disclosure(value: object) -> object:
    if isinstance(value, str):
        try:
            return Disclosure[value.upper()]
        except KeyError:
            expected = ", ".join(level.name.lower() for level in Disclosure)
            raise ValueError(f"expected one of {expected}, got {value!r}") from None
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_all_defaults(cls, value: object) -> object:
        """`full:` with nothing behind it is None in YAML, and meant as `full: {}`."""
        return {} if value is None else value


class TlsConfig(_Section):
    """PEM files, read again whenever they change: a new certificate needs no restart."""

    certificate: Path  # the server's chain
    key: Path
    client_ca: Path | None = None  # then every connection must show a certificate that this authority signed (mutual TLS)


class ShadowConfig(_Section):
    """Another ensemble gets a share of the images, too, and it is counted how often it agrees. Nobody waits for it."""

    ensemble: str
    share: float = Field(1.0, gt=0, le=1)


class EnsembleConfig(_Section):
    """One named choice over the bundle; what is left out is chosen as the bundle recommends."""

    without: tuple[str, ...] = ()  # members that are absent from the graph
    roles: Mapping[str, tuple[Literal["classifier", "detector"], ...]] = {}
    rule: RuleName | None = None
    detectors: tuple[str, ...] | None = None
    review_rate: float | None = Field(None, gt=0, lt=1)  # None: that of `decision`
    reject_rate: float | None = Field(None, gt=0, lt=1)
    masks: Literal["fixed", "fresh"] = "fixed"
    shadow: ShadowConfig | None = None


class QuotaConfig(_Section):
    """What one caller may take from the others; nothing is limited that is not named."""

    images_per_second: float | None = Field(None, gt=0, le=1e9)  # a token bucket, refilled at this rate
    burst_images: int = Field(256, ge=1, le=2**31 - 1)  # how many it holds
    concurrent_calls: int | None = Field(None, ge=1, le=4096)


class ScopeConfig(_Section):
    """How far a scope that asks for answers goes."""

    disclosure: Annotated[Disclosure, BeforeValidator(_disclosure)] = Disclosure.EVIDENCE
    ensembles: tuple[str, ...] | None = None  # None: the default ensemble for `classify`, all for `ablate`


class ScopesConfig(_Section):
    classify: ScopeConfig = ScopeConfig()
    ablate: ScopeConfig = ScopeConfig()


class CallerConfig(_Section):
    """Somebody known: by a token, by the name in a client certificate, or by either."""

    token_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")  # `phalanx token` makes a token and its hash
    certificate: str | None = Field(None, min_length=1)  # its subject alternative name, or its common name
    scopes: tuple[Scope, ...] = Field(min_length=1)
    disclosure: Annotated[Disclosure | None, BeforeValidator(_disclosure)] = None  # None: as its scopes allow
    quota: QuotaConfig | None = None  # None: that of `quota`

    @model_validator(mode="after")
    def _known_by_something(self) -> Self:
        if self.token_sha256 is None and self.certificate is None:
            raise ValueError("expected `token_sha256` or `certificate`: by what is this caller known?")
        return self


class DecisionConfig(_Section):
    review_rate: float = Field(0.05, gt=0, lt=1)
    reject_rate: float = Field(0.01, gt=0, lt=1)


class BatchingConfig(_Section):
    max_batch_size: int = Field(64, ge=1, le=4096)  # images of one run; on a CPU never more than 16
    max_delay_ms: float = Field(2.0, ge=0, le=1000)
    max_queue: int = Field(1024, ge=1, le=2**31 - 1)  # images waiting, per ensemble


class DeviceConfig(_Section):
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    strict: bool = False  # refuse to start where the wanted provider is not to be had
    cuda_graphs: bool = True  # on a GPU a run is one launch, where the driver allows it
    threads: int = Field(0, ge=0, le=1024)  # compute threads of all ensembles together; 0: one per core


class LimitsConfig(_Section):
    disclosure: Annotated[Disclosure, BeforeValidator(_disclosure)] = Disclosure.EVIDENCE
    max_images_per_request: int = Field(256, ge=1, le=2**31 - 1)
    max_message_bytes: int = Field(16 * 2**20, ge=1024, le=2**31 - 1)
    max_image_pixels: int = Field(4096 * 4096, ge=1, le=2**40)  # of one encoded image, read from its header
    max_request_pixels: int = Field(4 * 4096 * 4096, ge=1, le=2**40)  # of all encoded images of a request: decoding costs CPU
    max_concurrent_calls: int = Field(128, ge=1, le=4096)  # a thread each, started when needed; at most half are streams
    max_connection_age_seconds: float | None = Field(None, gt=0, le=2e6)  # lets a load balancer spread long-lived connections
    message_seconds: float = Field(30.0, gt=0, le=86400)  # for all of a call's message to come: it keeps a thread meanwhile
    stream_idle_seconds: float = Field(300.0, gt=0, le=86400)  # then a stream that asks nothing, or reads no answer, is ended


class SignatureConfig(_Section):
    """Whose bundles are served, and no others; needs the extra `signing`."""

    public_key: Path  # PEM, of an elliptic curve; `phalanx sign` signs with its private half


class QuarantineConfig(_Section):
    """Unusual images are kept with their evidence; `phalanx quarantine` shows them."""

    folder: Annotated[Path, BeforeValidator(_quarantine_folder)]  # of nobody else's: what is in it are callers' images
    max_bytes: int = Field(2**30, ge=2**20, le=2**50)  # of all files together; the oldest make room
    verdicts: tuple[Literal["suspect", "rejected"], ...] = Field(("suspect", "rejected"), min_length=1)


class TracingConfig(_Section):
    """OpenTelemetry traces, to a collector that speaks OTLP over gRPC; needs the extra `tracing`."""

    endpoint: str = Field("http://127.0.0.1:4317", pattern=r"^https?://[^\s/]+/?$")
    sample: float = Field(0.1, ge=0, le=1)  # of requests whose caller has not decided it (W3C `traceparent`)


class LoggingConfig(_Section):
    format: Literal["auto", "json", "console"] = "auto"  # auto: for people on a terminal, JSON elsewhere
    requests: Literal["none", "notable", "all"] = "notable"  # calls that failed, or had a suspect or rejected image


class ShutdownConfig(_Section):
    notice_seconds: float = Field(0.5, ge=0, le=86400)  # NOT_SERVING, still answering: time for load balancers to look away
    drain_seconds: float = Field(20.0, ge=0, le=86400)  # for calls already accepted


class ServiceConfig(_Section):
    bundle: Annotated[Path | None, BeforeValidator(_folder)] = None  # None: the bundle that ships with Phalanx
    signature: SignatureConfig | None = None  # None: whoever can write the folder is trusted
    listen: Annotated[Address, BeforeValidator(_address)] = Address("127.0.0.1", 50051)
    metrics: Annotated[Address | None, BeforeValidator(_switched_off)] = Address("127.0.0.1", 9100)
    front_end: Literal["grpcio", "native"] = "grpcio"  # native: faster, plain text only; needs the extra `native`
    workers: int = Field(1, ge=1, le=256)  # processes that share the port; limits and quotas are each one's own
    insecure: bool = False
    tls: TlsConfig | None = None
    admin: Annotated[Address | None, BeforeValidator(_switched_off)] = None  # None: no admin port; reload by SIGHUP
    callers: Mapping[Annotated[str, Field(pattern=ENSEMBLE_NAME)], CallerConfig] = {}  # none: everybody may ask
    scopes: ScopesConfig = ScopesConfig()
    quota: QuotaConfig = QuotaConfig()  # of each caller; where nobody is named, of each address
    ensembles: Mapping[Annotated[str, Field(pattern=ENSEMBLE_NAME)], EnsembleConfig] = Field(
        {"full": EnsembleConfig()}, min_length=1
    )
    decision: DecisionConfig = DecisionConfig()
    batching: BatchingConfig = BatchingConfig()
    device: DeviceConfig = DeviceConfig()
    limits: LimitsConfig = LimitsConfig()
    logging: LoggingConfig = LoggingConfig()
    quarantine: QuarantineConfig | None = None
    tracing: TracingConfig | None = None
    shutdown: ShutdownConfig = ShutdownConfig()

    @model_validator(mode="after")
    def _no_plain_text_in_public(self) -> Self:
        for key, address in (("listen", self.listen), ("metrics", self.metrics), ("admin", self.admin)):
            if address is not None and not address.loopback and self.tls is None and not self.insecure:
                raise ValueError(
                    f"`{key}: {address}` is reachable from other machines, without encryption: "
                    f"set `tls: {{certificate: FILE, key: FILE}}`, or say `insecure: true`"
                )
        return self

    @model_validator(mode="after")
    def _native_is_plain(self) -> Self:
        if self.front_end == "native" and self.tls is not None:
            raise ValueError("`front_end: native` speaks no TLS: leave it out, or have a proxy before it and leave `tls` out")
        if self.front_end == "native" and self.limits.max_connection_age_seconds is not None:
            raise ValueError("`front_end: native` closes no connection by its age: leave out `limits.max_connection_age_seconds`")
        if self.front_end == "native" and not self.listen.private:
            raise ValueError(
                f"`front_end: native` measures a message when all of it has come, and speaks plain text: expected a private "
                f"address in `listen`, behind a proxy that limits what it lets through, got {self.listen}"
            )
        limited = self.quota.images_per_second is not None or self.quota.concurrent_calls is not None
        if self.front_end == "native" and limited and not self.callers:
            raise ValueError("`front_end: native` does not know the address of a stream: name `callers`, or leave out `quota`")
        return self

    @model_validator(mode="after")
    def _reject_within_review(self) -> Self:
        for name in self.ensembles:
            rates = self.rates(name)
            if rates.reject_rate > rates.review_rate:
                raise ValueError(
                    f"ensemble `{name}`: reject_rate {rates.reject_rate} is above review_rate {rates.review_rate}; "
                    f"what is rejected is a part of what is reviewed"
                )
        return self

    @model_validator(mode="after")
    def _shadows_are_other_ensembles(self) -> Self:
        for name, its in self.ensembles.items():
            others = [other for other in self.ensembles if other != name]
            if its.shadow is not None and its.shadow.ensemble not in others:
                raise ValueError(
                    f"ensemble `{name}`: expected a shadow among the other ensembles ({', '.join(others) or 'there are none'}), "
                    f"got {its.shadow.ensemble}"
                )
        return self

    @model_validator(mode="after")
    def _nobody_is_called_anonymous(self) -> Self:
        if "anonymous" in self.callers:
            raise ValueError("callers: `anonymous` is whoever calls where nobody is named; choose another name")
        return self

    @model_validator(mode="after")
    def _callers_are_told_apart(self) -> Self:
        for what in ("token_sha256", "certificate"):
            seen: dict[str, str] = {}
            for name, caller in self.callers.items():
                known_by = getattr(caller, what)
                if known_by is not None and (other := seen.setdefault(known_by, name)) != name:
                    raise ValueError(f"callers `{other}` and `{name}` have the same {what}: which of them is calling?")
        return self

    @model_validator(mode="after")
    def _certificates_can_be_shown(self) -> Self:
        certified = [name for name, caller in self.callers.items() if caller.certificate is not None]
        if certified and (self.tls is None or self.tls.client_ca is None):
            raise ValueError(
                f"caller `{certified[0]}` is known by a certificate: set `tls: {{client_ca: FILE}}`, or nobody shows one"
            )
        return self

    @model_validator(mode="after")
    def _scopes_name_what_there_is(self) -> Self:
        for scope in ("classify", "ablate"):
            for name in getattr(self.scopes, scope).ensembles or ():
                if name not in self.ensembles:
                    raise ValueError(f"scopes.{scope}.ensembles: expected some of {', '.join(self.ensembles)}, got {name}")
        return self

    @model_validator(mode="after")
    def _scopes_are_somebodys(self) -> Self:
        if "scopes" in self.model_fields_set and not self.callers:
            raise ValueError(
                "`scopes` says what callers may ask, and nobody is named under `callers`: everybody may ask everything"
            )
        return self

    @model_validator(mode="after")
    def _metrics_stay_private(self) -> Self:
        address, certified = self.metrics, self.tls is not None and self.tls.client_ca is not None
        if address is not None and self.callers and not (address.private or certified or self.insecure):
            raise ValueError(
                f"`metrics: {address}` tells whoever reaches it what callers may not know: bind a private address, "
                f"set `tls: {{client_ca: FILE}}`, or say `insecure: true`"
            )
        return self

    @model_validator(mode="after")
    def _an_admin_is_known(self) -> Self:
        if self.admin is not None and not any(Scope.ADMIN in caller.scopes for caller in self.callers.values()):
            raise ValueError(
                "`admin` opens a port that changes what is served: name a caller with the scope `admin` under `callers` "
                "(`phalanx token` makes a token)"
            )
        return self

    @property
    def bundle_path(self) -> Path:
        """The bundle's folder; the one that ships with Phalanx where none is named."""
        return self.bundle if self.bundle is not None else Path(str(files("models"))) / "bundles" / "eurosat"

    @property
    def paths(self) -> list[Path]:
        """Every file and folder that it names."""
        sections = [dict(section) for section in (self.tls, self.signature, self.quarantine) if section is not None]
        return [self.bundle_path, *(value for section in sections for value in section.values() if isinstance(value, Path))]

    def rates(self, ensemble: str) -> DecisionConfig:
        """The decision levels of one ensemble: its own over those of `decision`."""
        own = self.ensembles[ensemble]
        return DecisionConfig(
            review_rate=self.decision.review_rate if own.review_rate is None else own.review_rate,
            reject_rate=self.decision.reject_rate if own.reject_rate is None else own.reject_rate,
        )


def load_config(
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ServiceConfig:
    """The file, the environment over it, and the command line's `overrides` over both.

    Raises InvalidConfig with one line per mistake: where it stands, what was expected, what came.
    """
    environment = os.environ if environment is None else environment
    named = environment.get("PHALANX_CONFIG")
    if path is None and named:
        path = Path(named)
    try:
        source = read_source(path) if path is not None else ConfigSource.empty()
        source = with_environment(source, environment, ServiceConfig)
        values = {**source.values, **{key: value for key, value in (overrides or {}).items() if value is not None}}
        try:
            return ServiceConfig.model_validate(values)
        except ValidationError as error:
            raise InvalidConfig(source.explain(error, ServiceConfig)) from None
    except InvalidConfig as error:
        error.file = path
        raise


def with_ensembles(config: ServiceConfig, changes: Mapping[str, str | None]) -> ServiceConfig:
    """The same with these ensembles: a choice in YAML to add or replace one, None to take it away; raises InvalidConfig."""
    ensembles: dict[str, Any] = dict(config.ensembles)
    for name, choice in changes.items():
        if choice is None:
            if name not in ensembles or name == next(iter(ensembles)):
                others = ", ".join(list(ensembles)[1:]) or "none"
                raise InvalidConfig(f"remove: expected one of the ensembles beside the default one ({others}), got {name!r}")
            del ensembles[name]
        else:
            ensembles[name] = parsed(choice, f"choice of {name}")
    try:
        return ServiceConfig.model_validate({**dict(config), "ensembles": ensembles})
    except ValidationError as error:
        raise InvalidConfig(ConfigSource.empty().explain(error, ServiceConfig)) from None
