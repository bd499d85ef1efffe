"""Ensembles and member outputs to test the rule with, and the rule run on each of its three back ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import ndonnx as ndx
import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from models.composition import calibrate
from models.ensemble import Decision, Detector, DetectorName, Ensemble, RuleName, Voter, decide, rankable
from models.outputs import CalibrationOutputs, reduce_outputs

Outputs = Mapping[str, NDArray[np.float32]]

K, T = 5, 8
VOTERS = (
    Voter("metric", 1.3, "robust", 0.3),
    Voter("edge", 0.8, "robust", 0.1),
    Voter("adversarial", 1.0, "robust", 0.6),
    Voter("bayesian", 1.5, "accurate", 0.0),
)
DETECTORS = (
    Detector(DetectorName.MUTUAL_INFORMATION, "bayesian"),
    Detector(DetectorName.VARIANCE, "bayesian"),
    Detector(DetectorName.DISAGREEMENT),
    Detector(DetectorName.DISTANCE, "metric"),
    Detector(DetectorName.MARGIN),
)


@cache
def ensemble(
    rule: RuleName,
    voters: tuple[Voter, ...] = VOTERS,
    detectors: tuple[Detector, ...] = DETECTORS,
    n: int = 199,
    alpha: float = 0.8,
    scale: float = 1.7,
) -> Ensemble:
    """Calibrated on n images whose logits are drawn as `random_outputs` draws them."""
    bare = Ensemble("test", K, voters, rule, alpha, scale, detectors, review_rate=0.05, reject_rate=0.01)
    members = {name: reduce_outputs(logits) for name, logits in random_outputs(n, seed=99).items()}
    return calibrate(bare, CalibrationOutputs(members, np.full(n, -1, np.int16)))


def random_outputs(n: int, seed: int = 0, std: float = 2.0) -> dict[str, NDArray[np.float32]]:
    """Member -> logits (n, K), or (T, n, K) of `bayesian`; members agree to a degree, the metric one's are negative."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, std, (n, K))
    own = {voter.name: common + rng.normal(0, std / 2, (n, K)) for voter in VOTERS}
    own["metric"] = -((own["metric"] - 3 * std) ** 2)
    own["bayesian"] = own["bayesian"] + rng.normal(0, std / 2, (T, n, K))
    return {name: logits.astype(np.float32) for name, logits in own.items()}


def votes_as_outputs(votes: NDArray[np.floating[Any]], voters: Sequence[Voter]) -> dict[str, NDArray[np.float64]]:
    """Logits that make `voters` vote with the probabilities votes (n, M, K)."""
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(votes), -1e4)
    return {voter.name: logs[:, m, :] * voter.temperature for m, voter in enumerate(voters)}


def on_numpy(ensemble: Ensemble, outputs: Outputs) -> Decision:
    return decide(ensemble, outputs)


def on_torch(ensemble: Ensemble, outputs: Outputs) -> Decision:
    decision = decide(ensemble, {name: torch.from_numpy(logits) for name, logits in outputs.items()})
    return Decision(*(getattr(decision, column.name).numpy() for column in fields(Decision)))


class OnnxRule:
    """The rule alone as an ONNX graph in ONNX Runtime."""

    def __init__(self, ensemble: Ensemble) -> None:
        shapes: dict[str, tuple[int | str, ...]] = dict.fromkeys(ensemble.members, ("N", K))
        if "bayesian" in shapes:
            shapes["bayesian"] = (T, "N", K)
        inputs = {name: ndx.argument(shape=shape, dtype=ndx.float32) for name, shape in shapes.items()}
        decision = decide(ensemble, inputs)
        self.model = ndx.build(inputs, {column.name: getattr(decision, column.name) for column in fields(Decision)})
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._inputs = list(inputs)

    def __call__(self, outputs: Outputs) -> Decision:
        return Decision(*self._session.run(None, {name: outputs[name] for name in self._inputs}))


def near_a_calibration_score(ensemble: Ensemble, decision: Decision) -> NDArray[np.bool_]:
    """Within 1e-5, (N, D)."""
    ranked = rankable(decision.scores)
    columns = [
        np.abs(table[:, None] - ranked[:, d]).min(axis=0) <= 1e-5 * np.maximum(1, ranked[:, d])
        for d, table in enumerate(ensemble.tables)
    ]
    return np.stack(columns, axis=1) if columns else np.zeros(decision.scores.shape, np.bool_)


def assert_alike(ensemble: Ensemble, expected: Decision, got: Decision) -> None:
    """To 1e-5, with the same labels and verdicts; p-values the same but next to a calibration score."""
    np.testing.assert_array_equal(got.finite, expected.finite)
    for column in ("probabilities", "confidence", "votes"):
        np.testing.assert_allclose(getattr(got, column), getattr(expected, column), rtol=0, atol=1e-5, err_msg=column)
    for d, detector in enumerate(ensemble.detectors):  # distances have any scale
        rtol = 1e-6 if detector.name == DetectorName.DISTANCE else 0
        np.testing.assert_allclose(got.scores[:, d], expected.scores[:, d], rtol=rtol, atol=1e-5, err_msg=detector.name)
    for column in ("label", "verdict", "reason"):
        np.testing.assert_array_equal(getattr(got, column), getattr(expected, column), err_msg=column)
    far = ~near_a_calibration_score(ensemble, expected)
    np.testing.assert_array_equal(got.p_values[far], expected.p_values[far])
    same = (got.p_values == expected.p_values).all(axis=1)  # then the statistic is the same to the last bit
    np.testing.assert_array_equal(got.statistic[same], expected.statistic[same])
    np.testing.assert_array_equal(got.p_value[same], expected.p_value[same])
