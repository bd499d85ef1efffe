"""A graph in a peer's process, with the options of service/engine.py; ONNX Runtime and NumPy are all that is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

MOST_AT_ONCE = 16  # images of one run, as in service/engine.py


def open_graph(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def read_masks(folder: Path) -> dict[str, Any]:
    """What a graph takes beside images: nothing where no member of it is stochastic."""
    masks = folder / "masks.npy"
    return {"masks": np.load(masks)} if masks.exists() else {}
