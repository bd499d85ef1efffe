"""Systems small enough that the worst perturbation, and what an attack should find, are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from models.composition import calibrate
from models.ensemble import Detector, DetectorName, Ensemble, RuleName, Voter
from models.outputs import CalibrationOutputs, MemberOutputs
from training.attacks.problem import Problem
from training.system import Members, System

SIDE, EPSILON = 6, 4.0


class Linear(nn.Module):
    """Pixels (n, h, w, c) -> logits (n, k), x W + b."""

    def __init__(self, weights: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weights, self.bias = nn.Parameter(weights), nn.Parameter(bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.weights + self.bias


class Masked(Linear):
    """The same decisions, but pixels are rounded to multiples of 2 first: no gradient comes through."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(2 * (pixels / 2).round())


def weights(seed: int, classes: int, scale: float = 0.01) -> Tensor:
    return scale * torch.randn(SIDE * SIDE * 3, classes, generator=torch.Generator().manual_seed(seed))


def images(n: int, seed: int = 1) -> Tensor:
    """Far enough from 0 and 255 that the box never binds."""
    return torch.rand(n, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(seed)) * 100 + 80


def system(
    networks: Mapping[str, nn.Module],
    classes: int,
    rule: RuleName = RuleName.SOFT,
    clean: Tensor | None = None,
    accurate: str = "",
    weights: Mapping[str, float] | None = None,
    detector: DetectorName = DetectorName.DISAGREEMENT,
) -> System:
    """Every network votes, `accurate` as the accurate one; with clean images, `detector` decides, calibrated on them."""
    members = Members({name: network.eval().requires_grad_(False) for name, network in networks.items()}, 0)
    share = weights or dict.fromkeys(networks, 1 / len(networks))
    voters = tuple(Voter(name, 1.0, "accurate" if name == accurate else "robust", share[name]) for name in networks)
    ensemble = Ensemble(
        name="toy", classes=classes, voters=voters, rule=rule, alpha=0.8, scale=2.0, detectors=(),
        review_rate=0.05, reject_rate=0.01,
    )  # fmt: skip
    if clean is not None:
        ensemble = _screened(ensemble, members, clean, detector)
    return System(ensemble, members)


def problem(toy: System, pixels: Tensor, labels: Tensor, epsilon: float = EPSILON) -> Problem:
    return Problem(toy, pixels, labels, epsilon, seed=3)


def _screened(ensemble: Ensemble, members: Members, clean: Tensor, detector: DetectorName) -> Ensemble:
    outputs = {
        name: MemberOutputs(logits.log_softmax(dim=1).numpy().astype(np.float16))
        for name, logits in members.outputs(members.networks, clean).items()
    }
    known = CalibrationOutputs(outputs, np.full(len(clean), -1, np.int16))
    return calibrate(replace(ensemble, detectors=(Detector(detector),)), known)
