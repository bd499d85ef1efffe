"""Phalanx beside Triton and MLServer, and beside the bare session: the same members, machine and client.

    python -m benchmarks.serving.peers                                   # once: the peers' environments
    python -m benchmarks.serving                                         # the bundle that ships
    phalanx-train build smoke --jobs 2                                   # the tiny members: runs/smoke/bundle
    python -m benchmarks.serving --config benchmarks/serving/tiny.yaml

For single images and for batches of 32: every setting of a peer is tried at concurrency 16, twice, and the fastest is what is
measured. Then Phalanx, behind each of its front ends, and both peers run side by side, and are asked in turns: for each round
and concurrency, one after the other. Before that, they must answer alike. Every figure goes to the results file as it is
found, and a run that was cut short goes on from there. Ends with 1 where a floor is missed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare import bare_graph
from benchmarks.processes import command_line, provenance, random_images, read_config
from benchmarks.serving import agreement, bare, mlserver, peers, phalanx, report, triton
from benchmarks.serving.perf_analyzer import Figures, PerfAnalyzer, asking
from benchmarks.serving.results import BARE, BATCHES, CONCURRENCY, MLSERVER, NATIVE, PHALANX, TRITON, Cell, Results, Tried
from benchmarks.serving.target import Target
from benchmarks.throughput import settings_of
from models.bundle import Bundle, read_bundle
from models.ensemble import Ensemble
from service.config import ServiceConfig
from service.engine import cores
from service.ensembles import compose_named

TRIED_AT = 16  # concurrency
TRIALS = 2
IMAGES = 64  # that are asked about, over and over
WARM_CALLS = 5  # of each caller
FRONT_ENDS = {PHALANX: "grpcio", NATIVE: "native"}

Starts = Callable[[], AbstractContextManager[Target]]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--peers", type=Path, default=peers.FOLDER, help="where their environments are (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="default: runs/serving/BUNDLE.jsonl")
    parser.add_argument("--batches", type=int, nargs="+", choices=BATCHES, default=BATCHES, help="images per call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=7.5, help="for each figure of each round (default: %(default)s)")
    parser.add_argument(
        "--try-seconds", type=float, default=3.0, help="for each trial of a setting of a peer (default: %(default)s)"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(read_config(given.config), peers.find(given.peers.resolve()), Path(folder))
        file = given.results or Path("runs/serving") / f"{run.bundle.manifest.name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        results = Results(file)
        with asking(run.peers.client, run.images) as client:
            results.begin(run.facts(client) | {"seconds": given.seconds, "try_seconds": given.try_seconds})
            print(f"{file}: {results.facts['machine']}", flush=True)
            for batch in given.batches:
                run.try_settings(results, client, batch, given.try_seconds)
                run.measure(results, client, batch, given.rounds, given.seconds)
    print(report.tables(results))
    sys.exit(report.missed(results))


@dataclass
class Run:
    """One bundle, and where its servers keep their files."""

    config: dict[str, Any]
    peers: peers.Peers
    folder: Path

    def __post_init__(self) -> None:
        config = ServiceConfig.model_validate(self.config)
        self.bundle: Bundle = read_bundle(config.bundle_path, weights=False)
        self.ensemble: Ensemble = compose_named(self.bundle, config, next(iter(config.ensembles)))
        self.graph = bare_graph(config, self.folder / "graphs")
        self.images = random_images(IMAGES, self.bundle.manifest.input.shape)
        self.service = config

    def facts(self, client: PerfAnalyzer) -> dict[str, Any]:
        """What figures must share to stand in one table."""
        manifest = self.bundle.manifest
        return {
            "bundle": f"{manifest.name} {manifest.version}",
            "machine": f"{provenance()}, {cores()} to be used",
            "triton": f"Triton {peers.TRITON}, {self.peers.triton.describe()}",
            "mlserver": self.peers.mlserver.describe(),
            "client": client.version(),
            "cores": cores(),
        }

    def starts(self, server: str, setting: str = "") -> Starts:
        """How to start a server; of a peer, in one of its settings."""
        if server in FRONT_ENDS:
            return lambda: phalanx.phalanx(self.config, self.folder / "graphs", FRONT_ENDS[server])
        return {TRITON: self._triton, MLSERVER: self._mlserver}[server](setting)

    def _triton(self, name: str) -> Starts:
        setting = next(each for each in triton.SETTINGS if each.name == name)

        @contextmanager
        def start() -> Iterator[Target]:
            with tempfile.TemporaryDirectory(dir=self.folder) as repository:
                triton.write_repository(Path(repository), self.bundle, self.ensemble, setting)
                with triton.triton(self.peers.triton, Path(repository)) as target:
                    yield target

        return start

    def _mlserver(self, name: str) -> Starts:
        setting = next(each for each in mlserver.SETTINGS if each.name == name)

        @contextmanager
        def start() -> Iterator[Target]:
            with tempfile.TemporaryDirectory(dir=self.folder) as model:
                mlserver.write_model(Path(model), self.graph, self.ensemble.classes, setting)
                with mlserver.mlserver(self.peers.mlserver, Path(model)) as target:
                    yield target

        return start

    def try_settings(self, results: Results, client: PerfAnalyzer, batch: int, seconds: float) -> None:
        """All of them side by side, too: tried one after the other, the machine's drift would choose."""
        named = [(TRITON, each.name) for each in triton.SETTINGS] + [(MLSERVER, each.name) for each in mlserver.SETTINGS]
        keys = [Tried(server, batch, setting, turn) for turn in range(TRIALS) for server, setting in named]
        left = [key for key in keys if key not in results.tried]
        with ExitStack() as stack:
            wanted = dict.fromkeys((key.server, key.setting) for key in left)
            targets = {setting: stack.enter_context(self.starts(server, setting)()) for server, setting in wanted}
            for target in targets.values():
                target.warm(self.images[:batch], TRIED_AT, WARM_CALLS)
            for key in left:
                results.add(key, client.measure(targets[key.setting], TRIED_AT, batch, seconds))
                _tell(f"calls of {batch}, {key.server}, {key.setting}", results.tried[key])

    def measure(self, results: Results, client: PerfAnalyzer, batch: int, rounds: int, seconds: float) -> None:
        """All servers side by side, asked in turns."""
        order = [*FRONT_ENDS, TRITON, MLSERVER]
        settings = {server: results.chosen(server, batch) for server in (TRITON, MLSERVER)}
        if all(Cell(s, batch, c, r) in results.cells for r in range(rounds) for c in CONCURRENCY for s in (*order, BARE)):
            return
        swept = bare.sweep(settings_of(self.service, self.folder / "graphs"), 0.5)
        with ExitStack() as stack:
            targets = {server: stack.enter_context(self.starts(server, settings.get(server, ""))()) for server in order}
            self._check(targets)
            for target in targets.values():
                target.warm(self.images[:batch], TRIED_AT, WARM_CALLS)
            for turn in range(rounds):
                print(f"calls of {batch}, round {turn + 1}", flush=True)
                for concurrency in CONCURRENCY:
                    for server in _rotated([*order, BARE], turn):
                        cell = Cell(server, batch, concurrency, turn)
                        if cell not in results.cells:
                            if server == BARE:
                                figures = bare.measure(bare.fastest(swept, concurrency * batch), seconds / 2)
                            else:
                                figures = client.measure(targets[server], concurrency, batch, seconds)
                            results.add(cell, figures)
                        _tell(f"concurrency {concurrency:>2}, {server}", results.cells[cell])

    def _check(self, targets: dict[str, Target]) -> None:
        samples = self.bundle.samples.images
        images = np.concatenate([samples, self.images])[: max(BATCHES)]
        expected = targets[PHALANX].answers(images)
        rank = 1 / (self.bundle.manifest.calibration.n + 1)
        for server, target in targets.items():
            agreement.check(server, target.answers(images), expected, rank)
            for index in range(4):
                alone = {name: column[index : index + 1] for name, column in expected.items()}
                agreement.check(f"{server}, one image", target.answers(images[index : index + 1]), alone, rank)
        print(f"all servers answer alike about {len(images)} images, labels {sorted(set(expected['label'].ravel().tolist()))}")


def _rotated(servers: list[str], turn: int) -> list[str]:
    """Nobody is always the first."""
    start = turn % len(servers)
    return servers[start:] + servers[:start]


def _tell(what: str, found: Figures) -> None:
    print(f"  {what}: {found.images_per_second:6.0f} images/s, p50 {found.p50:.1f} ms, p99 {found.p99:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
