"""`adversarial`: cross-entropy on the worst image that the inner attack finds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.recipe import MemberRecipe
from training.step import Batch, Outcome, Trainee, accuracy, perturbed


def adversarial_loss(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    """min_theta max_{|delta| <= eps} CE(f(x + delta), y)  (Madry et al. 2018, eq. 2.1).  logits: (n, k) at x + delta."""
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing)


def training_loss(trainee: Trainee, batch: Batch, recipe: MemberRecipe, generator: torch.Generator) -> Outcome:
    """One step of adversarial training."""
    logits = trainee.network(perturbed(trainee.probe, batch, recipe, generator))
    return Outcome(adversarial_loss(logits, batch.labels, recipe.schedule.label_smoothing), accuracy(logits, batch.labels))
