"""Arithmetic on log probabilities, against the Array API: finite, and with a gradient, where a probability is 0.

Nothing here becomes an If, Loop or Scan in ONNX, as ndonnx's `max`, `min`, `any`, `all` and `matmul` would, nor looks
up a length at run time, as its `mean` would: all lengths but the number of images are known when a graph is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, device

Array: TypeAlias = Any  # of NumPy, torch or ndonnx

NEVER = -1e38  # the log of a probability of 0
TIE = 1e-6  # probabilities this close are equal: back ends differ by less


def largest(x: Array, axis: int) -> Array:
    """The maximum along `axis`, which is kept."""
    xp = array_namespace(x)
    return xp.take_along_axis(x, xp.argmax(x, axis=axis, keepdims=True), axis=axis)


def first_largest(p: Array) -> Array:
    """The class of the largest probability, the first of those that tie for it; p: (..., K) -> int64 (...).

    Of two that tie, a plain argmax finds the one with the better last bit, which is not the same on every back end.
    """
    xp = array_namespace(p)
    return xp.argmax(xp.astype(p > largest(p, -1) - TIE, p.dtype), axis=-1)


def log_softmax(x: Array) -> Array:
    """x_k - log sum_j exp x_j over the last axis."""
    xp = array_namespace(x)
    below = x - largest(x, -1)
    return below - xp.log(xp.sum(xp.exp(below), axis=-1, keepdims=True))


def log_average(log_p: Array, axis: int) -> Array:
    """log mean p along `axis`, which is kept."""
    xp = array_namespace(log_p)
    top = largest(log_p, axis)
    return top + xp.log(average(xp.exp(log_p - top), axis, keepdims=True))


def average(x: Array, axis: int, keepdims: bool = False) -> Array:
    return array_namespace(x).sum(x, axis=axis, keepdims=keepdims) / x.shape[axis]


def shares(weights: Sequence[float]) -> list[float]:
    """Weights made to sum to 1; equal shares where all are 0."""
    total = sum(weights)
    return [weight / total if total > 0 else 1 / len(weights) for weight in weights]


def pool(log_p: Array, weights: Sequence[float]) -> Array:
    """log sum_m w_m p_m with the weights made to sum to 1; log_p: (N, M, K) -> (N, K)."""
    xp = array_namespace(log_p)
    m = len(weights)
    log_weights = np.array([[math.log(w * m) if w > 0 else NEVER] for w in shares(weights)])  # (M, 1)
    return xp.squeeze(log_average(log_p + xp.asarray(log_weights, dtype=log_p.dtype, device=device(log_p)), 1), axis=1)


def divergence(log_p: Array, axis: int) -> Array:
    """Generalised Jensen-Shannon divergence mean_m KL(p_m || mean p) of the distributions along `axis`; K is last.

    Not H(mean p) - mean H(p), the same quantity: the difference cancels where the distributions agree.
    """
    xp = array_namespace(log_p)
    kl = xp.sum(xp.exp(log_p) * (log_p - log_average(log_p, axis)), axis=-1)
    return xp.clip(average(kl, axis), min=0.0)
