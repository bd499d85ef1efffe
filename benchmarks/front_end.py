"""Servers of threads, of asyncio, and in Rust: what a call costs that is only sent back, and how each does with the real batcher.

    python -m benchmarks.front_end

The first table is CPU time of the server's process per call, one caller. The second: single images, several callers at once;
`native` is threads behind a server in Rust, and `events` the same without a thread for each call.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import batched, echo
from benchmarks.load import Load, quantile, rate
from benchmarks.processes import provenance, random_images, request, simple
from benchmarks.spread import spread
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

SENT_BACK: dict[str, Sequence[str]] = {"threads": (), "asyncio": ("--asyncio",)}
CLASSIFIED = {"threads": "--threads", "asyncio": "--asyncio", "native": "--native", "events": "--events"}
WARM_UP = 300
CALLERS = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="to be sent back per round (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each number of callers per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", type=Path, help="whose default ensemble classifies (default: that of the bundle that ships)")
    given = parser.parse_args()
    print(f"{given.rounds} rounds, one 64x64x3 image of raw pixels a call, seed 0; {provenance()}")
    sent_back: dict[str, list[float]] = {kind: [] for kind in SENT_BACK}
    for _ in range(given.rounds):
        for kind, arguments in SENT_BACK.items():
            sent_back[kind].append(microseconds(arguments, given.calls))
    print(f"sent back, {given.calls} calls a round: us of CPU per call")
    for kind, values in sent_back.items():
        print(f"  {kind:>8}: {spread(values, 1)}")
    print("classified: calls/s; p99 in ms; ms of CPU per call")
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(given.rounds):
            for kind, how in CLASSIFIED.items():
                arguments = [cache, how, *([str(given.config)] if given.config else [])]
                for callers, figures in classified(arguments, given.seconds).items():
                    found.setdefault((callers, kind), []).append(figures)
    for (callers, kind), rounds in sorted(found.items()):
        print(f"  {callers:>2} callers, {kind:>8}: {'; '.join(spread(values, 1) for values in zip(*rounds, strict=True))}")


def microseconds(arguments: Sequence[str], calls: int) -> float:
    """CPU time per call of an echo server started for this."""
    message = request(random_images(1, (64, 64, 3)))
    with simple(echo.__name__, *arguments) as server, server.channel() as channel:
        bounce = channel.unary_unary(echo.METHOD, pb.ClassifyRequest.SerializeToString, pb.ClassifyRequest.FromString)
        for _ in range(WARM_UP):
            bounce(message, wait_for_ready=True)
        before = server.cpu_seconds
        for _ in range(calls):
            bounce(message)
        return (server.cpu_seconds - before) / calls * 1e6


def classified(arguments: Sequence[str], seconds: float) -> dict[int, tuple[float, float, float]]:
    """By callers: calls a second, p99 in milliseconds, milliseconds of the server's CPU per call."""
    found = {}
    message = request(random_images(1, (64, 64, 3)))
    with simple(batched.__name__, *arguments) as server, Load(server.address, message, timeout=60.0) as load:
        load.together(16, 1.0)
        for callers in CALLERS:
            before = server.cpu_seconds
            answers = load.together(callers, seconds)
            spent = (server.cpu_seconds - before) * 1000 / len(answers)
            found[callers] = rate(answers), quantile([answer.from_begun for answer in answers], 0.99), spent
    return found


if __name__ == "__main__":
    main()
