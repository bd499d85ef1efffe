"""What an attack of the instrument is given: a system, images, a radius, a seed, and where to report what is odd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from models.ensemble import is_finite
from training.attacks.pgd import Logits
from training.system import System


@dataclass
class Findings:
    """What must not pass for robustness: how often an answer or a gradient was not finite, counted in images."""

    losses: int = 0
    gradients: int = 0

    @contextmanager
    def listening(self, networks: Iterable[nn.Module]) -> Iterator[None]:
        """Meanwhile every answer of these is looked at, before the rule has 0 for what is not finite."""
        hooks = [network.register_forward_hook(self._answer) for network in networks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def watched(self, logits: Logits) -> Logits:
        """The same function, every answer and every gradient through it checked."""

        def forward(pixels: Tensor) -> Tensor:
            if pixels.requires_grad:
                pixels = pixels.view_as(pixels)  # a hook of our own, and not one more on the caller's leaf
                pixels.register_hook(self._gradient)
            answer = logits(pixels)
            self.losses += _not_finite(answer)  # of features, which are no network's answer
            return answer

        return forward

    def checked(self, gradient: Tensor) -> Tensor:
        """The gradient with 0 for what is not finite, which is counted."""
        self.gradients += _not_finite(gradient)
        return gradient.nan_to_num(0.0, 0.0, 0.0)

    def _answer(self, network: nn.Module, inputs: object, logits: Tensor) -> None:  # noqa: ARG002  # as torch calls it
        self.losses += int((~is_finite(logits.detach())).sum())

    def _gradient(self, gradient: Tensor) -> None:
        self.gradients += _not_finite(gradient)


@dataclass(frozen=True)
class Problem:
    """Perturb pixels (n, h, w, c) of labels (n,) by at most epsilon, such that `system` is wrong, or wrong and accepting."""

    system: System
    pixels: Tensor
    labels: Tensor
    epsilon: float
    seed: int
    findings: Findings = field(default_factory=Findings)

    def generator(self) -> torch.Generator:
        """A generator at its start: every attack of a problem begins from the same draws."""
        return torch.Generator(self.pixels.device).manual_seed(self.seed)

    def against(self, system: System) -> Problem:
        """The same images, another system to fool."""
        return replace(self, system=system)

    def logits(self) -> Logits:
        """The system's log-probabilities, watched."""
        return self.findings.watched(self.system.log_probabilities)


Attack = Callable[[Problem], Tensor]
"""A problem -> adversarial pixels (n, h, w, c), one for each image, inside the ball."""


def _not_finite(values: Tensor) -> int:
    return int((~values.detach().isfinite()).flatten(1).any(dim=1).sum())
