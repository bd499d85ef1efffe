"""`metric`: features pulled to fixed, maximally separated class centers (Category 1: compact and separated)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from models.networks.backbone import Backbone, BackboneConfig
from models.networks.thermometer import PixelConfig, front


class MetricConfig(PixelConfig):
    """Settings of `MetricNetwork`."""

    backbone: BackboneConfig = BackboneConfig()
    features: int = Field(64, description="dimension d of the feature space, at least the number of classes")
    radius: float = Field(3.0, description="norm C of every class center")


def max_mahalanobis_centers(classes: int, features: int, radius: float) -> Tensor:
    """(k, d) centers of equal norm and equal, maximal pairwise distance (Pang et al. 2020, algorithm 1).

    mu_1 = e_1;  mu_i[j] = -(1/(k-1) + <mu_i, mu_j>) / mu_j[j] for j < i;  mu_i[i] = sqrt(1 - ||mu_i||^2);  all times C.
    """
    if features < classes:
        raise ValueError(f"{classes} class centers need a feature space of at least {classes} dimensions, got {features}")
    mu = torch.zeros(classes, features, dtype=torch.float64)
    mu[0, 0] = 1.0
    for i in range(1, classes):
        for j in range(i):
            mu[i, j] = -(1 / (classes - 1) + mu[i] @ mu[j]) / mu[j, j]
        mu[i, i] = math.sqrt(max(0.0, 1.0 - float(mu[i].square().sum())))
    return (radius * mu).float()


class MetricNetwork(nn.Module):
    """Pixels (n, h, w, c) in 0..255 -> logits (n, k), logit_j = -||z - mu_j||^2 with z (n, d) the features."""

    centers: Tensor

    def __init__(self, config: MetricConfig) -> None:
        super().__init__()
        self.pixels = front(config)
        self.backbone = Backbone(config.backbone, config.planes)
        self.embed = nn.Linear(self.backbone.width, config.features)
        self.register_buffer("centers", max_mahalanobis_centers(config.classes, config.features, config.radius))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (n, h, w, c) -> z (n, d)."""
        z: Tensor = self.embed(self.backbone(self.pixels(pixels))).float()
        return z

    def forward(self, pixels: Tensor) -> Tensor:
        z = self.features(pixels)
        # Squared differences, not the expanded square: no cancellation near a center, and no product that mixed
        # precision would round.
        return -(z[:, None, :] - self.centers).square().sum(dim=2)
