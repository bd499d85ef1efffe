"""The residual backbone that every member is built on: pixels in, one feature vector per image out."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class BackboneConfig(BaseModel):
    """A pre-activation residual network (He et al. 2016b).

    Size: with widths (32, 64, 128), one block each and a 5x5 stem it has 0.31 million parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: tuple[int, ...] = Field(
        (32, 64, 128), description="channels of each stage; every stage after the first halves the side"
    )
    blocks: tuple[int, ...] = Field((1, 1, 1), description="residual blocks of each stage")
    stem_kernel: int = Field(5, description="side of the first convolution's kernel, odd")
    stem_stride: int = Field(2, description="stride of the first convolution")
    normalisation: bool = Field(True, description="batch normalisation; without it (Galloway 2019) features are unbounded")


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, normalisation: bool) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, normalisation)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not normalisation)
        self.norm2 = _norm(outputs, normalisation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=not normalisation)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(h)
        change: Tensor = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return residual + change


class Backbone(nn.Module):
    """(n, c, h, w) -> (n, d) features after global average pooling; d = `config.widths[-1]`."""

    def __init__(self, config: BackboneConfig, channels: int) -> None:
        super().__init__()
        if len(config.widths) != len(config.blocks):
            raise ValueError(f"widths and blocks name {len(config.widths)} and {len(config.blocks)} stages; they must agree")
        inputs = config.widths[0]
        self.stem = nn.Conv2d(channels, inputs, config.stem_kernel, config.stem_stride, config.stem_kernel // 2, bias=False)
        stages: list[nn.Module] = []
        for stage, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(ResidualBlock(inputs, width, stride, config.normalisation))
                inputs = width
        self.stages = nn.Sequential(*stages)
        self.norm = _norm(inputs, config.normalisation)
        self.width = inputs

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stages(self.stem(x))))
        return h.mean(dim=(2, 3))


def _norm(channels: int, normalisation: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if normalisation else nn.Identity()
