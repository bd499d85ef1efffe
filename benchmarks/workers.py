"""Several workers on one port: what one process and several answer, and what is lost when workers are killed.

    python -m benchmarks.workers

First, single images and batches of 32 by several callers, each over a connection of its own, from servers of one worker and
more in turns. Then workers are killed (SIGKILL), one after the other, under callers who make a call once more where it fails
with UNAVAILABLE, a tenth of a second later and waiting for a connection. Ends with 1 where such a call was lost, or answered
with another label.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from benchmarks.load import Load, quantile, rate
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
    workers_of,
)
from benchmarks.spread import spread
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

ASKED = ((1, 1), (1, 16), (1, 64), (32, 4), (32, 16))  # images per call, callers
BACK_SECONDS = 30.0
PAUSE = 0.1  # before a call is made once more, as gRPC's own retries have it


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="how many (default: 1 2); the last are killed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each figure of each round (default: %(default)s)")
    parser.add_argument(
        "--kills", type=int, default=6, help="more, and the pauses before young workers are replaced grow (default: %(default)s)"
    )
    given = parser.parse_args()
    config = read_config(given.config)
    print(f"{given.rounds} rounds, {given.seconds:g} s a figure, seed 0; {provenance()}")
    with tempfile.TemporaryDirectory() as folder:
        compare(config, Path(folder), given.workers, given.rounds, given.seconds)
        with phalanx({**config, "workers": given.workers[-1]}, Path(folder)) as server:
            await_serving(server)
            sys.exit(kill(server, given.kills, given.workers[-1]))


def compare(config: Mapping[str, Any], cache: Path, workers: list[int], rounds: int, seconds: float) -> None:
    """Prints images a second, and p99, of each number of workers."""
    found: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for count in workers:
            with phalanx({**config, "workers": count}, cache) as server:
                await_serving(server)
                shape = image_shape(server)
                for images, callers in ASKED:
                    asked = request(random_images(images, shape))
                    with Load(server.address, asked, timeout=60.0, processes=1, connections=callers) as load:
                        load.together(callers, 1.0)  # warm
                        answers = load.together(callers, seconds)
                    figures = rate(answers) * images, quantile([answer.from_begun for answer in answers], 0.99)
                    found.setdefault((images, callers, count), []).append(figures)
    for (images, callers, count), figures_of_rounds in sorted(found.items()):
        per_second, p99 = (list(values) for values in zip(*figures_of_rounds, strict=True))
        which = f"{images:>2} images a call, {callers:>2} callers, {count} workers"
        print(f"  {which}: {spread(per_second)} images/s, p99 {spread(p99)} ms")


def kill(server: Process, kills: int, workers: int) -> int:
    """1 where a call was lost."""
    asked = request(random_images(2, image_shape(server)))
    with server.channel() as channel:
        right = labels(pb_grpc.DefenseEnsembleStub(channel).Classify(asked))
    ends, over = Counter[str](), threading.Event()

    def ask() -> None:
        with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            classify = pb_grpc.DefenseEnsembleStub(channel).Classify
            while not over.is_set():
                end = "answered"
                try:
                    try:
                        answer = classify(asked, timeout=20)
                    except grpc.RpcError as error:
                        if error.code() is not grpc.StatusCode.UNAVAILABLE:
                            raise
                        end = "answered when asked once more"
                        time.sleep(PAUSE)
                        answer = classify(asked, timeout=20, wait_for_ready=True)
                    if labels(answer) != right:
                        end = "wrong"
                except grpc.RpcError as error:
                    end = f"lost: {error.code().name}"
                ends[end] += 1

    back: list[float] = []
    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(ask) for _ in range(8)]
        try:
            for turn in range(kills):
                time.sleep(0.5)
                alive = workers_of(server.pid)
                killed = alive[turn % len(alive)]
                began = time.monotonic()
                os.kill(killed, signal.SIGKILL)
                while killed in (now := workers_of(server.pid)) or len(now) < workers:
                    if time.monotonic() > began + BACK_SECONDS:
                        raise TimeoutError(f"no other worker after {BACK_SECONDS:g} s")
                    time.sleep(0.02)
                back.append(time.monotonic() - began)
                time.sleep(2.0)  # for it to load and to serve
        finally:
            over.set()
        for caller in callers:
            caller.result()
    print(f"{kills} kills, of {workers} workers in turns, under 8 callers; another is started after {max(back):.2f} s at most")
    for end, count in ends.most_common():
        print(f"  {end}: {count} calls")
    return int(bool(ends.keys() - {"answered", "answered when asked once more"}))


def labels(answer: pb.ClassifyResponse) -> list[int]:
    return [result.classification.class_index for result in answer.results]


if __name__ == "__main__":
    main()
