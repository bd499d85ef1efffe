"""One image in quarantine: a PNG of the very pixels that were classified, with the evidence in a text chunk of the same file.

So one rename puts both in place, any viewer shows the image, and no image is ever without its evidence.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
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
SUFFIX = ".png"
TIME = "%Y%m%dT%H%M%S.%fZ"


class BrokenEntry(ValueError):
    """A file that is no image in quarantine."""


@dataclass(frozen=True)
class Entry:
    """pixels: (height, width, channels) uint8, RGB or grey."""

    time: datetime  # UTC
    caller: str
    request_id: str
    ensemble: str
    bundle_version: str
    seen: pb.Classification  # the whole evidence, whatever the caller was told
    pixels: NDArray[np.uint8]

    @property
    def verdict(self) -> str:
        """In lower case."""
        return pb.Verdict.Name(self.seen.verdict).removeprefix("VERDICT_").lower()

    def file_name(self) -> str:
        """Sorts by time; no two are alike."""
        return f"{self.time.strftime(TIME)}-{self.verdict}-{secrets.token_hex(4)}{SUFFIX}"

    def encode(self) -> bytes:
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
        Image.fromarray(self.pixels.squeeze(-1) if self.pixels.shape[-1] == 1 else self.pixels).save(file, "PNG", pnginfo=chunks)
        return file.getvalue()


def read_entry(path: Path) -> Entry:
    """Raises BrokenEntry, or OSError where it cannot be read."""
    content = path.read_bytes()
    try:
        with PngImageFile(BytesIO(content)) as file:
            evidence: dict[str, Any] = json.loads(file.text[CHUNK])
            pixels = np.asarray(file)
        if evidence["version"] != VERSION:
            raise BrokenEntry(f"{path}: expected evidence of version {VERSION}, got {evidence['version']}")
        return Entry(
            time=datetime.fromisoformat(evidence["time"]),
            caller=evidence["caller"],
            request_id=evidence["request_id"],
            ensemble=evidence["ensemble"],
            bundle_version=evidence["bundle_version"],
            seen=ParseDict(evidence["classification"], pb.Classification()),
            pixels=pixels if pixels.ndim == 3 else pixels[..., np.newaxis],
        )
    except BrokenEntry:
        raise
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, ParseError) as error:
        raise BrokenEntry(f"{path}: expected an image with its evidence, got {type(error).__name__}: {error}") from error


def now() -> datetime:
    return datetime.now(UTC)
