"""`phalanx quarantine ls` and `show`: what a server kept. Reads the folder, and needs no server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from rich.console import Group
from rich.text import Text

from service import classify
from service.config import InvalidConfig, load_config
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.quarantine.entry import BrokenEntry, Entry, read_entry
from service.quarantine.folder import entries
from service.terminal import printing

DESCRIPTION = """\
Look at the suspect and rejected images that a server kept (`quarantine:` in its
configuration).

An entry is a PNG file of the very pixels that were classified, with the whole
evidence inside: copy it, open it in any viewer, delete it."""

EPILOG = """\
examples:
  phalanx quarantine ls -c phalanx.yaml
  phalanx quarantine ls --folder quarantine --verdict rejected --last 20
  phalanx quarantine show 20261126T0915 -c phalanx.yaml    the beginning of a name
  phalanx quarantine show --json NAME | jq .classification.votes

exit status: 0 if all was readable, 1 if not."""

LINE = "{:46}  {:8}  {:>7}  {:24}  {:16}  {}\n"  # not a table, whose widths are known when the last entry is read


class CannotShow(RuntimeError):
    """What is asked for is not there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("-c", "--config", type=Path, metavar="FILE", help="the server's configuration (or PHALANX_CONFIG)")
    where.add_argument("--folder", type=Path, help="the folder itself, in place of the configuration's")
    where.add_argument("--json", action="store_true", help="print JSON, an object for each entry, instead of tables")
    actions = parser.add_subparsers(dest="action", metavar="ls|show", required=True)
    listed = actions.add_parser("ls", parents=[where], help="all entries, the oldest first")
    listed.add_argument("--verdict", choices=("suspect", "rejected"), help="only these")
    listed.add_argument("--last", type=int, metavar="N", help="only the newest N")
    shown = actions.add_parser("show", parents=[where], help="one entry with its evidence")
    shown.add_argument("entry", metavar="ENTRY", help="a name as ls prints it, or enough of its beginning; or a file")


def run(args: argparse.Namespace) -> int:
    try:
        if args.action == "show":
            path = _chosen(args)
            return _print([path], args.json, whole=True)
        found = entries(_folder(args))
        if args.verdict:
            found = [path for path in found if f"-{args.verdict}-" in path.name]
        return _print(found[-args.last :] if args.last else found, args.json, whole=False)
    except (CannotShow, InvalidConfig) as error:
        sys.stderr.write(f"phalanx quarantine: {error}\n")
        return 1


def _folder(args: argparse.Namespace) -> Path:
    folder: Path | None = args.folder
    if folder is None:
        config = load_config(args.config)
        if config.quarantine is None:
            raise CannotShow(
                "the configuration has no `quarantine: {folder: FOLDER}`; -c names another, --folder the folder itself"
            )
        folder = config.quarantine.folder
    if not folder.is_dir():
        raise CannotShow(f"{folder}: no such folder; a server makes it at its start")
    return folder


def _chosen(args: argparse.Namespace) -> Path:
    if Path(args.entry).is_file():
        return Path(args.entry)
    folder = _folder(args)
    found = [path for path in entries(folder) if path.name.startswith(args.entry)]
    if not found:
        raise CannotShow(f"no entry in {folder} begins with {args.entry!r}; `phalanx quarantine ls` lists them")
    if len(found) > 1:
        raise CannotShow(f"{len(found)} entries begin with {args.entry!r}, from {found[0].name} to {found[-1].name}: which?")
    return found[0]


def _print(paths: Sequence[Path], as_json: bool, *, whole: bool) -> int:
    """Each as soon as it is read. 1 if one cannot be read; one that is evicted meanwhile is left out."""
    broken = 0
    with printing() as console:
        if not as_json and not whole:
            sys.stdout.write(LINE.format("entry", "verdict", "p-value", "class", "ensemble", "caller"))
        for path in paths:
            try:
                entry = read_entry(path)
            except FileNotFoundError:
                continue
            except BrokenEntry as error:
                sys.stderr.write(f"phalanx quarantine: {error}\n")
                broken = 1
                continue
            if whole and not as_json:
                console.print(_whole(path, entry))
            else:
                sys.stdout.write(_json(path, entry) if as_json else _line(path, entry))
    return broken


def _json(path: Path, entry: Entry) -> str:
    fields = {
        "file": str(path),
        "time": entry.time.isoformat(),
        "caller": entry.caller,
        "request_id": entry.request_id,
        "ensemble": entry.ensemble,
        "bundle_version": entry.bundle_version,
        "classification": MessageToDict(entry.seen, preserving_proto_field_name=True),
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _line(path: Path, entry: Entry) -> str:
    p_value = f"{entry.seen.p_value:.4f}" if entry.seen.HasField("p_value") else "–"
    return LINE.format(path.name, entry.verdict, p_value, entry.seen.class_name, entry.ensemble, entry.caller)


def _whole(path: Path, entry: Entry) -> Group:
    """As `phalanx classify` shows an answer, under who asked and when."""
    answer = pb.ImageResult(classification=entry.seen)
    said = classify.as_table([classify.FileAnswer(path.name, entry.ensemble, entry.bundle_version, "evidence", answer)])
    asked = f"{path}\n{entry.time:%Y-%m-%d %H:%M:%S} UTC, caller {entry.caller}, request {entry.request_id}"
    return Group(Text(asked), said)
