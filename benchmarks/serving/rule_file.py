"""An ensemble as two files, for a peer that decides with models/ensemble.py itself; NumPy and nothing else of ours is needed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from models.ensemble import Detector, DetectorName, Ensemble, RuleName, Voter

NUMBERS, TABLES = "ensemble.json", "tables.npz"
# What every server answers with; all are columns of a decision. Triton's types beside those of the protocol.
OUTPUTS = {
    "label": ("INT64", "int64"),
    "verdict": ("INT64", "int64"),
    "p_value": ("FP32", "float32"),
    "probabilities": ("FP32", "float32"),
}


def write_rule(folder: Path, ensemble: Ensemble) -> None:
    numbers = asdict(ensemble)
    tables, combined = numbers.pop("tables"), numbers.pop("combined")
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=2))
    np.savez(folder / TABLES, combined=combined, **{f"table{index}": table for index, table in enumerate(tables)})


def read_rule(folder: Path) -> Ensemble:
    numbers = json.loads((folder / NUMBERS).read_text())
    numbers["voters"] = tuple(Voter(**voter) for voter in numbers["voters"])
    numbers["detectors"] = tuple(
        Detector(DetectorName(each["name"]), each["member"], each["decides"]) for each in numbers["detectors"]
    )
    numbers["rule"] = RuleName(numbers["rule"])
    with np.load(folder / TABLES) as arrays:
        tables = tuple(arrays[f"table{index}"] for index in range(len(numbers["detectors"])) if f"table{index}" in arrays)
        return Ensemble(**numbers, tables=tables, combined=arrays["combined"])
