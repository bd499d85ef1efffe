"""Images from a hub id, a folder that `datasets.load_dataset` reads, or a folder of class folders, as uint8 arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.recipe import DataRecipe

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


class InvalidData(ValueError):
    """A data set that does not hold what a recipe needs; says what was expected and what came."""


@dataclass(frozen=True)
class Images:
    """Pixels (n, h, w, c) uint8 and labels (n,) int64."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Images:
        """The images at `index`, in its order."""
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Splits:
    """What each image is for: `fit` trains, `held_out` fits temperatures and weights, `calibration` the detector
    tables, `test` is only ever scored."""

    fit: Images
    held_out: Images
    calibration: Images
    test: Images
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of every image."""
        h, w, c = self.fit.pixels.shape[1:]
        return h, w, c


def load_splits(recipe: DataRecipe, source: str | None = None) -> Splits:
    """Read every split. `source` overrides the recipe's, so that a local folder can stand in for a hub id."""
    where = source or recipe.source
    loaded = _load(where, recipe.revision if source is None else None)
    train, classes = _read(loaded, recipe.train, where)
    test, _ = _read(loaded, recipe.test, where)
    if isinstance(recipe.calibration, int):
        rest, taken = stratified_split(train.labels, recipe.calibration, recipe.split_seed)
        train, calibration = train.take(rest), train.take(taken)
    else:
        calibration, _ = _read(loaded, recipe.calibration, where)
    rest, taken = stratified_split(train.labels, round(recipe.held_out * len(train)), recipe.split_seed)
    fit, held_out = train.take(rest), train.take(taken)
    for name, part in (("test", test), ("calibration", calibration)):
        if part.pixels.shape[1:] != fit.pixels.shape[1:]:
            raise InvalidData(
                f"{where}: the {name} images have shape {part.pixels.shape[1:]}, training images {fit.pixels.shape[1:]}"
            )
    digest = hashlib.sha256()
    for part in (fit, held_out, calibration, test):
        digest.update(part.pixels.tobytes())
        digest.update(part.labels.tobytes())
    return Splits(fit, held_out, calibration, test, classes, digest.hexdigest())


def stratified_split(labels: NDArray[np.int64], take: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rest, taken): indices in rising order, `take` of them taken with every class in proportion (largest remainder)."""
    n = len(labels)
    if not 0 < take < n:
        raise InvalidData(f"cannot hold out {take} of {n} images")
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * take / n
    share = np.floor(exact).astype(np.int64)
    share[np.argsort(share - exact, kind="stable")[: take - share.sum()]] += 1
    taken = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, share, strict=True)])
    mask = np.zeros(n, dtype=bool)
    mask[taken] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def _load(where: str, revision: str | None) -> datasets.DatasetDict:
    folder = Path(where)
    try:
        if folder.is_dir() and not _has_data_files(folder):
            return datasets.load_dataset("imagefolder", data_dir=str(folder))
        return datasets.load_dataset(where, revision=revision)
    except Exception as error:  # the library raises a dozen unrelated types here; all mean the same to the caller
        raise InvalidData(
            f"cannot load images from {where!r}: expected a hub id, a folder with parquet files, or a folder of class folders"
            f" ({type(error).__name__}: {error})"
        ) from error


def _has_data_files(folder: Path) -> bool:
    return any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))


def _read(loaded: datasets.DatasetDict, split: str, where: str) -> tuple[Images, tuple[str, ...]]:
    if split not in loaded:
        raise InvalidData(f"{where}: expected a split {split!r}, found {', '.join(map(str, loaded)) or 'none'}")
    table = loaded[split]
    image_column = _column(table, IMAGE_COLUMNS, where)
    label_column = _column(table, LABEL_COLUMNS, where)
    feature = table.features[label_column]
    if not isinstance(feature, datasets.ClassLabel):
        raise InvalidData(f"{where}: column {label_column!r} should be a ClassLabel with names, is {feature}")
    table = table.cast_column(image_column, datasets.Image(decode=True))
    labels = np.asarray(table[label_column], dtype=np.int64)
    first = _decode(table[0][image_column])
    pixels = np.empty((len(table), *first.shape), dtype=np.uint8)
    for i, picture in enumerate(table[image_column]):
        decoded = _decode(picture)
        if decoded.shape != first.shape:
            raise InvalidData(
                f"{where}: image {i} of {split} has shape {decoded.shape}, the first {first.shape}; resize them alike first"
            )
        pixels[i] = decoded
    return Images(pixels, labels), tuple(feature.names)


def _column(table: datasets.Dataset, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise InvalidData(f"{where}: expected a column named {' or '.join(names)}, found {', '.join(table.column_names)}")


def _decode(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
