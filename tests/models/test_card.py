"""A card comes back as it was written, and is refused by every bundle but the one it was measured on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.bundle import Bundle, BundleParts, write_bundle
from models.card import CARD_FILE, encode_card, measured_on, read_card
from models.composition import EnsembleChoice, compose
from models.ensemble import RuleName
from models.manifest import InvalidBundle
from tests.bundles import tiny_parts
from tests.service.cards import manifest_of, tiny_card, with_card


@pytest.fixture(scope="module")
def parts() -> BundleParts:
    return tiny_parts(images=100)


@pytest.fixture(scope="module")
def bundle(parts: BundleParts, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("carded") / "bundle", with_card(parts))


def test_a_card_comes_back_as_it_was_written(bundle: Bundle) -> None:
    card = read_card(bundle.manifest, bundle.documents)
    assert card == tiny_card(bundle.manifest)
    assert encode_card(card) == bundle.documents[CARD_FILE]


def test_without_a_card_there_is_none(parts: BundleParts) -> None:
    assert read_card(manifest_of(parts), parts.documents) is None


def test_a_document_that_is_added_leaves_version_and_subject_as_they_were(parts: BundleParts, bundle: Bundle) -> None:
    without = manifest_of(parts)
    assert without.version == bundle.manifest.version
    assert without.subject == bundle.manifest.subject


def _of_another_temperature(parts: BundleParts) -> BundleParts:
    return replace(parts, members=[replace(parts.members[0], temperature=2.0), *parts.members[1:]])


OTHER_SUBJECTS: dict[str, Callable[[BundleParts], BundleParts]] = {
    "another temperature": _of_another_temperature,
    "another alpha of the rule": lambda parts: replace(
        parts, subsets=[row.model_copy(update={"alpha": 0.6}) for row in parts.subsets]
    ),
    "masks of another seed": lambda parts: replace(parts, masks_seed=8),
    "other p-values": lambda parts: replace(parts, calibration=tiny_parts(seed=0, images=120).calibration),
}


@pytest.mark.parametrize("change", OTHER_SUBJECTS.values(), ids=OTHER_SUBJECTS.keys())
def test_the_card_of_another_subject_is_refused(parts: BundleParts, change: Callable[[BundleParts], BundleParts]) -> None:
    own, other = manifest_of(parts), manifest_of(change(parts))
    assert own.subject != other.subject
    sentence = f"{CARD_FILE}: expected figures of these members, {other.subject}, got those of {own.subject}"
    with pytest.raises(InvalidBundle, match=sentence):
        read_card(other, {CARD_FILE: encode_card(tiny_card(own))})


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param(b"{", "expected JSON, got Expecting property name", id="cut short"),
        pytest.param(b'{"name": "\xe9"}', "expected JSON, got .* codec can't decode", id="no text"),
        pytest.param(b"[" * 100_000, "expected JSON, got maximum recursion depth", id="nested without end"),
        pytest.param(b"[]", "Input should be a valid dictionary", id="no object"),
    ],
)
def test_what_is_no_json_object_is_refused(parts: BundleParts, data: bytes, sentence: str) -> None:
    with pytest.raises(InvalidBundle, match=f"^{CARD_FILE}: {sentence}"):
        read_card(manifest_of(parts), {CARD_FILE: data})


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a figure above one": (lambda card: card["headline"]["robust"].update(value=1.5), r"headline\.robust\.value: .*got 1\.5"),
    "a figure that is no number": (lambda card: card["headline"]["robust"].update(low=float("nan")), r"finite number, got nan"),
    "a key nobody knows": (lambda card: card.update(promised=True), "promised: Extra inputs are not permitted"),
    "a key that is missing": (lambda card: card.pop("checks"), "checks: Field required"),
    "a later schema": (lambda card: card.update(schema_version=2), "schema_version: Input should be 1, got 2"),
    "a headline of no system": (
        lambda card: card["headline"].update(ensemble="half"),
        "expected a headline of one of full, votes, got half",
    ),
    "a headline better than its system": (
        lambda card: card["headline"]["robust"].update(value=0.63),
        "expected a headline with the figures of its system full, got others",
    ),
    "a headline at a smaller epsilon": (lambda card: card["headline"].update(epsilon=1), "expected a headline at epsilon 4, got 1"),
    "a system twice": (lambda card: card["systems"].append(card["systems"][0]), "every system once, got full, votes, full"),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_card_is_refused(parts: BundleParts, damage: Callable[[dict[str, Any]], object], sentence: str) -> None:
    manifest = manifest_of(parts)
    document = tiny_card(manifest).model_dump(mode="json")
    damage(document)
    with pytest.raises(InvalidBundle, match=f"^{CARD_FILE}: .*{sentence}"):
        read_card(manifest, {CARD_FILE: json.dumps(document).encode()})


COMPOSED: dict[str, tuple[dict[str, Any], str | None]] = {
    "as measured": ({}, "full"),
    "under other rates": ({"review_rate": 0.2, "reject_rate": 0.1}, "full"),
    "the rule named that is the default": ({"rule": RuleName.MIXED}, "full"),
    "another system of the card": ({"rule": RuleName.MAJORITY, "detectors": ()}, "votes"),
    "without a member": ({"without": ("edge",)}, None),
    "under another rule": ({"rule": RuleName.SOFT}, None),
    "without detectors": ({"detectors": ()}, None),
    "with fewer detectors": ({"detectors": ("distance",)}, None),
    "a member that only listens": ({"roles": {"bayesian": ("detector",)}}, None),
    "fresh masks": ({"masks": "fresh"}, None),
}


@pytest.mark.parametrize(("choice", "expected"), COMPOSED.values(), ids=COMPOSED.keys())
def test_figures_are_of_the_ensemble_that_was_attacked(bundle: Bundle, choice: dict[str, Any], expected: str | None) -> None:
    ensemble = compose(bundle, EnsembleChoice(name="served", **choice))
    found = measured_on(tiny_card(bundle.manifest), bundle.manifest, ensemble)
    assert (found and found.name) == expected


def test_a_detector_that_two_members_could_feed_has_no_figures(parts: BundleParts, tmp_path: Path) -> None:
    edge = next(index for index, member in enumerate(parts.members) if member.name == "edge")
    members = list(parts.members)
    members[edge] = replace(members[edge], centers=True)
    twice = write_bundle(tmp_path / "bundle", replace(parts, members=members))
    ensemble = compose(twice, EnsembleChoice(name="served", roles={"edge": ("classifier",)}))
    assert [detector.member for detector in ensemble.detectors] == ["bayesian", "bayesian", None, "metric", None]
    assert measured_on(tiny_card(twice.manifest), twice.manifest, ensemble) is None
