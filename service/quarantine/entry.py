"""One image in quarantine: a PNG of the very pixels that were classified, with the evidence in a text chunk of the same file.

So one rename puts both in place, any viewer shows the image, and no image is ever without its evidence.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

CHUNK, VERSION = "phalanx", 1
TIME = "%Y%m%dT%H%M%S.%fZ"
NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[a-z]+-[0-9a-f]{8}\.png")


class BrokenEntry(ValueError):
    """A file that is no image in quarantine."""


@dataclass(frozen=True)
class Entry:
    """The evidence; the pixels are for whoever writes it, or opens the file."""

    time: datetime  # UTC
    caller: str
    request_id: str
    ensemble: str
    bundle_version: str
    seen: pb.Classification  # all of it, whatever the caller was told

    @property
    def verdict(self) -> str:
        """In lower case."""
        return pb.Verdict.Name(self.seen.verdict).removeprefix("VERDICT_").lower()

    def file_name(self) -> str:
        """Sorts by time; no two are alike. In a folder it is `later` than the others, and may differ from the entry's time."""
        return f"{self.time.strftime(TIME)}-{self.verdict}-{secrets.token_hex(4)}.png"

    def encode(self, pixels: NDArray[np.uint8]) -> bytes:
        """pixels: (height, width, channels), RGB or grey."""
        evidence = {
            "version": VERSION,
            "time": self.time.isoformat(),
            "caller": self.caller,
            "request_id": self.request_id,
            "ensemble": self.ensemble,
            "bundle_version": self.bundle_version,
            "classification": MessageToDict(self.seen, preserving_proto_field_name=True),
        }
        chunks, file = PngInfo(), BytesIO()
        chunks.add_itxt(CHUNK, json.dumps(evidence, ensure_ascii=False))
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", pnginfo=chunks)
        return file.getvalue()


def read_entry(path: Path) -> Entry:
    """Of a file only what precedes the pixels is read. Raises BrokenEntry, or FileNotFoundError."""
    try:
        with PngImageFile(path) as file:
            evidence: dict[str, Any] = json.loads(file.info[CHUNK])
        if evidence["version"] != VERSION:
            raise BrokenEntry(f"{path}: expected evidence of version {VERSION}, got {evidence['version']}")
        return Entry(
            time=datetime.fromisoformat(evidence["time"]),
            caller=evidence["caller"],
            request_id=evidence["request_id"],
            ensemble=evidence["ensemble"],
            bundle_version=evidence["bundle_version"],
            seen=ParseDict(evidence["classification"], pb.Classification()),
        )
    except (BrokenEntry, FileNotFoundError):
        raise
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, ParseError) as error:
        raise BrokenEntry(f"{path}: expected an image with its evidence, got {type(error).__name__}: {error}") from error


def is_name(name: str) -> bool:
    """Whether a file of this name is an entry: others are nobody's to list, or to evict."""
    return NAME.fullmatch(name) is not None


def time_of(name: str) -> str:
    """As it sorts."""
    return name.partition("-")[0]


def later(name: str, newest: str) -> str:
    """The name, of a time after `newest`: where the clock was set back, by a microsecond."""
    time, _, rest = name.partition("-")
    if time > newest:
        return name
    try:
        return f"{(datetime.fromisoformat(newest) + timedelta(microseconds=1)).strftime(TIME)}-{rest}"
    except (ValueError, OverflowError):  # of no day there is: a file of somebody else
        return name


def now() -> datetime:
    return datetime.now(UTC)
