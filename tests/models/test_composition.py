"""From a bundle and a choice to an ensemble: who is in it, with which weights and tables, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.bundle import Bundle, MemberOutputs, read_bundle
from models.composition import EnsembleChoice, InvalidEnsemble, compose
from models.ensemble import Detector, DetectorName, Ensemble, RuleName, Verdict, decide
from models.masks import draw_masks
from models.member_session import member_runs
from tests.bundles import MASKS, MASKS_SEED, random_images, write_tiny_bundle

MI, VARIANCE, DISAGREEMENT, DISTANCE, MARGIN = DetectorName
N = 400  # calibration images


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(write_tiny_bundle(tmp_path_factory.mktemp("composition") / "bundle", images=N))


def ask(bundle: Bundle, **choice: Any) -> Ensemble:
    return compose(bundle, EnsembleChoice(name="asked", **choice))


def names(ensemble: Ensemble) -> list[str]:
    return [voter.name for voter in ensemble.voters]


def detectors(ensemble: Ensemble) -> list[DetectorName]:
    return [detector.name for detector in ensemble.detectors]


def test_by_default_an_ensemble_is_all_the_bundle_has(bundle: Bundle) -> None:
    full = ask(bundle)
    row = bundle.manifest.subset(["adversarial", "bayesian", "edge", "metric"])
    assert {voter.name: voter.weight for voter in full.voters} == row.weights
    assert {voter.name: voter.temperature for voter in full.voters} == {m.name: m.temperature for m in bundle.manifest.members}
    assert [voter.strength for voter in full.voters if voter.name == "bayesian"] == ["accurate"]
    assert (full.rule, full.alpha, full.scale, full.classes) == (row.rule, row.alpha, row.scale, 10)
    assert full.detectors == (
        Detector(MI, "bayesian"),
        Detector(VARIANCE, "bayesian"),
        Detector(DISAGREEMENT),
        Detector(DISTANCE, "metric"),
        Detector(MARGIN),
    )
    assert (full.review_rate, full.reject_rate, full.masks) == (0.05, 0.01, "fixed")
    assert [table.shape for table in (*full.tables, full.combined)] == [(N,)] * 6


@pytest.mark.parametrize(
    "choice, voters, expected",
    [
        pytest.param(
            {"without": ("edge",)},
            ["metric", "adversarial", "bayesian"],
            [MI, VARIANCE, DISAGREEMENT, DISTANCE, MARGIN],
            id="without a member that feeds no detector",
        ),
        pytest.param(
            {"without": ("bayesian",)},
            ["metric", "edge", "adversarial"],
            [DISAGREEMENT, DISTANCE, MARGIN],
            id="without the stochastic member there is no uncertainty",
        ),
        pytest.param({"without": ("metric", "edge", "bayesian")}, ["adversarial"], [MARGIN], id="one member alone has a margin"),
        pytest.param(
            {"roles": {"bayesian": ("detector",)}},
            ["metric", "edge", "adversarial"],
            [MI, VARIANCE, DISAGREEMENT, DISTANCE, MARGIN],
            id="a member that lost its vote still feeds its detectors",
        ),
        pytest.param(
            {"roles": {"bayesian": ("classifier",), "metric": ("classifier",)}},
            ["metric", "edge", "adversarial", "bayesian"],
            [DISAGREEMENT, MARGIN],
            id="members that only vote feed no detector",
        ),
        pytest.param({"detectors": ()}, ["metric", "edge", "adversarial", "bayesian"], [], id="votes only"),
        pytest.param(
            {"detectors": ("distance", "variance")},
            ["metric", "edge", "adversarial", "bayesian"],
            [VARIANCE, DISTANCE],
            id="the detectors asked for, in an order of their own",
        ),
    ],
)
def test_a_choice_decides_who_votes_and_what_detects(
    bundle: Bundle, choice: dict[str, Any], voters: list[str], expected: list[DetectorName]
) -> None:
    chosen = ask(bundle, **choice)
    assert names(chosen) == voters
    assert {voter.name: voter.weight for voter in chosen.voters} == bundle.manifest.subset(voters).weights
    assert detectors(chosen) == expected


def test_a_member_that_neither_votes_nor_is_listened_to_is_absent(bundle: Bundle) -> None:
    chosen = ask(bundle, roles={"bayesian": ("detector",), "metric": ("detector",)}, detectors=("distance",))
    assert chosen.members == ("edge", "adversarial", "metric")


def test_centers_give_a_distance_even_where_the_manifest_names_no_detector(bundle: Bundle) -> None:
    members = [m.model_copy(update={"roles": ("classifier",)}) for m in bundle.manifest.members]
    bare = replace(bundle, manifest=bundle.manifest.model_copy(update={"members": tuple(members)}))
    assert detectors(ask(bare)) == [DISAGREEMENT, DISTANCE, MARGIN]


def decided_by(bundle: Bundle, deciding: tuple[DetectorName, ...]) -> Bundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"deciding": deciding}))


def test_the_verdict_hangs_on_the_detectors_that_the_bundle_names(bundle: Bundle) -> None:
    """The others are told, and change nothing."""
    full, alone = ask(decided_by(bundle, (MARGIN,))), ask(bundle, detectors=("margin",))
    assert detectors(full) == [MI, VARIANCE, DISAGREEMENT, DISTANCE, MARGIN]
    assert [detector.name for detector in full.detectors if detector.decides] == [MARGIN]
    np.testing.assert_array_equal(full.combined, alone.combined)
    images = random_images(bundle.manifest.input, 50, seed=3)
    masks = draw_masks(MASKS_SEED, MASKS.samples, MASKS.width, MASKS.keep)
    runs = {name: run.logits(images, masks if run.stochastic else None) for name, run in member_runs(bundle).items()}
    told, bare = decide(full, runs), decide(alone, runs)
    assert told.p_values.shape == (50, 5)
    for column in ("statistic", "p_value", "verdict", "label"):
        np.testing.assert_array_equal(getattr(told, column), getattr(bare, column), err_msg=column)


def test_detectors_asked_for_by_name_all_decide(bundle: Bundle) -> None:
    chosen = ask(decided_by(bundle, (MARGIN,)), detectors=("distance", "margin"))
    assert all(detector.decides for detector in chosen.detectors)


def test_where_those_that_would_decide_are_not_fed_all_do(bundle: Bundle) -> None:
    chosen = ask(decided_by(bundle, (MI,)), without=("bayesian",))
    assert [(d.name, d.decides) for d in chosen.detectors] == [(DISAGREEMENT, True), (DISTANCE, True), (MARGIN, True)]


def test_a_rule_may_be_chosen(bundle: Bundle) -> None:
    assert ask(bundle, rule=RuleName.MAJORITY).rule == RuleName.MAJORITY


def test_tables_are_those_of_the_very_rule_and_members(bundle: Bundle) -> None:
    full, fewer, majority = ask(bundle), ask(bundle, without=("edge",)), ask(bundle, rule=RuleName.MAJORITY)
    np.testing.assert_array_equal(full.tables[0], fewer.tables[0])  # the stochastic member is the same
    assert (full.tables[2] != fewer.tables[2]).mean() > 0.9  # disagreement among fewer
    assert (full.tables[3] != majority.tables[3]).any()  # the distance is to the center of another class here and there
    assert (full.combined != fewer.combined).mean() > 0.9
    for table in (*full.tables, full.combined):
        assert table.dtype == np.float32
        assert (np.diff(table) >= 0).all()


def test_one_detectors_combined_p_value_ranks_calibration_images_evenly(bundle: Bundle) -> None:
    ranks = np.exp(-ask(bundle, detectors=("distance",)).combined) * N
    np.testing.assert_allclose(ranks, np.arange(N, 0, -1), rtol=1e-4)


def test_fresh_masks_have_tables_of_their_own(bundle: Bundle) -> None:
    fixed, fresh = ask(bundle), ask(bundle, masks="fresh")
    assert fresh.masks == "fresh"
    assert (fixed.tables[0] != fresh.tables[0]).mean() > 0.9
    np.testing.assert_array_equal(np.sort(bundle_mutual_information(bundle)), fresh.tables[0])
    np.testing.assert_array_equal(fixed.tables[3].shape, fresh.tables[3].shape)


def bundle_mutual_information(bundle: Bundle) -> Any:
    member = bundle.calibration.members["bayesian"].fresh
    assert isinstance(member, MemberOutputs)
    return member.mutual_information


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"without": ("edge",)},
        {"without": ("bayesian",)},
        {"rule": RuleName.MAJORITY},
        {"detectors": ("disagreement",)},
        {"roles": {"bayesian": ("detector",)}},
    ],
    ids=lambda choice: " ".join(choice) or "full",
)
def test_ablation_stays_calibrated(bundle: Bundle, choice: dict[str, Any]) -> None:
    """Of clean images that the bundle has not seen, the share that was asked for is set aside."""
    images = random_images(bundle.manifest.input, 1000, seed=11)
    masks = draw_masks(MASKS_SEED, MASKS.samples, MASKS.width, MASKS.keep)
    runs = {name: run.logits(images, masks if run.stochastic else None) for name, run in member_runs(bundle).items()}
    verdict = decide(ask(bundle, review_rate=0.1, reject_rate=0.05, **choice), runs).verdict
    assert np.mean(verdict >= Verdict.SUSPECT) == pytest.approx(0.1, abs=0.06)
    assert np.mean(verdict == Verdict.REJECTED) == pytest.approx(0.05, abs=0.04)


REFUSED = [
    pytest.param({"without": ("metric", "edge", "adversarial", "bayesian")}, "expected at least one classifier", id="nobody left"),
    pytest.param(
        {"roles": {"bayesian": ("detector",)}, "without": ("metric", "edge", "adversarial")},
        "expected at least one classifier among the members present: bayesian",
        id="nobody left who votes",
    ),
    pytest.param({"without": ("egde",)}, "without: expected one of .*, got 'egde'; the nearest is edge", id="unknown member"),
    pytest.param({"without": ("edge", "edge")}, "without: expected each once, got edge twice", id="a member twice"),
    pytest.param(
        {"roles": {"baysian": ("detector",)}},
        "roles: .* got 'baysian'; the nearest is bayesian",
        id="unknown member's role",
    ),
    pytest.param(
        {"roles": {"edge": ("clasifier",)}},
        "roles of edge: expected one of classifier, detector, got 'clasifier'; the nearest is classifier",
        id="unknown role",
    ),
    pytest.param({"roles": {"edge": ()}}, "roles of edge: expected classifier or detector, got none", id="no role"),
    pytest.param(
        {"roles": {"edge": ("detector",)}},
        "roles of edge: expected no detector, as it is neither stochastic nor has centers",
        id="a detector of a member that has none to offer",
    ),
    pytest.param(
        {"roles": {"edge": ("classifier",)}, "without": ("edge",)},
        "edge: expected in one of without and roles, got it in both",
        id="a role for an absent member",
    ),
    pytest.param(
        {"detectors": ("distanse",)},
        "detectors: expected one of .*, got 'distanse'; the nearest is distance",
        id="misspelt",
    ),
    pytest.param(
        {"detectors": ("distance",), "without": ("metric",)},
        "distance: expected a member with class centers and the role detector, got edge, adversarial, bayesian",
        id="a detector whose member is absent",
    ),
    pytest.param(
        {"detectors": ("mutual_information",), "roles": {"bayesian": ("classifier",)}},
        "detector mutual_information: expected a stochastic member with the role detector, got",
        id="a detector whose member only votes",
    ),
    pytest.param(
        {"detectors": ("disagreement",), "without": ("metric", "edge", "bayesian")},
        "detector disagreement: expected two classifiers or more, got adversarial",
        id="disagreement with oneself",
    ),
    pytest.param(
        {"reject_rate": 0.002},
        "expected a reject_rate of 0.00249 or more, which 400 calibration images resolve, got 0.002",
        id="a reject rate too fine",
    ),
    pytest.param(
        {"reject_rate": 0.1},
        "expected 0 <= reject_rate <= review_rate <= 1, got 0.1 and 0.05",
        id="rejection before review",
    ),
    pytest.param({"review_rate": 1.5}, "expected 0 <= reject_rate <= review_rate <= 1", id="a rate above 1"),
    pytest.param({"review_rate": float("nan")}, "expected 0 <= reject_rate <= review_rate <= 1", id="a rate of NaN"),
]


@pytest.mark.parametrize("choice, sentence", REFUSED)
def test_what_the_bundle_cannot_fulfil_is_refused(bundle: Bundle, choice: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidEnsemble, match=f"^ensemble asked: .*{sentence}"):
        ask(bundle, **choice)


def test_the_finest_reject_rate_there_is_can_be_asked_for(bundle: Bundle) -> None:
    assert ask(bundle, reject_rate=1 / (N + 1)).reject_rate == 1 / (N + 1)


def test_without_detectors_any_rate_will_do(bundle: Bundle) -> None:
    assert ask(bundle, detectors=(), reject_rate=0.0).combined.shape == (0,)


def test_a_member_that_was_fitted_no_weights_cannot_vote(bundle: Bundle) -> None:
    manifest = bundle.manifest
    members = [m.model_copy(update={"roles": ("detector",)} if m.name == "bayesian" else {}) for m in manifest.members]
    silent = replace(bundle, manifest=manifest.model_copy(update={"members": tuple(members)}))
    assert "bayesian" not in names(ask(silent))
    with pytest.raises(InvalidEnsemble, match="roles of bayesian: expected no classifier, as no weights were fitted"):
        ask(silent, roles={"bayesian": ("classifier",)})


def twice(bundle: Bundle, name: str) -> Bundle:
    """The bundle with a second member that is like another, and does not vote."""
    member = bundle.manifest.member(name)
    second = member.model_copy(update={"name": "second", "roles": ("detector",)})
    manifest = bundle.manifest.model_copy(update={"members": (*bundle.manifest.members, second)})
    return replace(bundle, manifest=manifest)


@pytest.mark.parametrize("member, detector", [("bayesian", "mutual_information"), ("metric", "distance")])
def test_a_detector_is_fed_by_one_member(bundle: Bundle, member: str, detector: str) -> None:
    with pytest.raises(InvalidEnsemble, match=f"detector {detector}: expected one member to feed it, got {member}, second"):
        ask(twice(bundle, member))


def test_there_is_one_input_for_masks(bundle: Bundle) -> None:
    with pytest.raises(InvalidEnsemble, match="expected at most one stochastic member, got bayesian, second"):
        ask(twice(bundle, "bayesian"), roles={"bayesian": ("classifier",)})
