"""Draw the real tiles that this repository ships from a complete EuroSAT folder.

    python tests/data/draw_sample.py DATA_FOLDER

DATA_FOLDER holds one parquet file per split, as `datasets.load_dataset` reads it. Written are `tests/data/eurosat`, for
the tests, drawn from its train split, and `examples/tiles`, for people, drawn from its test split, which no member has
seen. The draw is uniform within each class and depends on SEED alone; no model was asked.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

SEED = 42
PER_CLASS = {"train": 40, "validation": 10, "test": 5}  # tiles of each class in tests/data/eurosat
EXAMPLES_PER_CLASS = 2
PARQUET = "{split}-00000-of-00001.parquet"


def class_names(table: pa.Table) -> list[str]:
    """The names that the Hugging Face metadata of the parquet schema give the labels."""
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    return list(features["label"]["names"])


def draw(labels: NDArray[np.int64], per_class: int, generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """For each class the indices of `per_class` different tiles, in the order in which they were drawn."""
    classes = range(int(labels.max()) + 1)
    return [generator.choice(np.flatnonzero(labels == y), per_class, replace=False) for y in classes]


def write_sample(source: Path, target: Path, generator: np.random.Generator) -> None:
    """One draw from the train split, split again into three small files; the JPEG bytes stay as published."""
    table = pq.read_table(source / PARQUET.format(split="train"))
    drawn = draw(table["label"].to_numpy(), sum(PER_CLASS.values()), generator)
    target.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, per_class in PER_CLASS.items():
        chosen = np.sort(np.concatenate([of_class[start : start + per_class] for of_class in drawn]))
        pq.write_table(table.take(chosen), target / PARQUET.format(split=split))
        start += per_class
    shutil.copyfile(source / "LICENSE", target / "LICENSE")


def write_examples(source: Path, target: Path, generator: np.random.Generator) -> None:
    """A few tiles of each class as PNG, pixel for pixel what the published JPEG decodes to."""
    table = pq.read_table(source / PARQUET.format(split="test"))
    drawn = draw(table["label"].to_numpy(), EXAMPLES_PER_CLASS, generator)
    target.mkdir(parents=True, exist_ok=True)
    for name, of_class in zip(class_names(table), drawn, strict=True):
        stem = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()  # AnnualCrop: annual-crop
        for number, index in enumerate(of_class, start=1):
            encoded = table["image"][int(index)].as_py()["bytes"]
            with Image.open(io.BytesIO(encoded)) as image:
                image.convert("RGB").save(target / f"{stem}-{number}.png", optimize=True)
    shutil.copyfile(source / "LICENSE", target / "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_folder", type=Path, help="holds train- and test-00000-of-00001.parquet and LICENSE")
    source = parser.parse_args().data_folder
    repository = Path(__file__).resolve().parents[2]
    write_sample(source, repository / "tests" / "data" / "eurosat", np.random.default_rng([SEED, 0]))
    write_examples(source, repository / "examples" / "tiles", np.random.default_rng([SEED, 1]))


if __name__ == "__main__":
    main()
