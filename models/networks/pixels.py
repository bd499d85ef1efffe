"""From pixels to network input. Part of every network, so that training and serving cannot drift apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pixels(nn.Module):
    """(n, h, w, c) uint8, or float in 0..255, -> (n, c, h, w) float32 with each channel centred and scaled."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("scale", 1.0 / torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return (channels_first(pixels) - self.mean) * self.scale


def channels_first(pixels: Tensor) -> Tensor:
    """(n, h, w, c) uint8 or float -> (n, c, h, w) float32 (float64 stays what it is), values unchanged."""
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32)).permute(0, 3, 1, 2)
