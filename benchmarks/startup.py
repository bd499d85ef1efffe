"""How long a second start takes until the health service says SERVING, and how much memory serving takes.

    python -m benchmarks.startup

For one ensemble (the default) and for four (the README's configuration): a first start fills a cache of fused graphs in an
empty folder; the starts after it are timed, from before the process exists. The last one answers 1,000 calls of one
image and ten of 64, and then its resident memory is read. Ends with 1 where a limit is passed, by a single start, too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
)
from benchmarks.spread import spread
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

FOUR: dict[str, Any] = {
    "full": {},
    "no-edge": {"without": ["edge"]},
    "votes-only": {"detectors": []},
    "hard-vote": {"rule": "majority"},
}
SINGLE_CALLS, BATCHES, BATCH = 1000, 10, 64


@dataclass(frozen=True)
class Limits:
    """What a second start, and serving after it, may take."""

    seconds: float
    megabytes: float

    def passed(self, later: Sequence[float], used: float) -> bool:
        return max(later) > self.seconds or used > self.megabytes


ONE_MAY, FOUR_MAY = Limits(2, 300), Limits(5, 450)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--starts", type=int, default=5, help="starts that are timed, after the first")
    given = parser.parse_args()
    config = read_config(given.config)
    print(f"{given.starts} starts after the first; {provenance()}")
    failed = False
    for title, ensembles, limits in (("one ensemble", {"full": {}}, ONE_MAY), ("four ensembles", FOUR, FOUR_MAY)):
        with tempfile.TemporaryDirectory() as folder:
            first, later, idle, used = measure(config | {"ensembles": ensembles}, Path(folder), given.starts)
        print(f"{title}, {SINGLE_CALLS} single calls to the first, {BATCHES} batches of {BATCH} to each")
        print(f"  first start {first:.2f} s, later ones {spread(later, 2)} s (at most {limits.seconds})")
        print(f"  resident when SERVING {idle:.0f} MB, after the calls {used:.0f} MB (at most {limits.megabytes})")
        failed |= limits.passed(later, used)
    sys.exit(int(failed))


def measure(config: dict[str, Any], cache: Path, starts: int) -> tuple[float, list[float], float, float]:
    times: list[float] = []
    idle = used = 0.0
    for start in range(starts + 1):
        began = time.perf_counter()
        with phalanx(config, cache) as server:
            await_serving(server)
            times.append(time.perf_counter() - began)
            if start == starts:
                idle = server.resident_megabytes
                use(server, list(config["ensembles"]))
                used = server.resident_megabytes
    return times[0], times[1:], idle, used


def use(server: Process, ensembles: list[str]) -> None:
    shape = image_shape(server)
    with server.channel() as channel:
        classify = pb_grpc.DefenseEnsembleStub(channel).Classify
        single = request(random_images(1, shape))
        for _ in range(SINGLE_CALLS):
            classify(single)
        for ensemble in ensembles:
            batch = request(random_images(BATCH, shape), ensemble)
            for _ in range(BATCHES):
                assert len(classify(batch).results) == BATCH


if __name__ == "__main__":
    main()
