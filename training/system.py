"""A bundle's ensemble as one differentiable function of pixels: the torch networks under the very rule that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from array_api_compat import array_namespace
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from models.bundle import Bundle
from models.ensemble import (
    Decision,
    DetectorName,
    Ensemble,
    Reading,
    RuleName,
    combine,
    decide,
    log_votes,
    read,
    reduce_masks,
    resolved,
    scores,
)
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
        return cast(Tensor, combine(ensemble, log_votes(ensemble, _read_all(members.outputs(voters, pixels)))))

    return forward


NO_CLASS = -1
"""The label of an image for which a member's output is not finite: nobody's, so that it is never right and never robust."""


def label_of(decision: Decision) -> Any:
    """(n,) int64, of the decision's own kind of array, NO_CLASS where it has no class to give."""
    return array_namespace(decision.label).where(decision.finite, decision.label, NO_CLASS)


@dataclass(frozen=True)
class Judged:
    """What the deployed rule says of n images: label (n,) int64, NO_CLASS for none, combined p-value (n,) in (0, 1]."""

    label: Tensor
    p_value: Tensor


class System:
    """An ensemble over its members: what is deployed, and a differentiable view of all that it decides by."""

    def __init__(self, ensemble: Ensemble, members: Members) -> None:
        self.ensemble, self.members = ensemble, members
        # Without the voters that the rule gives no share: the same probabilities for less work.
        self._speaking = replace(ensemble, voters=tuple(voter for voter in ensemble.voters if self.share(voter.name) > 0))
        self.log_probabilities = log_probabilities(self._speaking, members)
        self._deciding = _deciding(ensemble, self._speaking)
        self._stairs = [_staircase(table, members.device) for table in self._deciding.tables]

    def under(self, rule: RuleName) -> System:
        """The voters that have a share, with their part in the probabilities, under another rule."""
        voters = tuple(replace(voter, weight=self.part(voter.name)) for voter in self._speaking.voters)
        return System(replace(self.ensemble, voters=voters, rule=rule), self.members)

    def part(self, voter: str) -> float:
        """How much of the probabilities is a voter's: its share, in the mixed rule of what its side has, 1 - alpha or alpha."""
        sides = {v.name: v.strength == "accurate" for v in self._speaking.voters}
        share = self.share(voter)
        if self.ensemble.rule != RuleName.MIXED or len(set(sides.values())) < 2:
            return share
        alpha, accurate = self.ensemble.alpha, sides[voter]
        return (alpha if not accurate else 1 - alpha) * share / sum(self.share(v) for v in sides if sides[v] == accurate)

    def share(self, voter: str) -> float:
        """A voter's part in the rule, 1 where the rule ignores weights; accurate voters always speak in the mixed one."""
        if self.ensemble.rule not in (RuleName.WEIGHTED, RuleName.LOG_POOL, RuleName.MIXED):
            return 1.0
        mixed = self.ensemble.rule == RuleName.MIXED
        weights = {v.name: v.weight for v in self.ensemble.voters if not (mixed and v.strength == "accurate")}
        if not any(weights.values()):  # then they speak alike
            weights = dict.fromkeys(weights, 1.0)
        return weights.get(voter, 1.0)

    @property
    def heard(self) -> tuple[object, ...]:
        """All that its probabilities depend on; equal for systems that differ in silent voters and detectors only."""
        speaking = self._speaking
        voters = tuple((v.name, v.temperature, v.strength, self.share(v.name)) for v in speaking.voters)
        if len(voters) == 1 and speaking.rule != RuleName.MAJORITY:
            return voters
        return (*voters, speaking.rule, *((speaking.alpha, speaking.scale) if speaking.rule == RuleName.MIXED else ()))

    @property
    def decided_by(self) -> tuple[object, ...]:
        """All that its label and its verdict depend on while every member is finite; detectors that only tell are no part of it."""
        deciding = self._deciding
        voters = tuple((voter.name, voter.temperature) for voter in deciding.voters)
        detectors = tuple((detector.name, detector.member) for detector in deciding.detectors)
        return (self.heard, voters, detectors, deciding.masks, deciding.review_rate, deciding.reject_rate)

    def voting(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The system's log-probabilities (n, k), and those of each voter that has a share in them."""
        voters = [voter.name for voter in self.ensemble.voters]
        votes = log_votes(self.ensemble, _read_all(self.members.outputs(voters, pixels)))
        heard = {name: votes[:, i] for i, name in enumerate(voters) if self.share(name) > 0}
        return combine(self.ensemble, votes), heard

    def log_probabilities_under(self, seeds: Sequence[int], pixels: Tensor) -> Tensor:
        """Log-probabilities (s, n, k) under the masks of each of s seeds; members without masks are asked once."""
        steady, drawn = dict[str, Tensor](), dict[str, Sequence[Tensor]]()
        for voter in self._speaking.voters:
            network = self.members.networks[voter.name]
            masks = [fixed_masks(network, seed) for seed in seeds]
            if masks[0] is None:
                steady |= self.members.outputs([voter.name], pixels)
            else:
                output = network(pixels, torch.cat([each for each in masks if each is not None]))
                drawn[voter.name] = output.split(len(masks[0]))
        ensemble = self._speaking
        answers = [steady | {name: outputs[i] for name, outputs in drawn.items()} for i in range(len(seeds))]
        return torch.stack([cast(Tensor, combine(ensemble, log_votes(ensemble, _read_all(each)))) for each in answers])

    def judge(self, pixels: Tensor) -> Judged:
        """Label and p-value as deployed, without gradient."""
        with torch.no_grad():
            decision = decide(self.ensemble, self.members.outputs(self.ensemble.members, pixels))
        return Judged(label_of(decision), decision.p_value)

    def evidence(self, pixels: Tensor) -> tuple[Tensor, Tensor, Judged]:
        """Log-probabilities (n, k), the statistic (n,) made differentiable, and what the deployed rule says.

        p-values are step functions of the scores; between two calibration scores the statistic is interpolated, and
        beyond the last it goes on as steeply as it rose over the last tenth, so that a caught image feels a way back.
        """
        ensemble = self._deciding
        outputs = self.members.outputs(ensemble.members, pixels)
        readings = _read_all(outputs)
        votes = log_votes(ensemble, readings)
        log_p = combine(ensemble, votes)
        statistic = torch.zeros_like(log_p[:, 0])
        for (knots, heights), score in zip(self._stairs, scores(ensemble, readings, votes, log_p), strict=True):
            statistic = statistic + _interpolated(knots, heights, score)
        with torch.no_grad():
            decision = decide(ensemble, {name: output.detach() for name, output in outputs.items()})
        return log_p, statistic, Judged(label_of(decision), decision.p_value)

    def threshold(self, rate: Literal["review", "reject"]) -> float:
        """The statistic above which the verdict is at least SUSPECT (review), or REJECTED (reject)."""
        n, share = len(self.ensemble.combined), self.ensemble.review_rate if rate == "review" else self.ensemble.reject_rate
        return float(self.ensemble.combined[n - resolved(share, n)])


def _deciding(ensemble: Ensemble, speaking: Ensemble) -> Ensemble:
    """The same label and p-value from as little as they depend on; disagreement hears voters that have no share, too."""
    kept = [(d, table) for d, table in zip(ensemble.detectors, ensemble.tables, strict=True) if d.decides]
    everybody = any(detector.name == DetectorName.DISAGREEMENT for detector, _ in kept)
    detectors, tables = tuple(detector for detector, _ in kept), tuple(table for _, table in kept)
    return replace(ensemble if everybody else speaking, detectors=detectors, tables=tables)


def _interpolated(knots: Tensor, heights: Tensor, score: Tensor) -> Tensor:
    """The broken line through (knots, heights), extended at both ends, but not below 0; score: (n,)."""
    right = torch.searchsorted(knots, score.detach().contiguous()).clamp(1, len(knots) - 1)
    slope = (heights[right] - heights[right - 1]) / (knots[right] - knots[right - 1])
    return (heights[right - 1] + slope * (score - knots[right - 1])).clamp_min(0.0)


def _staircase(table: NDArray[np.float32], device: torch.device) -> tuple[Tensor, Tensor]:
    """Knots (score, -log p) of an ascending table (n,), at most some 200 of them, and one far beyond the last."""
    n = len(table)
    x, first = np.unique(table.astype(np.float64), return_index=True)
    y = -np.log((1 + n - first) / (n + 1))
    kept = np.unique(np.r_[0, np.searchsorted(y, np.linspace(0, y[-1], 200)).clip(0, len(x) - 1), len(x) - 1])
    x, y = x[kept], y[kept]
    tenth = np.searchsorted(y, y[-1] - np.log(10))
    slope = (y[-1] - y[tenth]) / (x[-1] - x[tenth]) if x[-1] > x[tenth] else 1.0
    far = x[-1] + max(1.0, 1e3 * abs(x[-1]))
    knots, heights = np.r_[x, far], np.r_[y, y[-1] + slope * (far - x[-1])]
    return torch.from_numpy(knots).float().to(device), torch.from_numpy(heights).float().to(device)


def _read_all(outputs: Mapping[str, Tensor]) -> dict[str, Reading]:
    return {name: read(output) for name, output in outputs.items()}
