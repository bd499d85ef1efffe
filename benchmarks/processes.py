"""A real server as a process of its own, for the benchmarks: started, asked, looked at, stopped."""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import yaml
from grpc_health.v1 import health_pb2
from numpy.typing import NDArray

from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

REPOSITORY = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 120.0


@dataclass(frozen=True)
class Process:
    """A process seen from outside, through /proc."""

    pid: int
    address: str
    metrics: str = ""  # the address of its metrics port

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all its threads."""
        values = _stat(self.pid)
        return (int(values[11]) + int(values[12])) / TICKS

    @property
    def resident_megabytes(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 1e6

    @property
    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @property
    def ended(self) -> bool:
        """Whether this child is a zombie by now."""
        return _stat(self.pid)[0] == "Z"

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(self.address) as channel:
            yield channel


@contextmanager
def phalanx(config: Mapping[str, Any], cache: Path) -> Iterator[Process]:
    """`phalanx serve` with this configuration, from the moment it is started; graphs are kept in `cache`."""
    with tempfile.TemporaryDirectory() as folder:
        address, metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        file = Path(folder) / "phalanx.yaml"
        file.write_text(yaml.safe_dump(dict(config) | {"listen": address, "metrics": metrics}, sort_keys=False))
        command = [sys.executable, "-m", "service.cli", "serve", "--config", str(file)]
        with running(command, address, {"XDG_CACHE_HOME": str(cache)}) as process:
            yield replace(process, metrics=metrics)


@contextmanager
def simple(module: str, *arguments: str) -> Iterator[Process]:
    """`python -m MODULE ADDRESS ARGUMENTS`."""
    address = f"127.0.0.1:{free_port()}"
    with running([sys.executable, "-m", module, address, *arguments], address) as process:
        yield process


@contextmanager
def running(command: list[str], address: str, environment: Mapping[str, str] | None = None) -> Iterator[Process]:
    """A command, and its end whatever happens."""
    with tempfile.TemporaryFile() as log:
        # a configuration meant for another server does not reach this one
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PHALANX_")}
        started = subprocess.Popen(
            command, cwd=REPOSITORY, env=inherited | dict(environment or {}), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield Process(started.pid, address)
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace"), file=sys.stderr)
            raise
        finally:
            started.terminate()
            started.wait(START_SECONDS)


def await_serving(process: Process) -> None:
    """Ask grpc.health.v1 until it says SERVING, every few milliseconds."""
    end = time.monotonic() + START_SECONDS
    options = [(f"grpc.{which}_reconnect_backoff_ms", 10) for which in ("initial", "min", "max")]
    with grpc.insecure_channel(process.address, options) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        while time.monotonic() < end:
            try:
                if check(health_pb2.HealthCheckRequest(), timeout=1.0).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
            if process.ended:
                raise RuntimeError("the server ended before it was SERVING; what it said follows")
            time.sleep(0.005)
    raise TimeoutError(f"not SERVING on {process.address} after {START_SECONDS:g} s")


def workers_of(pid: int) -> list[int]:
    """The worker processes of a server that has several, in the order of their starts."""
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():  # each lists those that it started
        with suppress(FileNotFoundError):  # it ended just now
            children += map(int, (thread / "children").read_text().split())
    return sorted(filter(_is_worker, children), key=_started)


def _started(pid: int) -> int:
    """Ticks since boot, which go up where process numbers begin again at the lowest; 0 of one that ended just now."""
    try:
        return int(_stat(pid)[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, from field 3 of proc_pid_stat(5) on, its state: the first two are number and name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _is_worker(pid: int) -> bool:
    try:
        return b"multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark of a server: its description as it is written, and which configuration the server has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a server's configuration; default: the bundle that ships with Phalanx")
    return parser


def read_config(file: Path | None) -> dict[str, Any]:
    """A server's configuration, to be written somewhere else: its bundle is made absolute; {} for no file."""
    if file is None:
        return {}
    config: dict[str, Any] = yaml.safe_load(file.read_text()) or {}
    return config | ({"bundle": str((file.parent / config["bundle"]).resolve())} if "bundle" in config else {})


def image_shape(process: Process) -> tuple[int, int, int]:
    with process.channel() as channel:
        spec = pb_grpc.DefenseEnsembleStub(channel).GetEnsemble(pb.GetEnsembleRequest()).ensemble.input
    return spec.height, spec.width, spec.channels


def request(images: NDArray[np.uint8], ensemble: str = "") -> pb.ClassifyRequest:
    """Images (n, h, w, c) as raw pixels."""
    _, height, width, channels = images.shape
    raw = [pb.RawImage(pixels=image.tobytes(), height=height, width=width, channels=channels) for image in images]
    return pb.ClassifyRequest(ensemble=ensemble, images=[pb.Image(raw=image) for image in raw])


def random_images(n: int, shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def provenance() -> str:
    """Where and with what a figure was taken."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip() or "none"
    libraries = f"grpcio {version('grpcio')}, Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores; commit {commit}; {libraries}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
