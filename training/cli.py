"""`phalanx-train`: from a data set to a bundle, and from a bundle to what it withstands."""

from __future__ import annotations

import argparse
import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from models.bundle import InvalidBundle
from models.composition import InvalidEnsemble
from training.refused import TrainingRefused

COMMANDS = {
    "build": "training.build",
    "train": "training.train",
    "export": "training.export",
    "evaluate": "training.evaluation.evaluate",
    "attack": "training.evaluation.attack",
    "ablate": "training.evaluation.ablate",
    "report": "training.evaluation.report",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; an error of the caller's is one sentence on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="phalanx-train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, path in COMMANDS.items():
        about = _about(path)
        child = commands.add_parser(name, help=about, description=about)
        if arguments[:1] == [name]:  # the others are not imported: torch and its like take seconds
            module = _imported(path)
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except (TrainingRefused, InvalidBundle, InvalidEnsemble, OSError) as error:
        print(f"phalanx-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("phalanx-train: stopped; what was reached is kept, run the same command to go on", file=sys.stderr)
        return 130


def _about(path: str) -> str:
    """What the docstring of a command's module says behind its name, read without importing it."""
    found = find_spec(path)
    source = Path(str(found and found.origin)).read_text(encoding="utf-8")
    return str(ast.get_docstring(ast.parse(source))).split(": ", 1)[1]


def _imported(path: str) -> ModuleType:
    try:
        return import_module(path)
    except ModuleNotFoundError as error:
        sys.exit(f"phalanx-train: {error}; it needs the extra `train`: pip install 'phalanx-ensemble[train]'")


if __name__ == "__main__":
    raise SystemExit(main())
