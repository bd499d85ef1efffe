"""`metric`: adversarial images are pulled to the fixed center of their class and away from the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.recipe import MemberRecipe
from training.step import Batch, Outcome, Trainee, accuracy, perturbed


def center_loss(logits: Tensor, y: Tensor, compactness: float, label_smoothing: float) -> Tensor:
    """CE(-||z - mu_j||^2, y) + lambda/2 ||z - mu_y||^2 on fixed centers.  logits: (n, k) = -||z - mu_j||^2.

    Max-Mahalanobis centers (Pang et al. 2020, eq. 7 is the second term alone) with the cross-entropy kept: the pull
    alone trains slowly under attack, and its large logits would mask other members' gradients.
    """
    to_own_center = -logits.gather(1, y[:, None]).squeeze(1)
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing) + compactness * 0.5 * to_own_center.mean()


def training_loss(trainee: Trainee, batch: Batch, recipe: MemberRecipe, generator: torch.Generator) -> Outcome:
    """One step of adversarial training of the metric network; setting `compactness` is lambda (default 0.05)."""
    logits = trainee.network(perturbed(trainee.probe, batch, recipe, generator))
    compactness = recipe.settings.get("compactness", 0.05)
    loss = center_loss(logits, batch.labels, compactness, recipe.schedule.label_smoothing)
    return Outcome(loss, accuracy(logits, batch.labels))
