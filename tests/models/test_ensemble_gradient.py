"""In torch the rule is differentiable: an adaptive attack gets true gradients, even where a probability is 0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from models.ensemble import Ensemble, RuleName, combine, decide, log_votes, read, scores
from tests.models.ensembles import VOTERS, K, ensemble, random_outputs

N = 4
NAMES = [voter.name for voter in VOTERS]


def tensors(dtype: torch.dtype, std: float = 2.0) -> tuple[Tensor, ...]:
    """The members' outputs, in the order of NAMES."""
    outputs = random_outputs(N, std=std)
    return tuple(torch.tensor(outputs[name], dtype=dtype, requires_grad=True) for name in NAMES)


def evidence(under_test: Ensemble) -> Callable[..., tuple[Tensor, ...]]:
    """Outputs -> log probabilities (N, K) and every detector's score (N,)."""

    def forward(*outputs: Tensor) -> tuple[Tensor, ...]:
        readings = {name: read(output) for name, output in zip(NAMES, outputs, strict=True)}
        votes = log_votes(under_test, readings)
        log_p = combine(under_test, votes)
        return (log_p, *scores(under_test, readings, votes, log_p))

    return forward


@pytest.mark.parametrize("rule", RuleName)
def test_gradients_are_those_of_finite_differences(rule: RuleName) -> None:
    assert torch.autograd.gradcheck(evidence(ensemble(rule)), tensors(torch.float64, std=1.0), fast_mode=True)


@pytest.mark.parametrize("rule", RuleName)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e4, -1e4], ids=str)
def test_gradients_are_finite_where_outputs_are_not_and_where_probabilities_are_0(rule: RuleName, value: float) -> None:
    outputs = tensors(torch.float32)
    spoilt = []
    for member, output in enumerate(outputs):
        mask = torch.zeros(output.shape, dtype=torch.bool)
        mask[..., member, : member + 1] = True
        spoilt.append(torch.where(mask, value, output))
    decision = decide(ensemble(rule), dict(zip(NAMES, spoilt, strict=True)))
    log_p, *found = evidence(ensemble(rule))(*spoilt)
    total = log_p.sum() + sum(score.sum() for score in found) + decision.probabilities.sum() + decision.scores.sum()
    for gradient in torch.autograd.grad(total, outputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("rule", RuleName)
def test_a_class_of_probability_0_still_pulls(rule: RuleName) -> None:
    """-log p of a class that underflowed in every vote has a gradient, or a saturated member would look robust."""
    outputs = [torch.zeros(output.shape) for output in tensors(torch.float32)]
    for output in outputs:
        output[..., 1] = -500
        output.requires_grad_()
    log_p, *_ = evidence(ensemble(rule))(*outputs)
    assert (log_p.exp()[:, 1] == 0).all()
    gradients = torch.autograd.grad(-log_p[:, 1].sum(), outputs)
    pull = torch.stack([g if g.ndim == 2 else g.sum(dim=0) for g in gradients])[:, :, 1]  # (M, N)
    assert (pull.sum(dim=0) < -0.1).all()


def test_scores_have_gradients_when_taken_from_the_decision() -> None:
    outputs = tensors(torch.float32)
    decision = decide(ensemble(RuleName.MIXED), dict(zip(NAMES, outputs, strict=True)))
    assert decision.scores.shape == (N, 5)
    for d in range(5):
        gradients = torch.autograd.grad(decision.scores[:, d].sum(), outputs, retain_graph=True, materialize_grads=True)
        assert any(gradient.abs().sum() > 0 for gradient in gradients)
    assert decision.probabilities.shape == (N, K)
