"""The instrument's attacks where the answer is known: linear systems, a masked gradient, a detector in the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models.ensemble import DetectorName, RuleName, decide
from models.networks import build_network
from models.networks.thermometer import Thermometer, ThermometerConfig
from tests.training.toys import EPSILON, SIDE, Linear, Masked, images, problem, system, weights
from training.attacks.detectors import joint, orthogonal, surely_wrong
from training.attacks.libraries import apgd_ce, apgd_targeted, fab_targeted, square
from training.attacks.masks import fresh_masks, hears_masks
from training.attacks.noise import random_noise
from training.attacks.pgd import margin, to_uint8
from training.attacks.problem import Attack, Findings, Problem
from training.attacks.rule import reweighed, surrogate, whole_system
from training.attacks.surrogates import foresighted, hears_thermometers, other_ramps, soft_ramps
from training.evaluation.suites import suite
from training.system import NO_CLASS, Members, System

CLASSES = 5
MARGIN_PGD = partial(whole_system, steps=40, restarts=2)


def linear_system() -> tuple[System, Tensor, Tensor, Linear]:
    """One linear member, images deep in their class, labels as it has them."""
    net = Linear(weights(0, CLASSES), torch.zeros(CLASSES))
    pixels = images(40)
    with torch.no_grad():
        labels = net(pixels).argmax(dim=1)
    return system({"linear": net}, CLASSES), pixels, labels, net


def optimum(net: Linear, pixels: Tensor, y: Tensor) -> Tensor:
    """max over j != y of margin_j + eps * |w_j - w_y|_1: what the best perturbation of a linear model reaches."""
    w = net.weights.detach()
    gain = EPSILON * (w.T[None] - w.T[y][:, None]).abs().sum(dim=2)  # (n, k), 0 for y itself
    return margin(net(pixels).detach() + gain, y)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(partial(whole_system, steps=40, restarts=2, until_fooled=False), id="margin-PGD on the system"),
        pytest.param(partial(reweighed, steps=40, restarts=1), id="reweighed voters"),
        pytest.param(partial(surrogate, rule=RuleName.LOG_POOL, steps=40, restarts=1), id="the logits' surrogate"),
        pytest.param(partial(surrogate, rule=RuleName.WEIGHTED, steps=40, restarts=1), id="the probabilities' surrogate"),
    ],
)
def test_an_attack_reaches_the_known_optimum_of_a_linear_system(attack: Attack) -> None:
    toy, pixels, y, net = linear_system()
    best = optimum(net, pixels, y)
    held = best < 0  # no perturbation fools these, so that nothing stops an attack early
    assert 5 < int(held.sum()) < 35

    found = attack(problem(toy, pixels[held], y[held]))

    assert float((found - pixels[held]).abs().max()) <= EPSILON + 1e-4
    clean = margin(net(pixels[held]), y[held]).detach()
    assert torch.allclose(margin(net(found), y[held]) - clean, best[held] - clean, rtol=0.05)


@pytest.mark.parametrize(
    ("attack", "at_least"),
    [
        pytest.param(partial(whole_system, steps=40, restarts=2), 0.9, id="margin-PGD on the system"),
        pytest.param(partial(apgd_ce, iterations=50, restarts=2), 0.9, id="Auto-PGD on cross-entropy"),
        pytest.param(partial(apgd_targeted, iterations=50, targets=4), 0.9, id="targeted Auto-PGD"),
        pytest.param(partial(fab_targeted, iterations=50, targets=4), 0.9, id="targeted FAB"),
        pytest.param(partial(reweighed, steps=40, restarts=1), 0.9, id="reweighed voters"),
        pytest.param(partial(square, queries=1000), 0.6, id="Square, which has no gradient"),
    ],
)
def test_an_attack_fools_most_that_can_be_fooled_and_nothing_else(attack: Attack, at_least: float) -> None:
    toy, pixels, y, net = linear_system()
    best = optimum(net, pixels, y)

    found = attack(problem(toy, pixels, y))

    fooled = net(found).argmax(dim=1) != y
    assert not bool(fooled[best < 0].any())
    assert float(fooled[best > 0].float().mean()) >= at_least


def test_a_masked_gradient_is_unmasked_by_the_suite() -> None:
    """Rounding leaves no gradient: PGD alone would call the network robust."""
    net = Masked(weights(0, CLASSES), torch.zeros(CLASSES))
    pixels = images(40)
    y = net(pixels).argmax(dim=1)
    toy = problem(system({"masked": net}, CLASSES), pixels, y)
    entries = {entry.name: entry for entry in suite("quick").entries if entry.applies(toy.system) and entry.counts}

    def left(names: list[str]) -> float:
        return float(torch.stack([net(entries[name].attack(toy)).argmax(dim=1) == y for name in names]).all(dim=0).float().mean())

    assert left(["margin-pgd"]) > 0.9  # its random restarts find little
    assert left(["square"]) < left(["margin-pgd"])  # which the report's sanity check shouts about
    assert left(list(entries)) < left(["margin-pgd"]) - 0.2


class Coded(nn.Module):
    """One pixel in three lies just below the ramp, where its code is flat; moving those is enough to fool most answers."""

    def __init__(self, reach: float) -> None:
        super().__init__()
        config = ThermometerConfig(thresholds=(100.0,), width=2.0, surrogate_reach=reach)
        self.pixels, self.weights = Thermometer(config), nn.Parameter(weights(0, CLASSES, 1.0))

    def forward(self, pixels: Tensor) -> Tensor:
        code: Tensor = self.pixels(pixels)
        return code.permute(0, 2, 3, 1).flatten(1) @ self.weights


def coded(reach: float) -> Problem:
    net = Coded(reach)
    steps = torch.randint(0, 3, (60, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(2))
    pixels = torch.tensor([60.0, 97.0, 140.0])[steps]  # far below, just below, far above
    return problem(system({"coded": net}, CLASSES), pixels, net(pixels).argmax(dim=1))


def fooled(toy: Problem, attack: Attack) -> float:
    found = attack(toy)
    assert float((found - toy.pixels).abs().max()) <= EPSILON + 1e-4
    return float((toy.system.judge(found).label != toy.labels).float().mean())


def test_a_thermometer_whose_gradient_does_not_reach_is_unmasked_by_the_suite() -> None:
    entries = {entry.name: entry for entry in suite("quick").entries}
    near, far = coded(0.0), coded(4.0)
    ramps = [entries[name] for name in ("wide-ramps-pgd", "narrow-ramps-pgd", "soft-ramps-pgd")]
    assert all(entry.applies(near.system) for entry in ramps)
    direct = fooled(far, entries["margin-pgd"].attack)
    assert direct > 0.8
    assert fooled(near, entries["pushed-margin-pgd"].attack) < 0.1  # it begins at the image, where all is flat
    assert fooled(near, ramps[0].attack) == pytest.approx(direct, abs=0.05)
    assert fooled(near, entries["foresighted-pgd"].attack) == pytest.approx(direct, abs=0.05)


class Bumps(nn.Module):
    """Two planes that cancel each other but between their ramps: what a fixed slope for each plane says of them is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = Thermometer(ThermometerConfig(thresholds=(25.5, 89.25), width=38.25))
        self.weights = nn.Parameter(weights(0, CLASSES, 1.0))

    def forward(self, pixels: Tensor) -> Tensor:
        code: Tensor = self.pixels(pixels)
        first, second = code.unflatten(1, (3, 2)).permute(2, 0, 3, 4, 1).flatten(2).flatten(2)
        logits: Tensor = (first - second) @ self.weights
        return logits


def test_bumps_that_cancel_are_seen_by_the_attack_that_knows_the_ball() -> None:
    net = Bumps()
    pixels = torch.tensor([0.0, 76.0])[torch.randint(0, 2, (150, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(5))]
    toy = problem(system({"bumps": net}, CLASSES), pixels, net(pixels).argmax(dim=1), epsilon=25.5)
    entries = {entry.name: entry.attack for entry in suite("quick").entries}

    def wrong(attack: Attack) -> float:
        found = attack(toy)
        assert float((found - pixels).abs().max()) <= 25.5 + 1e-4
        return float((toy.system.judge(found).label != toy.labels).float().mean())

    assert wrong(entries["pushed-margin-pgd"]) < 0.1
    assert wrong(entries["foresighted-pgd"]) > 0.5


def test_a_weight_of_0_hides_no_thermometer_that_nobody_hears() -> None:
    plain = Linear(weights(0, CLASSES), torch.zeros(CLASSES))
    for share, heard in ((0.0, False), (0.5, True)):
        toy = system(
            {"plain": plain, "coded": Coded(4.0)}, CLASSES, RuleName.WEIGHTED, weights={"plain": 1 - share, "coded": share}
        )
        assert hears_thermometers(toy) == heard


def test_every_thermometer_of_a_system_is_exchanged_and_nothing_else() -> None:
    members = {"plain": Linear(weights(0, CLASSES), torch.zeros(CLASSES)), "one": Coded(4.0), "other": Coded(4.0)}
    toy = system(members, CLASSES)
    changed = foresighted(toy, images(2), EPSILON).members.networks
    assert [type(getattr(changed[name], "pixels", None)).__name__ for name in members] == [
        "NoneType",
        *["ForesightedThermometer"] * 2,
    ]
    assert changed["plain"] is toy.members.networks["plain"]
    assert type(members["one"].pixels) is Thermometer


def test_other_ramps_change_gradients_and_no_answer() -> None:
    toy = coded(4.0)
    x = toy.pixels.clone().requires_grad_()
    here, wider, soft = toy.system, other_ramps(toy.system, 50.0), soft_ramps(toy.system, 50.0)
    assert torch.equal(here.log_probabilities(x), wider.log_probabilities(x))
    assert not torch.allclose(here.log_probabilities(x), soft.log_probabilities(x))

    def felt(some: System) -> float:
        (gradient,) = torch.autograd.grad(some.log_probabilities(x)[:, 0].sum(), x)
        return float((gradient != 0).float().mean())

    assert felt(here) < 0.4 < 0.9 < felt(wider)
    assert felt(soft) > 0.9
    other = system({"linear": Linear(weights(0, CLASSES), torch.zeros(CLASSES))}, CLASSES)
    assert not hears_thermometers(other)


def stochastic(voters: int) -> System:
    """A dropout network whose one mask matters, alone or beside a linear voter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {
            "classes": CLASSES, "channels": 3, "mean": [130.0] * 3, "std": [30.0] * 3, "keep": 0.3, "samples": 1,
            "backbone": {"widths": [8, 64], "blocks": [0, 1], "stem_kernel": 3, "stem_stride": 1},
        }  # fmt: skip
        networks: dict[str, nn.Module] = {"dropout": build_network("bayesian", config)}
    if voters > 1:
        networks["linear"] = Linear(weights(0, CLASSES), torch.zeros(CLASSES))
    return system(networks, CLASSES)


@pytest.mark.parametrize("voters", [1, 2])
def test_masks_of_a_seed_are_those_of_a_system_with_that_seed(voters: int) -> None:
    toy, pixels = stochastic(voters), images(6)
    together = toy.log_probabilities_under([3, 9], pixels)
    apart = [System(toy.ensemble, Members(toy.members.networks, seed)).log_probabilities(pixels) for seed in (3, 9)]
    assert torch.allclose(together, torch.stack(apart), atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert hears_masks(toy)
    assert not hears_masks(linear_system()[0])


def test_an_attack_that_averages_over_masks_fools_those_it_never_saw_more_often_than_one_that_knows_some() -> None:
    toy, pixels = stochastic(1), images(60)
    y = toy.log_probabilities_under(range(1000, 1100), pixels).mean(dim=0).argmax(dim=1)

    def left(attack: Attack) -> float:
        found = attack(problem(toy, pixels, y))
        return float((toy.log_probabilities_under(range(100), found).argmax(dim=2) == y).float().mean())

    known = left(partial(whole_system, steps=20, restarts=1, until_fooled=False))
    averaging = left(partial(fresh_masks, steps=20, samples=16))
    assert averaging < known - 0.05


def disagreeing() -> tuple[System, Tensor, Tensor]:
    """A fragile voter and a firm one, of which the fragile one decides; their disagreement is a detector."""
    base, more = (w - w.mean(dim=0) for w in (weights(0, 2, 0.01), weights(5, 2, 0.03)))
    fragile, firm = Linear(base + more, torch.zeros(2)), Linear(base, torch.zeros(2))
    pixels = images(400, seed=7)
    agree = (fragile(pixels).argmax(1) == firm(pixels).argmax(1)).nonzero().squeeze(1)
    calibration, attacked = pixels[agree[:-30]], pixels[agree[-30:]]
    toy = system({"fragile": fragile, "firm": firm}, 2, clean=calibration)
    return toy, attacked, firm(attacked).argmax(1)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(partial(joint, steps=40, weights=(0.3, 1.0, 3.0)), id="the joint objective"),
        pytest.param(partial(orthogonal, steps=80), id="Orthogonal PGD"),
    ],
)
def test_an_attack_on_rule_and_detector_gets_past_both_more_often_than_one_on_the_rule(attack: Attack) -> None:
    toy, pixels, y = disagreeing()

    def past(found: Tensor) -> float:
        judged = toy.judge(found)
        return float(((judged.label != y) & (judged.p_value > toy.ensemble.review_rate)).float().mean())

    plain = past(whole_system(problem(toy, pixels, y, 8.0), steps=40, restarts=1, until_fooled=False))
    knowing = past(attack(problem(toy, pixels, y, 8.0)))
    assert knowing >= plain + 0.2


PUSHED = partial(whole_system, steps=40, restarts=1, until_fooled=False)


def hesitant() -> tuple[System, Tensor, Tensor]:
    """A linear network under the detector of small margins; images labelled as it has them."""
    net = Linear(weights(0, CLASSES), torch.zeros(CLASSES))
    pixels = images(40)
    return system({"net": net}, CLASSES, clean=images(400, seed=7), detector=DetectorName.MARGIN), pixels, net(pixels).argmax(1)


def twins() -> tuple[System, Tensor, Tensor]:
    """The same with two classes that are hard to tell apart, and images of a third that is told apart with ease."""
    w = weights(0, 3)
    w[:, 1] = w[:, 0] + 0.2 * weights(9, 1)[:, 0]
    net, pixels = Linear(w, torch.zeros(3)), images(2000, seed=7)
    first, second = net(pixels).topk(2, dim=1).values.unbind(1)
    third = net(pixels).argmax(1) == 2
    clear = pixels[third & (first - second > 0.5)]
    return system({"net": net}, 3, clean=clear, detector=DetectorName.MARGIN), pixels[third][:100], torch.full((100,), 2)


def past(toy: System, found: Tensor, y: Tensor) -> int:
    """How many are wrong and accepted."""
    judged = toy.judge(found)
    return int(((judged.label != y) & (judged.p_value > toy.ensemble.review_rate)).sum())


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(partial(joint, steps=40, weights=(2.0,)), id="the joint objective"),
        pytest.param(partial(orthogonal, steps=40), id="Orthogonal PGD"),
        pytest.param(partial(surely_wrong, iterations=40, targets=4), id="sure of each wrong class"),
    ],
)
def test_a_detector_of_small_margins_holds_no_attack_back(attack: Attack) -> None:
    """It is content while the class is surely right: who obeys it from the start stays where he is."""
    toy, pixels, y = hesitant()
    assert past(toy, attack(problem(toy, pixels, y, 6.0)), y) >= past(toy, PUSHED(problem(toy, pixels, y, 6.0)), y) > 10


def test_who_leads_over_all_classes_is_accepted_more_often_than_who_leads_over_the_right_one() -> None:
    toy, pixels, y = twins()
    attacks = partial(surely_wrong, iterations=40, targets=2), PUSHED
    sure, pushed = (past(toy, attack(problem(toy, pixels, y, 10.0)), y) for attack in attacks)
    assert sure >= pushed + 10


@pytest.mark.parametrize("rule", [RuleName.LOG_POOL, RuleName.WEIGHTED])
def test_a_surrogate_of_the_mixed_rule_is_not_led_astray_by_the_accurate_voter(rule: RuleName) -> None:
    """It has a fifth of the probabilities, and twice the logits."""
    accurate, robust = Linear(weights(3, CLASSES, 0.02), torch.zeros(CLASSES)), Linear(weights(0, CLASSES), torch.zeros(CLASSES))
    toy = system({"accurate": accurate, "robust": robust}, CLASSES, RuleName.MIXED, accurate="accurate")
    pixels = images(100)
    y = toy.judge(pixels).label
    assert [round(toy.part(name), 6) for name in ("accurate", "robust")] == [0.2, 0.8]
    fooled, directly = (
        int((toy.judge(attack(problem(toy, pixels, y))).label != y).sum())
        for attack in (partial(surrogate, rule=rule, steps=20, restarts=1), MARGIN_PGD)
    )
    assert fooled >= 0.7 * directly > 20


def test_the_differentiable_statistic_is_the_deployed_one_where_it_matters() -> None:
    toy, pixels, _ = disagreeing()
    _, statistic, judged = toy.evidence(pixels)
    accepted = judged.p_value > toy.ensemble.review_rate
    clear = (statistic - toy.threshold("review")).abs() > 0.05
    assert bool(((statistic <= toy.threshold("review")) == accepted)[clear].all())
    assert int(clear.sum()) >= 20


class Broken(Linear):
    """NaN for all bright images."""

    def forward(self, pixels: Tensor) -> Tensor:
        bright = pixels.flatten(1).mean(dim=1, keepdim=True) > 130
        return super().forward(pixels) * torch.where(bright, torch.nan, 1.0)


def test_an_answer_that_is_not_finite_is_counted_and_nobodys_class() -> None:
    """Not even that of class 0, which is the largest of nothing."""
    toy, findings = system({"broken": Broken(weights(0, CLASSES), torch.zeros(CLASSES))}, CLASSES), Findings()
    pixels = torch.cat([images(3) * 0.5, images(4) * 0.2 + 200])
    with findings.listening(toy.members.networks.values()):
        judged = toy.judge(pixels)
    toy.judge(pixels)
    assert findings.losses == 4
    assert bool((judged.label[:3] >= 0).all())
    assert judged.label[3:].tolist() == [NO_CLASS] * 4


@pytest.mark.parametrize(
    ("spoiled", "counted"),
    [
        pytest.param(lambda x: x.sqrt() * torch.where(x > -1, 0.0, 1.0), "losses", id="a NaN in the answer"),
        pytest.param(lambda x: (x - x.detach()).sqrt() + x, "gradients", id="an infinite gradient behind a finite answer"),
    ],
)
def test_what_is_not_finite_is_counted(spoiled: Callable[[Tensor], Tensor], counted: str) -> None:
    findings = Findings()
    forward = findings.watched(lambda pixels: spoiled(pixels.flatten(1)[:, :CLASSES]))
    x = (-images(3) if counted == "losses" else images(3)).requires_grad_()
    forward(x).sum().backward()
    assert getattr(findings, counted) == 3


def test_noise_stays_in_the_ball_and_keeps_the_worst() -> None:
    toy, pixels, y, net = linear_system()
    few, many = (random_noise(problem(toy, pixels, y), draws) for draws in (1, 30))
    assert float((many - pixels).abs().max()) <= EPSILON + 1e-4
    assert bool((margin(net(many), y) >= margin(net(few), y)).all())


def test_the_same_problem_is_attacked_the_same_way_twice_and_leaves_the_global_generator_alone() -> None:
    toy, pixels, y, _ = linear_system()
    attacks: list[Callable[[Problem], Tensor]] = [partial(square, queries=50), partial(apgd_ce, iterations=5, restarts=2)]
    before = torch.random.get_rng_state()
    for attack in attacks:
        first, second = (attack(problem(toy, pixels, y)) for _ in range(2))
        assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


def test_saturated_logits_keep_no_gradient_from_auto_pgd() -> None:
    """log softmax is exactly 0 on nearly all of these: cross-entropy as it is would have nowhere to go."""
    net = Linear(1000 * weights(0, CLASSES), torch.zeros(CLASSES))
    pixels = images(40)
    y = net(pixels).argmax(dim=1)
    toy = problem(system({"sure": net}, CLASSES), pixels, y)
    assert int((toy.system.log_probabilities(pixels).amax(dim=1) == 0).sum()) > 30
    by_entropy, by_margin = (
        int((net(attack(toy)).argmax(1) != y).sum()) for attack in (partial(apgd_ce, iterations=50, restarts=2), MARGIN_PGD)
    )
    assert by_entropy >= 0.9 * by_margin > 0


def test_what_fab_finds_survives_being_rounded_to_whole_pixels() -> None:
    """Its images lie on the boundary, and rounding towards the clean image alone would take all of them back."""
    toy, pixels, _, net = linear_system()
    pixels = pixels.round()
    y = net(pixels).argmax(dim=1)
    found = fab_targeted(problem(toy, pixels, y), iterations=50, targets=4)
    served = to_uint8(found, pixels).float()
    assert int((net(served).argmax(1) != y).sum()) >= 0.8 * int((net(found).argmax(1) != y).sum()) > 0


def silent(rule: RuleName, share: dict[str, float], accurate: str = "", detector: DetectorName | None = None) -> System:
    nets = {name: Linear(weights(seed, CLASSES), torch.zeros(CLASSES)) for seed, name in enumerate(share)}
    if detector is None:
        return system(nets, CLASSES, rule, accurate=accurate, weights=share)
    return system(nets, CLASSES, rule, images(200, seed=5), accurate, share, detector)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(MARGIN_PGD, id="the system"),
        pytest.param(partial(surrogate, rule=RuleName.LOG_POOL, steps=5, restarts=1), id="its logits"),
        pytest.param(partial(surrogate, rule=RuleName.WEIGHTED, steps=5, restarts=1), id="its probabilities"),
        pytest.param(partial(surrogate, rule=RuleName.MAJORITY, steps=5, restarts=1), id="its votes"),
        pytest.param(partial(reweighed, steps=5, restarts=1), id="its voters"),
    ],
)
def test_a_voter_without_a_share_changes_nothing_of_an_attack(attack: Attack) -> None:
    """Otherwise two systems that decide alike could not share an attack's work."""
    pixels = images(10)
    with_it, without = (silent(RuleName.WEIGHTED, share) for share in ({"a": 0.6, "b": 0.4, "c": 0.0}, {"a": 0.6, "b": 0.4}))
    assert with_it.heard == without.heard
    y = without.judge(pixels).label
    assert torch.equal(attack(problem(with_it, pixels, y)), attack(problem(without, pixels, y)))


SPEAKING, WITH_A_SILENT_ONE = {"a": 0.6, "b": 0.4}, {"a": 0.6, "b": 0.4, "c": 0.0}


def test_a_silent_voter_changes_nothing_of_an_attack_on_a_detector_that_does_not_hear_it() -> None:
    pixels = images(10)
    with_it, without = (silent(RuleName.WEIGHTED, share, detector=DetectorName.MARGIN) for share in (WITH_A_SILENT_ONE, SPEAKING))
    assert with_it.decided_by == without.decided_by
    y = without.judge(pixels).label
    found = [joint(problem(toy, pixels, y), steps=10, weights=(0.5, 2.0)) for toy in (with_it, without)]
    assert torch.equal(*found)


def test_systems_that_vote_alike_may_still_decide_by_something_else() -> None:
    """Disagreement hears whom the rule does not."""
    with_it, without = (
        silent(RuleName.WEIGHTED, share, detector=DetectorName.DISAGREEMENT) for share in (WITH_A_SILENT_ONE, SPEAKING)
    )
    other = silent(RuleName.WEIGHTED, SPEAKING, detector=DetectorName.MARGIN)
    assert with_it.heard == without.heard == other.heard
    assert len({system.decided_by for system in (with_it, without, other)}) == 3


@pytest.mark.parametrize(
    ("rule", "share", "accurate"),
    [
        pytest.param(RuleName.WEIGHTED, {"a": 1.0, "b": 0.0, "c": 0.0}, "", id="one speaks"),
        pytest.param(RuleName.MIXED, {"a": 0.0, "b": 0.7, "c": 0.3}, "a", id="mixed"),
        pytest.param(RuleName.MIXED, {"a": 1.0, "b": 0.0, "c": 0.0}, "a", id="mixed, the robust ones without weights"),
        pytest.param(RuleName.MIXED, {"a": 0.0, "b": 1.0, "c": 0.0}, "", id="mixed, all robust"),
        pytest.param(RuleName.LOG_POOL, {"a": 0.5, "b": 0.5, "c": 0.0}, "", id="log-pool"),
        pytest.param(RuleName.MEDIAN, {"a": 0.5, "b": 0.5, "c": 0.0}, "", id="median, which weighs nobody"),
    ],
)
def test_what_is_attacked_is_what_is_deployed_whoever_is_silent(rule: RuleName, share: dict[str, float], accurate: str) -> None:
    toy, pixels = silent(rule, share, accurate), images(20)
    deployed = decide(toy.ensemble, toy.members.outputs(toy.ensemble.members, pixels)).probabilities
    assert torch.allclose(toy.log_probabilities(pixels).exp(), deployed, atol=1e-6)


@pytest.mark.parametrize("detector", [DetectorName.MARGIN, DetectorName.DISAGREEMENT])
def test_an_attack_on_the_detectors_hears_what_is_deployed(detector: DetectorName) -> None:
    toy, pixels = silent(RuleName.WEIGHTED, WITH_A_SILENT_ONE, detector=detector), images(100)
    log_p, statistic, judged = toy.evidence(pixels)
    deployed = decide(toy.ensemble, toy.members.outputs(toy.ensemble.members, pixels))
    assert torch.allclose(log_p.exp(), deployed.probabilities, atol=1e-6)
    assert torch.equal(judged.label, deployed.label)
    assert torch.allclose(judged.p_value, deployed.p_value)
    assert float((statistic - deployed.statistic).abs().median()) < 0.05  # a staircase made a slope
