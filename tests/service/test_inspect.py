"""`phalanx inspect`: everything the manifest says, every hash verified, and an exit status that a script can use."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from models.bundle import read_bundle, write_bundle
from service.inspect import Inspection, add_arguments, as_tables, inspect_bundle, run
from tests.bundles import edit_manifest, tiny_parts, write_tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle", images=100)


def shown(inspection: Inspection) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(as_tables(inspection))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def invoke(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def test_a_good_bundle_is_printed_whole(bundle: Path) -> None:
    text = shown(inspect_bundle(bundle))
    manifest = read_bundle(bundle).manifest
    for expected in (manifest.version, "uint8 8 × 8 × 3", "annual crop", "1/101", "32 × 16, keep 0.7", "weights: MIT"):
        assert expected in text
    for file in manifest.files:
        assert f"{file.file} " in text
        assert file.sha256[:16] in text
    assert text.count("verified") == 11
    assert text.count("90.0%") == 15  # a row for every subset
    assert "valid: all 11 hashes agree" in text


def test_every_wrong_file_is_named_and_the_rest_still_printed(bundle: Path) -> None:
    (bundle / "edge.onnx").write_bytes(b"other")
    (bundle / "CARD.md").unlink()
    inspection = inspect_bundle(bundle)
    assert [check.file for check in inspection.files if check.problem] == ["edge.onnx", "CARD.md"]
    text = shown(inspection)
    assert text.count("  wrong  ") == 2
    assert "INVALID  edge.onnx: expected SHA-256" in text
    assert "CARD.md: expected a file" in text
    assert "adversarial" in text


def test_what_hashes_do_not_show_is_found_too(bundle: Path) -> None:
    edit_manifest(bundle, lambda m: m["calibration"].update(n=101))
    inspection = inspect_bundle(bundle)
    assert inspection.problem is not None
    assert "expected int16 (101,), got int16 (100,)" in inspection.problem
    assert not any(check.problem for check in inspection.files)


def test_without_a_manifest_there_is_one_line(tmp_path: Path) -> None:
    assert shown(inspect_bundle(tmp_path / "none")).startswith("INVALID  ")


def test_square_brackets_are_shown_not_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    write_bundle(path, dataclasses.replace(tiny_parts(images=10), name="[bold]loud[/bold]", licenses={"[/]": "MIT"}))
    text = shown(inspect_bundle(path))
    assert "[bold]loud[/bold]" in text
    assert "[/]: MIT" in text


def test_tables_and_status(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(str(bundle)) == 0
    assert "valid: all 11 hashes" in capsys.readouterr().out
    (bundle / "edge.onnx").write_bytes(b"other")
    assert invoke(str(bundle)) == 1
    assert "INVALID" in capsys.readouterr().out


def test_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(str(bundle), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["valid"] is True
    assert document["manifest"] == json.loads((bundle / "manifest.json").read_text())
    assert len(document["files"]) == 11

    (bundle / "edge.onnx").unlink()
    assert invoke(str(bundle), "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["valid"] is False
    assert document["problem"].startswith("edge.onnx: expected a file in ")
    assert [check["size"] for check in document["files"] if check["problem"]] == [None]

    (bundle / "manifest.json").write_text("{}")
    assert invoke(str(bundle), "--json") == 1
    assert json.loads(capsys.readouterr().out)["manifest"] is None
