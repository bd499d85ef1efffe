"""`phalanx-train train`: the members of a recipe, one after the other or several processes at a time."""

from __future__ import annotations

import argparse
import io
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning_fabric import Fabric

from training.children import end_with_parent
from training.data import load_splits
from training.lock import only_process
from training.loop import train_member
from training.progress import Progress
from training.recipe import add_precision, load_recipe
from training.refused import TrainingRefused

SLOW = (
    "this CPU has no bfloat16 units: training in bf16-mixed takes many times as long as in float32 here; "
    "stop, and give --precision 32-true"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx-train train`."""
    parser.add_argument("recipe", help="eurosat, fashion-mnist, smoke, or the path of a recipe's YAML file")
    parser.add_argument("--data", help="a local folder, or another hub id, in place of the recipe's data source")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where checkpoints, curves and weights go (default: %(default)s)"
    )
    parser.add_argument("--members", nargs="+", metavar="NAME", help="train these only (default: all of the recipe's)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="members trained side by side, each in its own process (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of each process (default: the cores divided by --jobs)")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--devices", default="auto", help="how many devices, or auto; use torchrun for several GPUs")
    add_precision(parser)
    parser.add_argument("--line", type=int, default=0, help=argparse.SUPPRESS)  # the terminal line of this process's bar


def run(args: argparse.Namespace) -> int:
    """Train; weights end up in `<runs>/<recipe>/<member>.safetensors`. Run again after a kill: it goes on."""
    recipe = load_recipe(args.recipe, args.precision)
    if args.jobs < 1:
        raise TrainingRefused(f"--jobs: expected 1 or more, got {args.jobs}")
    kinds = list(recipe.members) if not args.members else list(dict.fromkeys(args.members))
    unknown = [kind for kind in kinds if kind not in recipe.members]
    if unknown:
        raise TrainingRefused(f"recipe {recipe.name} has no member {', '.join(unknown)}; it has {', '.join(recipe.members)}")
    threads = args.threads or max(1, (torch.get_num_threads()) // args.jobs)
    if args.jobs > 1 and len(kinds) > 1:
        return _side_by_side(args, kinds, threads)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        fabric = Fabric(accelerator=args.accelerator, devices=args.devices, precision=recipe.precision)
        fabric.launch()
    except (RuntimeError, TypeError, ValueError) as error:  # Lightning's, over devices that are not there
        raise TrainingRefused(f"--accelerator {args.accelerator} --devices {args.devices}: {error}") from error
    if recipe.precision == "bf16-mixed" and fabric.device.type == "cpu" and not has_bfloat16_units() and args.line == 0:
        print(SLOW, file=sys.stderr)
    splits = load_splits(recipe.data, args.data)
    folder = args.runs / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        progress = Progress(sys.stderr if fabric.is_global_zero else io.StringIO(), args.line)
        with only_process(folder / f"{kind}.lock") if fabric.is_global_zero else nullcontext():
            written = train_member(recipe, kind, splits, folder, fabric, progress)
        if fabric.is_global_zero:
            print(f"{kind}: {written}")
    fabric.barrier()
    return 0


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies in bfloat16, by the names that x86 and ARM have for it."""
    able = torch.cpu.get_capabilities()
    return any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


def _side_by_side(args: argparse.Namespace, kinds: list[str], threads: int) -> int:
    """Each member in a process of its own, `--jobs` at a time, the longest-waiting first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the children are ended, too
    waiting, running, failed = list(enumerate(kinds)), dict[str, subprocess.Popen[bytes]](), list[str]()
    command = [sys.executable, "-m", "training.cli", "train", args.recipe, "--runs", str(args.runs), "--threads", str(threads)]
    command += ["--accelerator", args.accelerator, "--devices", args.devices] + (["--data", args.data] if args.data else [])
    command += ["--precision", args.precision] if args.precision else []
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                line, kind = waiting.pop(0)
                running[kind] = subprocess.Popen([*command, "--members", kind, "--line", str(line)], preexec_fn=end_with_parent)
            for kind, process in list(running.items()):
                try:
                    code = process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
                del running[kind]
                if code:
                    failed.append(kind)
    finally:
        for process in running.values():
            process.terminate()
    if failed:
        print(f"not trained: {', '.join(failed)}; what they have reached is kept, run the same command to go on", file=sys.stderr)
    return 1 if failed else 0
