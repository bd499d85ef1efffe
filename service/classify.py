"""`phalanx classify FILE...`: ask a server about image files.  A client: of the service it needs only the stubs."""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.json_format import MessageToDict
from PIL import Image
from rich.table import Table
from rich.text import Text

from service import connect
from service.config import LimitsConfig
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc
from service.terminal import printing

DESCRIPTION = """\
Ask a server what PNG, JPEG or WebP files show, and whether to trust it.

The table has one row per file: the class with its confidence, the verdict
with its p-value, every member's vote (dissenters in yellow), every detector's
p-value (low ones in red).

verdicts:
  CLEAN       as usual as the clean images that the bundle was calibrated on
  SUSPECT     as unusual as the review rate of them (default 5%): have
              somebody look
  REJECTED    as unusual as the reject rate of them (default 1%): do not act
  UNSCREENED  the ensemble has no detector"""

EPILOG = """\
examples:
  phalanx classify tile.png
  phalanx classify --ensemble no-edge tiles/*.png
  phalanx classify --json tiles/*.png | jq -r '[.file, .result.classification.verdict] | @tsv'

--json prints one object per line: `file`, and the fields of
phalanx.v1.ClassifyResponse with `result` for this file's.

A file that cannot be read or classified is an ERROR in its own row.

exit status: 0 if every file was classified, 1 if not."""

DEFAULT_SERVER = "127.0.0.1:50051"
LEVELS = {name.removeprefix("DISCLOSURE_").lower(): value for name, value in pb.Disclosure.items() if value}
OVERHEAD = 4096  # bytes of a request beside its files
VERDICT_STYLES = {"CLEAN": "green", "SUSPECT": "yellow", "REJECTED": "bold red", "UNSCREENED": "dim"}
UNUSUAL = 0.05  # a detector's p-value up to which it is shown in red


@dataclass(frozen=True)
class FileAnswer:
    """One file's part of a response."""

    file: str
    ensemble: str
    bundle_version: str
    disclosure: str
    result: pb.ImageResult


class CannotAsk(RuntimeError):
    """The server refused the request as a whole, or there is none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a PNG, JPEG or WebP file")
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="HOST:PORT", help="(%(default)s)")
    parser.add_argument("--ensemble", default="", metavar="NAME", help="which ensemble; without it, the server's default")
    parser.add_argument("--disclosure", choices=LEVELS, help="how much to ask for; without it, all that the server tells")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    connect.add_arguments(parser)
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of each request (%(default)s)")


def run(args: argparse.Namespace) -> int:
    try:
        with connect.channel(args.server, args) as channel:
            stub = pb_grpc.DefenseEnsembleStub(channel)
            answers = list(classify_files(stub, args.files, args.ensemble, LEVELS.get(args.disclosure, 0), args.timeout))
    except (CannotAsk, OSError) as error:
        sys.stderr.write(f"phalanx classify: {error}\n")
        return 1
    with printing() as console:
        if args.json:
            sys.stdout.writelines(f"{as_json(answer)}\n" for answer in answers)
        else:
            console.print(as_table(answers))
    return 1 if any(answer.result.HasField("error") for answer in answers) else 0


def classify_files(
    stub: pb_grpc.DefenseEnsembleStub, files: Sequence[Path], ensemble: str, disclosure: int, timeout: float
) -> Iterator[FileAnswer]:
    """In the order of the files, in as few requests as the server's limits allow."""
    try:
        described = _described(stub, ensemble, timeout)
        for batch in _batches(files, described.limits):
            request = pb.ClassifyRequest(ensemble=ensemble, disclosure=pb.Disclosure.ValueType(disclosure))
            for encoded in (content for _, content in batch if isinstance(content, bytes)):
                request.images.add(encoded=encoded)
            response = stub.Classify(request, timeout=timeout) if request.images else pb.ClassifyResponse()
            results = iter(response.results)
            level = pb.Disclosure.Name(response.disclosure).removeprefix("DISCLOSURE_")
            for file, content in batch:
                result = next(results) if isinstance(content, bytes) else content
                name, version = response.ensemble or described.name, response.bundle_version or described.bundle.version
                yield FileAnswer(str(file), name, version, level, result)
    except grpc.RpcError as error:
        raise CannotAsk(_sentence(error)) from None


def _described(stub: pb_grpc.DefenseEnsembleStub, ensemble: str, timeout: float) -> pb.Ensemble:
    """The ensemble, or its name and the usual limits, where the caller may ask it and not be told what it is."""
    try:
        return stub.GetEnsemble(pb.GetEnsembleRequest(ensemble=ensemble), timeout=timeout).ensemble
    except grpc.RpcError as error:
        call: object = error
        if not isinstance(call, grpc.Call) or call.code() is not grpc.StatusCode.PERMISSION_DENIED:
            raise
        usual = LimitsConfig()
        return pb.Ensemble(
            name=ensemble,
            limits=pb.Limits(
                max_images_per_request=usual.max_images_per_request,
                max_message_bytes=usual.max_message_bytes,
                max_request_pixels=usual.max_request_pixels,
            ),
        )


def _batches(files: Sequence[Path], limits: pb.Limits) -> Iterator[list[tuple[Path, bytes | pb.ImageResult]]]:
    """Files with their bytes, or with what is wrong with them, in batches that the server takes."""
    batch: list[tuple[Path, bytes | pb.ImageResult]] = []
    size, pixels = OVERHEAD, 0
    for file in files:
        try:
            encoded = file.read_bytes()
        except OSError as error:
            batch.append((file, _wrong(error.strerror or str(error))))
            continue
        cost, own_pixels = len(encoded) + 16, _pixels(encoded)  # with its tags and lengths
        if OVERHEAD + cost > limits.max_message_bytes:
            batch.append((file, _wrong(f"expected at most {limits.max_message_bytes - OVERHEAD} bytes, got {len(encoded)}")))
            continue
        full = len(batch) == limits.max_images_per_request or size + cost > limits.max_message_bytes
        if batch and (full or pixels + own_pixels > limits.max_request_pixels):
            yield batch
            batch, size, pixels = [], OVERHEAD, 0
        batch.append((file, encoded))
        size, pixels = size + cost, pixels + own_pixels
    if batch:
        yield batch


def _pixels(encoded: bytes) -> int:
    """What an image counts for, from its header; 0 where that cannot be read, which is the server's to say."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
            return image.width * image.height
    except Exception:  # Pillow raises many unrelated types over broken headers, and over images that are very large
        return 0


def _wrong(message: str) -> pb.ImageResult:
    return pb.ImageResult(error=pb.ImageError(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=message))


def _sentence(error: grpc.RpcError) -> str:
    call: object = error  # grpcio's errors are calls as well; its types do not say so
    if not isinstance(call, grpc.Call):
        return str(error)
    if call.code() is grpc.StatusCode.UNAVAILABLE:
        return f"no server answers ({call.details()}); `phalanx serve` starts one, --server names another"
    return f"{call.code().name}: {call.details()}"


def as_json(answer: FileAnswer) -> str:
    result = MessageToDict(answer.result, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    document = {
        "file": answer.file,
        "ensemble": answer.ensemble,
        "bundle_version": answer.bundle_version,
        "disclosure": answer.disclosure,
        "result": result,
    }
    return json.dumps(document, ensure_ascii=False)


def as_table(answers: Sequence[FileAnswer]) -> Table:
    """Names from files, servers and bundles are plain text here: they may hold rich's square brackets."""
    first = answers[0] if answers else None
    title = Text(f"{first.ensemble}, bundle {first.bundle_version}") if first else None
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("file", "class", "verdict", "votes", "detectors"):
        table.add_column(heading, overflow="fold")
    for answer in answers:
        if answer.result.HasField("error"):
            table.add_row(Text(answer.file), Text(answer.result.error.message, "red"), Text("ERROR", "bold red"), "", "")
        else:
            seen = answer.result.classification
            table.add_row(Text(answer.file), _class(seen), _verdict(seen), _votes(seen), _detectors(seen))
    return table


def _class(seen: pb.Classification) -> Text:
    text = Text(seen.class_name, "bold")
    if seen.HasField("confidence"):
        text.append(f"\n{seen.confidence:.3f}", "not bold")
    if seen.resized:
        text.append("\nresized", "not bold dim")
    return text


def _verdict(seen: pb.Classification) -> Text:
    name = pb.Verdict.Name(seen.verdict).removeprefix("VERDICT_")
    if not seen.verdict:
        return Text("not disclosed", "dim")
    text = Text(name, VERDICT_STYLES.get(name, ""))
    if seen.HasField("p_value"):
        text.append(f"\np = {seen.p_value:.4f}", "not bold default")
    if seen.reason:
        text.append(f"\n{pb.Reason.Name(seen.reason).removeprefix('REASON_').lower().replace('_', ' ')}", "not bold default")
    return text


def _votes(seen: pb.Classification) -> Text:
    width = max((len(vote.member) for vote in seen.votes), default=0)
    lines = [
        Text(
            f"{vote.member:{width}}  {vote.confidence:.2f} {vote.class_name}",
            "" if vote.class_index == seen.class_index else "yellow",
        )
        for vote in seen.votes
    ]
    return Text("\n").join(lines)


def _detectors(seen: pb.Classification) -> Text:
    width = max((len(detection.detector) for detection in seen.detections), default=0)
    lines = [
        Text(f"{detection.detector:{width}}  p = {detection.p_value:.4f}", "" if detection.p_value > UNUSUAL else "red")
        for detection in seen.detections
    ]
    return Text("\n").join(lines)
