"""Callers for the benchmarks: as many at once as are given, or as many a second whether the server keeps up or not."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one call."""

    code: str
    seconds: float  # from the moment the call should have been made, its own lateness included, to its end
    ended: float  # time.monotonic()


class Load:
    """Callers of one server with one request, over a few connections."""

    def __init__(self, address: str, request: pb.ClassifyRequest, timeout: float = 5.0, connections: int = CONNECTIONS) -> None:
        self._address, self._request, self._timeout, self._connections = address, request, timeout, connections

    def together(self, callers: int, seconds: float) -> list[Answer]:
        """Each asks again as soon as it is answered: what comes of it is the most that the server can do."""
        return asyncio.run(self._together(callers, seconds))

    def at_rate(self, per_second: float, seconds: float, seed: int = 0) -> list[Answer]:
        """Calls that come when they come (a Poisson process), as those of many independent callers do."""
        gaps = np.random.default_rng(seed).exponential(1 / per_second, int(per_second * seconds))
        return asyncio.run(self._at(gaps.cumsum().tolist()))

    async def _together(self, callers: int, seconds: float) -> list[Answer]:
        answers: list[Answer] = []
        end = time.monotonic() + seconds

        async def ask(stub: pb_grpc.DefenseEnsembleStub) -> None:
            while time.monotonic() < end:
                answers.append(await self._call(stub))

        async with _Stubs(self._address, self._connections) as stubs:
            await asyncio.gather(*(ask(stubs[caller % len(stubs)]) for caller in range(callers)))
        return answers

    async def _at(self, moments: Sequence[float]) -> list[Answer]:
        began = time.monotonic()
        async with _Stubs(self._address, self._connections) as stubs:
            calls: list[asyncio.Task[Answer]] = []
            for index, moment in enumerate(moments):
                if (early := began + moment - time.monotonic()) > 0:
                    await asyncio.sleep(early)
                calls.append(asyncio.create_task(self._call(stubs[index % len(stubs)], began + moment)))
                if not index % 16:  # late itself, it would never let the answers be read
                    await asyncio.sleep(0)
            return list(await asyncio.gather(*calls))

    async def _call(self, stub: pb_grpc.DefenseEnsembleStub, due: float | None = None) -> Answer:
        began, code = time.monotonic() if due is None else due, "OK"
        try:
            await stub.Classify(self._request, timeout=self._timeout)  # type: ignore[misc]  # the stubs are typed for threads
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        ended = time.monotonic()
        return Answer(code, ended - began, ended)


class _Stubs:
    """One for each connection; gRPC would share one for all."""

    def __init__(self, address: str, connections: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options) for _ in range(connections)]

    async def __aenter__(self) -> list[pb_grpc.DefenseEnsembleStub]:
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        return [pb_grpc.DefenseEnsembleStub(channel) for channel in self._channels]

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))


def counted(answers: Sequence[Answer]) -> Counter[str]:
    return Counter(answer.code for answer in answers)


def rate(answers: Sequence[Answer]) -> float:
    """Calls a second; all of them must have been answered."""
    assert set(counted(answers)) == {"OK"}, counted(answers)
    return len(answers) / (max(answer.ended for answer in answers) - min(answer.ended - answer.seconds for answer in answers))


def quantile(answers: Sequence[Answer], code: str, q: float) -> float:
    """Of the milliseconds that calls with this end took; nan where there is none."""
    found = [answer.seconds * 1000 for answer in answers if answer.code == code]
    return float(np.quantile(found, q)) if found else float("nan")
