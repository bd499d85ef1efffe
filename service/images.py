"""From what a caller sends to the pixels that every member takes: (height, width, channels) uint8, RGB or grey.

Decoding hostile bytes is the widest door of the service, so it is kept narrow: three formats, recognised by their first
bytes and given straight to their Pillow plugin; sizes checked on the header, before anything is decoded; the first
frame only.

Resizing is antialiased.  A filter that skips source pixels lets an attacker hide a second image in the ones it does
read (Quiring et al. 2020); Pillow's filters widen with the reduction, so that every source pixel counts.  The aspect
ratio is not kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from models.manifest import InputSpec
from models.transparency import over_black
from service.errors import InvalidImage

log = logging.getLogger(__name__)

MODES = {1: "L", 3: "RGB"}
DEFAULT_MAX_PIXELS = 4096 * 4096


@dataclass(frozen=True, slots=True)
class Pixels:
    array: NDArray[np.uint8]  # (height, width, channels) as the input specification says
    resized: bool


@dataclass(slots=True)
class PixelBudget:
    """How many pixels may be decoded, of one image and of a request's images together: decoding costs CPU time."""

    per_image: int = DEFAULT_MAX_PIXELS
    left: int | None = None

    def spend(self, width: int, height: int) -> None:
        if width < 1 or height < 1 or width * height > self.per_image:
            raise InvalidImage(f"expected an image of 1 to {self.per_image:,} pixels, got {width:,} × {height:,}", "encoded")
        if self.left is not None:
            if width * height > self.left:
                expected = f"expected images of at most {self.left:,} more pixels in this request"
                raise InvalidImage(f"{expected}, got {width:,} × {height:,}; send it in another", "encoded")
            self.left -= width * height


def decode_image(encoded: bytes, spec: InputSpec, budget: PixelBudget) -> Pixels:
    """A PNG, JPEG or WebP file, upright, without alpha (it lies over black), in RGB or grey as the specification asks."""
    plugin = _plugin(encoded)
    try:
        # WebP's decoder allocates the canvas as soon as it is opened
        canvas = _webp_canvas(encoded) if plugin is WebPImageFile else None
        if canvas:
            budget.spend(*canvas)
        with plugin(BytesIO(encoded)) as file:
            if not canvas:
                budget.spend(*file.size)
            elif file.size != canvas:
                raise InvalidImage(f"expected {canvas} pixels as the header says, got {file.size}", "encoded")
            if plugin is PngImageFile:
                _refuse_16_bits(encoded)
            upright = ImageOps.exif_transpose(file)
            return _fitted(_flat(upright, spec.channels), spec)
    except (InvalidImage, MemoryError):
        raise
    except Exception as error:  # nobody can list what decoders raise on hostile bytes: OSError, SyntaxError, struct.error, ...
        log.debug("an image that cannot be decoded", exc_info=True)
        raise InvalidImage(
            f"expected a complete {plugin.format} file, got one that cannot be decoded: {error}", "encoded"
        ) from None


def raw_image(pixels: bytes, height: int, width: int, channels: int, spec: InputSpec) -> Pixels:
    """uint8 pixels, row by row, a pixel's channels side by side; a view of `pixels` where nothing has to be resized."""
    if channels != spec.channels:
        raise InvalidImage(f"expected {spec.channels} channels, got {channels}", "raw.channels")
    if height < 1 or width < 1:
        raise InvalidImage(f"expected height and width of at least 1, got {height} × {width}", "raw.height")
    if len(pixels) != height * width * channels:
        expected = f"{height * width * channels} bytes ({height} × {width} × {channels})"
        raise InvalidImage(f"expected {expected}, got {len(pixels)}", "raw.pixels")
    if (height, width) == (spec.height, spec.width):
        return Pixels(np.frombuffer(pixels, np.uint8).reshape(height, width, channels), resized=False)
    return _fitted(Image.frombytes(MODES[channels], (width, height), pixels), spec)


def _plugin(encoded: bytes) -> type[PngImageFile] | type[JpegImageFile] | type[WebPImageFile]:
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if encoded.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return WebPImageFile
    begins = f"one that begins with {encoded[:8].hex(' ')}" if encoded else "no bytes"
    raise InvalidImage(f"expected a PNG, JPEG or WebP file, got {begins}", "encoded")


def _webp_canvas(encoded: bytes) -> tuple[int, int]:
    """(width, height) from the first chunk of a WebP file (RFC 9649): lossy, lossless or extended."""
    kind = encoded[12:16]
    if kind == b"VP8 " and len(encoded) >= 30:
        return _little(encoded, 26, 2) & 0x3FFF, _little(encoded, 28, 2) & 0x3FFF
    if kind == b"VP8L" and len(encoded) >= 25:
        bits = _little(encoded, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(encoded) >= 30:
        return _little(encoded, 24, 3) + 1, _little(encoded, 27, 3) + 1
    raise InvalidImage("expected a complete WEBP file, got one whose header cannot be read", "encoded")


def _little(encoded: bytes, start: int, size: int) -> int:
    return int.from_bytes(encoded[start : start + size], "little")


def _refuse_16_bits(encoded: bytes) -> None:
    """Pillow would drop the lower half of some PNGs' samples, and clip others."""
    if encoded[12:16] != b"IHDR":
        raise InvalidImage("expected a complete PNG file, got one that does not begin with its header", "encoded")
    if encoded[24] > 8:
        raise InvalidImage(f"expected 8 bits per channel, got {encoded[24]}", "encoded")
    start = 33  # behind the header; Pillow would obey a second one
    while (kind := encoded[start + 4 : start + 8]) not in (b"IDAT", b""):
        if kind == b"IHDR":
            raise InvalidImage("expected one PNG header, got two", "encoded")
        start += 12 + int.from_bytes(encoded[start : start + 4], "big")


def _flat(image: Image.Image, channels: int) -> Image.Image:
    """RGB or grey, 8 bits, nothing transparent."""
    image = over_black(image)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _fitted(image: Image.Image, spec: InputSpec) -> Pixels:
    size = (spec.width, spec.height)
    resized = image.size != size
    if resized:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Pixels(np.asarray(image).reshape(spec.shape), resized)
