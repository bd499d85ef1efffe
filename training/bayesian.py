"""`bayesian`: ordinary training under dropout masks that are an input, as they are when it serves."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.bayesian import BayesianNetwork
from training.recipe import MemberRecipe
from training.step import Batch, Outcome, Trainee, accuracy, perturbed

TRAINING_MASKS = 8
"""Masks drawn for a step; every image sees all of them, which costs only the head."""


def draw_masks(samples: int, network: nn.Module, generator: torch.Generator, device: torch.device) -> Tensor:
    """(samples, d) float32, each entry 1/keep with the network's probability keep, else 0."""
    bayesian = cast(BayesianNetwork, network)
    keep = torch.full((samples, bayesian.mask_width), bayesian.config.keep, device=device)
    return torch.bernoulli(keep, generator=generator) / keep


def masked_loss(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    """mean_t CE(logits_t, y), the variational objective of dropout (Gal & Ghahramani 2016, eq. 7).  logits: (T, n, k)."""
    samples, n, k = logits.shape
    return F.cross_entropy(logits.reshape(samples * n, k), y.repeat(samples), label_smoothing=label_smoothing)


def training_loss(trainee: Trainee, batch: Batch, recipe: MemberRecipe, generator: torch.Generator) -> Outcome:
    """One step of dropout training; with an `attack:` section, on adversarial images."""
    masks = draw_masks(TRAINING_MASKS, trainee.module, generator, batch.pixels.device)
    pixels = perturbed(lambda x: trainee.probe(x, masks).mean(dim=0), batch, recipe, generator)
    logits = trainee.network(pixels, masks)
    loss = masked_loss(logits, batch.labels, recipe.schedule.label_smoothing)
    return Outcome(loss, accuracy(logits.softmax(dim=2).mean(dim=0), batch.labels))
