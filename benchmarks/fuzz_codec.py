"""Coverage-guided fuzzing of what makes images of a caller's bytes, through either API: message, codec, image decoding, tensors.
Needs the extra `fuzz` (atheris).

    python -m benchmarks.fuzz_codec 1000000

Ends with a traceback, and the bytes in a file, where decoding raises anything but the errors of `service/errors.py`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service", "PIL", "models"]):
    from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

    from benchmarks.fuzz_targets import SPEC, read

from benchmarks.fuzz import valid_messages


def main() -> None:
    runs = sys.argv[1] if len(sys.argv) > 1 else "100000"
    with tempfile.TemporaryDirectory() as corpus:
        for index, (_, data) in enumerate(valid_messages(SPEC.shape)):
            (Path(corpus) / str(index)).write_bytes(data)
        atheris.Setup([sys.argv[0], f"-atheris_runs={runs}", "-max_len=20000", "-print_final_stats=1", corpus], read)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
