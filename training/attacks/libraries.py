"""AutoAttack's four, by pyautoattack.

It wants images (n, c, h, w) in 0..1, draws from torch's global generator, which is put back as it was, and returns the
clean image where it fails.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from training.attacks.pgd import margin, project
from training.attacks.problem import Problem

GAP = 5.0
LOGGER = logging.getLogger("pyautoattack")


def apgd_ce(problem: Problem, iterations: int, restarts: int) -> Tensor:
    """Auto-PGD on cross-entropy (Croce & Hein 2020), of logits that are scaled down where its gradient would vanish."""
    settings = _settings(problem) | {"loss": "ce", "logger": LOGGER}
    attack = APGDAttack(_channels_first(problem, unsaturated), n_iter=iterations, n_restarts=restarts, **settings)
    return _run(problem, attack)


def apgd_targeted(problem: Problem, iterations: int, targets: int, restarts: int = 1) -> Tensor:
    """Auto-PGD on the targeted difference of logits ratio, towards the `targets` most likely wrong classes."""
    targets, k = min(targets, problem.system.ensemble.classes - 1), problem.system.ensemble.classes
    if k < 4:  # the ratio's denominator needs a fourth class
        return apgd_ce(problem, iterations, restarts)
    settings = _settings(problem) | {"n_target_classes": targets, "logger": LOGGER}
    attack = APGDAttack_targeted(_channels_first(problem), n_iter=iterations, n_restarts=restarts, **settings)
    return _run(problem, attack)


def apgd_lead(problem: Problem, target: Tensor, iterations: int) -> Tensor:
    """Auto-PGD on the lead of the classes `target` (n,) over all others: where it was largest, whether it fools or not."""

    class Lead(APGDAttack_targeted):  # type: ignore[misc]
        def ce_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002  # as its run calls it
            return -margin(x, self.y_target)

    attack = Lead(_channels_first(problem), n_iter=iterations, **_settings(problem))
    attack.loss, attack.y_target = "ce-targeted", target
    pixels = _as_wanted(problem)
    attack.init_hyperparam(pixels)
    with _own_random_state():
        torch.manual_seed(attack.seed)
        found = attack.attack_single_run(pixels, problem.labels)[0]
    return _in_ball(problem, found)


def fab_targeted(problem: Problem, iterations: int, targets: int, restarts: int = 1) -> Tensor:
    """The targeted Fast Adaptive Boundary attack, which looks for the nearest boundary (Croce & Hein 2020b)."""
    targets = min(targets, problem.system.ensemble.classes - 1)
    settings = _settings(problem) | {"n_target_classes": targets, "targeted": True}
    attack = FABAttack_PT(_channels_first(problem), n_iter=iterations, n_restarts=restarts, **settings)
    return _outward(problem, _run(problem, attack))


def _outward(problem: Problem, found: Tensor) -> Tensor:
    """What lies just beyond the boundary, moved away from the clean image to whole pixels, where that still fools."""
    delta = found - problem.pixels
    rounded = project(problem.pixels + delta.sign() * (delta.abs() - 1e-3).ceil(), problem.pixels, problem.epsilon)
    fools = problem.system.judge(rounded).label != problem.labels
    return torch.where(fools[:, None, None, None], rounded, found)


def square(problem: Problem, queries: int) -> Tensor:
    """Square (Andriushchenko et al. 2020): scores only, no gradient."""
    attack = SquareAttack(_channels_first(problem), n_queries=queries, n_restarts=1, **_settings(problem))
    return _run(problem, attack)


def _settings(problem: Problem) -> dict[str, Any]:
    return {
        "norm": "Linf", "eps": problem.epsilon / 255, "seed": problem.seed % 2**31, "verbose": False,
        "device": problem.pixels.device,
    }  # fmt: skip


def unsaturated(logits: Tensor) -> Tensor:
    """Logits (n, k) at a temperature of their own, such that the first leads the second by GAP at most."""
    first, second = logits.detach().topk(2, dim=1).values.unbind(dim=1)
    return logits / ((first - second) / GAP).clamp_min(1.0)[:, None]


def _channels_first(problem: Problem, change: Callable[[Tensor], Tensor] = lambda logits: logits) -> nn.Module:
    logits = problem.logits()

    class ChannelsFirst(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return change(logits(255 * x.permute(0, 2, 3, 1)))

    return ChannelsFirst().eval()


def _run(problem: Problem, attack) -> Tensor:  # type: ignore[no-untyped-def]
    """Images that are wrong as they are stay so; for the others, what the attack returns, inside the ball to the last bit."""
    with _own_random_state(), contextlib.redirect_stdout(io.StringIO()):
        found = attack.perturb(_as_wanted(problem), problem.labels)
    found = found[0] if isinstance(found, tuple) else found
    return _in_ball(problem, found)


def _as_wanted(problem: Problem) -> Tensor:
    return problem.pixels.permute(0, 3, 1, 2).contiguous() / 255


def _in_ball(problem: Problem, found: Tensor) -> Tensor:
    return project(255 * found.detach().permute(0, 2, 3, 1), problem.pixels, problem.epsilon)


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
