"""A bundle with a certified member, from its recipe to its card: what bounds prove is told, and no attack gets through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from models.bundle import read_bundle
from models.composition import EnsembleChoice, compose
from models.ensemble import RuleName
from models.log_probability import first_largest
from models.networks import build_network
from tests.training import toys
from tests.training.commands import SMOKE, phalanx_train
from training.attacks.pgd import margin_pgd
from training.certified import certified_loss
from training.data import Images, splits_of
from training.evaluation.campaign import Campaign, largest_half
from training.evaluation.card import build, ledgers_of
from training.evaluation.proofs import leads, proven_on
from training.evaluation.report import finished
from training.evaluation.suites import suite
from training.recipe import InvalidRecipe, load_recipe
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


CLASSES = 5


class Sure(nn.Module):
    """An accurate voter that is sure of one class, whatever it sees."""

    def __init__(self, says: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(50 * nn.functional.one_hot(torch.tensor(says), CLASSES).float())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits.expand(len(pixels), -1)


def bounded() -> nn.Module:
    """A certified network for the toys' images, with logits far enough apart that much of a small ball is proven."""
    size = {"size": (toys.SIDE, toys.SIDE), "hidden": 16, "convolutions": [{"channels": 4}]}
    config = {"classes": CLASSES, "channels": 3, "mean": (130.0,) * 3, "std": (30.0,) * 3, **size}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network("certified", config)
        for parameter in network.parameters():
            parameter.data.mul_(3)
        for _ in range(50):
            network.train()(toys.images(200, seed=5))
    return network.eval()


@pytest.fixture(scope="module")
def some() -> Images:
    pixels = toys.images(300).round().to(torch.uint8)
    with torch.no_grad():
        return Images(pixels.numpy(), bounded()(pixels).argmax(1).numpy())


def mixture(rule: RuleName, weights: dict[str, float], says: int = 0, temperature: float = 1.0, alpha: float = 0.9) -> System:
    """`accurate` beside `certified` and `other`, which has no bounds; those that `weights` does not name are absent."""
    other = toys.Linear(toys.weights(0, CLASSES), torch.zeros(CLASSES))
    networks = {"accurate": Sure(says), "certified": bounded(), "other": other}
    found = toys.system({name: networks[name] for name in weights}, CLASSES, rule, accurate="accurate", weights=weights)
    voters = tuple(replace(v, temperature=temperature) if v.name == "certified" else v for v in found.ensemble.voters)
    return System(replace(found.ensemble, voters=voters, alpha=alpha, scale=4.0), found.members)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        (RuleName.SOFT, {"accurate": 0.0, "certified": 1.0}),
        (RuleName.MAJORITY, {"certified": 1.0, "other": 0.0}),
        (RuleName.MEDIAN, {"accurate": 0.0, "certified": 1.0}),
        (RuleName.WEIGHTED, {"accurate": 0.2, "certified": 0.8}),
        (RuleName.WEIGHTED, {"certified": 0.8, "other": 0.2}),
        (RuleName.MIXED, {"accurate": 0.0, "certified": 0.8, "other": 0.2}),
        (RuleName.MIXED, {"accurate": 0.0, "certified": 0.0, "other": 1.0}),
        (RuleName.MIXED, {"accurate": 0.0}),
    ],
)
def test_a_vote_that_hangs_on_more_than_bounds_is_not_proven(rule: RuleName, weights: dict[str, float], some: Images) -> None:
    assert proven_on(mixture(rule, weights), some, 0.5) is None


def test_silent_voters_change_nothing(some: Images) -> None:
    alone = proven_on(mixture(RuleName.SOFT, {"certified": 1.0}), some, 0.5)
    assert alone is not None
    assert 0 < alone.mean() < 1
    for weights in ({"accurate": 0.0, "certified": 1.0}, {"certified": 1.0, "other": 0.0}):
        beside = proven_on(mixture(RuleName.WEIGHTED, weights), some, 0.5)
        assert beside is not None
        assert np.array_equal(beside, alone)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_beside_an_accurate_voter_that_lies_what_is_proven_stands(temperature: float, some: Images) -> None:
    """The more it may say, the less is proven."""
    weights, epsilon = {"accurate": 0.0, "certified": 1.0, "other": 0.0}, 0.5
    pixels, y = torch.from_numpy(some.pixels).float(), torch.from_numpy(some.labels)
    shares = []
    for alpha in (0.6, 0.8, 0.95):
        shown = proven_on(mixture(RuleName.MIXED, weights, 0, temperature, alpha), some, epsilon)
        assert shown is not None
        shares.append(float(shown.mean()))
        for says in range(CLASSES):
            system = mixture(RuleName.MIXED, weights, says, temperature, alpha)
            generator = torch.Generator().manual_seed(0)
            attacked = margin_pgd(system.log_probabilities, pixels, y, epsilon, 10, generator, restarts=1).pixels
            for x in (pixels, attacked):
                assert bool((system.judge(x).label == y)[torch.from_numpy(shown)].all())
    assert 0 < shares[0] <= shares[1] <= shares[2] < 1
    assert shares[0] < shares[2]


def test_a_lead_that_is_a_tie_for_the_rule_is_none() -> None:
    """With many classes and a high temperature a lead in logits is less than what the rule tells apart."""
    y = torch.full((1,), 99)
    z = torch.full((1, 100), -0.0015).scatter(1, y[:, None], 0.0)
    assert not leads(z, y, 1 / 20, 1.0).item()
    assert int(first_largest((z / 20).softmax(1))) == 0  # not 99
    assert leads(z * 10, y, 1 / 20, 1.0).item()
    assert int(first_largest((z / 2).softmax(1))) == 99


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": {"ramp": 0}}, "above 0 and at most 1"),
        ({"settings": {"ramp": 1.5}}, "above 0 and at most 1"),
        ({"network": {"hidden": 0}}, "network.hidden"),
        (
            {"network": {"convolutions": [{"channels": 8, "kernel": 40}]}},
            "1 such convolutions leave nothing of images of 28x28",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, object], says: str, tmp_path: Path) -> None:
    document = load_recipe("smoke").model_dump(mode="json") | {"members": {"certified": change}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(InvalidRecipe, match=says):
        load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 2.55, 4.0, 8.1, 25.5])
def test_what_is_kept_of_a_perturbation_stays_within_epsilon(epsilon: float) -> None:
    reach = largest_half(epsilon)
    assert epsilon * 0.999 < reach <= epsilon
    assert float(torch.tensor(reach).half()) == reach


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
    assert full.certified is not None
    assert full.certified.value <= full.robust.value
    assert certified.certified is not None
    assert 0 < certified.certified.value <= certified.robust.value
    checks = {check.name: check for check in card.checks}
    assert checks["no attack gets through what is proven of full"].passed
    assert checks["no attack gets through what is proven of certified"].passed

    broken = ledgers["certified"]
    fooled = replace(broken, label=(broken.labels + 1) % len(bundle.manifest.classes) + 0 * broken.label)
    card = build(campaign, units, {**ledgers, "certified": fooled}, ())
    check = next(check for check in card.checks if check.name == "no attack gets through what is proven of certified")
    assert not check.passed
    proven = round(certified.certified.value * 8)
    assert check.measured == f"{proven} of {proven} images fell"
