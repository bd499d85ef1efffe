"""A bundle with a certified member, from its recipe to its card: what bounds prove is told, and no attack gets through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models.bundle import read_bundle
from models.networks.certified import CertifiedNetwork
from tests.training.commands import SMOKE, phalanx_train
from training.certified import certified_loss, proven_on
from training.data import splits_of
from training.evaluation.campaign import Campaign
from training.evaluation.card import build, ledgers_of
from training.evaluation.report import finished
from training.evaluation.suites import suite
from training.recipe import load_recipe
from training.system import load_networks

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


def test_it_is_a_robust_voter_beside_the_accurate_one(made: Path) -> None:
    manifest = read_bundle(made / "bundle").manifest
    assert {member.name: member.strength for member in manifest.members} == {"bayesian": "accurate", "certified": "robust"}


def test_evaluate_says_what_is_proven(made: Path) -> None:
    bundle = read_bundle(made / "bundle")
    ended = phalanx_train("evaluate", str(made / "bundle"), "--threads", "1")
    assert ended.returncode == 0, ended.stderr
    network = load_networks(bundle, torch.device("cpu"))["certified"]
    assert isinstance(network, CertifiedNetwork)
    proven = proven_on(network, splits_of(bundle, None).test, 0.05)
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
    assert full.certified is None
    assert certified.certified is not None
    assert 0 < certified.certified.value <= certified.robust.value
    (check,) = (check for check in card.checks if check.name == "no attack gets through a proof")
    assert check.passed

    broken = ledgers["certified"]
    fooled = replace(broken, label=(broken.labels + 1) % len(bundle.manifest.classes) + 0 * broken.label)
    card = build(campaign, units, {**ledgers, "certified": fooled}, ())
    (check,) = (check for check in card.checks if check.name == "no attack gets through a proof")
    assert not check.passed
    proven = round(certified.certified.value * 8)
    assert check.measured == f"{proven} of {proven} images that bounds prove for certified fell"
