"""One ensemble's fused graph in an ONNX Runtime session, on the device asked for, tested before it answers anybody."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.bundle import Bundle, StochasticSpec
from models.ensemble import Decision, Ensemble
from models.masks import draw_masks
from models.self_test import check_member, compare, softmax
from service.config import DeviceConfig

log = logging.getLogger(__name__)

Images = NDArray[np.uint8]  # (n, height, width, channels)
Floats = NDArray[np.float32]
Outputs = list[NDArray[Any]]  # one for every column of a decision

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Images in one run of a CPU session. Larger runs are slower: two threads computed batches of 64 of the default bundle 14% faster
# in sixteens than in thirty-twos (docs/reports/serving-under-stress.md).
MOST_AT_ONCE = 16
_COLUMNS = [column.name for column in fields(Decision)]


class ProviderUnavailable(RuntimeError):
    """The session does not run on the device that was asked for, and `strict` says that no other will do."""


@dataclass(frozen=True, slots=True)
class Run:
    """What an engine answers for a batch; `masks_seed` is None where no member is stochastic."""

    decision: Decision
    masks_seed: int | None


class Stopped(Exception):
    """A run that was stopped before its end."""


class Stop:
    """Ends the run it was given to, wherever in the graph it is."""

    __slots__ = ("asked", "options")

    def __init__(self) -> None:
        self.asked = False
        self.options = ort.RunOptions()

    def now(self) -> None:
        self.asked = True
        self.options.terminate = True


class ComputeThreads:
    """The threads that compute, for all engines of a process together: as many as cores, however many ensembles."""

    def __init__(self, count: int = 0) -> None:
        """`count` 0: as many as this process may use cores."""
        self.count = count or cores()
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="compute")

    def map(self, work: Callable[[Images], Outputs], parts: Sequence[Images]) -> list[Outputs]:
        return list(self._pool.map(work, parts))

    def close(self) -> None:
        """Nothing can be computed any more."""
        self._pool.shutdown()


class Engine:
    """Classifies batches of images; safe to share between threads.

    On the CPU a batch is divided among threads, each of which runs the whole graph on its parts. Threads that share every
    convolution instead, as ONNX Runtime has it, wait for each other some thirty times a run: two of them gained nothing
    below batches of 64, at a third more CPU, unless they waited in a busy loop.
    """

    def __init__(self, graph: bytes, bundle: Bundle, ensemble: Ensemble, device: DeviceConfig, threads: ComputeThreads) -> None:
        """`graph` is the fused graph of `ensemble` over `bundle`; `threads` may be those of other engines, too.

        Raises ProviderUnavailable, or InvalidBundle where the self-test fails.
        """
        manifest = bundle.manifest
        self.input_shape = manifest.input.shape  # (height, width, channels)
        self._threads = threads
        self._session = open_session(graph, device)
        self.provider: str = self._session.get_providers()[0]
        self.fallback = _falls_back(self.provider, device)
        stochastic = (manifest.member(name).stochastic for name in ensemble.members)
        self._masks_spec: StochasticSpec | None = next((spec for spec in stochastic if spec is not None), None)
        self._masks_seed = manifest.masks.seed
        self._fixed = self._draw(self._masks_seed)
        self._fresh = ensemble.masks == "fresh"
        _self_test(self, bundle, ensemble)

    def run(self, images: Images, masks_seed: int | None = None, *, stop: Stop | None = None) -> Run:
        """Classify images (n, h, w, c) as one batch; the `masks_seed` of an earlier answer repeats that answer.

        Raises Stopped where `stop` ended it.
        """
        if self._masks_spec is None:
            return Run(self._decide(images, {}, stop), None)
        if masks_seed is None:  # a fresh seed is not to be foreseen by whoever crafts an image
            masks_seed = secrets.randbits(63) if self._fresh else self._masks_seed
        masks = self._fixed if masks_seed == self._masks_seed else self._draw(masks_seed)
        return Run(self._decide(images, {"masks": masks}, stop), masks_seed)

    def _decide(self, images: Images, masks: dict[str, Any], stop: Stop | None) -> Decision:
        shares = 1 if self.provider == CUDA else shares_of(len(images), self._threads.count)
        options = None if stop is None else stop.options
        run = self._session.run
        try:
            if shares == 1:
                return Decision(*run(_COLUMNS, {"image": images} | masks, options))
            parts = self._threads.map(lambda part: run(_COLUMNS, {"image": part} | masks, options), np.array_split(images, shares))
        except Exception:
            if stop is not None and stop.asked:
                raise Stopped from None
            raise
        return Decision(*map(np.concatenate, zip(*parts, strict=True)))

    def _draw(self, seed: int) -> Floats | None:
        spec = self._masks_spec
        return draw_masks(seed, spec.samples, spec.width, spec.keep) if spec else None


def shares_of(images: int, threads: int) -> int:
    """In how many parts a batch is computed: as many for each thread, and none of more than MOST_AT_ONCE images."""
    return min(images, threads * math.ceil(images / (threads * MOST_AT_ONCE)))


def cores() -> int:
    """The processors this process may use: those it is bound to, within its cgroup's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(bound, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or the quota is `max`
        return bound


def open_session(graph: bytes, device: DeviceConfig) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # see Engine
    # An arena keeps the memory of its largest batch for good, and the pattern planner plans it larger still: 86 MB for a
    # session that has seen one batch of 64, against some 3% of that batch's time.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3
    providers: list[Any] = [CPU]
    if _wants_cuda(device):
        ort.preload_dlls()  # the libraries of the extra `cuda`
        # EXHAUSTIVE, the default, tries every algorithm again for each new batch size
        providers.insert(0, (CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}))
    return ort.InferenceSession(graph, options, providers=providers)


def _wants_cuda(device: DeviceConfig) -> bool:
    """`auto` is CUDA where there is an NVIDIA device: ONNX Runtime lists CUDA as available on any machine."""
    present = any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg"))
    if device.provider == "auto":
        return present and CUDA in ort.get_available_providers()
    return device.provider == "cuda"


def _falls_back(provider: str, device: DeviceConfig) -> bool:
    """A CUDA session that could not be had is a CPU session without a word: only the session itself knows."""
    if not _wants_cuda(device) or provider == CUDA:
        return False
    sentence = f"expected a session on {CUDA} (device.provider is {device.provider}), got one on {provider}"
    if device.strict:
        raise ProviderUnavailable(f"{sentence}; device.strict is true")
    log.warning("%s: this will be slow", sentence)
    return True


def _self_test(engine: Engine, bundle: Bundle, ensemble: Ensemble) -> None:
    """Every member present must answer the bundle's samples as it did when the bundle was made."""
    decision = engine.run(bundle.samples.images, bundle.manifest.masks.seed).decision
    temperature = {voter.name: voter.temperature for voter in ensemble.voters}
    for name in ensemble.members:
        if name in temperature:
            votes = decision.votes[:, [voter.name for voter in ensemble.voters].index(name)]  # (m, K)
            compare(name, votes, softmax(bundle.samples.expected[name] / temperature[name]))
        else:  # only a detector listens: its logits leave the graph as a score, so it is run on its own
            check_member(bundle, bundle.manifest.member(name))
