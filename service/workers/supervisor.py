"""Starts the workers, starts another for one that ended or hangs, changes what all of them offer, and ends them.

It holds the port without listening on it, so that nobody else gets it while no worker has it, and computes nothing itself.
Connections are divided among the workers by the kernel (SO_REUSEPORT).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import wait
from typing import Any, Self

from service.config import Address, ServiceConfig
from service.metrics_port import MetricsPort
from service.reload import Offered, Refused, Reloaded, Reloader, ReloadFailed
from service.server import CannotStart, resolved
from service.workers.gathered import GatheredMetrics, Scraped
from service.workers.lines import Line, NoAnswer, answer
from service.workers.worker import (
    CHANGE_SECONDS,
    SIGNALS,
    Cannot,
    Drain,
    Leave,
    Prepare,
    Ready,
    Scrape,
    Start,
    Take,
    Wished,
    work,
)

log = logging.getLogger(__name__)

START_SECONDS = 300.0
SCRAPE_SECONDS = 2.0  # a worker that takes longer is left out of a scrape
PULSE_SECONDS = 5.0  # between two questions whether a worker is alive
BEAT_SECONDS = 2.0  # in which it has to answer that
MOST_MISSED = 6  # of them in a row, then it is killed: some forty seconds
DRAIN_MARGIN = 5.0  # beyond what the configuration allows for
STEADY = 10.0  # seconds; the place of a worker that served so long is filled again at once
LONGEST_PAUSE = 30.0  # between the starts of one that does not


class WorkerFailed(RuntimeError):
    """A worker could not be started."""


class Supervisor:
    """Workers that answer once it is constructed; `drain` ends them."""

    def __init__(self, config: ServiceConfig, read_again: Callable[[], ServiceConfig]) -> None:
        """Raises CannotStart, or WorkerFailed with what a worker said."""
        self._config = config
        self._seats = [Seat(number) for number in range(config.workers)]
        self._metrics = GatheredMetrics(self._scrape, config.workers, lambda: len(self._serving))
        self._reloader = Reloader(self, read_again)
        self._changing = threading.RLock()  # no worker starts while the others change
        self._ending = False
        self._next_pulse = 0.0
        self._watcher = threading.Thread(target=self._watch, name="workers", daemon=True)
        self._woken, self._wake = multiprocessing.Pipe(duplex=False)
        with ExitStack() as started:
            held, self.address = hold("listen", config.listen)
            started.callback(held.close)
            self._admin = config.admin
            self.metrics_address = self._serve_metrics(started)
            started.callback(self._stop)
            self._offered: Offered | None = None
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

            def prepare(seat: Seat) -> Offered | Cannot:
                said: Offered | Cannot = seat.ask(Prepare(self._config_of(seat, config)), CHANGE_SECONDS)
                return said

            prepared = [prepare(seats[0])]  # which leaves its graphs in the cache for the others
            if isinstance(prepared[0], Offered) and len(seats) > 1:
                with ThreadPoolExecutor(len(seats) - 1) as pool:
                    prepared += pool.map(prepare, seats[1:])
            for seat, said in zip(seats, prepared, strict=False):
                if isinstance(said, Cannot):
                    raise Refused(f"worker {seat.number}: {said.reason}")
            if len(set(prepared)) > 1:
                raise Refused("the bundle changed while the workers read it")
            offered = prepared[0]
            assert isinstance(offered, Offered)
            self._config, self._offered = config, offered
            for seat in seats:
                if isinstance(seat.ask(Take(), CHANGE_SECONDS), Cannot):
                    seat.kill()  # nobody goes on with what was offered before
            return offered

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
        for _ in range(2):  # the second time for who was just being started
            with ThreadPoolExecutor(len(self._seats)) as pool:
                list(pool.map(lambda seat: seat.end(seconds), self._seats))
            if self._watcher.is_alive():
                self._watcher.join(DRAIN_MARGIN)

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
        said = seat.start(self._config_of(seat, self._config), self._offered if self._serving else None, self._fulfil)
        if isinstance(said, Ready) and said.admin is not None:
            self._admin = said.admin  # port 0 was chosen by now
        return said

    def _config_of(self, seat: Seat, config: ServiceConfig) -> ServiceConfig:
        """A worker's part: the port of all, no metrics port, and the admin port where it is the first."""
        admin = self._admin if seat.number == 0 else None
        return config.model_copy(update={"listen": self.address, "metrics": None, "admin": admin})

    def _watch(self) -> None:
        """Until the end: put somebody in the place of who ended."""
        while not self._ending:
            try:
                alive = [seat for seat in self._seats if seat.alive]
                ready = wait([*(seat.sentinel for seat in alive), self._woken], self._pause())
                for seat in alive:
                    if seat.sentinel in ready and not self._ending:
                        self._lost(seat)
                for seat in self._seats:
                    if not seat.alive and seat.due <= time.monotonic():
                        self._start_again(seat)
                self._feel_pulses()
            except Exception:  # whatever it is, others may have to be started
                if not self._ending:
                    log.exception("while watching the workers")
                    time.sleep(1.0)

    def _pause(self) -> float:
        """Seconds until somebody is to be started, or asked."""
        due = [seat.due for seat in self._seats if not seat.alive]
        return max(0.0, min([*due, self._next_pulse]) - time.monotonic())

    def _feel_pulses(self) -> None:
        """Kill who says nothing any more: its connections break, and callers come to others."""
        if time.monotonic() < self._next_pulse:
            return
        for seat in self._serving:
            if not self._ending and seat.missed_pulses() >= MOST_MISSED:
                log.error("worker %d hangs: it has not answered %d times in a row, and is killed", seat.number, MOST_MISSED)
                seat.kill()
        self._next_pulse = time.monotonic() + PULSE_SECONDS

    def _lost(self, seat: Seat) -> None:
        code, served = seat.bury()
        self._metrics.ended(seat.number)
        log.error(
            "worker %d ended by itself, having served for %.0f s, exit code %s; another is started", seat.number, served, code
        )

    def _start_again(self, seat: Seat) -> None:
        with self._changing:
            if self._ending:
                return
            said = self._start(seat)
            if isinstance(said, Ready):
                self._offered = said.offered
                log.info("worker %d serves", seat.number)
            else:
                again = max(0.0, seat.due - time.monotonic())
                log.error("worker %d cannot be started: %s; tried again in %.0f s", seat.number, said.reason, again)

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
            raise CannotStart(f"metrics: cannot have {wanted}: {error.strerror or error}") from None
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
        self.number = number
        self.due = 0.0  # when somebody is to be started, if nobody is here
        self._failures = 0
        self._missed = 0  # pulses, in a row
        self._process: Any = None
        self._serving_since: float | None = None
        self._lock = threading.RLock()  # of who ends it

    @property
    def alive(self) -> bool:
        return self._process is not None

    @property
    def serving(self) -> bool:
        return self._serving_since is not None

    @property
    def sentinel(self) -> int:
        sentinel: int = self._process.sentinel
        return sentinel

    def start(self, config: ServiceConfig, expected: Offered | None, fulfil: Callable[[Wished], object]) -> Ready | Cannot:
        """Returns once it serves, or cannot."""
        spawn = multiprocessing.get_context("spawn")
        verbose = log.isEnabledFor(logging.DEBUG)
        pipes = []
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: until it has its own handlers, it ignores them
        try:
            pipes += [spawn.Pipe() for _ in range(4)]
            its = tuple(end for _, end in pipes)
            process = spawn.Process(target=work, args=(self.number, verbose, *its), name=f"worker-{self.number}")
            process.start()
        except OSError as error:
            for pipe in pipes:
                for end in pipe:
                    end.close()
            self.put_off()
            return Cannot(f"no process: {error.strerror or error}")
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for end in its:
            end.close()  # ours, so that the worker's end is the end of the line
        (orders, _), (asides, _), (self._wishes, _), (pulses, _) = pipes
        self._orders, self._asides, self._pulses, self._process = Line(orders), Line(asides), Line(pulses), process
        threading.Thread(target=answer, args=(self._wishes, fulfil), name=f"wishes-{self.number}", daemon=True).start()
        said: Ready | Cannot = self.ask(Start(config, expected), START_SECONDS)
        if isinstance(said, Ready):
            self._serving_since, self._missed = time.monotonic(), 0
        else:
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
            return self._asides.ask(Scrape(), SCRAPE_SECONDS)
        return None

    def missed_pulses(self) -> int:
        """How often in a row it has not answered, this time included. Counted, as a clock goes on while a machine sleeps."""
        try:
            self._pulses.ask(None, BEAT_SECONDS)
            self._missed = 0
        except NoAnswer:
            self._missed += 1
        return self._missed

    def kill(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def end(self, seconds: float) -> None:
        """Let it drain, and kill it after so many seconds."""
        with self._lock:
            if self._process is None:
                return
            self._wishes.close()  # whoever wishes something now is not waited for
            if self.serving:
                with contextlib.suppress(NoAnswer):
                    self._asides.ask(Drain(), seconds)
            self._close_lines()
            self._process.join(DRAIN_MARGIN)
            if self._process.is_alive():
                log.warning("worker %d does not end: killed", self.number)
                self._process.kill()
            self.bury()

    def bury(self) -> tuple[int | None, float]:
        """Who was here ended: its exit code, and the seconds it served. The next may come at once if those were many."""
        with self._lock:
            if self._process is None:
                return None, 0.0
            self._process.join()
            code = self._process.exitcode
            served = 0.0 if self._serving_since is None else time.monotonic() - self._serving_since
            self._close_lines()
            self._process.close()
            self._process, self._serving_since = None, None
            if served >= STEADY:
                self._failures, self.due = 0, 0.0
            else:
                self.put_off()
            return code, served

    def put_off(self) -> None:
        """The next is to come after a pause that grows."""
        self.due = time.monotonic() + min(LONGEST_PAUSE, 0.25 * 2 ** min(self._failures, 8))
        self._failures += 1

    def _close_lines(self) -> None:
        for line in (self._orders, self._asides, self._wishes, self._pulses):
            line.close()


def hold(key: str, wanted: Address) -> tuple[socket.socket, Address]:
    """A port for workers to share, and nobody else; raises CannotStart."""
    if sys.platform != "linux":
        raise CannotStart(f"workers: expected 1, as only Linux divides the connections of a port, got more on {sys.platform}")
    place = resolved(key, wanted)
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:  # whoever has the port would perhaps share it
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((place.host, place.port))
            port = alone.getsockname()[1]
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server before this one may linger
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((place.host, port))
    except OSError as error:
        held.close()
        raise CannotStart(f"{key}: cannot have {wanted}: {error.strerror or error}") from None
    return held, Address(wanted.host, port)
