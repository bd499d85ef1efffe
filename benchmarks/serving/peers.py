"""Where the peers live: environments of their own, made once.

    python -m benchmarks.serving.peers [FOLDER]

Three of them, under `.venv-peers` unless another folder is given: `triton` (the server that nvidia-pytriton ships), `mlserver`,
and `client` (perf_analyzer, which wants Debian's libb64-0d). Each peer has the ONNX Runtime that Phalanx has.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnxruntime as ort

from benchmarks.processes import REPOSITORY

FOLDER = REPOSITORY / ".venv-peers"
TRITON = "2.51"  # what nvidia-pytriton 0.7.0 ships
RUNTIME = (f"onnxruntime=={ort.__version__}", f"array-api-compat=={version('array-api-compat')}")
REQUIREMENTS = {
    "triton": ("nvidia-pytriton==0.7.0", *RUNTIME),
    # its worker processes do not start with uvloop 0.22 and later, which no longer makes an event loop unasked
    "mlserver": ("mlserver==1.7.1", "uvloop==0.21.0", *RUNTIME),
    "client": ("--constraint", str(REPOSITORY / "constraints.txt"), "tritonclient[grpc]", "protobuf", "nvidia-cuda-runtime-cu12"),
}
SHOWN = ("nvidia-pytriton", "mlserver", "onnxruntime", "numpy", "grpcio")


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python3.*/site-packages"))

    def describe(self) -> str:
        listed = json.loads(self._python("-m", "pip", "list", "--format", "json", "--disable-pip-version-check"))
        versions = {each["name"].lower(): each["version"] for each in listed}
        return ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)

    def libraries(self) -> Path:
        """Where this environment's libpython is, if anywhere: what embeds Python loads it."""
        return Path(self._python("-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))").strip())

    def prefix(self) -> Path:
        return Path(self._python("-c", "import sys; print(sys.base_prefix)").strip())

    def _python(self, *arguments: str) -> str:
        return subprocess.run([self.python, *arguments], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Peers:
    triton: Environment
    mlserver: Environment
    client: Environment


def find(folder: Path) -> Peers:
    """The environments made before; FileNotFoundError where there are none."""
    if missing := [name for name in REQUIREMENTS if not (folder / name / ".made").exists()]:
        raise FileNotFoundError(
            f"{folder}: expected an environment for each peer, got none for {', '.join(missing)}: "
            f"make them with `python -m benchmarks.serving.peers {folder}`"
        )
    return Peers(*(Environment(folder / name) for name in REQUIREMENTS))


def make(folder: Path) -> None:
    """What is there already, made whole, is left as it is."""
    for name, requirements in REQUIREMENTS.items():
        environment = Environment(folder / name)
        if (environment.folder / ".made").exists():
            continue
        shutil.rmtree(environment.folder, ignore_errors=True)
        print(f"{environment.folder}: {', '.join(requirements)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", environment.folder], check=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([environment.python, *install, *requirements], check=True)
        if name == "triton":
            _place_stub(environment)
        (environment.folder / ".made").touch()


def _place_stub(environment: Environment) -> None:
    """The Python backend's other half, of this Python's version; pytriton, too, copies it before it starts the server."""
    server = environment.packages / "pytriton" / "tritonserver"
    stub = Path(f"{sys.version_info.major}.{sys.version_info.minor}") / "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / stub, server / "backends" / "python")


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else FOLDER)
