"""Pixels as a thermometer shows them: how far above each of a few thresholds (Category 2: non-robust detail is removed).

Between the end of one ramp and the next threshold nothing moves: with a first threshold of epsilon, a black background stays
black under every perturbation of the ball.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.networks.pixels import Pixels, channels_first
from models.networks.spec import NetworkConfig

Threshold = Annotated[float, Field(ge=0, lt=255)]


class ThermometerConfig(BaseModel):
    """Settings of `Thermometer`, in pixel units 0..255."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    thresholds: tuple[Threshold, ...] = Field(min_length=1, description="where each plane begins to rise from 0")
    width: float = Field(ge=1, le=255, description="over how many pixel units it rises to 1")
    surrogate_reach: float = Field(
        25.5,
        ge=0,
        le=255,
        description="how far beyond its ramp a plane has a gradient (BPDA); in a recipe at least epsilon",
    )


class PixelConfig(NetworkConfig):
    """Settings of a network that sees pixels: scaled, or, with `thermometer`, coded."""

    thermometer: ThermometerConfig | None = Field(None, description="code pixels by thresholds; null: centre and scale them")

    @property
    def planes(self) -> int:
        """Channels that the network sees."""
        return self.channels * (len(self.thermometer.thresholds) if self.thermometer else 1)


class Thermometer(nn.Module):
    """(n, h, w, c) uint8, or float in 0..255, -> (n, c t, h, w) in 0..1: clamp((x - threshold) / width, 0, 1) for
    each of t thresholds, the planes of one channel together.

    A thermometer code (Buckman et al. 2018) with ramps for steps, so that it is continuous. It does not fall where a pixel
    rises: an interval of pixels becomes the interval between the codes of its ends, exactly.

    Where a plane is flat its gradient would be 0 and tell an attack nothing of the ramp nearby, so the backward pass takes the
    gradient of a ramp that begins `surrogate_reach` earlier and ends as much later (BPDA, Athalye et al. 2018).
    """

    thresholds: Tensor

    def __init__(self, config: ThermometerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("thresholds", torch.tensor(config.thresholds).reshape(1, 1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = channels_first(pixels)[:, :, None]
        code = self.code(x.detach())
        if x.requires_grad:
            soft = self.smooth(x)
            code = code + (soft - soft.detach())
        return code.flatten(1, 2)

    def code(self, x: Tensor) -> Tensor:
        """(n, c, 1, h, w) -> (n, c, t, h, w), the ramps themselves."""
        return ((x - self.thresholds) / self.config.width).clamp(0, 1)

    def smooth(self, x: Tensor) -> Tensor:
        """The ramps whose gradient the backward pass takes."""
        reach = self.config.surrogate_reach
        return ((x - self.thresholds + reach) / (self.config.width + 2 * reach)).clamp(0, 1)


def thermometer_of(network: nn.Module) -> Thermometer | None:
    """The thermometer through which a network sees its pixels, if it has one."""
    first = getattr(network, "pixels", None)
    return first if isinstance(first, Thermometer) else None


def front(config: PixelConfig) -> Pixels | Thermometer:
    """The first layer of a network: pixels (n, h, w, c) -> (n, `config.planes`, h, w), never falling where a pixel rises."""
    return Thermometer(config.thermometer) if config.thermometer else Pixels(config.mean, config.std)
