"""Gradient attacks used inside training and calibration. Perturbations are in pixel units, inside [0, 255]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Pixels (n, h, w, c) float in 0..255 -> logits or log-probabilities (n, k)."""

FOOLED = 1e-3
"""A margin that no rounding takes back; an attack that stops earlier may find its image judged right."""

TOGETHER = 128
"""Images that margin-PGD steps at once."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (n, k), labels (n,) -> (n,) to be maximised; an image counts as fooled by its label, not by the loss."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax_y(logits), one value an image."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y (Carlini & Wagner 2017, f_6 without its floor): above 0 exactly where fooled."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(dim=1) - true


def pgd(
    logits: Logits,
    pixels: Tensor,
    y: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    loss: Loss = cross_entropy,
) -> Tensor:
    """Projected gradient ascent from a random start in the eps-ball; the last iterate (Madry et al. 2018).

    One step of 1.25 eps is the fast adversarial training of Wong et al. 2020.
    """
    x = start(pixels, epsilon, generator)
    for _ in range(steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(logits(x), y).sum(), x)
        x = project(x.detach() + step_size * gradient.sign(), pixels, epsilon)
    return x.detach()


def start(pixels: Tensor, epsilon: float, generator: torch.Generator, random: bool = True) -> Tensor:
    """A point drawn uniformly from the eps-ball; not `random`, the image itself, though as much is drawn of the generator."""
    noise = torch.empty_like(pixels).uniform_(-epsilon, epsilon, generator=generator) * random
    return (pixels + noise).clamp(0, 255)


def project(x: Tensor, pixels: Tensor, epsilon: float) -> Tensor:
    """The nearest point to x within eps of `pixels` in every coordinate and inside 0..255."""
    return torch.minimum(torch.maximum(x, pixels - epsilon), pixels + epsilon).clamp(0, 255)


@dataclass(frozen=True)
class Attacked:
    """What margin-PGD found: for every image the pixels with the highest margin met, and that margin (> 0: fooled)."""

    pixels: Tensor  # (n, h, w, c) float32
    margin: Tensor  # (n,)


def margin_pgd(
    logits: Logits,
    pixels: Tensor,
    y: Tensor,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 5,
    step_size: float | None = None,
    batch_size: int = TOGETHER,
    until_fooled: bool = True,
) -> Attacked:
    """PGD on the margin, step eps/8 unless told otherwise; the first start is the image itself, the others random.

    The best iterate of every image is kept. With `until_fooled`, images that are fooled are left out of the next start,
    and a batch that is fooled stops; without, the margin is pushed to the end, for what must fool others as well. A
    gradient that is not finite is treated as 0, and so cannot pass for robustness: the random restarts still stand
    against it.
    """
    step = epsilon / 8 if step_size is None else step_size
    best, best_margin = pixels.clone(), torch.full((len(pixels),), float("-inf"), device=pixels.device)
    for restart in range(restarts):
        for todo in torch.nonzero((best_margin <= FOOLED) | (not until_fooled)).squeeze(1).split(batch_size):
            clean, labels = pixels[todo], y[todo]
            x = start(clean, epsilon, generator, random=restart > 0)
            for iteration in range(steps + 1):
                x.requires_grad_()
                found = margin(logits(x), labels)
                better = found.detach() > best_margin[todo]
                best[todo[better]], best_margin[todo[better]] = x.detach()[better], found.detach()[better]
                if iteration == steps or (until_fooled and bool((best_margin[todo] > FOOLED).all())):
                    break
                (gradient,) = torch.autograd.grad(found.sum(), x)
                x = project(x.detach() + step * gradient.nan_to_num(0.0).sign(), clean, epsilon)
    return Attacked(best, best_margin)


def to_uint8(adversarial: Tensor, clean: Tensor) -> Tensor:
    """Adversarial float pixels as uint8, each rounded toward the clean pixel, so that rounding never leaves the eps-ball."""
    return (clean + (adversarial - clean).trunc()).to(torch.uint8)
