"""A worker: a server in a process of its own that shares its port with others, and does what the supervisor says.

If the supervisor ends without a word, the workers answer what they have accepted, and end.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, assert_never

from service import logs
from service.config import Address, ServiceConfig
from service.ensembles import give_back_memory
from service.extras import MissingExtra
from service.quarantine.keeper import CannotKeep
from service.reload import FORESEEN, Offered, Refused, Reloaded, ReloadFailed, told
from service.server import CannotStart, Server, Together
from service.servicers.catalogue import Catalogue
from service.workers.lines import Line, NoAnswer, answer

log = logging.getLogger(__name__)

CHANGE_SECONDS = 600.0  # for a worker to load something else, or to refuse it
WISH_SECONDS = 3 * CHANGE_SECONDS  # for the supervisor to make a change, and perhaps another one before
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Start:
    """The first order: answered by Ready, or by Cannot."""

    config: ServiceConfig
    expected: Offered | None  # what the others serve; None where there are none


@dataclass(frozen=True)
class Prepare:
    """Load what this configuration says beside what is offered: answered by Offered, or by Cannot."""

    config: ServiceConfig


@dataclass(frozen=True)
class Take:
    """Offer what was prepared."""


@dataclass(frozen=True)
class Leave:
    """A change failed: what was prepared for it, if anything, is given up."""


Order = Start | Prepare | Take | Leave


@dataclass(frozen=True)
class Scrape:
    """Answered by a list of metrics."""


@dataclass(frozen=True)
class Drain:
    """Answer what is accepted, and stop. Comes beside the orders, as one of them may take long."""


Aside = Scrape | Drain


@dataclass(frozen=True)
class Ready:
    offered: Offered
    admin: Address | None


@dataclass(frozen=True)
class Cannot:
    """Why an order cannot be followed; names no folder, except at the start."""

    reason: str


@dataclass(frozen=True)
class Wished:
    """What an operator asks a worker for, which is for the supervisor to do: answered by Reloaded, or by Cannot."""

    what: str  # a method of service.reload.Changes
    arguments: tuple[str, ...]


def work(
    number: int,
    verbose: bool,
    orders: Connection[Any, Any],
    asides: Connection[Any, Any],
    wishes: Connection[Any, Any],
    pulses: Connection[Any, Any],
) -> None:
    """The whole life of a worker's process. Pulses are answered by nothing: that they are is the answer."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a terminal sends them to all: they are the supervisor's to follow
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    worker = Worker(number, verbose, Line(wishes))
    threading.Thread(target=worker.answer_asides, args=(asides,), daemon=True).start()
    threading.Thread(target=answer, args=(pulses, lambda _: None), daemon=True).start()
    answer(orders, worker.follow)
    worker.end()


class Worker:
    """Follows one order after the other."""

    def __init__(self, number: int, verbose: bool, wishes: Line) -> None:
        self._number, self._verbose = number, verbose
        self._wishes = WishesOfOperators(wishes)
        self._server: Server | None = None
        self._prepared: Catalogue | None = None
        self._told_to_drain = False

    def follow(self, order: Order) -> object:
        match order:
            case Start():
                return self._start(order)
            case Prepare():
                return self._prepare(order.config)
            case Take():
                assert self._prepared is not None
                self.server.offer.take(self._prepared)
                self._prepared = None
                self.server.offer.count("ok")
            case Leave():
                self._give_up()
                self.server.offer.count("failed")
            case _:
                assert_never(order)
        return None

    def end(self) -> None:
        """Answer what is accepted, and stop."""
        if self._server is not None:
            self._server.drain()

    def answer_asides(self, connection: Connection[Any, Any]) -> None:
        answer(connection, self._aside)
        if self._told_to_drain:  # the supervisor waits for it no more, or was ended the hard way while it waited
            os._exit(0)

    def _aside(self, aside: Aside) -> object:
        match aside:
            case Scrape():
                return list(self._server.metrics.registry.collect()) if self._server is not None else []
            case Drain():
                self._told_to_drain = True
                self.end()
                return None
            case _:
                assert_never(aside)

    @property
    def server(self) -> Server:
        assert self._server is not None, "the first order is Start"
        return self._server

    def _start(self, order: Start) -> Ready | Cannot:
        def check(offered: Offered) -> None:
            if order.expected is not None and order.expected != offered:
                raise Refused(
                    f"the bundle is {offered.bundle_version} by now, and the others serve {order.expected.bundle_version}: "
                    f"reload (SIGHUP to the supervisor), and all serve it"
                )

        logs.configure(order.config.logging, self._verbose, worker=self._number)
        try:
            self._server = Server(order.config, together=Together(self._wishes, check))
        except (CannotKeep, CannotStart, MissingExtra, *FORESEEN) as error:
            return Cannot(str(error))
        return Ready(Offered.of(self._server.catalogue), self._server.admin_address)

    def _prepare(self, config: ServiceConfig) -> Offered | Cannot:
        self._give_up()
        try:
            self._prepared = self.server.offer.load(config)
        except Exception as error:  # whatever it is, what is offered goes on
            if not isinstance(error, FORESEEN):
                log.exception("cannot load")
            return Cannot(told(error, self.server.offer.config, config))
        return Offered.of(self._prepared)

    def _give_up(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.ensembles.close()
            give_back_memory()


class WishesOfOperators:
    """`Changes` that the supervisor makes."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def reload(self, who: str) -> Reloaded:
        return self._wish("reload", who)

    def add(self, who: str, name: str, choice: str) -> Reloaded:
        return self._wish("add", who, name, choice)

    def remove(self, who: str, name: str) -> Reloaded:
        return self._wish("remove", who, name)

    def _wish(self, what: str, *arguments: str) -> Reloaded:
        try:
            done: Reloaded | Cannot = self._line.ask(Wished(what, arguments), WISH_SECONDS)
        except NoAnswer as error:
            raise ReloadFailed(f"the supervisor: {error}") from None
        if isinstance(done, Cannot):
            raise ReloadFailed(done.reason)
        return done
