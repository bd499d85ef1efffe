"""From a configuration to a server that answers, and back to none without leaving anybody unanswered.

The thread-pool server of grpcio, not its asyncio one: a thread answers one call from its first to its last byte, and waits for the
batcher in between. Or one in Rust, where a call that classifies has no thread (docs/decisions/threads-not-asyncio.md).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import grpc
from prometheus_client import ProcessCollector

from service import extras
from service.config import Address, ServiceConfig, TlsConfig
from service.ensembles import load_ensembles
from service.graph_cache import GraphCache
from service.metrics import Metrics
from service.metrics_port import MetricsPort
from service.pb.inference import open_inference_pb2_grpc
from service.pb.inference.open_inference_pb2 import ModelInferRequest
from service.pb.phalanx.v1 import admin_pb2_grpc, defense_ensemble_pb2_grpc
from service.pb.phalanx.v1.defense_ensemble_pb2 import ClassifyRequest
from service.quarantine.keeper import Keeper
from service.reload import CatalogueOffer, Changes, Offered, Reloaded, Reloader
from service.servicers.admin import AdminServicer
from service.servicers.catalogue import Catalogue
from service.servicers.gate import Gate
from service.servicers.health import DEFENSE_ENSEMBLE, OPEN_INFERENCE, Health, add_health, add_reflection
from service.servicers.malformed import Registrar
from service.servicers.native import DefenseEnsembleServicer
from service.servicers.open_inference import OpenInferenceServicer
from service.tls import Certificates, InvalidCertificate

if TYPE_CHECKING:
    from service.native_front import NativeServer
    from service.tracing import Tracing

log = logging.getLogger(__name__)

REFUSING_SECONDS = 0.2  # between the last call that is admitted and the end of listening
ADMIN_THREADS = 4
SPARE_THREADS = 16  # so that health checks are answered, and excess calls refused, while every admitted call has its thread


class CannotStart(RuntimeError):
    """What the configuration asks for cannot be had: an address, a certificate, a collector's client."""


@dataclass(frozen=True)
class Together:
    """That a server is one of several on one port."""

    changes: Changes  # what an operator wishes concerns them all
    check: Callable[[Offered], None]  # raises Refused where this may not be served beside the others


class Server:
    """Loaded and answering once it is constructed; `drain` ends it."""

    def __init__(
        self,
        config: ServiceConfig,
        cache: GraphCache | None = None,
        read_again: Callable[[], ServiceConfig] | None = None,
        *,
        together: Together | None = None,
    ) -> None:
        """`read_again` is where a reload gets its configuration from; without it, it is this one, and the bundle is read again.

        One of several raises Refused, too.
        """
        self._config, self.metrics = config, Metrics()
        ProcessCollector(registry=self.metrics.registry)
        self._pool = ThreadPoolExecutor(config.limits.max_concurrent_calls + SPARE_THREADS, thread_name_prefix="call")
        options = _options(config, share_port=together is not None)
        self._server = front_end(config, self._pool, options)
        self._ended = ExitStack()  # what must be undone, last first
        with ExitStack() as started:
            started.callback(self._pool.shutdown)
            started.callback(lambda: self._server.stop(None).wait())
            if together is None:  # before loading: a busy port need not wait for the models
                self.address = listen(self._server, "listen", config.listen, config.tls, self.metrics)
            self._admin, self.admin_address = self._open_admin(started)
            self.metrics_address = self._serve_metrics(started)
            self._keeper = self._open_quarantine(started)
            witnesses = [self._keeper] if self._keeper else []
            ensembles = load_ensembles(config, self.metrics, cache)
            self._tracing = self._open_tracing(started)
            self._gate = Gate(Catalogue(config, ensembles, witnesses), self.metrics, self._tracing)
            started.callback(self._gate.watchdog.close)
            started.callback(lambda: self._gate.catalogue.ensembles.close())
            ensembles.announce(self.metrics)
            self._health = self._add_servicers()
            self.offer = CatalogueOffer(self._gate, self._health, cache, witnesses)
            self._changes = together.changes if together else Reloader(self.offer, read_again or (lambda: config))
            if together is not None:  # after loading: until it is ready, the others get the calls
                together.check(Offered.of(self.catalogue))
                self.address = listen(self._server, "listen", config.listen, config.tls, self.metrics)
            _start(self._server)
            if self._admin is not None:
                self._start_admin(self._admin)
            self._ended = started.pop_all()
        names = ", ".join(self.ensembles)
        others = self.metrics_address or "no port", self.admin_address or "no port"
        level = logging.INFO if together is None else logging.DEBUG
        log.log(level, "SERVING %s on %s; metrics on %s, admin on %s", names, self.address, *others)

    @property
    def catalogue(self) -> Catalogue:
        """What is on offer now."""
        return self._gate.catalogue

    @property
    def ensembles(self) -> tuple[str, ...]:
        return tuple(self.catalogue.served)

    def reload(self, who: str) -> Reloaded:
        """Offer what the configuration says now; raises ReloadFailed, and all is as before."""
        return self._changes.reload(who)

    def drain(self) -> None:
        """NOT_SERVING first, still answering; then no new call; then wait for those accepted; then stop."""
        if not self._gate.ready:
            return
        shutdown = self._config.shutdown
        self._gate.ready = False
        self._health.enter_graceful_shutdown()
        log.info("NOT_SERVING; draining")
        time.sleep(shutdown.notice_seconds)
        end = time.monotonic() + shutdown.drain_seconds
        # gRPC cancels what it has received and not yet handed to us when it stops: a caller is better told to try elsewhere.
        self._gate.refusing.set()
        time.sleep(min(REFUSING_SECONDS, shutdown.drain_seconds))
        if self._admin is not None:
            self._admin.stop(0)
        stopped = self._server.stop(shutdown.drain_seconds)  # refuses new calls at once, cancels what is left at the end
        self._health.end_watches()
        stopped.wait()
        self.offer.finish(max(0.0, end - time.monotonic()))
        if not self._gate.catalogue.ensembles.drain(max(0.0, end - time.monotonic())):
            log.warning("some work was not finished within %g s", shutdown.drain_seconds)
        if self._keeper is not None:
            self._keeper.close(max(0.0, end - time.monotonic()))
        if self._tracing is not None:
            self._tracing.close(max(0.0, end - time.monotonic()))
        self._ended.close()
        log.info("stopped")

    def _add_servicers(self) -> Health:
        native = DefenseEnsembleServicer(self._gate)
        open_inference = OpenInferenceServicer(self._gate)
        if self._config.front_end == "native":
            front = cast("NativeServer", self._server)
            front.add_inference(DEFENSE_ENSEMBLE, ClassifyRequest.FromString, native.classify)
            front.add_inference(OPEN_INFERENCE, ModelInferRequest.FromString, open_inference.infer)
        registrar = cast(grpc.Server, Registrar(self._server, self._gate))
        defense_ensemble_pb2_grpc.add_DefenseEnsembleServicer_to_server(native, registrar)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, registrar)
        add_reflection(registrar, self._gate)
        return add_health(registrar, self._gate)

    def _open_quarantine(self, started: ExitStack) -> Keeper | None:
        """Where the configuration has a folder for it; `started` gets to know how it is closed."""
        wanted = self._config.quarantine
        if wanted is None:
            return None
        keeper = Keeper(wanted, self.metrics.quarantine())
        started.callback(keeper.close, 1.0)  # which finds it closed after a drain
        return keeper

    def _open_tracing(self, started: ExitStack) -> Tracing | None:
        """Where the configuration has a collector for it; `started` gets to know how it is closed."""
        wanted = self._config.tracing
        if wanted is None:
            return None
        try:
            tracing = extras.tracing()(wanted, self.metrics.tracing())
        except ValueError as error:
            raise CannotStart(f"tracing: {error}") from None
        started.callback(tracing.close, 1.0)  # which finds it closed after a drain
        return tracing

    def _open_admin(self, started: ExitStack) -> tuple[grpc.Server | None, Address | None]:
        """A server of its own, where the configuration has a port for it; `started` gets to know how it is closed."""
        wanted = self._config.admin
        if wanted is None:
            return None, None
        pool = ThreadPoolExecutor(ADMIN_THREADS, thread_name_prefix="admin")
        started.callback(pool.shutdown)
        server = grpc.server(pool, options=_options(self._config))
        started.callback(lambda: server.stop(None).wait())
        return server, listen(server, "admin", wanted, self._config.tls, self.metrics)

    def _start_admin(self, server: grpc.Server) -> None:
        registrar = cast(grpc.Server, Registrar(server, self._gate))
        admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(self._gate, self._changes), registrar)
        server.start()

    def _serve_metrics(self, started: ExitStack) -> Address | None:
        """On a port of their own; `started` gets to know how it is closed."""
        wanted = self._config.metrics
        if wanted is None:
            return None
        try:
            port = MetricsPort(wanted, self.metrics.registry, self._config.tls)
        except OSError as error:
            raise CannotStart(f"metrics: cannot have {wanted}: {error.strerror or error}") from None
        started.callback(port.close)
        return port.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()


def _start(server: grpc.Server) -> None:
    try:
        server.start()
    except OSError as error:  # of the native front end, which needs a folder for sockets of its own
        raise CannotStart(f"front_end: cannot start: {error}") from None


def front_end(config: ServiceConfig, pool: ThreadPoolExecutor, options: Sequence[tuple[str, int]]) -> grpc.Server:
    """What reads and writes messages; raises MissingExtra."""
    if config.front_end == "grpcio":
        return grpc.server(pool, options=options)
    return cast(grpc.Server, extras.native_server()(pool, options))  # reads messages where no thread of ours waits for it


def _options(config: ServiceConfig, share_port: bool = False) -> list[tuple[str, int]]:
    options = [
        ("grpc.so_reuseport", int(share_port)),  # else a second server on a busy port would start, and get half of the calls
        ("grpc.max_receive_message_length", config.limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # a peer that vanished without a word keeps its streams' places no longer than this
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
    age = config.limits.max_connection_age_seconds
    if age is not None:
        options += [
            ("grpc.max_connection_age_ms", int(age * 1000)),
            ("grpc.max_connection_age_grace_ms", int(config.shutdown.drain_seconds * 1000)),
        ]
    return options


def listen(server: grpc.Server, key: str, wanted: Address, tls: TlsConfig | None, metrics: Metrics) -> Address:
    address = str(resolved(key, wanted))
    credentials = _credentials(tls, metrics) if tls else None
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        raise CannotStart(f"{key}: cannot have {wanted}: another process uses it, or it is not ours") from None
    return Address(wanted.host, port)


def resolved(key: str, address: Address) -> Address:
    """A name's first address, of IPv4 if it has one: gRPC is content with any of several, so that a busy one goes unnoticed."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise CannotStart(f"{key}: cannot have {address}: {error.strerror or error}") from None
    *_, place = min(found, key=lambda each: each[0] != socket.AF_INET)
    return Address(str(place[0]), address.port)


def _credentials(tls: TlsConfig, metrics: Metrics) -> grpc.ServerCredentials:
    try:
        return Certificates(tls, metrics.certificate_expires).credentials()
    except InvalidCertificate as error:
        raise CannotStart(str(error)) from None
