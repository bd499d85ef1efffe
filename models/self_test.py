"""Whether members answer a bundle's samples as they did when the bundle was made."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.manifest import InvalidBundle, MemberManifest
from models.member_session import onnx_member
from models.outputs import expected_outputs

TOLERANCE = 1e-3  # of a probability: back ends differ by far less, another model by far more


def check_member(bundle: Bundle, member: MemberManifest) -> None:
    """Run one member alone on the samples; raises InvalidBundle naming it, and the first image that it gets wrong."""
    alone = onnx_member(member.onnx.file, bundle.onnx_bytes[member.name], member.stochastic)
    try:
        answers = expected_outputs({member.name: alone}, bundle.samples.images, bundle.manifest.masks.seed)[member.name]
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise InvalidBundle(f"self-test: member {member.name}: expected a graph that answers the samples, got {error}") from error
    compare(member.name, softmax(answers), softmax(bundle.samples.expected[member.name]))


def compare(member: str, got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Probabilities (m, K) of a member on the m samples; raises InvalidBundle where they differ."""
    if got.shape != expected.shape:
        raise InvalidBundle(f"self-test: member {member}: expected answers of shape {expected.shape}, got {got.shape}")
    wrong = ~(np.abs(got - expected) <= TOLERANCE).all(axis=1)  # (m,); a NaN is wrong
    if wrong.any():
        image = int(wrong.argmax())
        wanted, came = (f"{row[image].argmax()} with {row[image].max():.4f}" for row in (expected, got))
        raise InvalidBundle(
            f"self-test: member {member}, sample image {image}: expected class {wanted}, got {came}; "
            f"{int(wrong.sum())} of {len(wrong)} images differ by more than {TOLERANCE:g}"
        )


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(m, K) over the last axis."""
    powers: NDArray[np.float32] = np.exp(logits - logits.max(axis=1, keepdims=True))
    powers /= powers.sum(axis=1, keepdims=True)
    return powers
