"""`phalanx calibrate BUNDLE FOLDER -o NEW`: the same members, p-values taken against an operator's own clean images.

A p-value holds for images like those of the calibration: where an operator's camera differs from the training data, so
does the rate of false alarms, until this is run.  It needs nothing but what serving needs.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from models.bundle import Bundle, BundleParts, InputSpec, InvalidBundle, calibration_outputs, read_bundle, write_bundle
from models.card import CARD_FILE
from models.member_session import member_runs
from models.outputs import CALIBRATION_BATCH
from service.errors import InvalidImage
from service.images import PixelBudget, decode_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FEWEST, RECOMMENDED = 100, 1_000
LIMIT = 8_000  # images: their outputs fit a megabyte with four members and ten classes; more hardly move a p-value


class CalibrationRefused(ValueError):
    """The folder cannot be calibrated on."""


@dataclass
class ImageFolder:
    """The images of a folder as batches, and what became of each file on the way."""

    files: list[Path]
    classes: tuple[str, ...]
    image: InputSpec
    digests: dict[bytes, Path] = field(default_factory=dict)  # of the pixels used
    labels: list[int] = field(default_factory=list)  # of the images used: the class its folder is named after, or -1
    unreadable: list[str] = field(default_factory=list)
    repeated: int = 0
    resized: int = 0

    def batches(self, progress: Progress) -> Iterator[NDArray[np.uint8]]:
        """(b, h, w, c), b up to CALIBRATION_BATCH."""
        batch: list[NDArray[np.uint8]] = []
        for path in progress.track(self.files, description="calibrating"):
            if (pixels := self._decoded(path)) is not None:
                batch.append(pixels)
            if len(batch) == CALIBRATION_BATCH:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    def _decoded(self, path: Path) -> NDArray[np.uint8] | None:
        try:
            decoded = decode_image(path.read_bytes(), self.image, PixelBudget())
        except (InvalidImage, OSError) as error:
            self.unreadable.append(f"{path.name}: {error}")
            return None
        digest = hashlib.sha256(decoded.array.tobytes()).digest()
        if digest in self.digests:  # the same image twice would count as two witnesses
            self.repeated += 1
            return None
        self.digests[digest] = path
        self.labels.append(self.classes.index(path.parent.name) if path.parent.name in self.classes else -1)
        self.resized += decoded.resized
        return decoded.array

    @property
    def fingerprint(self) -> str:
        """Over the pixels, whatever the files' names and order."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle to start from; it is not changed")
    parser.add_argument("folder", type=Path, help="clean images as PNG, JPEG or WebP, at any depth")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="NEW", help="where the new bundle goes")
    parser.add_argument("--replace", action="store_true", help="replace the bundle at NEW, in one step")
    parser.add_argument("--limit", type=int, default=LIMIT, help="use at most this many images, drawn at random (%(default)s)")
    parser.add_argument(
        "--reject-rate",
        type=float,
        default=0.01,
        help="the lowest reject rate to be configured: it decides how many images are needed (%(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the new bundle and say what it was made of; 1 if it cannot be made, and then nothing is written."""
    said = Console(stderr=True)
    images: ImageFolder | None = None
    try:
        for option, value in (("--limit", args.limit), ("--threads", args.threads)):
            if value < 1:
                raise CalibrationRefused(f"{option}: expected 1 or more, got {value}")
        if args.output.exists() and not args.replace:
            raise CalibrationRefused(f"{args.output} exists; name another output, or say --replace")
        bundle = read_bundle(args.bundle)
        images = image_folder(bundle, args.folder, args.limit)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=said) as progress:
            parts = calibrate(bundle, images, f"folder {args.folder.resolve().name!r}", args.reject_rate, args.threads, progress)
        new = _written(args.output, parts)
    except (CalibrationRefused, InvalidBundle, OSError) as error:
        for line in _remarks(images) if images is not None else ():
            said.print(Text(line, style="yellow"), soft_wrap=True)
        said.print(Text(f"phalanx calibrate: {error}", style="red"), soft_wrap=True)
        return 1
    for line in _remarks(images):
        said.print(Text(line, style="yellow"), soft_wrap=True)
    if CARD_FILE in bundle.documents:
        lost = f"left out: {CARD_FILE}, whose figures are of the old p-values; phalanx-train attack makes new ones"
        said.print(Text(lost, style="yellow"), soft_wrap=True)
    old = bundle.manifest
    Console().print(
        Text(f"{args.output}: {old.name} version {new.manifest.version} (was {old.version}), "),
        Text(f"calibrated on {len(images.labels):,} images"),
        sep="",
    )
    return 0


def image_folder(bundle: Bundle, folder: Path, limit: int = LIMIT) -> ImageFolder:
    """The images below `folder`; shuffled, so that images which share a draw of fresh masks are not also neighbours."""
    if not folder.is_dir():
        raise CalibrationRefused(f"{folder}: expected a folder of images, got {'a file' if folder.exists() else 'nothing'}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    random.Random(bundle.manifest.masks.seed).shuffle(files)
    return ImageFolder(files[:limit], bundle.manifest.classes, bundle.manifest.input)


def calibrate(
    bundle: Bundle, images: ImageFolder, source: str, reject_rate: float, threads: int, progress: Progress
) -> BundleParts:
    """The bundle with calibration outputs on these images; all stays, the figures fitted under attack too, but a card.

    With the p-values the verdicts change, and a robustness card is about both.
    """
    _refuse_few(len(images.files), reject_rate)
    runs = member_runs(bundle, threads)
    outputs = calibration_outputs(runs, images.batches(progress), None, bundle.manifest.masks.seed)
    _refuse_few(len(outputs), reject_rate)
    return replace(
        bundle.parts(),
        calibration=replace(outputs, labels=np.array(images.labels, np.int16)),
        calibration_source=source,
        calibration_fingerprint=images.fingerprint,
        documents={file: data for file, data in bundle.documents.items() if file != CARD_FILE},
    )


def _refuse_few(n: int, reject_rate: float) -> None:
    """A p-value on n images is at least 1/(n + 1): at a finer reject rate nothing would ever be rejected."""
    if not 0 < reject_rate < 1:
        raise CalibrationRefused(f"expected a reject rate between 0 and 1, got {reject_rate:g}")
    needed = max(FEWEST, math.ceil(1 / reject_rate - 1e-9) - 1)
    if n < needed:
        raise CalibrationRefused(
            f"expected at least {needed:,} different images for a reject rate of {reject_rate:g} "
            f"({RECOMMENDED:,} or more recommended), got {n:,}"
        )


def _written(path: Path, parts: BundleParts) -> Bundle:
    try:
        return write_bundle(path, parts)
    except OSError as error:  # a full disk, a folder that is read-only
        raise CalibrationRefused(f"{path} could not be written, and is as it was: {error}") from error


def _remarks(images: ImageFolder) -> Iterator[str]:
    n = len(images.labels)
    if images.unreadable:
        shown = "\n  ".join(images.unreadable[:5])
        yield f"left out, as it cannot be decoded: {len(images.unreadable):,}, for example\n  {shown}"
    if images.repeated:
        yield f"left out, as it repeats another image: {images.repeated:,}"
    if images.resized and n:
        yield f"resized to {images.image.height} × {images.image.width}: {images.resized:,} of {n:,}"
    if 0 < n < RECOMMENDED:
        yield f"{n:,} images give p-values in steps of {1 / (n + 1):.2g}; {RECOMMENDED:,} or more are recommended"
