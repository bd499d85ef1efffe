"""`certified`: cross-entropy on the worst case that interval bounds allow; what it classifies rightly there is proven."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.certified import proven
from training.recipe import MemberRecipe
from training.step import Batch, Outcome, Trainee


def certified_loss(bounds: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    """CE(bounds, y), the bounds in the logits' place (Gowal et al. 2018, without their share of clean loss).

    bounds: (n, k), upper bounds of z_j - z_y over the ball; 0 at the label itself.
    """
    return F.cross_entropy(bounds, y, label_smoothing=label_smoothing)


def training_loss(trainee: Trainee, batch: Batch, recipe: MemberRecipe, _: torch.Generator) -> Outcome:
    """One step of certified training; the ball grows to epsilon over the first share `ramp` (default 0.4) of training."""
    radius = batch.epsilon * min(1.0, batch.progress / recipe.settings.get("ramp", 0.4))
    bounds = trainee.network(batch.pixels, batch.labels, radius)
    loss = certified_loss(bounds, batch.labels, recipe.schedule.label_smoothing)
    return Outcome(loss, proven(bounds, batch.labels).float().mean())
