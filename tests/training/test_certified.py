"""A bundle with a certified member, from its recipe to its card: what bounds prove is told, and no attack gets through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models.bundle import read_bundle
from models.composition import EnsembleChoice, compose
from tests.training.commands import SMOKE, phalanx_train
from training.certified import certified_loss
from training.data import splits_of
from training.evaluation.campaign import Campaign
from training.evaluation.card import build, ledgers_of
from training.evaluation.proofs import leads, proven_on
from training.evaluation.report import finished
from training.evaluation.suites import suite
from training.recipe import load_recipe
from training.system import Members, System, load_networks

CONVOLUTIONS = [{"channels": 8, "kernel": 8, "stride": 4}, {"channels": 8, "kernel": 4, "stride": 2}]
CHANGES = {
    "name": "proven",
    "epsilon": 0.05,  # so little is trained that more could not be proven
    "members": {
        "certified": {
            "network": {"convolutions": CONVOLUTIONS, "hidden": 16},
            "augmented": False,
            "schedule": {"epochs": 30, "batch_size": 32, "learning_rate": 0.005, "optimizer": "adam", "ema_decay": 0.9},
        }
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proven")
    recipe = load_recipe("smoke").model_dump(mode="json")
    recipe["members"] = {"bayesian": recipe["members"]["bayesian"], **CHANGES["members"]}  # type: ignore[dict-item]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "name": CHANGES["name"], "epsilon": CHANGES["epsilon"]}))
    ended = phalanx_train(
        "build", str(folder / "recipe.yaml"), "--runs", str(folder / "runs"), "-o", str(folder / "bundle"), "--threads", "1"
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_loss_is_cross_entropy_with_bounds_for_logits() -> None:
    bounds, y = np.array([[0.0, -2.0, -1.0], [0.5, 0.0, -4.0]]), np.array([0, 1])
    expected = np.mean(np.log(np.exp(bounds).sum(axis=1)))  # the label's own entry is 0
    assert float(certified_loss(torch.from_numpy(bounds), torch.from_numpy(y), 0.0)) == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_what_leads_is_outvoted_by_nobody(alpha: float, sharpness: float) -> None:
    """The robust side as bad as its bounds allow, in all classes or in some; the accurate voter sure of any class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (500,), generator=generator)
    bounds = (3 * torch.randn(500, 4, generator=generator) - 3).scatter(1, y[:, None], 0.0)
    led = leads(bounds, y, sharpness, alpha)
    assert led.any() == (alpha > 0.5)  # a half never leads
    assert not led.all()
    for _ in range(20):
        z = (bounds - torch.rand(500, 4, generator=generator).pow(4) * 5).scatter(1, y[:, None], 0.0)
        for j in range(4):
            p = torch.eye(4)[j]
            label = ((1 - alpha) * p + alpha * (sharpness * z).softmax(1)).argmax(1)
            assert bool((label == y)[led].all())


def test_with_two_classes_a_lead_is_found_wherever_there_is_one() -> None:
    y = torch.zeros(4001, dtype=torch.long)
    bounds = torch.stack([torch.zeros(4001), torch.linspace(-20, 1, 4001)], dim=1)
    q = (2 * bounds).softmax(1)
    there = 0.8 * (q[:, 0] - q[:, 1]) > 0.2
    assert int((there & ~leads(bounds, y, 2.0, 0.8)).sum()) <= 1  # one step of the bounds is five times the rounding
    assert not (leads(bounds, y, 2.0, 0.8) & ~there).any()


def test_it_is_a_robust_voter_beside_the_accurate_one(made: Path) -> None:
    manifest = read_bundle(made / "bundle").manifest
    assert {member.name: member.strength for member in manifest.members} == {"bayesian": "accurate", "certified": "robust"}


def test_evaluate_says_what_is_proven(made: Path) -> None:
    bundle = read_bundle(made / "bundle")
    ended = phalanx_train("evaluate", str(made / "bundle"), "--threads", "1")
    assert ended.returncode == 0, ended.stderr
    system = System(
        compose(bundle, EnsembleChoice("certified", without=("bayesian",))), Members(load_networks(bundle, torch.device("cpu")), 0)
    )
    proven = proven_on(system, splits_of(bundle, None).test, 0.05)
    assert proven is not None
    assert 0 < proven.mean() < 1
    assert f"proven by interval bounds at epsilon 0.05, test split (n = {len(proven)})\n  certified    {proven.mean():.4f}" in (
        ended.stdout
    )


def test_no_attack_gets_through_a_proof_and_one_that_did_would_show(made: Path, tmp_path: Path) -> None:
    ended = phalanx_train("attack", str(made / "bundle"), *SMOKE, "--out", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    bundle = read_bundle(made / "bundle")
    campaign = Campaign(tmp_path, bundle, splits_of(bundle, None), suite("smoke"), 8, 0, torch.device("cpu"))
    units = finished(campaign)
    ledgers = ledgers_of(campaign, units)
    card = build(campaign, units, ledgers, ())
    certified, full = (next(system for system in card.systems if system.name == name) for name in ("certified", "full"))
    assert full.certified is not None  # beside the accurate voter, in the mixed rule
    assert full.certified.value <= full.robust.value
    assert certified.certified is not None
    assert 0 < certified.certified.value <= certified.robust.value
    checks = [check for check in card.checks if check.name == "no attack gets through a proof"]
    assert [check.passed for check in checks] == [True, True]

    broken = ledgers["certified"]
    fooled = replace(broken, label=(broken.labels + 1) % len(bundle.manifest.classes) + 0 * broken.label)
    card = build(campaign, units, {**ledgers, "certified": fooled}, ())
    check = next(check for check in card.checks if check.name == "no attack gets through a proof")
    assert not check.passed
    proven = round(certified.certified.value * 8)
    assert check.measured == f"{proven} of {proven} images that bounds prove for certified fell"
