"""`phalanx serve`: one process or several, from the start to a signal."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Callable
from enum import Enum, auto

from service.config import ServiceConfig
from service.reload import ReloadFailed
from service.server import Server
from service.workers.supervisor import Supervisor


class Wish(Enum):
    RELOAD = auto()
    END = auto()


def serve(config: ServiceConfig, read_again: Callable[[], ServiceConfig]) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process the hard way. SIGHUP reloads."""
    wishes: queue.SimpleQueue[Wish] = queue.SimpleQueue()

    def end(*_: object) -> None:
        for number in ends:
            signal.signal(number, signal.SIG_DFL)
        wishes.put(Wish.END)

    ends = (signal.SIGTERM, signal.SIGINT)
    handlers: dict[signal.Signals, Callable[..., object]] = dict.fromkeys(ends, end)
    if hasattr(signal, "SIGHUP"):
        handlers[signal.SIGHUP] = lambda *_: wishes.put(Wish.RELOAD)
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with Server(config, read_again=read_again) if config.workers == 1 else Supervisor(config, read_again) as server:
            while wishes.get() is Wish.RELOAD:
                with contextlib.suppress(ReloadFailed):  # the log says why
                    server.reload("SIGHUP")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
