"""Attacks on rule and detectors together: an image counts only if its class is wrong *and* the system accepts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from training.attacks.pgd import margin, project, start
from training.attacks.problem import Problem
from training.attacks.rule import unit
from training.system import System

Rate = Literal["review", "reject"]

FOOLED_ENOUGH = 0.5  # log-probability by which the wrong class leads when the classifier needs no more pushing
WELL_HIDDEN = 0.1  # how far below the threshold the statistic may rest


def joint(problem: Problem, steps: int, weights: Sequence[float], accepted_at: Rate = "review") -> Tensor:
    """Accept-and-wrong: ascend the margin and descend the detectors' statistic at once, for every weight between them.

    The first weight starts from the image itself, the others from random points in the ball.
    direction = unit(grad min(margin, c)) - weight * unit(grad relu(statistic - threshold)): either term rests while
    it is satisfied, so that no weight can be wrong for all images (Carlini & Wagner 2017b, sec. 5, as PGD).
    """
    search = _Search(problem, accepted_at)
    for weight in weights:
        for x, fool, hide in search.steps(steps):
            gradients = search.gradients(x, fool.clamp(max=FOOLED_ENOUGH), hide)
            search.move(x, unit(gradients[0]) - weight * unit(gradients[1]))
    return search.best


def orthogonal(problem: Problem, steps: int) -> Tensor:
    """Orthogonal PGD, selective (Bryniarski et al. 2021, eq. 9): never pay for the one with the other.

    While the class is right, ascend the margin along the part of its gradient that leaves the statistic alone; once it
    is wrong, descend the statistic along the part of its gradient that leaves the margin alone.
    """
    search = _Search(problem, "review")
    for x, fool, hide in search.steps(steps):
        up, down = map(unit, search.gradients(x, fool, hide))
        aligned = (up * down).flatten(1).sum(dim=1)[:, None, None, None]
        wrong = (fool.detach() > 0)[:, None, None, None]
        search.move(x, torch.where(wrong, -(down - aligned * up), up - aligned * down))
    return search.best


class _Search:
    """One ascent after another, and of every image the most harmful version met on the way."""

    def __init__(self, problem: Problem, accepted_at: Rate) -> None:
        self.problem, self.generator = problem, problem.generator()
        self.threshold = problem.system.threshold(accepted_at)
        self.first = True
        self.best = problem.pixels.clone()
        self.harm = torch.full((len(self.best),), -torch.inf, device=self.best.device)
        self._next = self.best

    def steps(self, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, margin (n,), excess of the statistic over the threshold (n,)), `steps` times, and judge one more."""
        system, y = self.problem.system, self.problem.labels
        self._next = start(self.problem.pixels, self.problem.epsilon, self.generator, random=not self.first)
        self.first = False
        for iteration in range(steps + 1):
            x = self._next.detach().requires_grad_()
            log_p, statistic, judged = system.evidence(x)
            fool = margin(log_p, y)
            self._keep(x.detach(), harm(judged.label != y, judged.p_value, system, fool.detach()))
            if iteration < steps:
                yield x, fool, F.relu(statistic - self.threshold + WELL_HIDDEN)

    def gradients(self, x: Tensor, fool: Tensor, hide: Tensor) -> tuple[Tensor, Tensor]:
        """Of both objectives with respect to x."""
        (up,) = torch.autograd.grad(fool.sum(), x, retain_graph=True)
        (down,) = torch.autograd.grad(hide.sum(), x)
        return self.problem.findings.checked(up), self.problem.findings.checked(down)

    def move(self, x: Tensor, direction: Tensor) -> None:
        """One step of epsilon / 8 along the sign of `direction`."""
        step = self.problem.epsilon / 8
        self._next = project(x.detach() + step * direction.sign(), self.problem.pixels, self.problem.epsilon)

    def _keep(self, x: Tensor, found: Tensor) -> None:
        better = found > self.harm
        self.best[better], self.harm[better] = x[better], found[better]


def harm(wrong: Tensor, p_value: Tensor, system: System, margins: Tensor) -> Tensor:
    """How bad an image is for the system: 3 wrong and clean, 2 wrong and suspect, 1 wrong and rejected, 0 right; ties by margin."""
    accepted = (p_value > system.ensemble.reject_rate).float() + (p_value > system.ensemble.review_rate).float()
    return wrong.float() * (1 + accepted) + 1e-3 * margins.clamp(-100, 100)
