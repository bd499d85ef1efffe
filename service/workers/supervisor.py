"""Starts the workers, starts another for one that ended, changes what all of them offer, and ends them.

It holds the port without listening on it, so that nobody else gets it while no worker has it, and computes nothing itself.
Connections are divided among the workers by the kernel (SO_REUSEPORT).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from service.config import Address, ServiceConfig
from service.metrics_port import MetricsPort
from service.reload import Offered, Refused, Reloaded, Reloader, ReloadFailed
from service.server import CannotListen, resolved
from service.workers.gathered import GatheredMetrics, Scraped
from service.workers.lines import Line, NoAnswer, answer_one
from service.workers.worker import CHANGE_SECONDS, Cannot, Drain, Leave, Prepare, Ready, Start, Take, Wished, work

log = logging.getLogger(__name__)

START_SECONDS = 300.0
SCRAPE_SECONDS = 2.0  # a worker that takes longer is left out of a scrape
DRAIN_MARGIN = 5.0  # beyond what the configuration allows for
STEADY = 10.0  # a worker that lived so long is started again at once
LONGEST_PAUSE = 30.0  # between the starts of one that does not


class WorkerFailed(RuntimeError):
    """A worker could not be started."""


class Supervisor:
    """Workers that answer once it is constructed; `drain` ends them."""

    def __init__(self, config: ServiceConfig, read_again: Callable[[], ServiceConfig]) -> None:
        """Raises CannotListen, or WorkerFailed with what a worker said."""
        self._config = config
        self._seats = [Seat(number) for number in range(config.workers)]
        self._metrics = GatheredMetrics(self._scrape, lambda: len(self._serving))
        self._reloader = Reloader(self, read_again)
        self._changing = threading.RLock()  # no worker starts while the others change
        self._ending = False
        self._watcher = threading.Thread(target=self._watch, name="workers", daemon=True)
        self._woken, self._wake = multiprocessing.Pipe(duplex=False)
        with ExitStack() as started:
            held, self.address = hold("listen", config.listen)
            started.callback(held.close)
            self._admin = config.admin
            self.metrics_address = self._serve_metrics(started)
            started.callback(self._stop)
            first, *others = self._seats  # the first leaves its fused graphs in the cache for the others
            self._offered = self._start_first(first)
            with ThreadPoolExecutor(len(others)) as pool:
                list(pool.map(self._start_first, others))
            self._watcher.start()
            self._ended = started.pop_all()
        names, where = ", ".join(self._offered.ensembles), (self.metrics_address or "no port", self._admin or "no port")
        log.info("SERVING %s on %s by %d workers; metrics on %s, admin on %s", names, self.address, len(self._seats), *where)

    # --- what an operator may wish

    def reload(self, who: str) -> Reloaded:
        """Offer what the configuration says now; raises ReloadFailed, and all is as before."""
        return self._reloader.reload(who)

    @property
    def config(self) -> ServiceConfig:
        return self._config

    def replace(self, config: ServiceConfig) -> Offered:
        """Every worker loads it and tests it; if all can, all take it."""
        with self._changing:
            if self._ending:
                raise Refused("this server is shutting down")
            seats = self._serving
            if not seats:
                raise Refused("no worker is serving just now")
            with ThreadPoolExecutor(len(seats)) as pool:
                prepared = list(pool.map(lambda seat: seat.ask(Prepare(self._config_of(seat, config)), CHANGE_SECONDS), seats))
            for seat, said in zip(seats, prepared, strict=True):
                if isinstance(said, Cannot):
                    raise Refused(f"worker {seat.number}: {said.reason}")
            if len(set(prepared)) > 1:
                raise Refused("the bundle changed while the workers read it")
            for seat in seats:
                seat.ask(Take(), CHANGE_SECONDS)
            self._config, self._offered = config, prepared[0]
            return self._offered

    def count(self, outcome: str) -> None:
        """A worker counts what it took; a failure is everybody's."""
        if outcome == "failed":
            for seat in self._serving:
                seat.ask(Leave(), CHANGE_SECONDS)

    # --- the end

    def drain(self) -> None:
        """As a server does, all workers at once."""
        if self._ending:
            return
        log.info("NOT_SERVING; draining")
        self._ended.close()
        log.info("stopped")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()

    def _stop(self) -> None:
        self._ending = True
        self._wake.close()
        shutdown = self._config.shutdown
        seconds = shutdown.notice_seconds + shutdown.drain_seconds + DRAIN_MARGIN
        if self._watcher.is_alive():
            self._watcher.join(seconds)
        with ThreadPoolExecutor(len(self._seats)) as pool:
            list(pool.map(lambda seat: seat.end(seconds), self._seats))

    # --- the workers

    @property
    def _serving(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.serving]

    def _start_first(self, seat: Seat) -> Offered:
        self._metrics.watch(seat.number)
        said = self._start(seat)
        if isinstance(said, Cannot):
            raise WorkerFailed(said.reason)
        return said.offered

    def _start(self, seat: Seat) -> Ready | Cannot:
        said = seat.start(self._config_of(seat, self._config))
        if isinstance(said, Ready) and said.admin is not None:
            self._admin = said.admin  # port 0 was chosen by now
        return said

    def _config_of(self, seat: Seat, config: ServiceConfig) -> ServiceConfig:
        """A worker's part: the port of all, no metrics port, and the admin port where it is the first."""
        admin = self._admin if seat.number == 0 else None
        return config.model_copy(update={"listen": self.address, "metrics": None, "admin": admin})

    def _watch(self) -> None:
        """Until the end: answer wishes, and put somebody in the place of who ended."""
        while not self._ending:
            alive = [seat for seat in self._seats if seat.alive]
            ready = wait([*(seat.sentinel for seat in alive), *(seat.wishes for seat in alive), self._woken], self._pause())
            for seat in alive:
                if seat.wishes in ready:
                    with contextlib.suppress(EOFError, OSError):  # whoever wished is gone
                        answer_one(seat.wishes, self._fulfil)
                if seat.sentinel in ready and not self._ending:
                    self._lost(seat)
            for seat in self._seats:
                if not seat.alive and seat.due <= time.monotonic():
                    self._start_again(seat)

    def _pause(self) -> float | None:
        """Seconds until somebody is to be started."""
        due = [seat.due for seat in self._seats if not seat.alive]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _lost(self, seat: Seat) -> None:
        code, lived = seat.bury()
        self._metrics.ended(seat.number)
        log.error("worker %d ended by itself after %.0f s, exit code %s; another is started", seat.number, lived, code)

    def _start_again(self, seat: Seat) -> None:
        with self._changing:
            if self._ending:
                return
            said = self._start(seat)
            if isinstance(said, Ready):
                if said.offered == self._offered or self._serving == [seat]:
                    self._offered = said.offered
                    log.info("worker %d serves", seat.number)
                    return
                now, theirs = said.offered.bundle_version, self._offered.bundle_version
                said = Cannot(f"the bundle is {now} by now, and the others serve {theirs}: reload, and all serve it")
                seat.end(DRAIN_MARGIN)
            log.error(
                "worker %d cannot be started: %s; tried again in %.0f s", seat.number, said.reason, seat.due - time.monotonic()
            )

    def _fulfil(self, wished: Wished) -> Reloaded | Cannot:
        try:
            done: Reloaded = getattr(self._reloader, wished.what)(*wished.arguments)
        except ReloadFailed as error:
            return Cannot(str(error))
        return done

    # --- metrics

    def _serve_metrics(self, started: ExitStack) -> Address | None:
        wanted = self._config.metrics
        if wanted is None:
            return None
        try:
            port = MetricsPort(wanted, self._metrics.registry, self._config.tls)
        except OSError as error:
            raise CannotListen(f"metrics: cannot have {wanted}: {error.strerror or error}") from None
        started.callback(port.close)
        return port.address

    def _scrape(self) -> Scraped:
        found = {}
        for seat in self._serving:
            metrics = seat.scrape()
            if metrics is not None:
                found[seat.number] = metrics
        return found


class Seat:
    """A worker's place. Who ends is replaced by another of the same number."""

    def __init__(self, number: int) -> None:
        self.number, self.serving = number, False
        self.due = 0.0  # when somebody is to be started, if nobody is here
        self._failures = 0
        self._process: Any = None

    @property
    def alive(self) -> bool:
        return self._process is not None

    @property
    def sentinel(self) -> int:
        sentinel: int = self._process.sentinel
        return sentinel

    def start(self, config: ServiceConfig) -> Ready | Cannot:
        """Returns once it serves, or cannot."""
        spawn = multiprocessing.get_context("spawn")
        (orders, its_orders), (scrapes, its_scrapes), (self.wishes, its_wishes) = (spawn.Pipe() for _ in range(3))
        verbose = log.isEnabledFor(logging.DEBUG)
        its: tuple[Connection[Any, Any], ...] = (its_orders, its_scrapes, its_wishes)
        self._process = spawn.Process(target=work, args=(self.number, verbose, *its), name=f"worker-{self.number}")
        self._process.start()
        for connection in its:
            connection.close()  # ours, so that the worker's end is the end of the line
        self._orders, self._scrapes, self._began = Line(orders), Line(scrapes), time.monotonic()
        said: Ready | Cannot = self.ask(Start(config), START_SECONDS)
        self.serving = isinstance(said, Ready)
        if not self.serving:
            self.end(DRAIN_MARGIN)
        return said

    def ask(self, order: object, seconds: float) -> Any:
        """What the worker says; Cannot where it says nothing."""
        try:
            return self._orders.ask(order, seconds)
        except NoAnswer as error:
            return Cannot(str(error))

    def scrape(self) -> Any:
        """None where it does not answer."""
        with contextlib.suppress(NoAnswer):
            return self._scrapes.ask(None, SCRAPE_SECONDS)
        return None

    def end(self, seconds: float) -> None:
        """Let it drain, and kill it after so many seconds."""
        if self._process is None:
            return
        if self.serving:
            self.ask(Drain(), seconds)
        self._close_lines()
        self._process.join(DRAIN_MARGIN)
        if self._process.is_alive():
            log.warning("worker %d does not end: killed", self.number)
            self._process.kill()
        self.bury()

    def bury(self) -> tuple[int | None, float]:
        """Who was here ended: its exit code, and the seconds it lived. The next may come at once if it lived long."""
        self._process.join()
        code, lived = self._process.exitcode, time.monotonic() - self._began
        self._close_lines()
        self._process.close()
        self._process, self.serving = None, False
        if lived >= STEADY:
            self._failures, self.due = 0, 0.0
        else:
            self.put_off()
        return code, lived

    def put_off(self) -> None:
        """The next is to come after a pause that grows."""
        self.due = time.monotonic() + min(LONGEST_PAUSE, 0.25 * 2**self._failures)
        self._failures += 1

    def _close_lines(self) -> None:
        self._orders.close()
        self._scrapes.close()
        self.wishes.close()


def hold(key: str, wanted: Address) -> tuple[socket.socket, Address]:
    """A port for workers to share, and nobody else; raises CannotListen."""
    if sys.platform != "linux":
        raise CannotListen(f"workers: expected 1, as only Linux divides the connections of a port, got more on {sys.platform}")
    place = resolved(key, wanted)
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:  # whoever has the port would perhaps share it
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((place.host, place.port))
            port = alone.getsockname()[1]
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((place.host, port))
    except OSError as error:
        held.close()
        raise CannotListen(f"{key}: cannot have {wanted}: {error.strerror or error}") from None
    return held, Address(wanted.host, port)
