"""Callers for the benchmarks: as many at once as are given, or as many a second whether the server keeps up or not.

They live in processes of their own, each with an event loop and connections of its own. Every call has three moments: when it
was due, when it was begun, when it ended. What lies between the last two is the server's and the network's, and that
of a loop that reads the answer; between the first two a caller was late.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

PROCESSES = 2
CONNECTIONS = 2  # of each process
CONNECTING = 0.5  # seconds until all set off together
METHOD = "/phalanx.v1.DefenseEnsemble/Classify"
Classify = Callable[..., Any]  # takes and gives bytes, and awaits them: reading messages is no part of what is measured


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one call; moments are time.monotonic(), which all processes of a machine share."""

    code: str
    due: float
    begun: float
    ended: float
    reason: str = ""  # of a refusal: which limit it was

    @property
    def end(self) -> str:
        return f"{self.code} {self.reason}".strip()

    @property
    def late(self) -> float:
        """Seconds from due to begun: the caller's own."""
        return self.begun - self.due

    @property
    def from_due(self) -> float:
        return self.ended - self.due

    @property
    def from_begun(self) -> float:
        return self.ended - self.begun


@dataclass(frozen=True, slots=True)
class Target:
    """Who is asked, what, and for how long an answer is awaited."""

    address: str
    request: bytes
    timeout: float
    connections: int  # of each process


Work = Callable[..., Coroutine[Any, Any, list[Answer]]]


class Load:
    """Callers of one server with one request."""

    def __init__(
        self,
        address: str,
        request: pb.ClassifyRequest,
        timeout: float = 5.0,
        processes: int = PROCESSES,
        connections: int = CONNECTIONS,
    ) -> None:
        """`connections` are those of each process."""
        self._target = Target(address, request.SerializeToString(), timeout, connections)
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._processes = [ProcessPoolExecutor(1, context) for _ in range(processes)]
        for started in [process.submit(_run, _together, self._target, 0.0, 0, 0.0) for process in self._processes]:
            started.result()  # no caller yet, but the process is there and has imported what it needs

    def together(self, callers: int, seconds: float) -> list[Answer]:
        """Each asks again as soon as it is answered: what comes of it is the most that the server can do."""
        share, more = divmod(callers, len(self._processes))
        return self._all(_together, [(share + (index < more), seconds) for index in range(len(self._processes))])

    def at_rate(self, per_second: float, seconds: float, seed: int = 0) -> list[Answer]:
        """So many calls, at moments drawn evenly over the time, as those of many independent callers are."""
        moments = np.sort(np.random.default_rng(seed).uniform(0, seconds, round(per_second * seconds)))
        return self._all(_at, [(moments[index :: len(self._processes)].tolist(),) for index in range(len(self._processes))])

    def _all(self, work: Work, arguments: Sequence[tuple[Any, ...]]) -> list[Answer]:
        start = time.monotonic() + CONNECTING
        running = [
            process.submit(_run, work, self._target, start, *each) for process, each in zip(self._processes, arguments, strict=True)
        ]
        return [answer for each in running for answer in each.result()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.shutdown(cancel_futures=True)


# In the callers' processes


def _run(work: Work, target: Target, start: float, *arguments: Any) -> list[Answer]:
    return asyncio.run(work(target, start, *arguments))


async def _together(target: Target, start: float, callers: int, seconds: float) -> list[Answer]:
    answers: list[Answer] = []

    async def ask(classify: Classify) -> None:
        await asyncio.sleep(start - time.monotonic())
        while (now := time.monotonic()) < start + seconds:
            answers.append(await _call(target, classify, now))

    async with _Connections(target) as connections:
        await asyncio.gather(*(ask(connections[caller % len(connections)]) for caller in range(callers)))
    return answers


async def _at(target: Target, start: float, moments: Sequence[float]) -> list[Answer]:
    async with _Connections(target) as connections:
        calls: list[asyncio.Task[Answer]] = []
        for index, moment in enumerate(moments):
            if (early := start + moment - time.monotonic()) > 0:
                await asyncio.sleep(early)
            calls.append(asyncio.create_task(_call(target, connections[index % len(connections)], start + moment)))
            if not index % 16:  # late itself, it would never let the answers be read
                await asyncio.sleep(0)
        return list(await asyncio.gather(*calls))


async def _call(target: Target, classify: Classify, due: float) -> Answer:
    begun, code, reason = time.monotonic(), "OK", ""
    try:
        await classify(target.request, timeout=target.timeout)
        ended = time.monotonic()
    except grpc.aio.AioRpcError as error:
        ended = time.monotonic()
        code, reason = error.code().name, _reason(error)
    return Answer(code, due, begun, ended, reason)


def _reason(error: grpc.aio.AioRpcError) -> str:
    """The reason in a rich status; "" without one, as where gRPC itself refused."""
    info = error_details_pb2.ErrorInfo()
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


class _Connections:
    """Those of one process; gRPC would share one for all."""

    def __init__(self, target: Target) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(target.address, options) for _ in range(target.connections)]

    async def __aenter__(self) -> list[Classify]:
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        return [channel.unary_unary(METHOD) for channel in self._channels]

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))


# What came of it


def ended(answers: Iterable[Answer], code: str) -> list[Answer]:
    """Those of this status."""
    return [answer for answer in answers if answer.code == code]


def counted(answers: Iterable[Answer]) -> Counter[str]:
    return Counter(answer.code for answer in answers)


def rate(answers: Sequence[Answer]) -> float:
    """Calls a second; all of them must have been answered."""
    assert set(counted(answers)) == {"OK"}, counted(answers)
    return len(answers) / (max(answer.ended for answer in answers) - min(answer.begun for answer in answers))


def quantile(seconds: Sequence[float], q: float) -> float:
    """In milliseconds; nan of nothing."""
    return float(np.quantile(seconds, q)) * 1000 if seconds else float("nan")
