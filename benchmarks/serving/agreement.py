"""Before anything is timed: every server answers the same about the same images, alone and in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.rule_file import OUTPUTS

EXACT = ("label", "verdict")
TOLERANCE = 1e-5

Answers = Mapping[str, NDArray[Any]]


class Disagreement(RuntimeError):
    """Two servers that do not do the same work: their times say nothing."""


def check(name: str, found: Answers, expected: Answers, rank: float) -> None:
    """A server's answers against Phalanx's; `rank` is the least step of a p-value, of which one may be rounded away."""
    for output in OUTPUTS:
        if output not in found:
            raise Disagreement(f"{name}: expected the output {output}, got {', '.join(found)}")
        ours, theirs = expected[output].astype(np.float64), found[output].astype(np.float64)
        if ours.shape != theirs.shape:
            raise Disagreement(f"{name}: expected {output} of shape {ours.shape}, got {theirs.shape}")
        allowed = 0.0 if output in EXACT else 1.01 * rank if output == "p_value" else TOLERANCE
        if not (difference := float(np.abs(ours - theirs).max())) <= allowed:
            raise Disagreement(f"{name}: expected {output} within {allowed:g} of Phalanx's, got {difference:g} away")
