"""Attacks on the rule: on the system as it is, on what stands in for it, and on its voters, reweighed."""

from __future__ import annotations

import torch
from torch import Tensor

from models.ensemble import RuleName
from training.attacks.pgd import margin, margin_pgd, project, start
from training.attacks.problem import Problem


def whole_system(problem: Problem, steps: int, restarts: int, until_fooled: bool = True) -> Tensor:
    """Margin-PGD on the log-probabilities of the system, as deployed."""
    found = margin_pgd(
        problem.logits(), problem.pixels, problem.labels, problem.epsilon, steps, problem.generator(), restarts,
        until_fooled=until_fooled,
    )  # fmt: skip
    return found.pixels


def surrogate(problem: Problem, rule: RuleName, steps: int, restarts: int) -> Tensor:
    """Margin-PGD on the same voters under another rule, whose gradient may show a way that the deployed rule's hides.

    `log-pool` adds the voters' logits, `weighted` their probabilities, both with the part that each voter has in the deployed
    ones; `majority` has the softer of both for its ballots.
    Images go on until the last step, for only the deployed rule says what is fooled.
    """
    return whole_system(problem.against(problem.system.under(rule)), steps, restarts, until_fooled=False)


def reweighed(problem: Problem, steps: int, restarts: int, sharpness: float = 2.0) -> Tensor:
    """Every step pushes hardest on the voters that still see the true class, so that none can hide behind another.

    The idea of MORA (Yu et al. 2022): member gradients, each of unit norm, are added with weights
    w_m softmax_m(-sharpness * margin_m), w_m the voter's part in the probabilities, margin_m that of its own tempered vote.
    """
    system, y, step = problem.system, problem.labels, problem.epsilon / 8
    generator = problem.generator()
    best = problem.pixels.clone()
    best_margin = torch.full((len(best),), -torch.inf, device=best.device)
    for restart in range(restarts):
        x = start(problem.pixels, problem.epsilon, generator, random=restart > 0)
        for iteration in range(steps + 1):
            x = x.detach().requires_grad_()
            log_p, votes = system.voting(x)
            better = (found := margin(log_p, y)) > best_margin
            best[better], best_margin[better] = x.detach()[better], found.detach()[better]
            if iteration == steps:
                break
            direction = torch.zeros_like(x)
            margins = torch.stack([margin(vote, y) for vote in votes.values()])
            weights = torch.tensor([system.part(name) for name in votes], device=x.device)[:, None]
            attention = weights * (-sharpness * margins.detach()).softmax(dim=0)
            for own, attended in zip(margins, attention, strict=True):
                (gradient,) = torch.autograd.grad(own.sum(), x, retain_graph=True)
                direction += attended[:, None, None, None] * unit(problem.findings.checked(gradient))
            x = project(x.detach() + step * direction.sign(), problem.pixels, problem.epsilon)
    return best


def unit(gradient: Tensor) -> Tensor:
    """Each image's gradient (n, h, w, c) at Euclidean norm 1; 0 stays 0."""
    norm: Tensor = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    return gradient / norm[:, None, None, None]
