"""What an image's transparent parts look like: black, where it is trained on and where it is served alike."""

from __future__ import annotations

from PIL import Image


def over_black(image: Image.Image) -> Image.Image:
    """As it is where nothing is transparent, else RGB over black."""
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
