"""No gradient at all: what random noise inside the ball does."""

from __future__ import annotations

import torch
from torch import Tensor

from training.attacks.pgd import margin
from training.attacks.problem import Problem


def random_noise(problem: Problem, draws: int) -> Tensor:
    """The worst of `draws` perturbations, uniform in the ball and at its corners in turn."""
    generator = problem.generator()
    best = problem.pixels.clone()
    with torch.inference_mode():
        best_margin = margin(problem.logits()(best), problem.labels)
        for draw in range(draws):
            noise = torch.empty_like(best).uniform_(-problem.epsilon, problem.epsilon, generator=generator)
            x = (problem.pixels + (noise if draw % 2 else problem.epsilon * noise.sign())).clamp(0, 255)
            better = (found := margin(problem.logits()(x), problem.labels)) > best_margin
            best[better], best_margin[better] = x[better], found[better]
    return best
