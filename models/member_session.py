"""One member alone through ONNX Runtime on the CPU: for calibration and parity; serving fuses the members."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.bundle import Bundle
from models.manifest import InvalidBundle, StochasticSpec
from models.outputs import MemberRun


def onnx_member(file: str, model: bytes, stochastic: StochasticSpec | None, threads: int = 1) -> MemberRun:
    """How to run the graph in `model`; `file` is its name in complaints."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise InvalidBundle(f"{file}: expected a graph that ONNX Runtime can run, got {error}") from error

    def logits(images: NDArray[np.uint8], masks: NDArray[np.float32] | None) -> NDArray[np.float32]:
        inputs = {"image": images} if masks is None else {"image": images, "masks": masks}
        (output,) = session.run(["logits"], inputs)
        return np.asarray(output, np.float32)

    return MemberRun(logits, stochastic)


def member_runs(bundle: Bundle, threads: int = 1) -> dict[str, MemberRun]:
    """Every member of a bundle, by name."""
    members = bundle.manifest.members
    return {m.name: onnx_member(m.onnx.file, bundle.onnx_bytes[m.name], m.stochastic, threads) for m in members}
