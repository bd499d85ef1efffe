"""What serving costs beyond computing: CPU time of the whole server process per Classify of one image of raw pixels.

    python -m benchmarks.overhead

Three things are done in turns, over and over: a call to a Phalanx server (batcher on, full disclosure); a run of the bare
graph, by this process, in a session like the server's; and a call to a bare gRPC server that parses the same message and
sends it back. Printed is (server - graph) / echo.

In turns, call by call, because a run of the graph leaves nothing else in the processor's caches: whatever comes after it,
gRPC included, takes twice the time that it takes in a loop of its own. --slice 100 measures such loops instead.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import echo
from benchmarks.bare import bare_graph
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
from service.config import ServiceConfig
from service.engine import open_session
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

Call = Callable[[], object]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="calls per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slice", type=int, default=1, help="calls in a row before it is the next one's turn")
    given = parser.parse_args()
    config = read_config(given.config)
    print(f"{given.rounds} rounds of {given.calls} calls after a warm-up, one image of raw pixels each, seed 0; {provenance()}")

    with (
        tempfile.TemporaryDirectory() as folder,
        phalanx(config, Path(folder)) as server,
        simple(echo.__name__) as bare,
    ):
        await_serving(server)
        shape = image_shape(server)
        image = random_images(1, shape)
        message = request(image)
        graph = bare_run(ServiceConfig.model_validate(config), Path(folder), image)
        with server.channel() as to_server, bare.channel() as to_bare:
            classify = pb_grpc.DefenseEnsembleStub(to_server).Classify
            bounce = to_bare.unary_unary(echo.METHOD, pb.ClassifyRequest.SerializeToString, pb.ClassifyRequest.FromString)
            bounce(message, wait_for_ready=True)
            rounds = [
                one_round(server, bare, lambda: classify(message), lambda: bounce(message), graph, given.calls, given.slice)
                for _ in range(given.rounds + 1)
            ]
    report(rounds[1:], len(message.SerializeToString()))


def bare_run(config: ServiceConfig, cache: Path, images: NDArray[np.uint8]) -> Call:
    """One run of the default ensemble's graph, without anything around it."""
    bare = bare_graph(config, cache)
    session, feeds = open_session(bare.content, config.device), bare.feeds(images)
    return lambda: session.run(None, feeds)


def one_round(
    server: Process, bare: Process, classify: Call, bounce: Call, graph: Call, calls: int, in_a_row: int
) -> dict[str, float]:
    """CPU time of each in microseconds per call. Each process works for nobody else meanwhile."""
    before = server.cpu_seconds, bare.cpu_seconds
    computing = 0.0
    for _ in range(calls // in_a_row):
        for call in (classify, bounce):
            for _ in range(in_a_row):
                call()
        began = time.thread_time()  # the session has no other thread
        for _ in range(in_a_row):
            graph()
        computing += time.thread_time() - began
    seconds = {"server": server.cpu_seconds - before[0], "graph": computing, "echo": bare.cpu_seconds - before[1]}
    return {name: spent / (calls // in_a_row * in_a_row) * 1e6 for name, spent in seconds.items()}


def report(rounds: list[dict[str, float]], message_bytes: int) -> None:
    print(f"CPU time per call in microseconds, mean +- standard deviation over rounds; message of {message_bytes} bytes")
    for name, what in (
        ("server", "phalanx serve, whole process"),
        ("graph", "the bare graph"),
        ("echo", "bare gRPC echo server, whole process"),
    ):
        print(f"  {what:38} {spread([each[name] for each in rounds])}")
    print(f"  {'beyond the graph':38} {spread([each['server'] - each['graph'] for each in rounds])}")
    ratios = [(each["server"] - each["graph"]) / each["echo"] for each in rounds]
    print(f"  (server - graph) / echo: {statistics.mean(ratios):.2f} +- {statistics.stdev(ratios):.2f} (at most 2)")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):7.0f} +- {statistics.stdev(values):.0f}"


if __name__ == "__main__":
    main()
