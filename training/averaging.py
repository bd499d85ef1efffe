"""An exponential moving average of weights and batch-norm statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """a <- a + (1 - decay_t)(w - a) after every step, decay_t = min(decay, (1 + t)/(10 + t)) so that early steps fade.

    Wraps the raw module, not the trainer's wrapper. Integer buffers are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the network's weights after step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        theirs = network.state_dict()
        for name, mine in self.network.state_dict().items():
            if mine.is_floating_point():
                mine.lerp_(theirs[name], 1 - decay)
            else:
                mine.copy_(theirs[name])
