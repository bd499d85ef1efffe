"""The one client of all servers: Triton's perf_analyzer, unmodified, one process for each measurement."""

from __future__ import annotations

import base64
import csv
import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.peers import Environment
from benchmarks.serving.target import Target

WINDOWS = 3  # it measures until as many windows agree, and here all do: the figures are over all of them
LONGEST = 300.0
NONE_ENDED = "No valid requests recorded within time interval"  # where calls are answered many at once, and rarely


@dataclass(frozen=True)
class Figures:
    """Of one measurement; milliseconds of a call."""

    images_per_second: float
    p50: float
    p99: float
    client: float = 0.0  # CPU milliseconds of the client for each image, its start included


class LoadFailed(RuntimeError):
    """perf_analyzer ended without figures: what it said."""


@dataclass(frozen=True)
class PerfAnalyzer:
    environment: Environment
    data: Path  # what is asked

    def measure(self, target: Target, concurrency: int, batch: int, seconds: float) -> Figures:
        """So many callers at once, each asking again as soon as it is answered; longer where a window saw no call end."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.csv"
            before = _cpu_of_children()
            done = self._run(
                "-m", target.model, "-u", target.address, "-i", "grpc", "--async", "-b", str(batch),
                "--concurrency-range", str(concurrency), "--input-data", str(self.data), "--measurement-mode", "time_windows",
                "-p", str(round(seconds * 1000 / WINDOWS)), "-r", str(WINDOWS), "-s", "1e9", "-f", str(report),
            )  # fmt: skip
            if NONE_ENDED in done.stdout + done.stderr and seconds < LONGEST / 8:
                return self.measure(target, concurrency, batch, 2 * seconds)
            if done.returncode or not report.exists():
                raise LoadFailed(f"perf_analyzer ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            found = read_report(report.read_text())
            return replace(found, client=1000 * (_cpu_of_children() - before) / (found.images_per_second * seconds))

    def version(self) -> str:
        done = self._run("--version")
        if done.returncode:
            raise LoadFailed(f"perf_analyzer does not start: {done.stderr.strip()}; on Debian it needs the package libb64-0d")
        return (done.stdout or done.stderr).strip()

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        libraries = [str(self.environment.packages / "nvidia" / "cuda_runtime" / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        command = [str(self.environment.folder / "bin" / "perf_analyzer"), *arguments]
        variables = os.environ | {"LD_LIBRARY_PATH": ":".join(libraries)}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LONGEST, check=False)


@contextmanager
def asking(environment: Environment, images: NDArray[np.uint8]) -> Iterator[PerfAnalyzer]:
    """It asks about these images (n, h, w, c), one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images.json"
        data.write_text(input_data(images))
        yield PerfAnalyzer(environment, data)


def _cpu_of_children() -> float:
    """Seconds of all processes of ours that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def input_data(images: NDArray[np.uint8]) -> str:
    """As `--input-data` takes it: an entry for each image."""
    return json.dumps({"data": [{"image": {"b64": base64.b64encode(image.tobytes()).decode()}} for image in images]})


def read_report(text: str) -> Figures:
    """Of the one row of its CSV, whose latencies are in microseconds."""
    rows = list(csv.DictReader(text.splitlines()))
    if len(rows) != 1:
        raise LoadFailed(f"expected one row in perf_analyzer's report, got {len(rows)}")
    (row,) = rows
    return Figures(
        images_per_second=float(row["Inferences/Second"]),
        p50=float(row["p50 latency"]) / 1000,
        p99=float(row["p99 latency"]) / 1000,
    )
