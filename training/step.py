"""What the training loop and a defense say to each other about one step."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from training.attacks.pgd import Logits, pgd
from training.recipe import MemberRecipe


@dataclass(frozen=True)
class Batch:
    """Pixels (n, h, w, c) float32 in 0..255, labels (n,), the radius in pixel units, the share of training done."""

    pixels: Tensor
    labels: Tensor
    epsilon: float
    progress: float


@dataclass(frozen=True)
class Outcome:
    """A differentiable scalar loss, and the share of the (perturbed) training images that were classified rightly."""

    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class Trainee:
    """One network, twice: as the trainer runs it, and bare, for attacks to differentiate with respect to pixels.

    The trainer's wrapper insists on seeing every backward pass; an attack's gradient is none of its business.
    """

    network: Callable[..., Tensor]
    probe: Callable[..., Tensor]
    module: nn.Module


TrainingLoss = Callable[[Trainee, Batch, MemberRecipe, torch.Generator], Outcome]
"""One defense: a trainee, a batch, the member's recipe and the step's generator -> its outcome."""


def step_generator(device: torch.device, seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A generator that depends on (seed, purpose, counters) alone: a resumed run draws what the first would have drawn."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *counters]).generate_state(2, np.uint32)
    generator = torch.Generator(device)
    generator.manual_seed(int(entropy[0]) << 32 | int(entropy[1]))
    return generator


def perturbed(logits: Logits, batch: Batch, recipe: MemberRecipe, generator: torch.Generator) -> Tensor:
    """The batch under the recipe's inner attack; as it is where the recipe has none."""
    attack = recipe.attack
    if attack is None:
        return batch.pixels
    radius = batch.epsilon * attack.epsilon_factor
    return pgd(logits, batch.pixels, batch.labels, radius, attack.steps, radius * attack.step_factor, generator)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows of (n, k) whose largest entry is the label."""
    return (logits.argmax(dim=1) == labels).float().mean()
