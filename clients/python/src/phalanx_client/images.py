"""What may be classified: a file, the bytes of a file, or bare pixels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from phalanx_client.pb.phalanx.v1 import defense_ensemble_pb2 as pb


class ArrayLike(Protocol):
    """What an array of NumPy looks like from outside; NumPy itself is not needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> object: ...
    def tobytes(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class RawPixels:
    """uint8 pixels, row by row, the channels of a pixel side by side."""

    pixels: bytes
    height: int
    width: int
    channels: int = 3

    def __post_init__(self) -> None:
        if len(self.pixels) != (expected := self.height * self.width * self.channels):
            size = f"{self.height} x {self.width} x {self.channels}"
            raise ValueError(f"expected {size} = {expected} bytes of pixels, got {len(self.pixels)}")

    @classmethod
    def from_array(cls, array: ArrayLike) -> Self:
        """From uint8 (height, width, channels), or (height, width) for one channel."""
        if str(array.dtype) != "uint8" or len(array.shape) not in (2, 3):
            raise ValueError(f"expected uint8 (height, width, channels), got {array.dtype} {tuple(array.shape)}")
        height, width, channels = (*array.shape, 1)[:3]
        return cls(array.tobytes(), height, width, channels)


ImageLike = str | os.PathLike[str] | bytes | RawPixels


def to_message(image: ImageLike) -> pb.Image:
    """`str` and paths are read; `bytes` are an encoded image."""
    if isinstance(image, RawPixels):
        raw = pb.RawImage(pixels=image.pixels, height=image.height, width=image.width, channels=image.channels)
        return pb.Image(raw=raw)
    if isinstance(image, bytes):
        return pb.Image(encoded=image)
    return pb.Image(encoded=Path(image).read_bytes())
