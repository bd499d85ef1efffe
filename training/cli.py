"""`phalanx-train`: from a data set to a bundle, and from a bundle to what it withstands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from models.bundle import InvalidBundle
from models.composition import InvalidEnsemble
from training.refused import TrainingRefused


def main(arguments: list[str] | None = None) -> int:
    """Run a command; an error of the caller's is one sentence on stderr and exit code 2."""
    try:
        from training import build, export, train
        from training.evaluation import ablate, attack, evaluate, report
    except ModuleNotFoundError as error:
        sys.exit(f"phalanx-train: {error}; it needs the extra `train`: pip install 'phalanx-ensemble[train]'")
    modules = {"build": build, "train": train, "export": export, "evaluate": evaluate}
    modules |= {"attack": attack, "ablate": ablate, "report": report}
    parser = argparse.ArgumentParser(prog="phalanx-train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runners: dict[str, Callable[[argparse.Namespace], int]] = {}
    for name, module in modules.items():
        described = (module.__doc__ or "").split(": ", 1)[1]
        child = commands.add_parser(name, help=described, description=described)
        module.add_arguments(child)
        runners[name] = module.run
    args = parser.parse_args(arguments)
    try:
        return runners[args.command](args)
    except (TrainingRefused, InvalidBundle, InvalidEnsemble, OSError) as error:
        print(f"phalanx-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("phalanx-train: stopped; what was reached is kept, run the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
