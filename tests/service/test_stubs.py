"""The committed stubs are what the protos say."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_regenerating_the_stubs_gives_no_difference(tmp_path: Path) -> None:
    subprocess.run([sys.executable, REPOSITORY / "protos" / "generate", tmp_path], check=True, capture_output=True)
    generated = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*") if path.is_file()}
    committed = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "service" / "pb").rglob("*.py*")}
    committed = {path for path in committed if "__pycache__" not in path.parts}
    assert generated == committed
    different = [path for path in generated if not filecmp.cmp(tmp_path / path, REPOSITORY / path, shallow=False)]
    assert not different, "run protos/generate"
