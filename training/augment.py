"""Augmentation of a whole batch at once, every draw from the step's own generator.

kornia's augmentations draw from torch's global generator, which a resumed run could not restore step by step.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Symmetry = Literal["none", "mirror", "dihedral"]


def augment(pixels: Tensor, symmetry: Symmetry, shift: int, generator: torch.Generator) -> Tensor:
    """(n, h, w, c) uint8 -> same shape: a random symmetry of each image, then a shift of up to `shift` pixels.

    `mirror` flips left and right; `dihedral` draws one of the eight flips and right-angle rotations of a square,
    which leave the meaning of a satellite tile alone. Pixels shifted in mirror the border.
    """
    n, h, w, _ = pixels.shape
    device = pixels.device
    if symmetry != "none":
        pixels = torch.where(_coin(n, generator, device), pixels.flip(2), pixels)
    if symmetry == "dihedral":
        if h != w:
            raise ValueError(f"right-angle rotations need square images, got {h}x{w}")
        pixels = torch.where(_coin(n, generator, device), pixels.flip(1), pixels)
        pixels = torch.where(_coin(n, generator, device), pixels.transpose(1, 2), pixels)
    if shift > 0:
        padded = F.pad(pixels.permute(0, 3, 1, 2).float(), (shift,) * 4, mode="reflect").to(pixels.dtype)
        dy, dx = torch.randint(0, 2 * shift + 1, (2, n), generator=generator, device=device)
        rows = dy[:, None] + torch.arange(h, device=device)
        columns = dx[:, None] + torch.arange(w, device=device)
        image = torch.arange(n, device=device)[:, None, None]
        pixels = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    return pixels


def _coin(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(0, 2, (n, 1, 1, 1), generator=generator, device=device).bool()
