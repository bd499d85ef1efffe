"""`certified`: a plain convolutional classifier whose answer over a whole l-infinity ball can be bounded, and so proven."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.networks.thermometer import PixelConfig, front

ROUNDING = 1e-3
"""In logits: what a served network may be off in its arithmetic, hundred times what was seen of float32 on CPUs."""


class Convolution(BaseModel):
    """One convolution, padded by one pixel, with its batch normalisation and ReLU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: int = Field(gt=0)
    kernel: int = Field(3, ge=3, description="side of the kernel")
    stride: int = Field(1, ge=1)


class CertifiedConfig(PixelConfig):
    """Settings of `CertifiedNetwork`. Few layers: bounds loosen with depth, and residual sums loosen them further."""

    convolutions: tuple[Convolution, ...] = Field(
        (Convolution(channels=16, kernel=4, stride=2), Convolution(channels=32, kernel=4)), min_length=1
    )
    hidden: int = Field(128, gt=0, description="units of the layer after the convolutions")
    size: tuple[int, int] = Field((28, 28), description="height and width of the images")

    @model_validator(mode="after")
    def _fits(self) -> CertifiedConfig:
        if min(self.sides()[-1]) < 1:
            (height, width), layers = self.size, len(self.convolutions)
            raise ValueError(f"{layers} such convolutions leave nothing of images of {height}x{width} pixels")
        return self

    def sides(self) -> list[tuple[int, int]]:
        """Height and width before the convolutions and after each; below 1 where a kernel is larger than what it sees."""
        found = [self.size]
        for each in self.convolutions:
            height, width = ((side + 2 - each.kernel) // each.stride + 1 if side > 0 else 0 for side in found[-1])
            found.append((height, width))
        return found


class Interval(NamedTuple):
    """A layer over the ball around each image: its values `at` the image, and center and radius of what they may become."""

    at: Tensor
    center: Tensor
    radius: Tensor


class CertifiedNetwork(nn.Module):
    """Pixels (n, h, w, c) in 0..255 -> logits (n, k); with labels and a radius, bounds of their differences over the ball."""

    def __init__(self, config: CertifiedConfig) -> None:
        super().__init__()
        self.pixels = front(config)
        layers: list[nn.Conv2d | nn.Linear] = []
        norms: list[nn.BatchNorm1d | nn.BatchNorm2d] = []
        channels, (height, width) = config.planes, config.sides()[-1]
        for each in config.convolutions:
            layers.append(nn.Conv2d(channels, each.channels, each.kernel, each.stride, 1, bias=False))
            norms.append(nn.BatchNorm2d(each.channels))
            channels = each.channels
        layers.append(nn.Linear(channels * height * width, config.hidden, bias=False))
        norms.append(nn.BatchNorm1d(config.hidden))
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(norms)
        self.head = nn.Linear(config.hidden, config.classes)
        for layer in (*layers, self.head):
            _interval_initialisation(layer.weight)

    def forward(self, pixels: Tensor, y: Tensor | None = None, epsilon: float = 0.0) -> Tensor:
        if y is not None:
            return self.worst_case(pixels, y, epsilon)
        h = self.pixels(pixels)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = F.relu(norm(layer(h.flatten(1) if isinstance(layer, nn.Linear) else h)))
        logits: Tensor = self.head(h)
        return logits.float()

    def worst_case(self, pixels: Tensor, y: Tensor, epsilon: float) -> Tensor:
        """(n, k) upper bounds of z_j - z_y over all pixels within `epsilon` (in units of 0..255) of the images; 0 for j = y.

        Interval bound propagation (Gowal et al. 2018). Where every other bound is below 0, no image in the ball is taken for
        another class than y. In training mode batch normalisation takes its statistics from the images themselves.
        """
        low, high = (pixels - epsilon).clamp(0, 255), (pixels + epsilon).clamp(0, 255)
        low, high = self.pixels(low), self.pixels(high)  # it does not fall where a pixel rises
        h = Interval(self.pixels(pixels), (low + high) / 2, (high - low) / 2)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            if isinstance(layer, nn.Linear):
                h = Interval(*(part.flatten(1) for part in h))
            h = _relu(_normalised(norm, _affine(layer, h)))
        # the head and the difference of two logits are one affine map: its bounds are tighter than those of two
        with torch.autocast(pixels.device.type, enabled=False):
            difference = self.head.weight - self.head.weight[y][:, None]  # (n, k, d)
            center = torch.einsum("nkd,nd->nk", difference, h.center.to(difference.dtype))
            radius = torch.einsum("nkd,nd->nk", difference.abs(), h.radius.to(difference.dtype))
            return center + radius + self.head.bias - self.head.bias[y][:, None]


def proven(bounds: Tensor, y: Tensor) -> Tensor:
    """(n,) bool, from the bounds (n, k) of `worst_case`: no image in the ball is taken for another class than y.

    A bound must be below 0 by more than arithmetic may lose, in the bounds and in the network that is served.
    """
    return (bounds.scatter(1, y[:, None], float("-inf")) < -ROUNDING).all(dim=1)


def _interval_initialisation(weight: Tensor) -> None:
    """Normal of deviation sqrt(2 pi) / fan-in, with which intervals keep their width from layer to layer (Shi et al. 2021)."""
    nn.init.normal_(weight, 0.0, math.sqrt(2 * math.pi) / weight[0].numel())


def _affine(layer: nn.Module, h: Interval) -> Interval:
    """An affine map moves the center and stretches the radius by the absolute weights."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    at, center = layer(torch.cat([h.at, h.center])).chunk(2)
    if isinstance(layer, nn.Linear):
        return Interval(at, center, F.linear(h.radius, layer.weight.abs()))
    return Interval(at, center, F.conv2d(h.radius, layer.weight.abs(), None, layer.stride, layer.padding))


def _normalised(norm: nn.Module, h: Interval) -> Interval:
    """Batch normalisation as the affine map that it is once its statistics are known: those at the images."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        dims = [d for d in range(h.at.ndim) if d != 1]
        variance, mean = torch.var_mean(h.at.float(), dims, correction=0)
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum or 0.1)
            norm.running_var.lerp_(variance, norm.momentum or 0.1)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    shape = (1, -1) + (1,) * (h.at.ndim - 2)
    scale, shift = scale.view(shape), shift.view(shape)
    return Interval(h.at * scale + shift, h.center * scale + shift, h.radius * scale.abs())


def _relu(h: Interval) -> Interval:
    low, high = F.relu(h.center - h.radius), F.relu(h.center + h.radius)
    return Interval(F.relu(h.at), (low + high) / 2, (high - low) / 2)
