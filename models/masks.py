"""Dropout masks of a stochastic member, as a function of a seed and of nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def draw_masks(seed: int, samples: int, width: int, keep: float) -> NDArray[np.float32]:
    """Masks (samples, width): each entry 1/keep with probability keep, else 0.

    Drawn from the raw words of Philox: NumPy promises to keep their stream, but not how `random()` uses them, and the
    masks that a bundle was calibrated with must be those it is served with, whatever the library's version.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"expected a probability of keeping a unit in (0, 1], got {keep:g}")
    words = np.random.Philox(key=seed).random_raw(samples * width).reshape(samples, width)
    uniform = (words >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    return np.where(uniform < keep, np.float32(1 / keep), np.float32(0))
