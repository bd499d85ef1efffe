"""Images from a hub id, a folder that `datasets.load_dataset` reads, or a folder of class folders, as uint8 arrays."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.bundle import Bundle
from models.transparency import over_black
from training.recipe import DataRecipe
from training.refused import TrainingRefused

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


class InvalidData(TrainingRefused):
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
    source: str  # where they came from
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
    train, classes = _read_all(loaded, recipe.training_splits, where)
    parts: dict[str, Images] = {}
    for name, chosen in (("test", recipe.test), ("calibration", recipe.calibration)):
        if isinstance(chosen, int):
            rest, taken = stratified_split(train.labels, chosen, recipe.split_seed)
            train, parts[name] = train.take(rest), train.take(taken)
        else:
            parts[name], _ = _read(loaded, chosen, where)
    test, calibration = parts["test"], parts["calibration"]
    rest, taken = stratified_split(train.labels, round(recipe.held_out * len(train)), recipe.split_seed)
    fit, held_out = train.take(rest), train.take(taken)
    for name, part in parts.items():
        if part.pixels.shape[1:] != fit.pixels.shape[1:]:
            raise InvalidData(
                f"{where}: the {name} images have shape {part.pixels.shape[1:]}, training images {fit.pixels.shape[1:]}"
            )
    digest = hashlib.sha256()
    for part in (fit, held_out, calibration, test):
        digest.update(part.pixels.tobytes())
        digest.update(part.labels.tobytes())
    return Splits(fit, held_out, calibration, test, classes, _named(recipe, source), digest.hexdigest())


def splits_of(bundle: Bundle, source: str | None, other_data: bool = False) -> Splits:
    """The splits that a bundle was made with; other data is refused unless it is asked for."""
    provenance = bundle.manifest.provenance
    splits = load_splits(DataRecipe.model_validate(provenance.recipe["data"]), source)
    if splits.fingerprint != provenance.data_fingerprint and not other_data:
        raise TrainingRefused(
            f"{splits.source}: expected the very images and splits that the bundle was made with ({provenance.data_name}); "
            f"the test split of others may hold what it was trained on (evaluate --other-data scores them all the same)"
        )
    return splits


def _named(recipe: DataRecipe, source: str | None) -> str:
    """The source for people to read: a hub id with its revision, a folder by its name, wherever it lies."""
    if source is None and recipe.revision:
        return f"{recipe.source}@{recipe.revision}"
    where = source or recipe.source
    return f"folder {Path(where).resolve().name!r}" if Path(where).is_dir() else where


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
    try:
        return datasets.load_dataset(where, revision=revision)
    except Exception as error:  # the library raises a dozen unrelated types here; all mean the same to the caller
        raise InvalidData(
            f"cannot load images from {where!r}: expected a hub id, a folder with parquet files, or a folder of class folders"
            f" ({type(error).__name__}: {error})"
        ) from error


def _read_all(loaded: datasets.DatasetDict, names: list[str], where: str) -> tuple[Images, tuple[str, ...]]:
    """Several splits as one, in the order of their names."""
    read = [_read(loaded, name, where) for name in names]
    first, classes = read[0]
    for name, (part, _) in zip(names, read, strict=True):
        if part.pixels.shape[1:] != first.pixels.shape[1:]:
            raise InvalidData(
                f"{where}: the {name} images have shape {part.pixels.shape[1:]}, the {names[0]} images {first.pixels.shape[1:]}"
            )
    return Images(np.concatenate([part.pixels for part, _ in read]), np.concatenate([part.labels for part, _ in read])), classes


def _read(loaded: datasets.DatasetDict, split: str, where: str) -> tuple[Images, tuple[str, ...]]:
    if split not in loaded:
        raise InvalidData(
            f"{where}: expected a split {split!r}, found {', '.join(map(str, loaded)) or 'none'}; a recipe's data.test and "
            f"data.calibration may also say how many training images to hold out"
        )
    table = loaded[split]
    image_column = _column(table, IMAGE_COLUMNS, where)
    label_column = _column(table, LABEL_COLUMNS, where)
    feature = table.features[label_column]
    if not isinstance(feature, datasets.ClassLabel):
        raise InvalidData(f"{where}: column {label_column!r} should be a ClassLabel with names, is {feature}")
    table = table.cast_column(image_column, datasets.Image(decode=False))
    labels = np.asarray(table[label_column], dtype=np.int64)
    if len(labels) == 0 or labels.min() < 0:
        raise InvalidData(
            f"{where}: expected labeled images in {split}, got {int((labels < 0).sum())} of {len(labels)} without one"
        )
    pixels: NDArray[np.uint8] | None = None
    for i in range(len(table)):
        try:
            decoded = _decode(table[i][image_column])
        except (OSError, SyntaxError, InvalidData) as error:  # Pillow raises either over a broken file
            raise InvalidData(f"{where}: image {i} of {split}: {error}") from error
        if pixels is None:
            pixels = np.empty((len(table), *decoded.shape), dtype=np.uint8)
        if decoded.shape != pixels.shape[1:]:
            raise InvalidData(
                f"{where}: expected images alike, got height, width and channels {decoded.shape} for image {i} of {split} and "
                f"{pixels.shape[1:]} for those before it"
            )
        pixels[i] = decoded
    assert pixels is not None
    return Images(pixels, labels), tuple(feature.names)


def _column(table: datasets.Dataset, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    hint = "; of class folders there must be two or more" if table.column_names == ["image"] else ""
    raise InvalidData(f"{where}: expected a column named {' or '.join(names)}, found {', '.join(table.column_names)}{hint}")


def _decode(stored: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Pixels (h, w, c) as serving would see them: what is transparent is black, and 16 bits are refused.

    `stored` is how `datasets` keeps an image: its encoded `bytes`, or the `path` of its file.
    """
    encoded = stored["bytes"]
    with Image.open(Path(stored["path"]) if encoded is None else io.BytesIO(encoded)) as picture:
        picture.load()
        return _pixels(picture)


def _pixels(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode.startswith(("I", "F")):
        raise InvalidData(f"expected 8 bits per channel, got Pillow's mode {picture.mode}")
    picture = over_black(picture)
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
