"""`phalanx-train attack`: attack a bundle's ensemble end to end, and each of its members, with everything known."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from models.bundle import Bundle, read_bundle
from training.attacks.query import ATTACKS, QUERIES
from training.children import end_with_parent
from training.data import splits_of
from training.evaluation.campaign import Campaign, Unit
from training.evaluation.card import checks
from training.evaluation.queries import DISCLOSURES, through_endpoint
from training.evaluation.scores import Ledger, ledger, share
from training.evaluation.subjects import Subject, controls, full_and_members
from training.evaluation.suites import SUITES, suite
from training.lock import only_process
from training.progress import counted
from training.refused import TrainingRefused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx-train attack`."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder; its ensemble `full` and every member are attacked")
    parser.add_argument("--data", help="a local folder, or another hub id, in place of the recipe's data source")
    parser.add_argument(
        "--suite", choices=SUITES, default="quick",
        help="smoke: seconds, proves nothing; quick: minutes; standard: hours, for figures to publish (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int,
        help="test images, the first n of a seeded shuffle; a campaign goes on with more (default: the suite's)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of every start (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the campaign's folder (default: runs/attacks/BUNDLE-SUBJECT-SUITE)")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="attack these only: full, or members by name")
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N",
        help="do the I-th of N shares of the work; shares in one folder, of as many images, make one result (default: 1/1)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes side by side, a shard and a thread each (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    through = parser.add_argument_group("through a running server, with nothing but its answers")
    through.add_argument(
        "--endpoint",
        metavar="HOST:PORT",
        help="attack this server, which serves the bundle, by queries; PHALANX_TOKEN: as which caller",
    )
    through.add_argument("--ensemble", default="", help="the server's ensemble (default: its default)")
    through.add_argument(
        "--disclosure", choices=DISCLOSURES, default="label", help="how much of an answer the attacker sees (default: %(default)s)"
    )
    through.add_argument(
        "--query-attacks", nargs="+", choices=list(ATTACKS), default=["square", "hopskipjump"],
        help="which, of square, hopskipjump and boundary (default: square hopskipjump)",
    )  # fmt: skip
    through.add_argument("--queries", type=int, default=QUERIES, help="that an image may take at most (default: %(default)s)")
    through.add_argument("--query-images", type=int, default=100, help="how many images (default: %(default)s)")
    through.add_argument("--no-rescore", action="store_true", help="do not show the server what the campaign has found")


def run(args: argparse.Namespace) -> int:
    """Attack what is not yet attacked; with all of it done, print the figures."""
    campaign = open_campaign(args)
    if args.endpoint:
        return through_endpoint(args, campaign)
    manifest = campaign.bundle.manifest
    subjects = [*full_and_members(manifest), *controls(manifest)]
    if args.systems:
        names = [subject.name for subject in subjects if not subject.control]
        if unknown := [name for name in args.systems if name not in names]:
            raise TrainingRefused(f"no system {', '.join(unknown)}; there are {', '.join(names)}")
        subjects = [subject for subject in subjects if subject.name in args.systems]
    return work(args, campaign, subjects)


def open_campaign(args: argparse.Namespace) -> Campaign:
    """The campaign that the options describe, begun or gone on with."""
    if args.jobs < 1:
        raise TrainingRefused(f"--jobs: expected 1 or more, got {args.jobs}")
    if args.jobs > 1 and args.shard != (1, 1):
        raise TrainingRefused("--jobs makes shards of its own: expected --jobs or --shard, got both")
    if args.images is not None and args.images < 1:
        raise TrainingRefused(f"--images: expected 1 or more, got {args.images}")
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle, chosen = read_bundle(args.bundle), suite(args.suite)
    images = args.images or chosen.images
    epsilon = bundle.manifest.provenance.epsilon
    if not 0 < epsilon <= 255:
        raise TrainingRefused(f"{args.bundle}: expected an epsilon in (0, 255] in its provenance, got {epsilon:g}")
    splits = splits_of(bundle, args.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Campaign(folder_of(args, bundle), bundle, splits, chosen, min(images, len(splits.test)), args.seed, device)


def folder_of(args: argparse.Namespace, bundle: Bundle) -> Path:
    """`--out`, or a folder that names what the campaign is about."""
    named = f"{bundle.manifest.name}-{bundle.manifest.subject}-{args.suite}"
    return args.out or Path("runs") / "attacks" / named


def work(args: argparse.Namespace, campaign: Campaign, subjects: Sequence[Subject]) -> int:
    """Do this process's share of the units, then print the figures if nothing is left for another."""
    if args.jobs > 1:
        if code := _side_by_side(args):
            return code
    else:
        _do(args, campaign, subjects)
    units = list(campaign.units(subjects))
    if left := sum(not campaign.done(unit) for unit in units):
        print(f"{campaign.folder}: {len(units) - left} of {len(units)} units done; the other shards have the rest", file=sys.stderr)
        return 0
    for line in table(campaign, subjects, units):
        print(line)
    if all(main in subjects for main in full_and_members(campaign.bundle.manifest)):
        for check in checks(campaign, units):
            print(f"  {'passed' if check.passed else 'FAILED'}: {check.name}: {check.measured}")
    return 0


def table(campaign: Campaign, subjects: Sequence[Subject], units: Sequence[Unit]) -> list[str]:
    """Clean and robust accuracy of every system, worst case over all attacks of all systems; of a control, over its own."""
    manifest, suite_ = campaign.bundle.manifest, campaign.suite
    caveat = "" if suite_.publishable else f"; the suite {suite_.name} has fewer safeguards than a published figure"
    lines = [
        f"{manifest.name} {manifest.subject}, l-infinity, epsilon = {campaign.epsilon:g}/255, n = {len(campaign.images)}, "
        f"seed {campaign.seed}, suite {suite_.name}, attacker knows everything{caveat}",
        f"  {'system':<24} clean   robust  95% interval     with rejection at 5%, at 1%",
    ]
    for subject in subjects:
        ensemble = campaign.system(subject).ensemble
        if subject.control:
            found = ledger(campaign, ensemble, [unit for unit in units if unit.subject == subject])
        else:
            found = ledger(campaign, ensemble, units).where(lambda row: row.counts)
        lines.append(_row(subject.name, found))
    return lines


def _row(name: str, found: Ledger) -> str:
    robust = share(found.robust)
    rejecting = f"{found.robust_at(0.05).mean():.3f}                {found.robust_at(0.01).mean():.3f}"
    return f"  {name:<24} {found.right.mean():.3f}   {robust.value:.3f}   {robust.low:.3f} to {robust.high:.3f}   {rejecting}"


def _do(args: argparse.Namespace, campaign: Campaign, subjects: Sequence[Subject]) -> None:
    shard, shards = args.shard
    units = [unit for i, unit in enumerate(campaign.units(subjects)) if i % shards == shard - 1]
    todo = [unit for unit in units if not campaign.done(unit)]
    lock = only_process(campaign.folder / f"shard-{shard}-of-{shards}.lock")
    with lock, counted(len(units), len(units) - len(todo), "unit", f"shard {shard}/{shards}", shard - 1) as bar:
        for unit in todo:
            bar.set_postfix_str(f"{unit.subject.name}: {unit.entry.name}", refresh=False)
            campaign.attack(unit)
            bar.update()


def _side_by_side(args: argparse.Namespace) -> int:
    """One process for each shard; what is left of a failed one is done by the next run."""
    command = [sys.executable, "-m", "training.cli", args.command, str(args.bundle), f"--suite={args.suite}", f"--seed={args.seed}"]
    command += [f"--out={args.out}"] * bool(args.out) + [f"--images={args.images}"] * bool(args.images)
    command += [f"--data={args.data}"] * bool(args.data) + ["--threads=1", *(["--systems", *args.systems] if args.systems else [])]
    shards = [f"--shard={i}/{args.jobs}" for i in range(1, args.jobs + 1)]
    running = [subprocess.Popen([*command, shard], stdout=subprocess.DEVNULL, preexec_fn=end_with_parent) for shard in shards]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    return max(map(abs, codes))  # a negative one was killed


def _shard(text: str) -> tuple[int, int]:
    shard, slash, shards = text.partition("/")
    if not (slash and shard.isdecimal() and shards.isdecimal() and 1 <= int(shard) <= int(shards)):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, such as 2/4, got {text!r}")
    return int(shard), int(shards)
