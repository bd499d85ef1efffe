"""The ensemble against one network of its size: measured on the same images, or refused."""

from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import read_bundle, write_bundle
from models.card import CARD_FILE, Card
from tests.training.commands import SMOKE, answered, phalanx_train
from training.data import load_splits, splits_of
from training.evaluation import equal_size
from training.evaluation.campaign import Campaign
from training.evaluation.card import NO_CONTROL, compared
from training.evaluation.report import finished
from training.evaluation.scores import REVIEW, ledger, mcnemar
from training.evaluation.subjects import full_and_members
from training.evaluation.suites import suite
from training.recipe import DataRecipe
from training.refused import TrainingRefused

RECIPE = """
name: one-network
data: {source: tests/data/eurosat, symmetry: dihedral, shift: 2}
epsilon: 4
seed: 0
members:
  adversarial:
    network: {backbone: {widths: [18, 36], blocks: [1, 1], stem_kernel: 7, stem_stride: 4}}
    attack: {steps: 1, step_factor: 1.25}
    schedule: {epochs: 2, batch_size: 32, learning_rate: 0.1, ema_decay: 0.9}
calibration: {images: 16, steps: 2, rounds: 1}
licenses: {weights: MIT}
"""


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one network, with a few more parameters than the four of the smoke recipe have together."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "recipe.yaml").write_text(RECIPE)
    bundle = folder / "bundle"
    ended = phalanx_train("build", str(folder / "recipe.yaml"), "--runs", str(folder / "runs"), "-o", str(bundle))
    assert ended.returncode == 0, ended.stderr
    return bundle


@pytest.fixture(scope="module")
def attacked(built: Path, folder: Path, control: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """The campaign of each bundle; the ensemble's, with an ablation, is a copy."""
    folders = {bundle: tmp_path_factory.mktemp("campaign") / "of" for bundle in (built, control)}
    shutil.copytree(folder, folders[built])
    ended = phalanx_train("attack", str(control), *SMOKE, "--out", str(folders[control]))
    assert ended.returncode == 0, ended.stderr
    return folders


def campaign(bundle: Path, folder: Path) -> Campaign:
    read = read_bundle(bundle)
    return Campaign(folder, read, splits_of(read, None), suite("smoke"), 8, 0, torch.device("cpu"))


def arguments(control: Path, folder: Path) -> Namespace:
    """Of a report, as far as they concern the control."""
    return Namespace(
        control=control, control_out=folder, data=None, suite="smoke", images=None, seed=0, jobs=1, shard=(1, 1), threads=1
    )  # fmt: skip


def test_the_report_holds_the_ensemble_against_it(built: Path, control: Path, attacked: dict[Path, Path]) -> None:
    options = ("--control", str(control), "--control-out", str(attacked[control]))
    ended = phalanx_train("report", str(built), *SMOKE, "--out", str(attacked[built]), *options)
    assert ended.returncode == 0, ended.stderr
    card = Card.model_validate_json((attacked[built] / CARD_FILE).read_bytes())
    found = card.equal_size
    assert found is not None

    right = []
    for bundle, folder in attacked.items():
        each = campaign(bundle, folder)
        ensemble = each.system(full_and_members(each.bundle.manifest)[-1]).ensemble
        counted = ledger(each, ensemble, finished(each)).where(lambda row: row.counts)
        right.append((counted.robust, counted.robust_at(REVIEW)))
    for held, mine, theirs in zip((found.compared, found.compared_rejecting_5), *right, strict=True):
        won, lost = int(np.sum(mine & ~theirs)), int(np.sum(theirs & ~mine))
        assert (held.won, held.lost, held.p_value) == (won, lost, mcnemar(won, lost))
        assert held.robust == pytest.approx(mine.mean() - theirs.mean())
    assert found.robust.value == pytest.approx(right[1][0].mean())
    assert found.parameters >= found.members_parameters == 27230

    assert NO_CONTROL not in card.missing
    assert "One adversarially trained network as large as all members" in card.headline.conjecture
    assert card.commands[-1].endswith(f"--control {control}")
    assert [check.passed for check in card.checks if "the one network is finite" in check.name] == [True]
    assert found.bundle in (attacked[built] / "report.html").read_text(encoding="utf-8")


def test_a_control_that_was_not_attacked_says_what_to_type(
    built: Path, control: Path, attacked: dict[Path, Path], tmp_path: Path
) -> None:
    options = ("--data", "tests/data/eurosat", "--control", str(control), "--control-out", str(tmp_path))
    ended = answered("report", str(built), *SMOKE, "--out", str(attacked[built]), *options)
    assert ended.returncode == 2
    command = f"phalanx-train attack {control} --suite smoke --images 8 --seed 0 --data tests/data/eurosat --out {tmp_path}"
    assert f"attack the control first: {command}\n" in ended.stderr


def test_a_folder_for_no_control_is_not_passed_over(built: Path, tmp_path: Path) -> None:
    ended = answered("report", str(built), *SMOKE, "--control-out", str(tmp_path))
    assert ended.returncode == 2
    assert f"--control-out {tmp_path}: expected --control BUNDLE beside it, got none" in ended.stderr


def test_the_folder_of_the_ensemble_is_not_the_control_s(built: Path, control: Path, attacked: dict[Path, Path]) -> None:
    with pytest.raises(TrainingRefused, match=r"holds another campaign: expected bundle .*; give another folder"):
        equal_size.open_control(arguments(control, attacked[built]), campaign(built, attacked[built]))


@pytest.mark.parametrize(
    ("won", "lost", "says"),
    [
        pytest.param(5, 5, "shows no difference", id="as many won as lost"),
        pytest.param(1, 6, "shows no difference", id="five apart, which chance may do"),
        pytest.param(3, 12, "is more robust", id="the one network won"),
        pytest.param(12, 3, "is less robust", id="the ensemble won"),
    ],
)
def test_only_what_chance_hardly_does_is_called_a_difference(won: int, lost: int, says: str) -> None:
    one = np.arange(100)
    found = compared("full", "one", one >= lost, (one < lost) | (one >= lost + won), 0.0)
    assert (found.won, found.lost) == (won, lost)
    assert f"as large as all members {says} (" in equal_size.sentence(found, 100)


def test_several_classifiers_are_no_control(built: Path, attacked: dict[Path, Path]) -> None:
    with pytest.raises(TrainingRefused, match="expected a bundle of one classifier, got adversarial, bayesian, edge, metric"):
        equal_size.open_control(arguments(built, attacked[built]), campaign(built, attacked[built]))


def test_the_one_classifier_of_the_ensemble_itself_is_no_control(control: Path, attacked: dict[Path, Path]) -> None:
    with pytest.raises(TrainingRefused, match="expected another network than the ensemble's own, got the same"):
        equal_size.open_control(arguments(control, attacked[control]), campaign(control, attacked[control]))


def test_a_network_trained_on_the_test_images_is_no_control(
    built: Path, control: Path, attacked: dict[Path, Path], tmp_path: Path
) -> None:
    parts = read_bundle(control).parts()
    data = {"source": "tests/data/eurosat", "train": "test", "test": "validation", "calibration": "train"}
    provenance = parts.provenance.model_copy(
        update={
            "recipe": {**parts.provenance.recipe, "data": data},
            "data_fingerprint": load_splits(DataRecipe.model_validate(data)).fingerprint,
        }
    )
    write_bundle(tmp_path / "bundle", replace(parts, provenance=provenance))
    with pytest.raises(TrainingRefused, match="expected one made of the ensemble's images and splits"):
        equal_size.open_control(arguments(tmp_path / "bundle", tmp_path / "campaign"), campaign(built, attacked[built]))


def test_a_smaller_network_is_no_control(
    built: Path, control: Path, attacked: dict[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equal_size, "SMALLER", 2.0)
    with pytest.raises(TrainingRefused, match=r"about the 27,230 parameters .* a smaller network proves nothing"):
        equal_size.open_control(arguments(control, attacked[control]), campaign(built, attacked[built]))
