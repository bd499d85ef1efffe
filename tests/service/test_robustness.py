"""A real server tells an ensemble's figures under attack where they were measured on that very ensemble, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.bundle import InvalidBundle
from service.cli import main
from service.graph_cache import GraphCache
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from tests.service.cards import ALL, CONJECTURE, DETECTORS, VANISHED, headline_of, system_card, write_carded_bundle
from tests.service.serving import Running, serving

SERVED: dict[str, tuple[dict[str, Any], float | None]] = {
    "full": ({}, 0.62),
    "full-by-another-name": ({"rule": "mixed", "review_rate": 0.2}, 0.62),
    "hard-vote": ({"rule": "majority", "detectors": []}, 0.4),
    "no-edge": ({"without": ["edge"]}, None),
    "votes-only": ({"detectors": []}, None),
    "listening": ({"roles": {"bayesian": ["detector"]}}, None),
    "fresh": ({"masks": "fresh"}, None),
}


@pytest.fixture(scope="module")
def carded(tmp_path_factory: pytest.TempPathFactory, graphs: GraphCache) -> Iterator[Running]:
    bundle = write_carded_bundle(tmp_path_factory.mktemp("carded") / "bundle")
    with serving(bundle, graphs, ensembles={name: configuration for name, (configuration, _) in SERVED.items()}) as server:
        yield server


def described(running: Running, ensemble: str = "") -> pb.Ensemble:
    return running.native.GetEnsemble(pb.GetEnsembleRequest(ensemble=ensemble)).ensemble


def test_the_headline_is_told_whole(carded: Running) -> None:
    assert described(carded).robustness == pb.Robustness(
        epsilon=4,
        images=300,
        clean=pb.Share(value=0.94, low=0.94 - 0.01, high=0.94 + 0.01),
        robust=pb.Share(value=0.62, low=0.62 - 0.01, high=0.62 + 0.01),
        robust_with_rejection=pb.Share(value=0.62 + 0.09, low=0.62 + 0.09 - 0.01, high=0.62 + 0.09 + 0.01),
        suite="quick",
        publishable=False,
        conjecture=CONJECTURE,
    )


@pytest.mark.parametrize(("name", "expected"), [(name, expected) for name, (_, expected) in SERVED.items()], ids=SERVED.keys())
def test_an_ensemble_has_its_own_figures_or_none(carded: Running, name: str, expected: float | None) -> None:
    ensemble = described(carded, name)
    assert ensemble.HasField("robustness") == (expected is not None)
    assert expected is None or ensemble.robustness.robust.value == expected
    assert (ensemble.robustness.conjecture == CONJECTURE) == (expected == 0.62)


def test_the_list_says_what_each_one_says(carded: Running) -> None:
    listed = carded.native.ListEnsembles(pb.ListEnsemblesRequest()).ensembles
    assert [ensemble.robustness for ensemble in listed] == [described(carded, name).robustness for name in SERVED]


def test_without_a_card_nothing_is_claimed(running: Running) -> None:
    assert not any(each.HasField("robustness") for each in running.native.ListEnsembles(pb.ListEnsemblesRequest()).ensembles)


def test_a_failed_check_is_told_and_nothing_is_publishable_then(tmp_path: Path, graphs: GraphCache) -> None:
    full = system_card("full", ALL, "mixed", DETECTORS, robust=0.62)
    headline = headline_of(full, 4, publishable=True)
    for folder, checks, publishable in ("sound", (), True), ("failed", (VANISHED,), False):
        bundle = write_carded_bundle(tmp_path / folder, headline=headline, systems=(full,), checks=checks, missing=())
        with serving(bundle, graphs, ensembles={"full": {}}) as server:
            told = described(server).robustness
        assert told.publishable == publishable
        assert list(told.failed_checks) == [f"{check.name}: {check.measured}" for check in checks]


def test_a_server_refuses_to_start_on_the_card_of_another_subject(
    tmp_path: Path, graphs: GraphCache, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_carded_bundle(tmp_path / "bundle", subject="0123456789ab")
    sentence = r"robustness-card\.json: expected figures of these members, [0-9a-f]{12}, got those of 0123456789ab"
    with pytest.raises(InvalidBundle, match=sentence), serving(bundle, graphs):
        pytest.fail("it started")
    assert main(["serve", "--check", "--bundle", str(bundle)]) == 1
    assert "phalanx serve: robustness-card.json: expected figures of these members" in capsys.readouterr().err
