"""The log: one JSON object a line, or lines for a person at a terminal; and what of every call goes into it.

Modules use the standard library's loggers, with `extra=` for what a machine should find; structlog renders them.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from models.ensemble import Verdict
from service.config import LoggingConfig

if TYPE_CHECKING:
    from models.ensemble import Array

MOST_A_SECOND = 100  # lines about one caller's calls: whoever is refused ten thousand times a second must not fill the disk
QUIET = Verdict.CLEAN, Verdict.UNSCREENED

requests = logging.getLogger("service.requests")


def configure(config: LoggingConfig, verbose: bool = False, stream: TextIO = sys.stderr, worker: int | None = None) -> None:
    """Send all that is logged to `stream`: for people where it is a terminal, as JSON elsewhere, unless told otherwise.

    `worker` is the number of this process among several, which then is in every line.
    """
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if worker is not None:
        shared.append(lambda _, __, event: {**event, "worker": worker})
    console = config.format == "console" or (config.format == "auto" and stream.isatty())
    renderers: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=stream.isatty())]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)


class RequestLog:
    """Lines about calls: none, those worth a look (failed, or with an image that is suspect or rejected), or all."""

    def __init__(self, which: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.notable, self.all = which != "none", which == "all"
        self._clock, self._lock = clock, threading.Lock()
        self._second = 0
        self._written: Counter[str] = Counter()  # in this second, by caller; all strangers are one
        self._dropped: Counter[str] = Counter()  # since a caller's last line

    def write(
        self,
        method: str,
        ensemble: str,
        caller: str,
        request_id: str,
        code: str,
        seconds: float,
        verdicts: Array,
        trace_id: str = "",
    ) -> None:
        """One call; verdicts (n,) of its images, or None where there are none; the id of its trace, if it has one."""
        if (dropped := self._dropped_before(caller)) is None:
            return
        fields: dict[str, object] = {
            "method": method, "ensemble": ensemble, "caller": caller, "request_id": request_id, "code": code,
            "seconds": round(seconds, 6),
        }  # fmt: skip
        if verdicts is not None:
            fields |= {"images": len(verdicts), "verdicts": counted_verdicts(verdicts)}
        if trace_id:
            fields["trace_id"] = trace_id
        if dropped:
            fields["lines_dropped"] = dropped
        requests.info("request", extra=fields)

    def wants(self, code: str, verdicts: Array) -> bool:
        """Whether a call that ended so gets a line."""
        if self.all or not self.notable:
            return self.all
        return code != "OK" or (verdicts is not None and not all(verdict in QUIET for verdict in verdicts.tolist()))

    def _dropped_before(self, caller: str) -> int | None:
        """How many of a caller's lines were dropped before this one; None where this one is, too."""
        with self._lock:
            second = int(self._clock())
            if second != self._second:
                self._second = second
                self._written.clear()
            self._written[caller] += 1
            if self._written[caller] > MOST_A_SECOND:
                self._dropped[caller] += 1
                return None
            return self._dropped.pop(caller, 0)


def counted_verdicts(verdicts: Array) -> Mapping[str, int]:
    found = verdicts.tolist()
    return {verdict.name.lower(): found.count(verdict) for verdict in Verdict if verdict in found}
