"""Decoding: what is accepted becomes exactly the pixels it should, and hostile bytes become a sentence."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from models.manifest import InputSpec
from service.errors import InvalidImage
from service.images import PixelBudget, Pixels, decode_image, raw_image

Array = NDArray[np.uint8]

RGB = InputSpec(height=8, width=8, channels=3)
GREY = InputSpec(height=8, width=8, channels=1)
PIXELS: Array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def spec(height: int, width: int, channels: Literal[1, 3] = 3) -> InputSpec:
    return InputSpec(height=height, width=width, channels=channels)


def encoded(image: Image.Image | Array, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes | None = None) -> bytes:
    """A PNG that says what it is told to say; `rows` are its bytes, filter bytes included."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(rows if rows is not None else bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def webp_extended(width: int, height: int) -> bytes:
    body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    content = b"WEBPVP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(content)) + content


def jpeg_saying(width: int, height: int) -> bytes:
    true = encoded(PIXELS, "JPEG")
    at = true.index(b"\xff\xc0") + 5
    return true[:at] + struct.pack(">HH", height, width) + true[at + 4 :]


def decode(data: bytes, image: InputSpec = RGB) -> Pixels:
    return decode_image(data, image, PixelBudget())


# --- what is accepted


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded(PIXELS), id="PNG"),
        pytest.param(encoded(PIXELS, "WEBP", lossless=True), id="lossless WebP"),
        pytest.param(encoded(np.dstack([PIXELS, np.full((8, 8), 255, np.uint8)])), id="PNG with an opaque alpha channel"),
        pytest.param(encoded(PIXELS, "PNG", pnginfo=None, icc_profile=b"nonsense"), id="PNG with a broken colour profile"),
    ],
)
def test_lossless_files_give_their_very_pixels(data: bytes) -> None:
    pixels = decode(data)
    np.testing.assert_array_equal(pixels.array, PIXELS)
    assert pixels.array.dtype == np.uint8
    assert not pixels.resized


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_lossy_files_give_nearly_their_pixels(file_format: str) -> None:
    smooth = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[:, None, None], (64, 64, 3))
    pixels = decode(encoded(np.ascontiguousarray(smooth), file_format, quality=95), spec(64, 64))
    assert np.abs(pixels.array.astype(int) - smooth).max() <= 12


def test_real_tiles_decode_as_pillow_decodes_them(example_tiles: list[Path]) -> None:
    for path in example_tiles[:4]:
        with Image.open(path) as image:
            np.testing.assert_array_equal(decode(path.read_bytes(), spec(64, 64)).array, np.asarray(image.convert("RGB")))


def test_alpha_lies_over_black() -> None:
    colour = np.full((8, 8, 4), (200, 100, 50, 128), np.uint8)
    expected = np.round(np.array([200, 100, 50]) * 128 / 255)
    assert np.abs(decode(encoded(colour)).array - expected).max() <= 1


def test_a_transparent_palette_entry_is_black() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert (decode(encoded(image, "PNG", transparency=1)).array == 0).all()
    assert (decode(encoded(image)).array == (0, 255, 0)).all()


def test_grey_is_expanded_and_colour_reduced() -> None:
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(decode(encoded(grey)).array, np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(decode(encoded(grey), GREY).array, grey[..., None])
    luma = PIXELS @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(decode(encoded(PIXELS), GREY).array[..., 0] - luma).max() <= 1


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = Image.new("RGB", (8, 8), (200, 30, 40)).convert("CMYK")
    assert np.abs(decode(encoded(image, "JPEG", quality=100)).array.astype(int) - (200, 30, 40)).max() <= 6


@pytest.mark.parametrize(("orientation", "undone"), [(3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
def test_the_exif_orientation_is_applied(orientation: int, undone: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(half, file_format, exif=exif, **options)
    assert np.abs(decode(data).array.astype(int) - np.rot90(half, undone)).max() <= 8


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((10, 20, 30), (200, 0, 0))]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert (decode(data).array == (10, 20, 30)).all()


# --- resizing


def test_resizing_is_said_and_keeps_a_flat_colour() -> None:
    flat = np.full((100, 37, 3), (7, 130, 255), np.uint8)
    for pixels in (decode(encoded(flat)), raw_image(flat.tobytes(), 100, 37, 3, RGB)):
        assert pixels.resized
        assert pixels.array.shape == (8, 8, 3)
        assert (pixels.array == (7, 130, 255)).all()


def test_an_image_hidden_in_the_sampled_pixels_does_not_appear() -> None:
    """The image-scaling attack: every 16th pixel white is a white image to a sampler that skips the others."""
    big = np.zeros((128, 128, 3), np.uint8)
    big[8::16, 8::16] = 255
    assert (np.asarray(Image.fromarray(big).resize((8, 8), Image.Resampling.NEAREST)) == 255).all()  # the attack works
    assert decode(encoded(big)).array.max() <= 8


# --- what is refused


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param(b"", "expected a PNG, JPEG or WebP file, got no bytes", id="nothing"),
        pytest.param(b"hello there", "got one that begins with 68 65 6c 6c", id="text"),
        pytest.param(encoded(PIXELS, "GIF"), "expected a PNG, JPEG or WebP file", id="GIF"),
        pytest.param(encoded(PIXELS, "TIFF"), "expected a PNG, JPEG or WebP file", id="TIFF"),
        pytest.param(encoded(PIXELS)[:60], "expected a complete PNG file", id="a truncated PNG"),
        pytest.param(encoded(PIXELS, "JPEG")[:-40], "expected a complete JPEG file", id="a truncated JPEG"),
        pytest.param(encoded(PIXELS, "WEBP")[:-20], "expected a complete WEBP file", id="a truncated WebP"),
        pytest.param(encoded(PIXELS, "WEBP")[:20], "whose header cannot be read", id="a WebP without its header"),
        pytest.param(png(64, 64), "expected a complete PNG file", id="a PNG with fewer pixels than its header says"),
        pytest.param(png(30_000, 30_000), "of 1 to 16,777,216 pixels, got 30,000 × 30,000", id="a PNG bomb"),
        pytest.param(jpeg_saying(30_000, 30_000), "got 30,000 × 30,000", id="a JPEG bomb"),
        pytest.param(webp_extended(16_384, 16_384), "got 16,384 × 16,384", id="a WebP bomb"),
        pytest.param(png(0, 5), "expected", id="a PNG without width"),
        pytest.param(png(2, 2, 16, 0, bytes(2 * 5)), "expected 8 bits per channel, got 16", id="a 16-bit grey PNG"),
        pytest.param(png(2, 2, 16, 2, bytes(2 * 13)), "expected 8 bits per channel, got 16", id="a 16-bit colour PNG"),
        pytest.param(encoded(PIXELS)[:40] + b"\xff" + encoded(PIXELS)[41:], "expected a complete PNG", id="a flipped byte"),
    ],
)
def test_a_bad_file_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(InvalidImage, match=sentence) as raised:
        decode(data)
    assert raised.value.field == "encoded"


def test_a_bomb_is_refused_without_decoding() -> None:
    rows = bytes(100_000_000)  # a hundred kilobytes when compressed
    bomb = png(8000, 4100, rows=rows)
    began = time.process_time()
    with pytest.raises(InvalidImage, match="got 8,000 × 4,100"):
        decode(bomb)
    assert time.process_time() - began < 0.05


def test_the_pixels_of_a_request_are_limited_together() -> None:
    budget = PixelBudget(per_image=100, left=150)
    decode_image(encoded(PIXELS), RGB, budget)
    decode_image(encoded(PIXELS), RGB, budget)
    with pytest.raises(InvalidImage, match="at most 22 more pixels in this request, got 8 × 8"):
        decode_image(encoded(PIXELS), RGB, budget)


ATTACKED = [encoded(PIXELS), encoded(PIXELS, "JPEG"), encoded(PIXELS, "WEBP"), encoded(PIXELS, "WEBP", lossless=True)]


@settings(max_examples=300)
@given(st.sampled_from(ATTACKED), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), st.floats(0, 1))
def test_damaged_files_give_pixels_or_a_sentence(data: bytes, damages: list[tuple[float, int]], kept: float) -> None:
    damaged = bytearray(data)
    for place, value in damages:
        damaged[round(place * (len(data) - 1))] = value
    outcome: Pixels | InvalidImage
    try:
        outcome = decode(bytes(damaged[: round((0.5 + kept / 2) * len(data))]))
    except InvalidImage as error:
        outcome = error
    if isinstance(outcome, InvalidImage):
        assert str(outcome).startswith("expected")
    else:
        assert outcome.array.shape == (8, 8, 3)


def test_a_second_png_header_is_refused() -> None:
    """Pillow would decode by the second, and so take 16 bits for 8."""
    buffer = BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    honest = buffer.getvalue()
    second = b"IHDR" + honest[16:24] + b"\x10" + honest[25:29]  # 16 bits
    lying = honest[:33] + struct.pack(">I", 13) + second + struct.pack(">I", zlib.crc32(second)) + honest[33:]
    with pytest.raises(InvalidImage, match="expected one PNG header, got two"):
        decode_image(lying, RGB, PixelBudget())


# --- raw pixels


def test_raw_pixels_of_the_right_size_are_a_view() -> None:
    pixels = PIXELS.tobytes()
    image = raw_image(pixels, 8, 8, 3, RGB)
    np.testing.assert_array_equal(image.array, PIXELS)
    assert not image.array.flags.owndata


@pytest.mark.parametrize(
    ("make", "field", "sentence"),
    [
        pytest.param(lambda: raw_image(bytes(256), 8, 8, 4, RGB), "raw.channels", "expected 3 channels, got 4", id="RGBA"),
        pytest.param(lambda: raw_image(bytes(64), 8, 8, 1, RGB), "raw.channels", "expected 3 channels, got 1", id="grey"),
        pytest.param(lambda: raw_image(bytes(192), 8, 8, 3, GREY), "raw.channels", "expected 1 channels", id="colour"),
        pytest.param(
            lambda: raw_image(bytes(191), 8, 8, 3, RGB),
            "raw.pixels",
            r"expected 192 bytes \(8 × 8 × 3\), got 191",
            id="short",
        ),
        pytest.param(lambda: raw_image(bytes(200), 8, 8, 3, RGB), "raw.pixels", "expected 192 bytes.*got 200", id="long"),
        pytest.param(lambda: raw_image(b"", 0, 8, 3, RGB), "raw.height", "at least 1, got 0 × 8", id="no rows"),
        pytest.param(lambda: raw_image(b"", 2**31, 2**31, 3, RGB), "raw.pixels", "got 0", id="a height and width that lie"),
    ],
)
def test_bad_raw_pixels_are_refused(make: Callable[[], Pixels], field: str, sentence: str) -> None:
    with pytest.raises(InvalidImage, match=sentence) as raised:
        make()
    assert raised.value.field == field
