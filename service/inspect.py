"""`phalanx inspect BUNDLE`: what a bundle says about itself, and whether every byte of it is what it says."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from models.bundle import FileCheck, InvalidBundle, Manifest, check_files, read_bundle, read_manifest
from models.card import CARD_FILE, Card, Share, read_card
from models.self_test import check_member
from service.terminal import console

NO_CARD = "no robustness card: nothing is claimed under attack; phalanx-train attack, then phalanx-train report, make one"


@dataclass(frozen=True)
class Inspection:
    """`problem` is the first thing wrong, or None; without a manifest that can be read nothing else is known."""

    manifest: Manifest | None
    files: tuple[FileCheck, ...]
    problem: str | None
    card: Card | None = None  # where there is one, and it is this bundle's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the bundle; 1 if anything about it is wrong."""
    inspection = inspect_bundle(args.bundle)
    if args.json:
        sys.stdout.write(as_json(inspection) + "\n")
    else:
        console().print(as_tables(inspection))
    return 1 if inspection.problem else 0


def inspect_bundle(path: Path) -> Inspection:
    """Verify every hash, all that reading the bundle verifies, the card, and that every member answers the samples rightly."""
    try:
        manifest = read_manifest(path)
    except InvalidBundle as error:
        return Inspection(None, (), str(error))
    files: tuple[FileCheck, ...] = ()
    card: Card | None = None
    try:
        files = tuple(check_files(path, manifest))
        problem = next((check.problem for check in files if check.problem), None)
        if problem is None:
            bundle = read_bundle(path, weights=False)
            card = read_card(manifest, bundle.documents)
            for member in manifest.members:
                check_member(bundle, member)
    except InvalidBundle as error:
        problem = str(error)
    return Inspection(manifest, files, problem, card)


def as_json(inspection: Inspection) -> str:
    document = {
        "valid": inspection.problem is None,
        "problem": inspection.problem,
        "files": [asdict(check) for check in inspection.files],
        "manifest": inspection.manifest.model_dump(mode="json") if inspection.manifest else None,
        "card": inspection.card.model_dump(mode="json") if inspection.card else None,
    }
    return json.dumps(document, indent=2)


def as_tables(inspection: Inspection) -> RenderableType:
    wrong = [check for check in inspection.files if check.problem]
    if inspection.problem:
        verdict = Text(f"INVALID  {inspection.problem}", style="bold red")
    else:
        verdict = Text(f"valid: all {len(inspection.files)} hashes agree, members answer the samples as expected", "bold green")
    if inspection.manifest is None:
        return verdict
    manifest = inspection.manifest
    parts: list[RenderableType] = [_about(manifest), _members(manifest), _subsets(manifest)]
    parts += [*_robustness(manifest, inspection.card), _files(inspection.files), _provenance(manifest)]
    others = [Text(f"         {check.problem}", style="red") for check in wrong[1:]]
    if inspection.card and inspection.card.failed:
        loud = f"FAILED   checks of {CARD_FILE}, whose figures prove nothing:\n{_failures(inspection.card)}"
        others.append(Text(loud, style="bold red"))
    return Group(*(part for each in parts for part in (each, Text())), verdict, *others)


def _about(manifest: Manifest) -> Table:
    image, calibration = manifest.input, manifest.calibration
    return _pairs(
        f"{manifest.name}  version {manifest.version}",
        {
            "input": f"uint8 {image.height} × {image.width} × {image.channels}",
            "classes": f"{len(manifest.classes)}: {', '.join(manifest.classes)}",
            "verdict hangs on": ", ".join(manifest.deciding) if manifest.deciding else "every detector",
            "calibration": f"{calibration.n:,} clean images from {calibration.source}",
            "finest reject rate": f"1/{calibration.n + 1} = {1 / (calibration.n + 1):.2g}",
            "samples": f"{manifest.samples.n} with expected outputs",
            "masks seed": str(manifest.masks.seed),
            "licences": ", ".join(f"{what}: {name}" for what, name in manifest.licenses.items()) or "none named",
        },
    )


def _members(manifest: Manifest) -> Table:
    table = _table("members", "name", "network", "strength", "roles", ">temperature", ">parameters", "masks", "distances")
    for member in manifest.members:
        masks = member.stochastic
        _row(
            table,
            member.name,
            member.network.kind,
            member.strength,
            ", ".join(member.roles),
            f"{member.temperature:.3g}",
            f"{member.parameters:,}",
            f"{masks.samples} × {masks.width}, keep {masks.keep:g}" if masks else "",
            "to centers" if member.centers else "",
        )
    return table


def _subsets(manifest: Manifest) -> Table:
    table = _table("fitted under attack, for each subset of classifiers", "weights", "rule", "α", "s", "clean", "robust", "n")
    for subset in sorted(manifest.subsets, key=lambda row: (-len(row.classifiers), row.classifiers)):
        _row(
            table,
            "  ".join(f"{name} {subset.weights[name]:.2f}" for name in subset.classifiers),
            subset.rule.value,
            f"{subset.alpha:.2f}",
            f"{subset.scale:.3g}",
            f"{subset.clean:.1%}",
            f"{subset.robust:.1%}",
            f"{subset.n:,}",
        )
    return table


def _robustness(manifest: Manifest, card: Card | None) -> Iterator[RenderableType]:
    """The headline, with all that speaks against it; nothing where the card cannot be read, as the verdict says so."""
    if card is None:
        if not any(document.file == CARD_FILE for document in manifest.documents):
            yield Text(NO_CARD)
        return
    told = card.headline
    pairs: dict[str, str | Text] = {
        "clean": _percent(told.clean),
        "robust": _percent(told.robust),
        "robust, rejecting 5%": _percent(told.rejecting_5),
        "conjecture": told.conjecture,
    }
    pairs |= {f"proven, {s.name}": _percent(s.certified) for s in card.systems if s.certified is not None}
    if not told.publishable or card.missing:
        lacking = "".join(f"\n- {safeguard}" for safeguard in card.missing)
        pairs["NOT PUBLISHABLE"] = Text(f"measured with fewer safeguards than a published figure{lacking}", style="yellow")
    if failed := _failures(card):
        pairs["FAILED"] = Text(failed, style="bold red")
    yield _pairs(f"{told.ensemble} under attack: l-infinity, ε = {told.epsilon:g} of 255, suite {told.suite}", pairs)


def _failures(card: Card) -> str:
    return "\n".join(f"{check.name}: {check.measured}" for check in card.failed)


def _percent(share: Share) -> str:
    return f"{share.value:.1%}  (95% interval {share.low:.1%} to {share.high:.1%}, n = {share.n:,})"


def _files(files: tuple[FileCheck, ...]) -> Table:
    table = _table("files", "file", ">bytes", "SHA-256", "")
    for check in files:
        state = Text("wrong", style="red") if check.problem else Text("verified", style="green")
        size = "" if check.size is None else f"{check.size:,}"
        table.add_row(Text(check.file), Text(size), Text(check.sha256[:16]), state)
    return table


def _provenance(manifest: Manifest) -> Table:
    source = manifest.provenance
    return _pairs(
        "provenance",
        {
            "created": source.created,
            "commit": source.commit,
            "data": f"{source.data_name}, {source.data_fingerprint}",
            "hardened at": f"ε = {source.epsilon:g} of 255",
            "seed": str(source.seed),
            "recipe": json.dumps(source.recipe),
            "libraries": ", ".join(f"{name} {version}" for name, version in source.libraries.items()),
        },
    )


def _pairs(title: str, pairs: Mapping[str, str | Text]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    for name, value in pairs.items():
        _row(table, name, value)
    return table


def _table(title: str, *columns: str) -> Table:
    """Numbers go to the right: their columns' names begin with ">"."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _row(table: Table, *cells: str | Text) -> None:
    """As plain text: what a bundle says is data, and may hold rich's square brackets."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
