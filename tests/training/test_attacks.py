"""The attacks against closed forms: on a linear model the worst perturbation is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.attacks.pgd import cross_entropy, margin, margin_pgd, pgd, to_uint8

EPSILON = 4.0


@pytest.fixture
def weights() -> Tensor:
    return torch.randn(2, 5 * 5 * 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pixels() -> Tensor:
    """Far enough from 0 and 255 that the box never binds."""
    return torch.rand(6, 5, 5, 3, generator=torch.Generator().manual_seed(1)) * 100 + 80


def optimum(weights: Tensor, pixels: Tensor, y: Tensor) -> Tensor:
    """max margin over the ball of a two-class linear model: margin(x) + eps * ||w_other - w_y||_1."""
    logits = pixels.flatten(1) @ weights.T
    difference = weights[1 - y] - weights[y]
    return margin(logits, y) + EPSILON * difference.abs().sum(dim=1)


def test_margin_pgd_reaches_the_known_optimum_of_a_linear_model(weights: Tensor, pixels: Tensor) -> None:
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    shift = 1e4  # every image starts so deep in its class that no early success stops the attack
    own = torch.nn.functional.one_hot(y, 2) * shift

    found = margin_pgd(lambda x: x.flatten(1) @ weights.T + own, pixels, y, EPSILON, 40, torch.Generator().manual_seed(2))

    best = optimum(weights, pixels, y) - shift
    clean = margin(pixels.flatten(1) @ weights.T + own, y)
    assert torch.allclose(found.margin - clean, best - clean, rtol=0.05)
    assert float((found.pixels - pixels).abs().max()) <= EPSILON + 1e-4


def test_pgd_gains_in_one_step_and_in_many_on_a_linear_model(weights: Tensor, pixels: Tensor) -> None:
    y = torch.zeros(6, dtype=torch.int64)

    def logits(x: Tensor) -> Tensor:
        return x.flatten(1) @ weights.T / 100

    clean = cross_entropy(logits(pixels), y)
    for steps in (1, 10):
        x = pgd(logits, pixels, y, EPSILON, steps, 1.25 * EPSILON / steps, torch.Generator().manual_seed(3))
        assert bool((cross_entropy(logits(x), y) > clean).all())


def test_margin_is_positive_exactly_where_the_label_loses() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0, 0, 0])).tolist() == [-1.0, 3.0, 0.0]


def test_a_gradient_that_is_not_finite_does_not_end_the_attack(pixels: Tensor) -> None:
    """sqrt has an infinite slope at 0: the first start sits on it, later starts must still break the model."""
    y = torch.zeros(6, dtype=torch.int64)

    def logits(x: Tensor) -> Tensor:
        moved = (x - pixels[: len(x)]).flatten(1).abs().sum(dim=1)
        return torch.stack([torch.full_like(moved, 0.5), moved.sqrt()], dim=1)

    found = margin_pgd(logits, pixels, y, EPSILON, 5, torch.Generator().manual_seed(0), restarts=2)
    assert bool((found.margin > 0).all())


def test_rounding_goes_toward_the_clean_image() -> None:
    clean = torch.tensor([10.0, 10.0, 10.0, 255.0])
    adversarial = torch.tensor([13.9, 6.1, 10.2, 251.5])
    assert to_uint8(adversarial, clean).tolist() == [13, 7, 10, 252]
