"""The CPU time that a gRPC call costs a server of threads and one of asyncio, when all they do is to send it back.

python -m benchmarks.front_end
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks import echo
from benchmarks.processes import provenance, random_images, request, simple
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

KINDS: dict[str, Sequence[str]] = {"threads": (), "asyncio": ("--asyncio",)}
WARM_UP = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="calls per round, one after the other")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{given.rounds} rounds of {given.calls} calls, one 64x64x3 image of raw pixels each, seed 0; {provenance()}")
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(given.rounds):
        for kind, arguments in KINDS.items():
            found[kind].append(microseconds(arguments, given.calls))
    for kind, values in found.items():
        print(f"{kind:>8}: {statistics.mean(values):.0f} +- {statistics.stdev(values):.0f} us of CPU per call")


def microseconds(arguments: Sequence[str], calls: int) -> float:
    """CPU time per call of a server started for this."""
    message = request(random_images(1, (64, 64, 3)))
    with simple("benchmarks.echo", *arguments) as server, server.channel() as channel:
        bounce = channel.unary_unary(echo.METHOD, pb.ClassifyRequest.SerializeToString, pb.ClassifyRequest.FromString)
        for _ in range(WARM_UP):
            bounce(message, wait_for_ready=True)
        before = server.cpu_seconds
        for _ in range(calls):
            bounce(message)
        return (server.cpu_seconds - before) / calls * 1e6


if __name__ == "__main__":
    main()
