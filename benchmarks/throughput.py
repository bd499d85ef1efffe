"""Images a second: the server's, and those of the bare fused session in a process that does nothing else.

    python -m benchmarks.throughput

The floor is the default ensemble's graph, run on random images: by as many threads as there are cores, each with a batch of its
own (as the server computes), and by one caller whose session shares every operator among as many threads, idle ones asleep or
waiting in a loop. Each of these settings has the batch size that is best for it. As the machine's speed changes, all of them are
measured before and after every cell of the server, and the cell is held against the one whose mean of the two is largest.
The server is asked by callers who share the machine with it. Ends with 1 where its share of the floor is too small.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from benchmarks.bare import bare_graph
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
)
from benchmarks.spread import spread
from service.config import ServiceConfig
from service.engine import CPU, cores, open_session

BATCHES = (1, 4, 8, 16, 32, 64, 128)
PASSES = 3


@dataclass(frozen=True)
class Cell:
    """How the server is asked, and the least it should reach."""

    images: int  # per call
    callers: int
    least: float  # share of the floor

    def __str__(self) -> str:
        return f"{self.images:>2} images per call, {self.callers:>2} callers"


CELLS = (Cell(32, 4, 0.9), Cell(32, 16, 0.9), Cell(1, 16, 0.8), Cell(1, 64, 0.8))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each cell of each round (default: %(default)s)")
    parser.add_argument("--floor-seconds", type=float, default=1.5, help="for each setting of the floor (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    given = parser.parse_args()
    config = read_config(given.config)
    print(f"{given.rounds} rounds, {given.seconds:g} s a cell, {given.floor_seconds:g} s a setting of the floor, seed 0")
    print(f"{provenance()}, {cores()} to be used")
    with tempfile.TemporaryDirectory() as folder:
        settings = [best(each, given.floor_seconds) for each in settings_of(ServiceConfig.model_validate(config), Path(folder))]
        with phalanx(config, Path(folder)) as server:
            await_serving(server)
            shares = measure(server, settings, given.rounds, given.seconds, given.floor_seconds)
    print("share of the floor, mean +- standard deviation over the rounds")
    for cell, found in shares.items():
        print(f"  {cell}: {spread(found, 2)} (at least {cell.least})")
    sys.exit(any(statistics.mean(found) < cell.least for cell, found in shares.items()))


@dataclass(frozen=True)
class Setting:
    """A session, how many callers it has at once, and their batches."""

    name: str
    session: ort.InferenceSession
    callers: int
    feeds: Mapping[str, Any]  # images (n, h, w, c) and masks
    batch: int = 1

    def images_per_second(self, seconds: float) -> float:
        """Every caller runs batches of its own, over and over."""
        feeds = dict(self.feeds) | {"image": self.feeds["image"][: self.batch]}
        self.session.run(None, feeds)
        began = time.perf_counter()

        def work(_: int) -> int:
            runs = 0
            while not runs or time.perf_counter() < began + seconds:
                self.session.run(None, feeds)
                runs += 1
            return runs

        with ThreadPoolExecutor(self.callers) as pool:
            runs = sum(pool.map(work, range(self.callers)))
        return runs * self.batch / (time.perf_counter() - began)

    def __str__(self) -> str:
        return f"{self.name}, batches of {self.batch}"


def settings_of(config: ServiceConfig, cache: Path) -> list[Setting]:
    """The default ensemble's graph in every setting."""
    bare = bare_graph(config, cache)
    feeds = bare.feeds(random_images(max(BATCHES), bare.shape))
    return [
        Setting("a batch for each thread", open_session(bare.content, config.device), cores(), feeds),
        Setting("threads that share, asleep", sharing(bare.content, spin=False), 1, feeds),
        Setting("threads that share, in a loop", sharing(bare.content, spin=True), 1, feeds),
    ]


def sharing(graph: bytes, spin: bool) -> ort.InferenceSession:
    """Every operator of a run is divided among as many threads as there are cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = cores(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=[CPU])


def best(setting: Setting, seconds: float) -> Setting:
    """With the batch size in which it runs most images a second, by the mean of some readings, in turns."""
    sized = [replace(setting, batch=batch) for batch in BATCHES]
    passes = [[each.images_per_second(seconds) for each in sized] for _ in range(PASSES)]
    means = [statistics.mean(readings) for readings in zip(*passes, strict=True)]
    told = ", ".join(f"{mean:.0f} in {batch}s" for mean, batch in zip(means, BATCHES, strict=True))
    print(f"  {setting.name:30} {told}", flush=True)
    return sized[means.index(max(means))]


def measure(
    server: Process, settings: Sequence[Setting], rounds: int, seconds: float, floor_seconds: float
) -> dict[Cell, list[float]]:
    """The server's share of the floor for every cell, one a round. What follows one cell precedes the next."""
    shares: dict[Cell, list[float]] = {cell: [] for cell in CELLS}
    with ExitStack() as ends:
        shape = image_shape(server)
        loads = {
            images: ends.enter_context(Load(server.address, request(random_images(images, shape)), timeout=60.0))
            for images in {cell.images for cell in CELLS}
        }
        for _ in range(rounds):
            before = [setting.images_per_second(floor_seconds) for setting in settings]
            for cell in CELLS:
                load = loads[cell.images]
                load.together(cell.callers, 1.0)  # warm
                answers = load.together(cell.callers, seconds)
                after = [setting.images_per_second(floor_seconds) for setting in settings]
                floor, chosen = highest(before, after)
                before = after
                reached, p99 = rate(answers) * cell.images, quantile([answer.from_begun for answer in answers], 0.99)
                shares[cell].append(reached / floor)
                print(f"  {cell}: {reached:5.0f} of {floor:.0f} images/s ({settings[chosen]}), p99 {p99:.0f} ms", flush=True)
    return shares


def highest(before: Sequence[float], after: Sequence[float]) -> tuple[float, int]:
    """The largest mean of the two readings of a setting, and which setting's it is."""
    means = [statistics.mean(readings) for readings in zip(before, after, strict=True)]
    return max(means), means.index(max(means))


if __name__ == "__main__":
    main()
