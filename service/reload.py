"""Change without downtime: another catalogue is loaded and tested beside the one that answers, and then takes its place.

Whatever is wrong with the new one, the old one goes on; the reason is in the answer, in the log and in a metric. Calls that
are under way are answered by what they began with, and those that were about to queue begin again with the new.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from models.bundle import InvalidBundle
from models.composition import InvalidEnsemble
from service.config import InvalidConfig, ServiceConfig, with_ensembles
from service.engine import ProviderUnavailable
from service.ensembles import give_back_memory, load_ensembles
from service.errors import Unfulfilled
from service.graph_cache import GraphCache
from service.servicers.catalogue import Catalogue
from service.servicers.gate import Gate
from service.servicers.health import Health

log = logging.getLogger(__name__)

# What a port, a pool of threads or a connection was made with.
AT_START = ("listen", "metrics", "admin", "insecure", "tls", "logging", "shutdown")
LIMITS_AT_START = ("max_message_bytes", "max_concurrent_calls", "max_connection_age_seconds")
FOLDERS = re.compile(r"(?<![\w.])(?:/[^\s/:,;'\"`]+)+/")
FORESEEN = (InvalidBundle, InvalidConfig, InvalidEnsemble, ProviderUnavailable, ValidationError, OSError)


class ReloadFailed(Unfulfilled):
    """The new configuration or bundle cannot be served, and the old one goes on. Names no folder: this leaves the process."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What is on offer now, and the seconds it took."""

    catalogue: Catalogue
    seconds: float


class Reloader:
    """One per server; one change at a time."""

    def __init__(self, gate: Gate, health: Health, cache: GraphCache | None, read: Callable[[], ServiceConfig]) -> None:
        self._gate, self._health, self._cache, self._read_config = gate, health, cache, read
        self._lock = threading.Lock()
        self._draining: set[threading.Thread] = set()

    def reload(self, who: str) -> Reloaded:
        """Read the configuration again, and offer what it says."""
        return self._change("reload", who, self._read_config)

    def add(self, who: str, name: str, choice: str) -> Reloaded:
        """Offer one more ensemble; `choice` is YAML, as under `ensembles.NAME`."""
        return self._change(f"add ensemble {name}", who, lambda: with_ensembles(self._config, {name: choice}))

    def remove(self, who: str, name: str) -> Reloaded:
        """Offer one ensemble less."""
        return self._change(f"remove ensemble {name}", who, lambda: with_ensembles(self._config, {name: None}))

    def finish(self, timeout: float) -> None:
        """Wait for what was replaced to answer its last calls."""
        end = time.monotonic() + timeout
        for thread in tuple(self._draining):
            thread.join(max(0.0, end - time.monotonic()))

    @property
    def _config(self) -> ServiceConfig:
        return self._gate.catalogue.config

    def _change(self, what: str, who: str, read: Callable[[], ServiceConfig]) -> Reloaded:
        began = time.monotonic()
        with self._lock:
            try:
                if not self._gate.ready:
                    raise InvalidConfig("this server is shutting down")
                catalogue = self._load(read())
            except Exception as error:  # whatever it is, the old one goes on
                self._gate.metrics.reloads("failed")
                foreseen = isinstance(error, FORESEEN)
                said = "audit: %s by %s failed, what was served before goes on: %s"
                log.error(said, what, who, error, extra={"audit": what, "caller": who, "outcome": "failed"}, exc_info=not foreseen)
                raise ReloadFailed(FOLDERS.sub("", str(error)) if foreseen else "internal error; the log has it") from error
            self._offer(catalogue)
        seconds = time.monotonic() - began
        self._gate.metrics.reloads("ok")
        manifest = catalogue.ensembles.bundle.manifest
        names = ", ".join(catalogue.served)
        told = what, who, names, manifest.name, manifest.version, seconds
        fields = {"audit": what, "caller": who, "outcome": "ok", "bundle_version": manifest.version}
        log.info("audit: %s by %s: %s over %s %s in %.2f s", *told, extra=fields)
        return Reloaded(catalogue, seconds)

    def _load(self, config: ServiceConfig) -> Catalogue:
        _refuse_what_needs_a_start(self._config, config)
        return Catalogue(config, load_ensembles(config, self._gate.metrics, self._cache))

    def _offer(self, catalogue: Catalogue) -> None:
        before = self._gate.swap(catalogue)
        self._health.offer(catalogue.served)
        for name in before.served.keys() - catalogue.served.keys():
            self._gate.metrics.forget(name)

        def drain() -> None:
            before.ensembles.drain()
            give_back_memory()
            self._draining.discard(thread)

        thread = threading.Thread(target=drain, name="drain-replaced", daemon=True)
        self._draining.add(thread)
        thread.start()


def _refuse_what_needs_a_start(before: ServiceConfig, after: ServiceConfig) -> None:
    if before.callers and not after.callers:  # as an empty file would have it
        raise InvalidConfig("callers: expected some, as before, got none: to open a server to everybody takes a restart")
    pairs: Mapping[str, tuple[object, object]] = {
        **{key: (getattr(before, key), getattr(after, key)) for key in AT_START},
        **{f"limits.{key}": (getattr(before.limits, key), getattr(after.limits, key)) for key in LIMITS_AT_START},
    }
    for key, (was, wanted) in pairs.items():
        if was != wanted:
            raise InvalidConfig(f"{key}: expected {was}, as at the start, got {wanted}: this takes a restart to change")
