"""What serving costs beyond computing: CPU time of the whole server process per Classify of one image of raw pixels.

    python -m benchmarks.overhead

Three servers are called in turns: Phalanx (batcher on, full disclosure); a bare gRPC server of the same kind that parses the
same message and sends it back (echo); and that one with a run of the graph in between (echo and graph). What the graph costs
is the difference of the last two: in a process of its own, without a call around it, it would find its caches warm, and
gRPC finds them full of the graph. Printed is (server - graph) / echo.

In turns, call by call, so that all have the machine at its same speed and their caches equally cold.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks import echo
from benchmarks.processes import (
    Process,
    await_serving,
    command_line,
    image_shape,
    phalanx,
    provenance,
    random_images,
    read_config,
    request,
    simple,
)
from benchmarks.spread import spread
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

AT_MOST = 1.3
Call = Callable[[], object]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="calls per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    config = read_config(given.config)
    print(f"{given.rounds} rounds of {given.calls} calls each, seed 0; {provenance()}")
    with tempfile.TemporaryDirectory() as folder, phalanx(config, Path(folder)) as server:
        await_serving(server)
        message = request(random_images(1, image_shape(server)))
        its_config = ["--graph", folder, *([str(given.config)] if given.config else [])]
        with (
            simple(echo.__name__) as bare,
            simple(echo.__name__, *its_config) as computing,
            server.channel() as to_server,
            bare.channel() as to_bare,
            computing.channel() as to_computing,
        ):
            classify = pb_grpc.DefenseEnsembleStub(to_server).Classify
            calls: dict[Process, Call] = {server: partial(classify, message)}
            for process, channel in ((bare, to_bare), (computing, to_computing)):
                bounce = channel.unary_unary(echo.METHOD, pb.ClassifyRequest.SerializeToString, pb.ClassifyRequest.FromString)
                bounce(message, wait_for_ready=True)
                calls[process] = partial(bounce, message)
            rounds = [one_round(calls, given.calls) for _ in range(given.rounds + 1)][1:]  # the first is to warm up
    names = {server: "server", bare: "echo", computing: "echo and graph"}
    missed = report(
        [{names[process]: spent for process, spent in each.items()} for each in rounds], len(message.SerializeToString())
    )
    sys.exit(missed)


def one_round(calls: Mapping[Process, Call], times: int) -> dict[Process, float]:
    """CPU time of each in microseconds per call. Each process works for nobody else meanwhile."""
    before = {process: process.cpu_seconds for process in calls}
    for _ in range(times):
        for call in calls.values():
            call()
    return {process: (process.cpu_seconds - before[process]) / times * 1e6 for process in calls}


def report(rounds: list[dict[str, float]], message_bytes: int) -> int:
    """1 where it costs more than it may."""
    print(f"CPU time per call in microseconds, mean +- standard deviation over rounds; message of {message_bytes} bytes")
    for name in rounds[0]:
        print(f"  {name:22} {spread([each[name] for each in rounds]):>16}")
    beyond = [each["server"] - (each["echo and graph"] - each["echo"]) for each in rounds]
    print(f"  {'server beyond graph':22} {spread(beyond):>16}")
    ratios = [cost / each["echo"] for cost, each in zip(beyond, rounds, strict=True)]
    print(f"  (server - graph) / echo: {spread(ratios, 2)} (at most {AT_MOST})")
    return int(statistics.mean(ratios) > AT_MOST)


if __name__ == "__main__":
    main()
