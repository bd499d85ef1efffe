"""Images a second: the server's, and those of the bare fused session in a process that does nothing else.

    python -m benchmarks.throughput

The floor is the default ensemble's graph, run on random images: by as many threads as there are cores, each with a batch of its
own (as the server computes), and by one caller whose session shares every operator among as many threads, idle ones waiting
in a loop or asleep. The best of all batch sizes and settings counts. The server is asked by callers in this process, who share
the machine with it. The floor is taken again before each round. Ends with 1 where the server's share of the floor is too small.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from benchmarks.bare import bare_graph
from benchmarks.load import Load, quantile, rate
from benchmarks.processes import await_serving, command_line, image_shape, phalanx, provenance, random_images, read_config, request
from service.config import ServiceConfig
from service.engine import CPU, cores, open_session

BATCHES = (1, 4, 8, 16, 32, 64, 128)
ASKED = (  # images per call, callers at once, share of the floor at least
    (32, 4, 0.9),
    (32, 16, 0.9),
    (1, 16, 0.8),
    (1, 64, 0.8),
)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure of each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    config = read_config(given.config)
    print(f"{given.rounds} rounds, {given.seconds:g} s a figure, seed 0; {provenance()}, {cores()} to be used")
    found: dict[tuple[int, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        floor, batch = best(settings_of(ServiceConfig.model_validate(config), Path(folder)), given.seconds / 2)
        print(f"the floor: {floor.name}, batches of {batch}")
        with phalanx(config, Path(folder)) as server:
            await_serving(server)
            for _ in range(given.rounds):
                base = floor.images_per_second(batch, given.seconds)
                for images, callers, _ in ASKED:
                    load = Load(server.address, request(random_images(images, image_shape(server))), timeout=60.0)
                    load.together(callers, 1.0)  # warm
                    answers = load.together(callers, given.seconds)
                    reached = rate(answers) * images
                    found.setdefault((images, callers), []).append(reached / base)
                    asked = f"{images:>2} images a call, {callers:>2} callers"
                    print(
                        f"  {asked}: {reached:5.0f} of {base:.0f} images/s, p99 {quantile(answers, 'OK', 0.99):.0f} ms", flush=True
                    )
    missed = False
    for images, callers, least in ASKED:
        shares = found[images, callers]
        missed |= statistics.mean(shares) < least
        spread = f"{statistics.mean(shares):.2f} +- {statistics.stdev(shares) if len(shares) > 1 else 0:.2f}"
        print(f"{images:>2} images per call, {callers:>2} callers: {spread} of the floor (at least {least})")
    sys.exit(missed)


@dataclass(frozen=True)
class Setting:
    """A session, and how many callers it has at once."""

    name: str
    session: ort.InferenceSession
    callers: int
    feeds: Mapping[str, Any]  # images (n, h, w, c) and masks

    def images_per_second(self, batch: int, seconds: float) -> float:
        """Every caller runs batches of its own, over and over."""
        feeds = dict(self.feeds) | {"image": self.feeds["image"][:batch]}
        self.session.run(None, feeds)
        began = time.perf_counter()

        def work(_: int) -> int:
            runs = 0
            while time.perf_counter() < began + seconds:
                self.session.run(None, feeds)
                runs += 1
            return runs

        with ThreadPoolExecutor(self.callers) as pool:
            runs = sum(pool.map(work, range(self.callers)))
        return runs * batch / (time.perf_counter() - began)


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


def best(settings: Sequence[Setting], seconds: float) -> tuple[Setting, int]:
    """What runs most images a second, and in which batches."""
    found: list[tuple[float, int, Setting]] = []
    print(f"  {'images/s in batches of':32}" + " ".join(f"{batch:>5}" for batch in BATCHES))
    for setting in settings:
        rates = [setting.images_per_second(batch, seconds) for batch in BATCHES]
        print(f"  {setting.name:32}" + " ".join(f"{rate:5.0f}" for rate in rates), flush=True)
        found += [(rate, batch, setting) for rate, batch in zip(rates, BATCHES, strict=True)]
    _, batch, setting = max(found, key=lambda each: each[0])
    return setting, batch


if __name__ == "__main__":
    main()
