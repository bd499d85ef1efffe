"""One ensemble's fused graph in an ONNX Runtime session, on the device asked for, tested before it answers anybody."""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.bundle import Bundle
from models.ensemble import Decision, Ensemble
from models.masks import draw_masks
from models.self_test import check_member, compare, softmax
from service.bound_runs import BoundRuns, sizes_up_to
from service.config import DeviceConfig
from service.gpu_runs import GpuRuns, NotOnGpu

log = logging.getLogger(__name__)

Images = NDArray[np.uint8]  # (n, height, width, channels)
Floats = NDArray[np.float32]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Images in one run of a CPU session. Larger runs are slower: two threads computed batches of 64 of bundle faa062501894 14% faster
# in sixteens than in thirty-twos.
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


class Lanes:
    """Where runs are computed: so many at once, for all engines of a process together, however many those are.

    While more than half of them are free there is time to spare, which one run at a time may borrow: it takes no lane, and is
    stopped as soon as there is none to spare any more.
    """

    def __init__(self, count: int = 0) -> None:
        """`count` 0: as many as this process may use cores."""
        self.count = count or cores()
        self.free = self.count
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._idle = threading.Condition(lock)  # for those who wait until there is time to spare
        self._borrower: Stop | None = None
        self._busy = 0.0  # time.monotonic() when there last was no time to spare
        self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="compute")

    def enter(self, wait: bool = True) -> bool:
        """Take a lane, which whoever took it must `leave`; False where none is free and none is waited for."""
        with self._changed:
            while not self.free:
                if not wait:
                    return False
                self._changed.wait()
            self.free -= 1
            if self._borrower is not None and not self._to_spare():
                self._borrower.now()
        return True

    def await_free(self) -> None:
        """Return when a lane is free, without taking it."""
        with self._changed:
            self._changed.wait_for(lambda: self.free)

    def leave(self) -> None:
        with self._changed:
            was_busy = not self._to_spare()
            self.free += 1
            self._changed.notify_all()
            if was_busy:
                self._busy = time.monotonic()
                if self._to_spare():
                    self._idle.notify_all()

    def await_idle(self, seconds: float, gave_up: Callable[[], bool]) -> bool:
        """Return when there has been time to spare for so long, or, with False, when somebody gave up and woke the borrowers."""
        with self._idle:
            while not gave_up():
                self._idle.wait_for(lambda: self._lends() or gave_up())
                left = self._busy + seconds - time.monotonic()
                if left <= 0:
                    break
                self._idle.wait(left)
            return not gave_up()

    def borrow(self, stop: Stop) -> bool:
        """Compute in time that is to spare, until it is not: then `stop` is called, and the end to be told by `give_back`.
        False where there is none.
        """
        with self._idle:
            if not self._lends():
                return False
            self._borrower = stop
            return True

    def give_back(self) -> None:
        with self._idle:
            self._borrower = None
            self._idle.notify_all()

    def wake_borrowers(self) -> None:
        with self._idle:
            self._idle.notify_all()

    def _to_spare(self) -> bool:
        return 2 * self.free > self.count

    def _lends(self) -> bool:
        return self._borrower is None and self._to_spare()

    def compute(self, work: Callable[[], None]) -> None:
        """Do the work in a thread of ours; the caller has taken a lane, and the work leaves it."""
        self._threads.submit(work)

    def close(self) -> None:
        """Nothing can be computed any more."""
        self._threads.shutdown()


class Engine:
    """Classifies batches of images; safe to share between threads.

    On the CPU every run has one thread, and as many runs are under way at once as there are lanes. Threads that share every
    convolution instead, as ONNX Runtime has it, wait for each other some thirty times a run: two of them gained nothing
    below batches of 64, at a third more CPU, unless they waited in a busy loop. Runs that begin and end together wait for each
    other, too, and for all their callers: with a lane each, one computes while the other's answers are on their way.
    """

    def __init__(
        self, graph: bytes, bundle: Bundle, ensemble: Ensemble, device: DeviceConfig, lanes: Lanes, largest_batch: int
    ) -> None:
        """`graph` is the fused graph of `ensemble` over `bundle`; `lanes` may be those of other engines, too; batches of more
        than `largest_batch` images are not worth preparing for.

        Raises ProviderUnavailable, or InvalidBundle where the self-test fails.
        """
        manifest = bundle.manifest
        self.input_shape = manifest.input.shape  # (height, width, channels)
        self._masks_spec = manifest.masks_of(ensemble.members)
        self._masks_seed = manifest.masks.seed
        self._fixed = self._draw(self._masks_seed)
        self._fresh = ensemble.masks == "fresh"
        self._gpu = self._on_gpu(graph, device, bundle.samples.images, largest_batch) if _wants_cuda(device) else None
        self.fallback = _wants_cuda(device) and self._gpu is None
        if self._gpu is None:
            self._session = open_session(graph, device.model_copy(update={"provider": "cpu"}))
        self.provider = CPU if self._gpu is None else CUDA
        self.cuda_graphs = self._gpu is not None and self._gpu.graphs
        self.lanes = lanes if self._gpu is None else Lanes(1)  # a GPU divides a run by itself
        self.most_at_once = MOST_AT_ONCE if self._gpu is None else largest_batch  # images that are worth to be in one run
        try:
            _self_test(self, bundle, ensemble)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go what is on a GPU; the caller runs nothing any more. A session on the CPU needs nothing of the kind."""
        if self._gpu is not None:
            self._gpu.close()
            self.lanes.close()

    def run(self, images: Images, masks_seed: int | None = None, *, stop: Stop | None = None) -> Run:
        """Classify images (n, h, w, c) as one batch; the `masks_seed` of an earlier answer repeats that answer.

        Raises Stopped where `stop` ended it, which it does on the CPU alone.
        """
        if self._masks_spec is None:
            return Run(self._decide(images, {}, stop), None)
        if masks_seed is None:  # a fresh seed is not to be foreseen by whoever crafts an image
            masks_seed = secrets.randbits(63) if self._fresh else self._masks_seed
        masks = self._fixed if masks_seed == self._masks_seed else self._draw(masks_seed)
        return Run(self._decide(images, {"masks": masks}, stop), masks_seed)

    def _on_gpu(self, graph: bytes, device: DeviceConfig, samples: Images, largest_batch: int) -> GpuRuns | None:
        """None where the session would be elsewhere, and `strict` allows it."""
        masks = {} if self._fixed is None else {"masks": self._fixed}
        bind = partial(BoundRuns, columns=_COLUMNS, others=masks, sizes=sizes_up_to(largest_batch), device="cuda")
        try:
            return GpuRuns(partial(_open_on_gpu, graph, device), bind, samples, device.cuda_graphs)
        except NotOnGpu as error:
            sentence = f"expected a session on {CUDA} (device.provider is {device.provider}), got one on {error}"
        if device.strict:
            raise ProviderUnavailable(f"{sentence}; device.strict is true")
        log.warning("%s: this will be slow", sentence)
        return None

    def _decide(self, images: Images, masks: dict[str, Any], stop: Stop | None) -> Decision:
        if self._gpu is not None:  # takes milliseconds, and is not stopped on the way
            return Decision(*self._gpu.run(images, masks))
        try:
            return Decision(*self._session.run(_COLUMNS, {"image": images} | masks, None if stop is None else stop.options))
        except Exception:
            if stop is not None and stop.asked:
                raise Stopped from None
            raise

    def _draw(self, seed: int) -> Floats | None:
        spec = self._masks_spec
        return draw_masks(seed, spec.samples, spec.width, spec.keep) if spec else None


def cores() -> int:
    """The processors this process may use: those it is bound to, within its cgroup's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(bound, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or the quota is `max`
        return bound


def open_session(graph: bytes, device: DeviceConfig, cuda_graphs: bool = False) -> ort.InferenceSession:
    """`cuda_graphs`: runs are captured, see service/gpu_runs.py; raises where the graph does not allow it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # see Engine
    # The arena keeps the memory of a session's largest run for good, which is of sixteen images for each lane, and no more than
    # the allocator keeps without one; runs of eight and more images of small members are 1.8 times as fast with it. The pattern
    # planner adds memory and no speed.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    providers: list[Any] = [CPU]
    if _wants_cuda(device):
        ort.preload_dlls()  # the libraries of the extra `cuda`
        # EXHAUSTIVE, the default, tries every algorithm again for each new batch size
        providers.insert(0, (CUDA, {"cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": str(int(cuda_graphs))}))
    session = ort.InferenceSession(graph, options, providers=providers)
    session.disable_fallback()  # in the middle of a run it would be another session, on the CPU
    return session


def _open_on_gpu(graph: bytes, device: DeviceConfig, cuda_graphs: bool) -> ort.InferenceSession:
    """A CUDA session that could not be had is a CPU session without a word: only the session itself knows."""
    session = open_session(graph, device, cuda_graphs)
    if (provider := session.get_providers()[0]) != CUDA:
        raise NotOnGpu(provider)
    return session


def _wants_cuda(device: DeviceConfig) -> bool:
    """`auto` is CUDA where there is an NVIDIA device: ONNX Runtime lists CUDA as available on any machine."""
    present = any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg"))
    if device.provider == "auto":
        return present and CUDA in ort.get_available_providers()
    return device.provider == "cuda"


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
