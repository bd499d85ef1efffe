"""`edge`: adversarial training through the smooth surrogate of binary edges, with clean images mixed in."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from training.recipe import MemberRecipe
from training.step import Batch, Outcome, Trainee, accuracy, perturbed


def training_loss(trainee: Trainee, batch: Batch, recipe: MemberRecipe, generator: torch.Generator) -> Outcome:
    """CE on a batch of which a share stays clean (setting `clean_share`, default 0.25).

    Batch norm that only ever sees adversarial edges is wrong about clean ones, whose edges are cleaner; a shared
    batch keeps its statistics between the two.
    """
    attacked = perturbed(trainee.probe, batch, recipe, generator)
    clean = round(recipe.settings.get("clean_share", 0.25) * len(attacked))
    logits = trainee.network(torch.cat([batch.pixels[:clean], attacked[clean:]]))
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=recipe.schedule.label_smoothing)
    return Outcome(loss, accuracy(logits[clean:], batch.labels[clean:]))
