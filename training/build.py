"""`phalanx-train build`: train every member of a recipe, then export the bundle; the whole way from data in one command."""

from __future__ import annotations

import argparse
from pathlib import Path

from training import export, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx-train build`: those of `train`, and where the bundle goes."""
    train.add_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, help="the bundle to write (default: <runs>/<recipe>/bundle)")


def run(args: argparse.Namespace) -> int:
    """Train, then export. Run again after a kill: it goes on."""
    return train.run(args) or export.run(args)
