"""What a run found, line by line in a file, so that one that was cut short goes on where it was."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.perf_analyzer import Figures

PHALANX, NATIVE, TRITON, MLSERVER, BARE = SERVERS = ("Phalanx", "Phalanx, native", "Triton", "MLServer", "bare session")
CONCURRENCY = (1, 4, 16, 64)
BATCHES = (1, 32)


@dataclass(frozen=True)
class Cell:
    """One measurement of one server."""

    server: str
    batch: int
    concurrency: int
    round: int


@dataclass(frozen=True)
class Tried:
    """One measurement of a setting of a server, for requests of so many images."""

    server: str
    batch: int
    setting: str
    turn: int


@dataclass(frozen=True)
class Floor:
    """What Phalanx must reach against Triton, at concurrency 16 with single images."""

    throughput: float  # times Triton's at least
    p99: float  # times Triton's at most


FLOORS = {"eurosat": Floor(1.5, 1 / 2), "smoke": Floor(3.0, 1 / 3)}  # by bundle
ASKED = (1, 16)  # images a call, concurrency


class Results:
    """`facts` must be those of the run that goes on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.facts: dict[str, Any] = {}
        self.cells: dict[Cell, Figures] = {}
        self.tried: dict[Tried, Figures] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            self._read(json.loads(line))

    def begin(self, facts: dict[str, Any]) -> None:
        """Say what is measured; ValueError where the file has figures of something else."""
        if self.facts:
            if changed := [key for key in facts if self.facts.get(key) != facts[key]]:
                raise ValueError(f"{self._file}: expected figures with the same {', '.join(changed)}, or none; name another file")
            return
        self.facts = facts
        self._write({"facts": facts})

    def add(self, key: Cell | Tried, figures: Figures) -> None:
        self._write({type(key).__name__.lower(): asdict(key), "figures": asdict(figures)})
        self._keep(key, figures)

    def chosen(self, server: str, batch: int) -> str:
        """The setting with the highest throughput."""
        settings = {key.setting for key in self.tried if (key.server, key.batch) == (server, batch)}
        return max(
            settings, key=lambda setting: statistics.mean(each.images_per_second for each in self.trials(server, batch, setting))
        )

    def trials(self, server: str, batch: int, setting: str) -> list[Figures]:
        """By turn."""
        keys = [key for key in self.tried if (key.server, key.batch, key.setting) == (server, batch, setting)]
        return [self.tried[key] for key in sorted(keys, key=lambda key: key.turn)]

    def of(self, server: str, batch: int, concurrency: int) -> list[Figures]:
        """By round."""
        cells = [cell for cell in self.cells if (cell.server, cell.batch, cell.concurrency) == (server, batch, concurrency)]
        return [self.cells[cell] for cell in sorted(cells, key=lambda cell: cell.round)]

    def ratios(self, what: str, batch: int, concurrency: int, ours: str = PHALANX) -> list[float]:
        """Our figure of each round over Triton's of the same round."""
        pairs = zip(self.of(ours, batch, concurrency), self.of(TRITON, batch, concurrency), strict=False)
        return [getattr(own, what) / getattr(theirs, what) for own, theirs in pairs]

    def free_of_charge(self, batch: int, concurrency: int) -> list[float]:
        """Of each round, over Triton's throughput: that of a server that costs nothing beside the graph, with our client."""
        rounds = zip(*(self.of(server, batch, concurrency) for server in (NATIVE, BARE, TRITON)), strict=False)
        return [
            1 / (1 / bare.images_per_second + native.client / 1000 / self.facts["cores"]) / triton.images_per_second
            for native, bare, triton in rounds
        ]

    def _read(self, line: dict[str, Any]) -> None:
        if "facts" in line:
            self.facts = line["facts"]
        else:
            kind = Cell if "cell" in line else Tried
            self._keep(kind(**line[kind.__name__.lower()]), Figures(**line["figures"]))

    def _keep(self, key: Cell | Tried, figures: Figures) -> None:
        if isinstance(key, Cell):
            self.cells[key] = figures
        else:
            self.tried[key] = figures

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
