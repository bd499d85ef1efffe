"""Sabour's feature adversary (2016): look, to the metric member's features, like an image of another class."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.networks.metric import MetricNetwork
from training.attacks.pgd import project
from training.attacks.problem import Problem
from training.system import System


def has_centers(system: System) -> bool:
    """Whether a member of the system decides by distances in a feature space."""
    return bool(_metric_members(system))


def feature_adversary(problem: Problem, steps: int) -> Tensor:
    """min |z(x + delta) - z(guide)|^2 inside the ball, by ART; every image's guide is the next one of another class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ART imports what SciPy has deprecated; slow to import, so only here
        from art.attacks.evasion import FeatureAdversariesPyTorch
        from art.estimators.classification import PyTorchClassifier

    (member, *_) = _metric_members(problem.system)
    x = (problem.pixels / 255).permute(0, 3, 1, 2).cpu().numpy()
    radius = problem.epsilon / 255
    estimator = PyTorchClassifier(
        _Features(member, problem), nn.CrossEntropyLoss(), x.shape[1:], problem.system.ensemble.classes, clip_values=(0.0, 1.0),
        device_type="gpu" if problem.pixels.is_cuda else "cpu",
    )  # fmt: skip
    attack = FeatureAdversariesPyTorch(
        estimator, delta=radius, max_iter=steps, step_size=radius / 8, layer=-1, batch_size=len(x), verbose=False
    )
    found = torch.from_numpy(attack.generate(x, x[_guides(problem.labels.cpu().numpy())])).to(problem.pixels)
    return project(255 * found.permute(0, 2, 3, 1), problem.pixels, problem.epsilon)


class _Features(nn.Module):
    """Images (n, c, h, w) in 0..1 -> features, as the output of a layer of its own, which is how ART finds them."""

    def __init__(self, member: MetricNetwork, problem: Problem) -> None:
        super().__init__()
        self.look = problem.findings.watched(member.features)
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(self.look(255 * x.permute(0, 2, 3, 1)))
        return features


def _metric_members(system: System) -> list[MetricNetwork]:
    networks = [system.members.networks[name] for name in system.ensemble.members]
    return [network for network in networks if isinstance(network, MetricNetwork)]


def _guides(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every image the place of the next one whose label differs, itself where all are of one class; (n,)."""
    n = len(labels)
    order = (np.arange(n)[:, None] + np.arange(n)) % n
    return np.asarray(order[np.arange(n), (labels[order] != labels[:, None]).argmax(axis=1)])
