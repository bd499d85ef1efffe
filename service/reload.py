"""Change without downtime: another catalogue is loaded and tested beside the one that answers, and then takes its place.

Whatever is wrong with the new one, the old one goes on; the reason is in the answer, in the log and in a metric. Calls that
are under way are answered by what they began with, and those that were about to queue begin again with the new.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
from service.witnesses import Witness

log = logging.getLogger(__name__)

# What a port, a process, a pool of threads or a connection was made with.
AT_START = ("listen", "metrics", "admin", "insecure", "tls", "logging", "quarantine", "tracing", "shutdown", "workers", "front_end")
LIMITS_AT_START = ("max_message_bytes", "max_concurrent_calls", "max_connection_age_seconds")
FOLDERS = re.compile(r"(?<![\w./])(?:/[^\s/:,;'\"`]+)*/(?=[\w.])")  # of an absolute path without spaces


class Refused(Exception):
    """Somebody who was asked to offer something else cannot; says why, and names no folder."""


FORESEEN = (InvalidBundle, InvalidConfig, InvalidEnsemble, ProviderUnavailable, Refused, ValidationError, OSError)


class ReloadFailed(Unfulfilled):
    """The new configuration or bundle cannot be served, and the old one goes on. Names no folder: this leaves the process."""


@dataclass(frozen=True, slots=True)
class Offered:
    """What is on offer."""

    ensembles: tuple[str, ...]
    bundle: str
    bundle_version: str

    @classmethod
    def of(cls, catalogue: Catalogue) -> Offered:
        manifest = catalogue.ensembles.bundle.manifest
        return cls(tuple(catalogue.served), manifest.name, manifest.version)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What is on offer now, and the seconds it took."""

    offered: Offered
    seconds: float


class Changes(Protocol):
    """What an operator may wish; `who` does. Each raises ReloadFailed, and all is as before."""

    def reload(self, who: str) -> Reloaded:
        """Read the configuration again, and offer what it says."""

    def add(self, who: str, name: str, choice: str) -> Reloaded:
        """Offer one more ensemble; `choice` is YAML, as under `ensembles.NAME`."""

    def remove(self, who: str, name: str) -> Reloaded:
        """Offer one ensemble less."""


class Offer(Protocol):
    """What a reload changes: what one process offers, or several do together."""

    @property
    def config(self) -> ServiceConfig:
        """By which it is made."""

    def replace(self, config: ServiceConfig) -> Offered:
        """Offer what this configuration says; raises one of FORESEEN, and what was offered goes on."""

    def count(self, outcome: str) -> None:
        """`ok` or `failed`, for those who watch."""


class Reloader:
    """`Changes` of an offer, one at a time, each with a line in the log."""

    def __init__(self, offer: Offer, read: Callable[[], ServiceConfig]) -> None:
        self._offer, self._read = offer, read
        self._lock = threading.Lock()

    def reload(self, who: str) -> Reloaded:
        return self._change("reload", who, self._read)

    def add(self, who: str, name: str, choice: str) -> Reloaded:
        return self._change(f"add ensemble {name}", who, lambda: with_ensembles(self._offer.config, {name: choice}))

    def remove(self, who: str, name: str) -> Reloaded:
        return self._change(f"remove ensemble {name}", who, lambda: with_ensembles(self._offer.config, {name: None}))

    def _change(self, what: str, who: str, read: Callable[[], ServiceConfig]) -> Reloaded:
        began = time.monotonic()
        with self._lock:
            known = [self._offer.config]
            try:
                config = read()
                known.append(config)
                _refuse_what_needs_a_start(self._offer.config, config)
                offered = self._offer.replace(config)
            except Exception as error:  # whatever it is, the old one goes on
                self._offer.count("failed")
                said = "audit: %s by %s failed, what was served before goes on: %s"
                fields = {"audit": what, "caller": who, "outcome": "failed"}
                log.error(said, what, who, error, extra=fields, exc_info=not isinstance(error, FORESEEN))
                raise ReloadFailed(told(error, *known)) from error
        seconds = time.monotonic() - began
        self._offer.count("ok")
        names = ", ".join(offered.ensembles)
        fields = {"audit": what, "caller": who, "outcome": "ok", "bundle_version": offered.bundle_version}
        said = "audit: %s by %s: %s over %s %s in %.2f s"
        log.info(said, what, who, names, offered.bundle, offered.bundle_version, seconds, extra=fields)
        return Reloaded(offered, seconds)


class CatalogueOffer:
    """What this process offers."""

    def __init__(self, gate: Gate, health: Health, cache: GraphCache | None, witnesses: Sequence[Witness] = ()) -> None:
        self._gate, self._health, self._cache, self._witnesses = gate, health, cache, witnesses
        self._draining: set[threading.Thread] = set()

    @property
    def config(self) -> ServiceConfig:
        return self._gate.catalogue.config

    def replace(self, config: ServiceConfig) -> Offered:
        catalogue = self.load(config)
        self.take(catalogue)
        return Offered.of(catalogue)

    def count(self, outcome: str) -> None:
        self._gate.metrics.reloads(outcome)

    def load(self, config: ServiceConfig) -> Catalogue:
        """Another catalogue, tested and warm, that nobody is offered yet; raises one of FORESEEN."""
        if not self._gate.ready:
            raise InvalidConfig("this server is shutting down")
        return Catalogue(config, load_ensembles(config, self._gate.metrics, self._cache), self._witnesses)

    def take(self, catalogue: Catalogue) -> None:
        """Offer it in the place of what is offered, which answers its last calls and is closed."""
        before = self._gate.swap(catalogue)
        catalogue.ensembles.announce(self._gate.metrics)
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

    def finish(self, timeout: float) -> None:
        """Wait for what was replaced to answer its last calls."""
        end = time.monotonic() + timeout
        for thread in tuple(self._draining):
            thread.join(max(0.0, end - time.monotonic()))


def told(error: Exception, *known: ServiceConfig) -> str:
    """What an operator far away learns of an error: nothing of what nobody foresaw, and no folders. Those that a `known`
    configuration names are found however they are spelled.
    """
    if not isinstance(error, FORESEEN):
        return "internal error; the log has it"
    paths = [path for config in known for path in config.paths]
    if isinstance(error, InvalidConfig) and error.file is not None:
        paths.append(error.file)
    spelled = {form for path in paths for form in (path, path.absolute(), Path(os.path.realpath(path)))}
    folders = sorted((re.escape(f"{form.parent}/") for form in spelled if form.parent.name), key=len, reverse=True)
    return FOLDERS.sub("", re.sub(rf"(?<![\w./-])(?:{'|'.join(folders)})", "", str(error)))


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
