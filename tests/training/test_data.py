"""Loading real images: parquet as the hub lays it out, class folders, and what is refused."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from models.manifest import InputSpec
from service.images import PixelBudget, decode_image
from training.data import InvalidData, load_splits, stratified_split
from training.recipe import DataRecipe

SAMPLE = Path(__file__).parents[1] / "data" / "eurosat"
RECIPE = DataRecipe(source=str(SAMPLE), symmetry="dihedral")


def test_a_parquet_folder_gives_disjoint_splits_with_every_class() -> None:
    splits = load_splits(RECIPE)

    assert splits.shape == (64, 64, 3)
    assert len(splits.classes) == 10
    whole = datasets.load_dataset(str(SAMPLE))
    assert len(splits.fit) + len(splits.held_out) == len(whole["train"])
    assert len(splits.calibration) == len(whole["validation"])
    assert set(splits.held_out.labels.tolist()) == set(range(10))
    prints = [hash(image.tobytes()) for part in (splits.fit, splits.held_out) for image in part.pixels]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_follows_the_split_seed() -> None:
    other = RECIPE.model_copy(update={"split_seed": 43})
    assert load_splits(RECIPE).fingerprint == load_splits(RECIPE).fingerprint
    assert load_splits(RECIPE).fingerprint != load_splits(other).fingerprint


def test_calibration_images_can_be_held_out_of_train() -> None:
    splits = load_splits(RECIPE.model_copy(update={"calibration": 50}))
    assert len(splits.calibration) == 50
    assert collections.Counter(splits.calibration.labels.tolist()) == dict.fromkeys(range(10), 5)


def test_several_splits_can_be_trained_on() -> None:
    whole = datasets.load_dataset(str(SAMPLE))
    splits = load_splits(RECIPE.model_copy(update={"train": "train+validation", "calibration": 50}))
    used = [image.tobytes() for part in (splits.fit, splits.held_out, splits.calibration) for image in part.pixels]
    alone = [
        image.tobytes()
        for source in ("train", "validation")
        for image in load_splits(DataRecipe(source=str(SAMPLE), train=source, calibration=50, held_out=0.1)).fit.pixels
    ]
    assert len(used) == len(set(used)) == len(whole["train"]) + len(whole["validation"])
    assert set(alone) < set(used)


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"train": "train+validation"}, "validation"),
        ({"train": "train+test", "calibration": 50}, "test"),
        ({"train": "train+train"}, "train"),
        ({"calibration": "test"}, "test"),
    ],
)
def test_no_split_has_two_uses(change: dict[str, object], shared: str) -> None:
    with pytest.raises(ValidationError, match=f"should share no split, but {shared} is named twice; to train on it"):
        DataRecipe.model_validate({"source": str(SAMPLE), **change})


def test_splits_trained_on_have_images_of_one_size(tmp_path: Path) -> None:
    for split, side in (("train", 8), ("validation", 9)):
        for name in ("forest", "lake"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(folder / f"{i}.png")
    with pytest.raises(InvalidData, match=r"the validation images have shape \(9, 9, 3\), the train images \(8, 8, 3\)"):
        load_splits(DataRecipe(source=str(tmp_path), train="train+validation", test=2, calibration=2))


def test_class_folders_are_read_as_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for name in ("forest", "lake"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")

    splits = load_splits(DataRecipe(source=str(tmp_path), calibration=4, held_out=0.25))

    assert splits.classes == ("forest", "lake")
    assert [len(part) for part in (splits.fit, splits.held_out, splits.calibration, splits.test)] == [12, 4, 4, 4]


def test_class_folders_without_splits_give_up_what_a_recipe_holds_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("forest", "lake"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    splits = load_splits(DataRecipe(source=str(tmp_path), test=4, calibration=4, held_out=0.25))
    assert [len(part) for part in (splits.fit, splits.held_out, splits.calibration, splits.test)] == [9, 3, 4, 4]
    assert splits.source == f"folder {tmp_path.name!r}"
    with pytest.raises(InvalidData, match="may also say how many training images to hold out"):
        load_splits(DataRecipe(source=str(tmp_path)))


def test_images_are_decoded_as_serving_decodes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spec = InputSpec(height=8, width=8, channels=3)
    for name in ("forest", "lake"):
        (tmp_path / name).mkdir()
        for i in range(6):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8), "RGBA")
            image.save(tmp_path / name / f"{i}.png")
    splits = load_splits(DataRecipe(source=str(tmp_path), test=2, calibration=2, held_out=0.25))
    ours = {pixels.tobytes() for part in (splits.fit, splits.held_out, splits.calibration, splits.test) for pixels in part.pixels}
    served = {decode_image(path.read_bytes(), spec, PixelBudget()).array.tobytes() for path in tmp_path.rglob("*.png")}
    assert ours == served


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:60]), "image 3 of train: .*truncated", id="a file cut short"),
        pytest.param(
            lambda path: Image.fromarray(np.zeros((8, 8), np.uint16)).save(path), "expected 8 bits per channel", id="16 bits"
        ),
    ],
)
def test_an_image_that_cannot_be_used_is_named(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    rng = np.random.default_rng(0)
    for name in ("forest", "lake"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    spoil(tmp_path / "forest" / "3.png")
    with pytest.raises(InvalidData, match=says):
        load_splits(DataRecipe(source=str(tmp_path), test=2, calibration=2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"source": "/nowhere/at/all"}, "cannot load images from '/nowhere/at/all'", id="no such folder"),
        pytest.param({"test": "exam"}, "expected a split 'exam', found train, validation, test", id="no such split"),
        pytest.param({"calibration": 100_000}, "cannot hold out 100000 of", id="more held out than there is"),
    ],
)
def test_what_a_recipe_needs_and_the_data_lacks_is_said(change: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidData, match=says):
        load_splits(RECIPE.model_copy(update=change))


def test_images_of_different_size_are_refused(tmp_path: Path) -> None:
    for i, side in enumerate((8, 8, 9, 8)):
        folder = tmp_path / "train" / ("a" if i % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(folder / f"{i}.png")
    with pytest.raises(InvalidData, match=r"expected images alike, got height, width and channels \(9, 9, 3\) for image"):
        load_splits(DataRecipe(source=str(tmp_path), test=2, calibration=2))


def test_a_stratified_split_keeps_proportions_and_is_repeatable() -> None:
    labels = np.repeat(np.arange(3), [60, 30, 10])
    rest, taken = stratified_split(labels, 10, seed=1)
    assert np.bincount(labels[taken]).tolist() == [6, 3, 1]
    assert sorted([*rest, *taken]) == list(range(100))
    assert np.array_equal(taken, stratified_split(labels, 10, seed=1)[1])
