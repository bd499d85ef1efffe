"""An attack on masks that nobody knows: the expectation over them (EOT, Athalye et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from training.attacks.pgd import margin_pgd
from training.attacks.problem import Problem
from training.system import System

SEEDS = 2**31


def fresh_masks(problem: Problem, steps: int, samples: int) -> Tensor:
    """Margin-PGD on the mean of the system's log-probabilities over `samples` draws of masks, other ones at every look.

    An image that fools one draw need not fool the next: all are pushed to the last step.
    """
    generator = problem.generator()

    def expected(pixels: Tensor) -> Tensor:
        seeds = torch.randint(SEEDS, (samples,), generator=generator, device=generator.device)
        return problem.system.log_probabilities_under(seeds.tolist(), pixels).mean(dim=0)

    logits = problem.findings.watched(expected)
    found = margin_pgd(logits, problem.pixels, problem.labels, problem.epsilon, steps, generator, 1, until_fooled=False)
    return found.pixels


def hears_masks(system: System) -> bool:
    """Whether a voter with a share in the rule is stochastic."""
    return any(system.members.masks[voter.name] is not None for voter in system.ensemble.voters if system.share(voter.name) > 0)
