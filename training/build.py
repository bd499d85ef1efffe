"""`phalanx-train build`: train every member of a recipe, then export the bundle; the whole way from data in one command."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from training import export, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx-train build`: those of `train`, and where the bundle goes."""
    train.add_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, help="the bundle to write (default: <runs>/<recipe>/bundle)")


def run(args: argparse.Namespace) -> int:
    """Train, then export. Run again after a kill: it goes on."""
    if args.output is not None:
        export.check_output(args.output)
    failed = train.run(args)
    # Of several processes, each with a GPU of its own, the first exports.
    return failed or (export.run(args) if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0 else 0)
