"""What every network's settings share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class NetworkConfig(BaseModel):
    """The part of a network's settings that follows from the data, not from the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: int = Field(description="number of classes k")
    channels: int = Field(description="colour channels of an image, 1 or 3")
    mean: tuple[float, ...] = Field(description="mean of each channel over the training images, in pixel units 0..255")
    std: tuple[float, ...] = Field(description="standard deviation of each channel, in pixel units")
