"""NumPy, torch and ONNX Runtime answer alike, whatever the rule and whatever comes in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from models.ensemble import RuleName
from service.graph import CONTROL_FLOW, op_types
from tests.models.ensembles import (
    DETECTORS,
    VOTERS,
    K,
    OnnxRule,
    Outputs,
    T,
    assert_alike,
    ensemble,
    near_a_calibration_score,
    on_numpy,
    on_torch,
    random_outputs,
)

N = 12


def random_inputs() -> Outputs:
    return random_outputs(N)


def alike() -> Outputs:
    """Every member votes the same, so that disagreement and uncertainty are 0."""
    same = {voter.name: random_outputs(N)["edge"] * voter.temperature for voter in VOTERS}
    return {**same, "bayesian": np.tile(same["bayesian"], (T, 1, 1))}


def undecided() -> Outputs:
    """Every class is as probable as the next."""
    return {name: np.full_like(logits, -3) for name, logits in random_outputs(N).items()}


def torn() -> Outputs:
    """Two members for one class, two for another, to the same degree."""
    logits = np.zeros((N, K), np.float32)
    one, other = logits.copy(), logits.copy()
    one[:, 1], other[:, 3] = 2, 2
    tempered = {voter.name: (one if voter.name in ("metric", "edge") else other) * voter.temperature for voter in VOTERS}
    return {**tempered, "bayesian": np.tile(tempered["bayesian"], (T, 1, 1))}


def certain() -> Outputs:
    """Probabilities 0 and 1, by logits of +-10,000."""
    rng = np.random.default_rng(5)
    return {name: rng.choice(np.array([-1e4, 1e4], np.float32), logits.shape) for name, logits in random_outputs(N).items()}


def opposed() -> Outputs:
    """Each member certain of a class of its own."""
    outputs = {name: np.full_like(logits, -1e4) for name, logits in random_outputs(N).items()}
    for k, logits in enumerate(outputs.values()):
        logits[..., k] = 1e4
    return outputs


def nearly_alike() -> Outputs:
    same, rng = alike(), np.random.default_rng(6)
    return {name: logits + rng.normal(0, 1e-4, logits.shape).astype(np.float32) for name, logits in same.items()}


def not_finite() -> Outputs:
    outputs = random_outputs(N)
    for image, (name, value) in enumerate((name, v) for name in outputs for v in (np.nan, np.inf, -np.inf)):
        outputs[name][..., image, image % K] = value
    outputs["bayesian"][0, 11, 0] = np.nan
    return outputs


def huge() -> Outputs:
    """Up to 1e25, which is more than the rule calls finite."""
    scale = 10.0 ** np.linspace(0, 25, N)[:, None]
    return {name: (logits * scale).astype(np.float32) for name, logits in random_outputs(N).items()}


INPUTS = [random_inputs, alike, undecided, torn, certain, opposed, nearly_alike, not_finite, huge]
SHAPES = {
    "four members": (VOTERS, DETECTORS),
    "one member": (VOTERS[2:3], ()),
    "one stochastic member": (VOTERS[3:], DETECTORS[:2]),
    "a detector without a vote": (VOTERS[:3], DETECTORS),
}


@cache
def onnx_rule(rule: RuleName, shape: str) -> OnnxRule:
    return OnnxRule(ensemble(rule, *SHAPES[shape]))


@pytest.mark.parametrize("inputs", INPUTS, ids=lambda inputs: inputs.__name__)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RuleName)
def test_back_ends_agree(rule: RuleName, shape: str, inputs: Callable[[], Outputs]) -> None:
    under_test = ensemble(rule, *SHAPES[shape])
    outputs = {name: logits for name, logits in inputs().items() if name in under_test.members}
    expected = on_numpy(under_test, outputs)
    for other in (on_torch(under_test, outputs), onnx_rule(rule, shape)(outputs)):
        assert_alike(under_test, expected, other)
        for column in vars(expected):
            a, b = getattr(expected, column), getattr(other, column)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), column


@pytest.mark.parametrize("rule", RuleName)
def test_back_ends_rank_all_images_alike_when_they_are_those_of_the_calibration(rule: RuleName) -> None:
    """Every score is next to one in the table, where the last bit decides about a rank: one, and no more."""
    under_test = ensemble(rule)
    outputs = random_outputs(199, seed=99)
    expected = on_numpy(under_test, outputs)
    for other in (on_torch(under_test, outputs), onnx_rule(rule, "four members")(outputs)):
        np.testing.assert_array_equal(other.label, expected.label)
        np.testing.assert_allclose(other.p_values, expected.p_values, atol=1.01 / 200)
        np.testing.assert_allclose(other.p_value, expected.p_value, atol=0.06)


@pytest.mark.parametrize("rule", RuleName)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rule_in_onnx_has_no_control_flow(rule: RuleName, shape: str) -> None:
    assert not CONTROL_FLOW.intersection(op_types(onnx_rule(rule, shape).model))


def test_a_batch_of_any_size_goes_through_one_graph() -> None:
    session, under_test = onnx_rule(RuleName.MIXED, "four members"), ensemble(RuleName.MIXED)
    for n in (1, 2, 7):
        outputs = random_outputs(n, seed=n)
        assert_alike(under_test, on_numpy(under_test, outputs), session(outputs))


def test_inputs_are_as_degenerate_as_they_are_meant_to_be() -> None:
    full = ensemble(RuleName.SOFT)
    assert near_a_calibration_score(full, on_numpy(full, random_inputs())).mean() < 0.05
    assert (on_numpy(full, certain()).votes == 0).mean() > 0.2
    assert on_numpy(full, opposed()).scores[0, 2] == pytest.approx(np.log(4))
    assert not on_numpy(full, not_finite()).finite.any()
    assert set(on_numpy(full, torn()).label.tolist()) == {1}
    assert 0 < on_numpy(full, huge()).finite.mean() < 1
    assert on_numpy(full, alike()).scores[:, :3].max() < 1e-6
