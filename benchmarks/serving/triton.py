"""Triton with the members as an ensemble model: each in the Python backend, and a last step that decides.

The members run beside each other and their logits meet in `rule`. Every step batches for itself, as Triton has it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ndonnx as ndx
import numpy as np

from benchmarks.processes import REPOSITORY, free_port, running
from benchmarks.serving.peers import Environment
from benchmarks.serving.rule_file import OUTPUTS, write_rule
from benchmarks.serving.target import Target, await_ready
from models.bundle import Bundle
from models.ensemble import Ensemble, decide
from models.masks import draw_masks

HERE = Path(__file__).parent
MODEL = "ensemble"
RULE = "rule"
MAX_BATCH = 64  # images: as in Phalanx's `batching`, and more than the largest request has


@dataclass(frozen=True)
class TritonSetting:
    """What was tried."""

    instances: int  # of every step, a process each
    delay: int | None  # microseconds that a step waits for a batch; None: without dynamic batching
    onnx_rule: bool = False  # the rule as a graph in ONNX Runtime instead of NumPy
    preferred: tuple[int, ...] = ()  # sizes of a batch that starts at once

    @property
    def name(self) -> str:
        batching = "no dynamic batching" if self.delay is None else f"delay {self.delay} µs"
        batching += f", preferred {'/'.join(map(str, self.preferred))}" if self.preferred else ""
        return f"{self.instances} of each step, {batching}, rule in {'ONNX Runtime' if self.onnx_rule else 'NumPy'}"


SETTINGS = (
    TritonSetting(1, None, onnx_rule=True),
    TritonSetting(1, 0),
    TritonSetting(1, 0, onnx_rule=True),
    TritonSetting(1, 500, onnx_rule=True),
    TritonSetting(1, 500, onnx_rule=True, preferred=(4, 8, 16)),
    TritonSetting(1, 2000, onnx_rule=True),
    TritonSetting(2, 0, onnx_rule=True),
    TritonSetting(2, 500, onnx_rule=True),
)


@contextmanager
def triton(environment: Environment, repository: Path) -> Iterator[Target]:
    """The server over a repository that `write_repository` wrote."""
    server = environment.packages / "pytriton" / "tritonserver"
    address = f"127.0.0.1:{free_port()}"
    command = [
        str(server / "bin" / "tritonserver"), "--model-repository", str(repository),
        "--backend-directory", str(server / "backends"), "--backend-config", f"python,shm-region-prefix-name=phalanx{os.getpid()}",
        "--grpc-address", "127.0.0.1", "--grpc-port", address.rpartition(":")[2],
        "--allow-http", "false", "--allow-metrics", "false",
    ]  # fmt: skip
    with running(command, address, _variables(environment)) as process:
        target = Target(address, MODEL)
        await_ready(process, target)
        yield target


def _variables(environment: Environment) -> dict[str, str]:
    """The backend's Python is the one that the environment was made of, with its packages and our sources."""
    libraries = [environment.libraries(), environment.packages / "nvidia_pytriton.libs"]
    return {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONHOME": str(environment.prefix()),
        "PYTHONPATH": f"{environment.packages}:{REPOSITORY}",
        "PATH": f"{environment.folder / 'bin'}:{os.environ['PATH']}",
    }


def write_repository(folder: Path, bundle: Bundle, ensemble: Ensemble, setting: TritonSetting) -> None:
    """A model for each member, one for the rule, and the ensemble of them."""
    height, width, channels = bundle.manifest.input.shape
    image = _tensor("image", "UINT8", (height, width, channels))
    shapes = {}  # of one image's logits
    for name in ensemble.members:
        member = bundle.manifest.member(name)
        spec = member.stochastic
        shapes[name] = (ensemble.classes,) if spec is None else (spec.samples, ensemble.classes)
        version = _model(folder, name, setting, "triton_member.py", [image], [_tensor("logits", "FP32", shapes[name])])
        (version / "model.onnx").write_bytes(bundle.onnx_bytes[name])
        if spec is not None:
            np.save(version / "masks.npy", draw_masks(bundle.manifest.masks.seed, spec.samples, spec.width, spec.keep))
    columns = {"probabilities": ensemble.classes}
    outputs = [_tensor(name, datatype, (columns.get(name, 1),)) for name, (datatype, _) in OUTPUTS.items()]
    logits = [_tensor(name, "FP32", shape) for name, shape in shapes.items()]
    version = _model(folder, RULE, setting, "triton_rule.py", logits, outputs)
    write_rule(version, ensemble)
    if setting.onnx_rule:
        (version / "rule.onnx").write_bytes(rule_graph(bundle, ensemble))
    (folder / MODEL / "1").mkdir(parents=True)
    steps = [_step(name, {"image": "image"}, {"logits": name}) for name in shapes]
    steps.append(_step(RULE, {name: name for name in shapes}, {name: name for name in OUTPUTS}))
    (folder / MODEL / "config.pbtxt").write_text(
        f'name: "{MODEL}"\nplatform: "ensemble"\nmax_batch_size: {MAX_BATCH}\n'
        f"{_listed('input', [image])}{_listed('output', outputs)}ensemble_scheduling {{\n{_listed('step', steps)}}}\n"
    )


def rule_graph(bundle: Bundle, ensemble: Ensemble) -> bytes:
    """Logits by member, (N, K) or (T, N, K) -> the columns of OUTPUTS: service/graph.py without the members."""
    inputs = {}
    for name in ensemble.members:
        spec = bundle.manifest.member(name).stochastic
        shape = ("N", ensemble.classes) if spec is None else (spec.samples, "N", ensemble.classes)
        inputs[name] = ndx.argument(shape=shape, dtype=ndx.float32)
    decision = decide(ensemble, inputs)
    return ndx.build(inputs, {name: getattr(decision, name) for name in OUTPUTS}).SerializeToString(deterministic=True)


def _model(folder: Path, name: str, setting: TritonSetting, source: str, inputs: list[str], outputs: list[str]) -> Path:
    """The folder of its one version."""
    version = folder / name / "1"
    version.mkdir(parents=True)
    shutil.copy(HERE / source, version / "model.py")
    batching = ""
    if setting.delay is not None:
        preferred = f", preferred_batch_size: {list(setting.preferred)}" if setting.preferred else ""
        batching = f"dynamic_batching {{ max_queue_delay_microseconds: {setting.delay}{preferred} }}\n"
    (folder / name / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: {MAX_BATCH}\n{_listed("input", inputs)}{_listed("output", outputs)}'
        f"{batching}instance_group [ {{ kind: KIND_CPU, count: {setting.instances} }} ]\n"
    )
    return version


def _tensor(name: str, datatype: str, shape: tuple[int, ...]) -> str:
    return f'{{ name: "{name}", data_type: TYPE_{datatype}, dims: [{", ".join(map(str, shape))}] }}'


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = [f'input_map {{ key: "{key}", value: "{value}" }}' for key, value in inputs.items()]
    maps += [f'output_map {{ key: "{key}", value: "{value}" }}' for key, value in outputs.items()]
    return f'{{ model_name: "{model}", model_version: -1, {", ".join(maps)} }}'


def _listed(field: str, entries: list[str]) -> str:
    return f"{field} [\n" + ",\n".join(f"  {entry}" for entry in entries) + "\n]\n"
