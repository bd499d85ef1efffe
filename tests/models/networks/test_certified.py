"""Bounds over a ball: never crossed by what an attack finds in it, exact where the ball is a point."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from models.networks import build_network
from models.networks.certified import ROUNDING, CertifiedNetwork, proven
from training.attacks.pgd import margin, margin_pgd, project

CONFIG = {
    "classes": 5, "channels": 3, "mean": (87.0, 97.0, 104.0), "std": (50.0, 35.0, 30.0), "size": (10, 12), "hidden": 24,
    "convolutions": [{"channels": 8, "kernel": 4, "stride": 2}, {"channels": 8, "kernel": 3}],
}  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(40, 10, 12, 3, generator=torch.Generator().manual_seed(3)) * 255


@pytest.fixture(
    scope="module", params=[None, {"thresholds": (4.0, 90.0, 91.5, 200.0), "width": 60.0}], ids=["scaled", "thermometer"]
)
def network(images: Tensor, request: pytest.FixtureRequest) -> CertifiedNetwork:
    """Far from its initial weights, which no bound would be loose on; its batch norm has seen the images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = build_network("certified", CONFIG | {"thermometer": request.param})
        assert isinstance(found, CertifiedNetwork)
        with torch.no_grad():
            for value in found.parameters():
                value.add_(0.3 * value.abs().mean().clamp(min=0.1) * torch.randn_like(value))
            for norm in found.norms:
                norm.weight[::3] *= -1  # type: ignore[index, operator]
            for _ in range(50):
                found.train()(images)
    return found.eval().requires_grad_(False)


def differences(logits: Tensor, y: Tensor) -> Tensor:
    return logits - logits.gather(1, y[:, None])


@pytest.mark.parametrize("epsilon", [0.5, 4.0, 25.5])
def test_nothing_in_the_ball_crosses_the_bounds(network: CertifiedNetwork, images: Tensor, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    y = network(images).argmax(1)
    bounds = network(images, y, epsilon)
    corners = [images + epsilon * (2 * torch.randint(0, 2, images.shape, generator=generator) - 1) for _ in range(100)]
    attacked = margin_pgd(network, images, y, epsilon, 20, generator, restarts=3, until_fooled=False).pixels
    for x in (*corners, attacked):
        inside = project(x, images, epsilon)
        assert (differences(network(inside), y) <= bounds + 1e-4).all()
    assert (bounds > differences(network(images), y) + 1e-3).sum() == bounds.numel() - len(y)


def test_an_image_that_an_attack_fools_is_never_proven(network: CertifiedNetwork, images: Tensor) -> None:
    y = network(images).argmax(1)
    for epsilon in (0.02, 0.25, 2.0):
        shown = proven(network(images, y, epsilon), y)
        found = margin_pgd(network, images, y, epsilon, 20, torch.Generator().manual_seed(1), restarts=3)
        assert not (shown & (margin(network(found.pixels), y) > 0)).any()
    assert proven(network(images, y, 0.02), y).any()


def test_float32_loses_less_than_a_proof_leaves_for_it(network: CertifiedNetwork, images: Tensor) -> None:
    y = network(images).argmax(1)
    exact = copy.deepcopy(network).double()
    for epsilon in (0.25, 4.0, 25.5):
        lost = network(images, y, epsilon).double() - exact(images.double(), y, epsilon)
        assert float(lost.abs().max()) < ROUNDING / 10


def test_a_ball_that_is_a_point_has_the_differences_themselves(network: CertifiedNetwork, images: Tensor) -> None:
    y = torch.arange(len(images)) % 5
    assert torch.allclose(network(images, y, 0.0), differences(network(images), y), atol=1e-4)


@pytest.mark.parametrize("thermometer", [None, {"thresholds": (99.0, 101.0), "width": 1.5}], ids=["scaled", "thermometer"])
def test_where_no_relu_bends_the_bounds_are_those_of_the_hidden_units(thermometer: dict[str, object] | None) -> None:
    """Weights positive, every unit alive: each hidden unit rises with every pixel, so that its least and its most are known."""
    torch.manual_seed(2)
    found = build_network("certified", CONFIG | {"thermometer": thermometer}).eval()
    assert isinstance(found, CertifiedNetwork)
    hidden: list[Tensor] = []
    found.head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    with torch.no_grad():
        for layer, norm in zip(found.layers, found.norms, strict=True):
            layer.weight.abs_()  # type: ignore[operator]
            norm.bias.fill_(1000.0)  # type: ignore[operator]
        pixels, y = torch.full((1, 10, 12, 3), 100.0), torch.tensor([1])
        for shift in (-3.0, 3.0):
            found(pixels + shift)
        rows = found.head.weight - found.head.weight[y]
        worst = torch.maximum(rows * hidden[0], rows * hidden[1]).sum(1) + found.head.bias - found.head.bias[y]
        assert torch.allclose(found(pixels, y, 3.0)[0], worst, rtol=1e-4, atol=1e-3)


def test_the_ball_ends_where_pixels_do(network: CertifiedNetwork) -> None:
    """What is below 0 is no image: it neither widens a ball nor moves its center."""
    black, y = torch.zeros(1, 10, 12, 3), torch.tensor([2])
    outside = network(black - 4.0, y, 4.0)  # all of its ball is black
    assert torch.allclose(outside, differences(network(black), y), atol=1e-4)
    assert torch.allclose(network(black, y, 4.0), network(black + 2.0, y, 2.0), atol=1e-4)  # both [0, 4]


def test_bounds_in_training_leave_the_statistics_that_a_forward_pass_leaves(images: Tensor) -> None:
    torch.manual_seed(1)
    one, other = (build_network("certified", CONFIG).train() for _ in range(2))
    other.load_state_dict(one.state_dict())
    one(images)
    other(images, torch.zeros(len(images), dtype=torch.long), 4.0)
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        if "running_var" in name:
            assert torch.allclose(value, theirs[name], rtol=0.03), name  # torch divides by n - 1
        elif "running_mean" in name:
            assert torch.allclose(value, theirs[name], atol=1e-4), name
