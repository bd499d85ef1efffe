"""Other gradients through what has none, or next to none (BPDA, Athalye et al. 2018): one surrogate that fails proves nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.networks.edge import EdgeNetwork, sobel_magnitude
from models.networks.pixels import channels_first
from models.networks.thermometer import Thermometer, ThermometerConfig, thermometer_of
from training.system import Members, System


class SoftEdges(EdgeNetwork):
    """The same weights behind smooth edges, forward as well as backward: sigmoid((magnitude - threshold) / width)."""

    def edges(self, pixels: Tensor) -> list[Tensor]:
        magnitude = sobel_magnitude(channels_first(pixels))
        width = self.config.surrogate_width
        return [((magnitude - threshold) / width).sigmoid() - 0.5 for threshold in self.config.thresholds]


class SoftThermometer(Thermometer):
    """The surrogate's wide ramps, forward as well as backward."""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.smooth(channels_first(pixels)[:, :, None]).flatten(1, 2)


class _TowardsBest(torch.autograd.Function):
    """The code; backward, for every pixel the slope towards the place in its ball where the code is worth most to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, thermometer: Thermometer) -> Tensor:
        ctx.save_for_backward(x, low, high)
        ctx.thermometer = thermometer
        return thermometer.code(x)

    @staticmethod
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, None, None, None]:
        x, low, high = ctx.saved_tensors
        thermometer: Thermometer = ctx.thermometer
        here = (wanted * thermometer.code(x)).sum(dim=2, keepdim=True)
        best, place = torch.zeros_like(here), x
        corners = thermometer.thresholds.flatten()
        for corner in (low, high, *corners, *(corners + thermometer.config.width)):
            there = torch.minimum(torch.maximum(torch.as_tensor(corner), low), high)
            gain = (wanted * thermometer.code(there)).sum(dim=2, keepdim=True) - here
            best, place = torch.maximum(gain, best), torch.where(gain > best, there, place)
        way = place - x
        return torch.where(way.abs() > 1e-3, best / way, 0.0), None, None, None


class ForesightedThermometer(Thermometer):
    """Every pixel's gradient points to the best place in the ball of its image, across ramps that cancel one another."""

    def __init__(self, config: ThermometerConfig, pixels: Tensor, epsilon: float) -> None:
        super().__init__(config)
        self.low = channels_first((pixels - epsilon).clamp(0, 255))[:, :, None]
        self.high = channels_first((pixels + epsilon).clamp(0, 255))[:, :, None]

    def forward(self, pixels: Tensor) -> Tensor:
        code: Tensor = _TowardsBest.apply(  # type: ignore[no-untyped-call]
            channels_first(pixels)[:, :, None], self.low, self.high, self
        )
        return code.flatten(1, 2)


def narrow_edges(system: System, factor: float) -> System:
    """The system with binary edges whose gradient comes from a sigmoid `factor` times as wide as in training."""
    return _with_edges(system, EdgeNetwork, factor)


def soft_edges(system: System, factor: float) -> System:
    """The system with edges that are smooth forward, too; what fools it may or may not fool the binary one."""
    return _with_edges(system, SoftEdges, factor)


def other_ramps(system: System, reach: float) -> System:
    """The system with thermometers whose gradient reaches this far beyond their ramps, whatever it was in training."""
    return _with_thermometers(system, partial(_reaching, Thermometer, reach))


def soft_ramps(system: System, reach: float) -> System:
    """The system with thermometers that are as wide forward, too; what fools it may or may not fool the real one."""
    return _with_thermometers(system, partial(_reaching, SoftThermometer, reach))


def foresighted(system: System, pixels: Tensor, epsilon: float) -> System:
    """The system with thermometers whose gradient knows the ball of each of these images; to be asked about no others."""
    return _with_thermometers(system, lambda config: ForesightedThermometer(config, pixels, epsilon))


def _reaching(thermometer: type[Thermometer], reach: float, config: ThermometerConfig) -> Thermometer:
    return thermometer(config.model_copy(update={"surrogate_reach": reach}))


def hears_edges(system: System) -> bool:
    """Whether a voter with a share in the rule sees edges."""
    return any(isinstance(network, EdgeNetwork) for network in _heard(system))


def hears_thermometers(system: System) -> bool:
    """Whether a voter with a share in the rule sees its pixels through a thermometer."""
    return any(thermometer_of(network) is not None for network in _heard(system))


def _heard(system: System) -> list[nn.Module]:
    return [system.members.networks[voter.name] for voter in system.ensemble.voters if system.share(voter.name) > 0]


def _with_edges(system: System, network: type[EdgeNetwork], factor: float) -> System:
    def seen_otherwise(member: nn.Module) -> nn.Module:
        if not isinstance(member, EdgeNetwork):
            return member
        width = factor * member.config.surrogate_width
        changed = network(member.config.model_copy(update={"surrogate_width": width}))
        changed.load_state_dict(member.state_dict())
        return changed.to(next(member.parameters()).device).eval().requires_grad_(False)

    return _with(system, seen_otherwise)


def _with_thermometers(system: System, other: Callable[[ThermometerConfig], Thermometer]) -> System:
    def seen_otherwise(member: nn.Module) -> nn.Module:
        if (front := thermometer_of(member)) is None:
            return member
        changed = copy.deepcopy(member)
        changed.pixels = other(front.config).to(front.thresholds.device)
        changed.pixels.load_state_dict(front.state_dict())  # what is served, whatever its settings say
        return changed

    return _with(system, seen_otherwise)


def _with(system: System, seen_otherwise: Callable[[nn.Module], nn.Module]) -> System:
    networks = {name: seen_otherwise(member) for name, member in system.members.networks.items()}
    return System(system.ensemble, Members(networks, system.members.masks_seed))
