"""A bundle's ensemble as one differentiable function of pixels: the torch networks under the very rule that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from models.bundle import Bundle
from models.ensemble import Ensemble, combine, log_votes, read, reduce_masks
from models.masks import draw_masks
from models.networks import build_network
from models.networks.bayesian import BayesianNetwork

Networks = Mapping[str, nn.Module]


def load_networks(bundle: Bundle, device: torch.device) -> dict[str, nn.Module]:
    """The torch network of every member, with the weights that ship in the bundle, frozen and in evaluation mode."""
    return {
        m.name: frozen_network(m.network.kind, m.network.config, load_tensors(bundle.weights[m.name]), device)
        for m in bundle.manifest.members
    }


def frozen_network(kind: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A network of `kind` with these weights, for inference and attacks on its input."""
    network = build_network(kind, config)
    network.load_state_dict(dict(weights))
    return network.to(device).eval().requires_grad_(False)


def fixed_masks(network: nn.Module, seed: int) -> Tensor | None:
    """The masks (T, d) that `masks: fixed` serves a stochastic network with; None for a deterministic one."""
    if not isinstance(network, BayesianNetwork):
        return None
    config = network.config
    return torch.from_numpy(draw_masks(seed, config.samples, network.mask_width, config.keep)).to(
        next(network.parameters(), torch.empty(0)).device
    )


class Members:
    """The members' outputs, in torch, as the fused graph has them."""

    def __init__(self, networks: Networks, masks_seed: int) -> None:
        self.networks, self.masks_seed = networks, masks_seed
        self.device = next(next(iter(networks.values())).parameters()).device
        self.masks = {name: fixed_masks(network, masks_seed) for name, network in networks.items()}

    def outputs(self, names: Iterable[str], pixels: Tensor) -> dict[str, Tensor]:
        """Member name -> logits (n, k), or (T, n, k) of a stochastic member."""
        return {name: self._output(name, pixels) for name in names}

    def logits(self, name: str, pixels: Tensor) -> Tensor:
        """One member's logits (n, k); of a stochastic member the log of its mean probability over the masks."""
        output = self._output(name, pixels)
        return output if output.ndim == 2 else cast(Tensor, reduce_masks(output)[0])

    def logits_on(self, pixels: NDArray[Any], batch_size: int = 256) -> dict[str, Tensor]:
        """Every member's `logits` on pixels (n, h, w, c) of any dtype, without gradient."""
        with torch.inference_mode():
            parts = [torch.from_numpy(pixels[i : i + batch_size]).to(self.device) for i in range(0, len(pixels), batch_size)]
            return {name: torch.cat([self.logits(name, part) for part in parts]) for name in self.networks}

    def _output(self, name: str, pixels: Tensor) -> Tensor:
        masks = self.masks[name]
        pixels = pixels.to(self.device)
        output: Tensor = self.networks[name](pixels) if masks is None else self.networks[name](pixels, masks)
        return output


def log_probabilities(ensemble: Ensemble, members: Members) -> Callable[[Tensor], Tensor]:
    """Pixels (n, h, w, c) -> the ensemble's log-probabilities (n, k), differentiable: what a whole-system attack sees."""
    voters = [voter.name for voter in ensemble.voters]

    def forward(pixels: Tensor) -> Tensor:
        readings = {name: read(output) for name, output in members.outputs(voters, pixels).items()}
        return cast(Tensor, combine(ensemble, log_votes(ensemble, readings)))

    return forward
