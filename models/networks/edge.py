"""`edge`: a classifier that sees binary edges and coarse colour only (Category 2: non-robust detail is removed).

Edges are Sobel magnitudes |g_x| + |g_y| of integer pixels against half-integer thresholds. Every intermediate value is
an integer that float32 holds exactly, so torch, NumPy and ONNX Runtime find the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from models.networks.backbone import Backbone, BackboneConfig
from models.networks.pixels import Pixels, channels_first
from models.networks.spec import NetworkConfig


class EdgeConfig(NetworkConfig):
    """Settings of `EdgeNetwork`."""

    backbone: BackboneConfig = BackboneConfig()
    thresholds: tuple[float, ...] = Field((32.5, 96.5), description="Sobel magnitudes (0..2040) above which a pixel is an edge")
    surrogate_width: float = Field(16.0, description="width w of the surrogate sigmoid((g - t)/w) that carries the gradient")
    colour_block: int = Field(8, description="side of the blocks over which colour is averaged; 0 leaves colour out")

    @field_validator("thresholds")
    @classmethod
    def _half_integers(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        for threshold in thresholds:
            if threshold % 1 != 0.5:
                raise ValueError(
                    f"an edge threshold must be a half-integer such as 32.5, so that no pixel ties it; got {threshold}"
                )
        return thresholds


def sobel_magnitude(x: Tensor) -> Tensor:
    """(n, c, h, w) in 0..255 -> |g_x| + |g_y| of the same shape, borders replicated; exact for integer pixels."""
    h, w = x.shape[2], x.shape[3]
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = x[:, :, :h] + 2 * x[:, :, 1 : h + 1] + x[:, :, 2:]  # smoothed down the columns
    columns = x[:, :, :, :w] + 2 * x[:, :, :, 1 : w + 1] + x[:, :, :, 2:]
    g_x = rows[:, :, :, 2:] - rows[:, :, :, :w]
    g_y = columns[:, :, 2:] - columns[:, :, :h]
    return g_x.abs() + g_y.abs()


def binary_edges(magnitude: Tensor, threshold: float, width: float) -> Tensor:
    """1 where magnitude > threshold, else 0; the gradient is that of sigmoid((magnitude - threshold) / width) (BPDA)."""
    hard = (magnitude > threshold).float()
    if not magnitude.requires_grad:
        return hard
    soft = torch.sigmoid((magnitude - threshold) / width)
    return hard + (soft - soft.detach())


class EdgeNetwork(nn.Module):
    """Pixels (n, h, w, c) in 0..255 -> logits (n, k), through binary edges and block-averaged colour."""

    def __init__(self, config: EdgeConfig) -> None:
        super().__init__()
        self.config = config
        self.pixels = Pixels(config.mean, config.std)
        planes = config.channels * (len(config.thresholds) + (config.colour_block > 0))
        self.backbone = Backbone(config.backbone, planes)
        self.head = nn.Linear(self.backbone.width, config.classes)

    def planes(self, pixels: Tensor) -> Tensor:
        """What the member sees: (n, planes, h, w); edge planes hold 0 and 1 (centred), colour planes are blocks."""
        seen = self.edges(pixels)
        if (block := self.config.colour_block) > 0:
            coarse = F.avg_pool2d(self.pixels(pixels), block)
            seen.append(coarse.repeat_interleave(block, dim=2).repeat_interleave(block, dim=3))
        return torch.cat(seen, dim=1)

    def edges(self, pixels: Tensor) -> list[Tensor]:
        """A plane (n, c, h, w) of -0.5 and 0.5 for every threshold."""
        magnitude = sobel_magnitude(channels_first(pixels))
        return [binary_edges(magnitude, t, self.config.surrogate_width) - 0.5 for t in self.config.thresholds]

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(self.planes(pixels)))
        return logits.float()
