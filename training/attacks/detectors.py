"""Attacks on rule and detectors together: an image counts only if its class is wrong *and* the system accepts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from training.attacks.libraries import apgd_lead
from training.attacks.pgd import margin, project, start
from training.attacks.problem import Problem
from training.attacks.rule import unit
from training.system import Judged, System

Rate = Literal["review", "reject"]

FOOLED_ENOUGH = 0.5  # log-probability by which the wrong class leads when the classifier needs no more pushing
WELL_HIDDEN = 0.1  # how far below the threshold the statistic may rest
NOTHING = 3e-6  # of a direction of norm 1, less its part along another that is the same: float32 leaves a quarter of that


def joint(problem: Problem, steps: int, weights: Sequence[float], accepted_at: Rate = "review") -> Tensor:
    """Accept-and-wrong: ascend the margin and descend the detectors' statistic at once, for every weight between them.

    The first weight starts from the image itself, the others from random points in the ball.
    direction = unit(grad min(margin, c)) - weight * unit(grad relu(statistic - threshold)): either term rests while
    it is satisfied, so that no weight can be wrong for all images (Carlini & Wagner 2017b, sec. 5, as PGD). The second
    waits, too, while the class is right and hiding is nothing but going back: a detector of small margins is content with
    every image that is surely right, and lets pass what is surely wrong.
    """
    search = _Search(problem, accepted_at)
    for weight in weights:
        for x, fool, hide in search.steps(steps):
            up, down = map(unit, search.gradients(x, fool.clamp(max=FOOLED_ENOUGH), hide))
            back = _each(fool <= 0) & ~_differs(_beside(down, up))
            search.move(x, torch.where(back, up, up - weight * down))
    return search.best.pixels


def orthogonal(problem: Problem, steps: int) -> Tensor:
    """Orthogonal PGD, selective (Bryniarski et al. 2021, eq. 9): never pay for the one with the other.

    While the class is right, ascend the margin along the part of its gradient that leaves the statistic alone; once it
    is wrong, descend the statistic along the part of its gradient that leaves the margin alone. Where there is no such part, as
    with a detector of small margins, along the gradient itself.
    """
    search = _Search(problem, "review")
    for x, fool, hide in search.steps(steps):
        up, down = map(unit, search.gradients(x, fool, hide))
        wanted, other = (torch.where(_each(fool > 0), *pair) for pair in ((-down, up), (up, down)))
        spared = _beside(wanted, other)
        search.move(x, torch.where(_differs(spared), spared, wanted))
    return search.best.pixels


def surely_wrong(problem: Problem, iterations: int, targets: int) -> Tensor:
    """For each of the likeliest wrong classes, Auto-PGD on its lead over all others, to the end: wrong, and sure of it.

    lead_t = log p_t - max_{j != t} log p_j is what a detector of small margins looks at once t leads. Of each image, the most
    harmful of what was found for the targets.
    """
    system, y = problem.system, problem.labels
    with torch.no_grad():
        log_p = system.log_probabilities(problem.pixels).scatter(1, y[:, None], -torch.inf)
    best = _Best(problem)
    for target in log_p.topk(min(targets, log_p.shape[1] - 1), dim=1).indices.unbind(1):
        found = apgd_lead(problem, target, iterations)
        with torch.no_grad():
            log_p, _, judged = system.evidence(found)
        best.keep(found, log_p, judged)
    return best.pixels


def _beside(direction: Tensor, other: Tensor) -> Tensor:
    """A direction (n, h, w, c) less its part along `other`, both of norm 1 or 0."""
    return direction - _each((direction * other).flatten(1).sum(dim=1)) * other


def _differs(rest: Tensor) -> Tensor:
    """Whether something was left beside; (n, 1, 1, 1)."""
    return _each(rest.flatten(1).norm(dim=1) > NOTHING)


def _each(values: Tensor) -> Tensor:
    """Of n images, to go with (n, h, w, c)."""
    return values[:, None, None, None]


class _Best:
    """Of every image the most harmful version met."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.pixels = problem.pixels.clone()
        self.harm = torch.full((len(self.pixels),), -torch.inf, device=self.pixels.device)

    def keep(self, x: Tensor, log_p: Tensor, judged: Judged) -> None:
        """What of x (n, h, w, c), so judged, is worse for the system than all before."""
        y = self.problem.labels
        found = harm(judged.label != y, judged.p_value, self.problem.system, margin(log_p.detach(), y))
        better = found > self.harm
        self.pixels[better], self.harm[better] = x[better], found[better]


class _Search:
    """One ascent after another, and of every image the most harmful version met on the way."""

    def __init__(self, problem: Problem, accepted_at: Rate) -> None:
        self.problem, self.generator = problem, problem.generator()
        self.threshold = problem.system.threshold(accepted_at)
        self.first = True
        self.best = _Best(problem)
        self._next = problem.pixels

    def steps(self, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, margin (n,), excess of the statistic over the threshold (n,)), `steps` times, and judge one more."""
        self._next = start(self.problem.pixels, self.problem.epsilon, self.generator, random=not self.first)
        self.first = False
        for iteration in range(steps + 1):
            x = self._next.detach().requires_grad_()
            log_p, statistic, judged = self.problem.system.evidence(x)
            self.best.keep(x.detach(), log_p, judged)
            if iteration < steps:
                yield x, margin(log_p, self.problem.labels), F.relu(statistic - self.threshold + WELL_HIDDEN)

    def gradients(self, x: Tensor, fool: Tensor, hide: Tensor) -> tuple[Tensor, Tensor]:
        """Of both objectives with respect to x."""
        (up,) = torch.autograd.grad(fool.sum(), x, retain_graph=True)
        (down,) = torch.autograd.grad(hide.sum(), x)
        return self.problem.findings.checked(up), self.problem.findings.checked(down)

    def move(self, x: Tensor, direction: Tensor) -> None:
        """One step of epsilon / 8 along the sign of `direction`."""
        self._next = project(x.detach() + self.problem.epsilon / 8 * direction.sign(), self.problem.pixels, self.problem.epsilon)


def harm(wrong: Tensor, p_value: Tensor, system: System, margins: Tensor) -> Tensor:
    """How bad an image is for the system: 3 wrong and clean, 2 wrong and suspect, 1 wrong and rejected, 0 right; ties by margin."""
    accepted = (p_value > system.ensemble.reject_rate).float() + (p_value > system.ensemble.review_rate).float()
    return wrong.float() * (1 + accepted) + 1e-3 * margins.clamp(-100, 100)
