"""What callers feel of a shadow: calls a second and their times, where a candidate is shown every image and where none is.

    python -m benchmarks.shadow

Two servers that differ in the shadow alone are asked for single images in turns, by callers who share the machine with them: by
one and by sixteen who ask again as soon as they are answered, which leaves a shadow next to nothing, and at a rate, as
independent callers do. The candidate is the default ensemble once more. Ends with 1 where a shadow costs more than TOLERANCE, or
where nothing was compared at the rate: then nothing was measured.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from benchmarks.load import Answer, Load, quantile, rate
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

TOLERANCE = {"calls/s": 0.05, "p50": 0.05, "p99": 0.1}  # shares of what is without a shadow
SETTLE_SECONDS = 2.0  # in which a shadow compares what still waits; the other server is asked after that


@dataclass(frozen=True)
class Cell:
    """How a server is asked."""

    callers: int = 0  # at once
    rate: float = 0.0  # or calls a second

    def ask(self, load: Load, seconds: float) -> list[Answer]:
        return load.together(self.callers, seconds) if self.callers else load.at_rate(self.rate, seconds)

    def __str__(self) -> str:
        return f"{self.callers} callers" if self.callers else f"{self.rate:g} calls/s"


@dataclass(frozen=True)
class Reading:
    """One server in one turn."""

    figures: Mapping[str, float]  # by the names of TOLERANCE; times in milliseconds
    compared: float  # images a second
    dropped: float


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=60.0, help="calls a second (default: %(default)s)")
    parser.add_argument("--callers", type=int, nargs="*", default=(1, 16), help="at once (default: 1 16)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    given = parser.parse_args()
    config = read_config(given.config)
    print(f"{given.rounds} rounds, {given.seconds:g} s a turn, single images, seed 0, {config or 'defaults'}; {provenance()}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        loads = []
        for served in (without_shadow(config), with_shadow(config)):
            server = ends.enter_context(phalanx(served, Path(folder)))
            await_serving(server)
            asked = request(random_images(1, image_shape(server)))
            loads.append((server, ends.enter_context(Load(server.address, asked, timeout=60.0))))
        cells = [*map(Cell, given.callers), Cell(rate=given.rate)]
        missed = [sentence for cell in cells for sentence in measure(loads, cell, given.rounds, given.seconds)]
    for sentence in missed:
        print(f"MISSED: {sentence}")
    sys.exit(bool(missed))


def without_shadow(config: Mapping[str, Any]) -> dict[str, Any]:
    """The candidate is loaded here, too."""
    ensembles = dict(config.get("ensembles") or {"full": {}})
    return dict(config) | {"ensembles": ensembles | {"candidate": next(iter(ensembles.values()))}}


def with_shadow(config: Mapping[str, Any]) -> dict[str, Any]:
    served = without_shadow(config)
    name, choice = next(iter(served["ensembles"].items()))
    shadow = {"shadow": {"ensemble": "candidate", "share": 1.0}}
    return served | {"ensembles": served["ensembles"] | {name: (choice or {}) | shadow}}


def measure(loads: Sequence[tuple[Process, Load]], cell: Cell, rounds: int, seconds: float) -> list[str]:
    """Prints what came of it; what was missed, a sentence each."""
    readings: dict[int, list[Reading]] = {0: [], 1: []}
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            readings[which].append(read(*loads[which], cell, seconds))
    plain, shadowed = readings[0], readings[1]
    print(f"{cell}, mean +- standard deviation over the rounds: without a shadow, with it, ratio of each round's two")
    missed = []
    for name, tolerance in TOLERANCE.items():
        before, after = ([each.figures[name] for each in side] for side in (plain, shadowed))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        print(f"  {name:8} {spread(before, 1):>16} {spread(after, 1):>16} {spread(ratios, 3):>18} (worse by at most {tolerance:g})")
        change = statistics.mean(ratios) - 1
        if (-change if name == "calls/s" else change) > tolerance:
            missed.append(f"{cell}: {name} with a shadow is {statistics.mean(ratios):.3f} of what it is without")
    compared = [each.compared for each in shadowed]
    print(f"  images a second: {spread(compared, 1)} compared, {spread([each.dropped for each in shadowed], 1)} dropped")
    if cell.rate and not all(compared):
        missed.append(f"{cell}: nothing was compared")
    return missed


def read(server: Process, load: Load, cell: Cell, seconds: float) -> Reading:
    cell.ask(load, 1.0)  # warm
    time.sleep(SETTLE_SECONDS)
    before = counted(server)
    answers = cell.ask(load, seconds)
    compared, dropped = (now - then for now, then in zip(counted(server), before, strict=True))
    times = [answer.from_begun for answer in answers]
    time.sleep(SETTLE_SECONDS)
    figures = {"calls/s": rate(answers), "p50": quantile(times, 0.5), "p99": quantile(times, 0.99)}
    return Reading(figures, compared / seconds, dropped / seconds)


def counted(server: Process) -> tuple[float, float]:
    """Images that were compared, and dropped."""
    with urlopen(f"http://{server.metrics}/metrics") as response:
        lines = response.read().decode().splitlines()
    compared, dropped = (
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}_total{{"))
        for name in ("phalanx_shadow_images", "phalanx_shadow_dropped_images")
    )
    return compared, dropped


if __name__ == "__main__":
    main()
