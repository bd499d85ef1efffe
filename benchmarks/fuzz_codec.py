"""Coverage-guided fuzzing of all that reads a caller's bytes: message, codec, image decoding. Needs the extra `fuzz` (atheris).

    python -m benchmarks.fuzz_codec 1000000

Ends with a traceback, and the bytes in a file, where decoding raises anything but the errors of `service/errors.py`.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service", "PIL", "models"]):
    from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

    from models.manifest import InputSpec
    from service.codec import decode_images
    from service.config import LimitsConfig
    from service.errors import CODES

from google.protobuf.message import DecodeError

from benchmarks.fuzz import valid_messages
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

SPEC = InputSpec(height=64, width=64, channels=3)
LIMITS = LimitsConfig(max_image_pixels=10**6, max_request_pixels=10**6)
FORESEEN: tuple[type[BaseException], ...] = (DecodeError, *CODES)


def decode(data: bytes) -> None:
    """Bytes to a message to pixels."""
    with contextlib.suppress(*FORESEEN):
        decode_images(pb.ClassifyRequest.FromString(data).images, SPEC, LIMITS)


def main() -> None:
    runs = sys.argv[1] if len(sys.argv) > 1 else "100000"
    with tempfile.TemporaryDirectory() as corpus:
        for index, (_, data) in enumerate(valid_messages(SPEC.shape)):
            (Path(corpus) / str(index)).write_bytes(data)
        atheris.Setup([sys.argv[0], f"-atheris_runs={runs}", "-max_len=20000", "-print_final_stats=1", corpus], decode)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
