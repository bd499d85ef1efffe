"""`phalanx inspect`: everything the manifest says, every hash verified, and an exit status that a script can use."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from models.bundle import read_bundle, read_manifest, write_bundle
from models.card import CARD_FILE, encode_card
from service.inspect import Inspection, add_arguments, as_tables, inspect_bundle, run
from tests.bundles import edit_manifest, replace_file, tiny_parts, write_tiny_bundle
from tests.service.cards import CONJECTURE, VANISHED, headline_of, share, tiny_card, write_carded_bundle


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


def test_a_bundle_without_a_card_claims_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "no robustness card: nothing is claimed under attack; phalanx-train attack, then phalanx-train report, make one"
    assert line in shown(inspect_bundle(bundle)).splitlines()
    assert invoke(str(bundle), "--json") == 0
    assert json.loads(capsys.readouterr().out)["card"] is None


def test_the_cards_headline_is_printed_with_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_carded_bundle(tmp_path / "bundle")
    text = shown(inspect_bundle(path))
    for expected in (
        "full under attack: l-infinity, ε = 4 of 255, suite quick",
        "94.0%  (95% interval 93.0% to 95.0%, n = 5,400)",
        "62.0%  (95% interval 61.0% to 63.0%, n = 300)",
        "71.0%  (95% interval 70.0% to 72.0%, n = 300)",
        CONJECTURE,
        "measured with fewer safeguards than a published figure",
        "- 1,000 images",
        "- FAB",
        "valid: all 12 hashes agree",
    ):
        assert expected in text
    assert "no robustness card" not in text
    assert "FAILED" not in text
    assert invoke(str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["card"] == json.loads((path / CARD_FILE).read_text())


def test_what_bounds_prove_is_printed_where_there_is_some(tmp_path: Path) -> None:
    card = tiny_card(read_manifest(write_tiny_bundle(tmp_path / "plain", images=100)))
    votes = card.systems[1].model_copy(update={"certified": share(0.37, 300)})
    text = shown(inspect_bundle(write_carded_bundle(tmp_path / "bundle", systems=(card.systems[0], votes))))
    assert "37.0%  (95% interval 36.0% to 38.0%, n = 300)" in text
    assert "proven, votes" in text
    assert "proven, full" not in text


def test_a_publishable_figure_lacks_nothing(tmp_path: Path) -> None:
    card = tiny_card(read_manifest(write_tiny_bundle(tmp_path / "plain", images=100)))
    headline = headline_of(card.system("full"), card.epsilon, publishable=True)
    text = shown(inspect_bundle(write_carded_bundle(tmp_path / "bundle", headline=headline, missing=())))
    assert "62.0%" in text
    assert "safeguards" not in text


def test_a_failed_check_is_shown_beside_the_figures_and_at_the_end(tmp_path: Path) -> None:
    path = write_carded_bundle(tmp_path / "bundle", checks=(VANISHED, VANISHED.model_copy(update={"measured": "twice"})))
    text = shown(inspect_bundle(path))
    assert text.count("gradients reach the image: zero on 12% of [images]") == 2
    assert text.count("gradients reach the image: twice") == 2
    assert text.index("valid: all") < text.index("FAILED   checks of robustness-card.json, whose figures prove nothing")


def test_the_card_of_another_subject_makes_the_bundle_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_carded_bundle(tmp_path / "bundle", subject="0123456789ab")
    text = shown(inspect_bundle(path))
    assert "INVALID  robustness-card.json: expected figures of these members, " in text
    assert "got those of 0123456789ab" in text
    assert "62.0%" not in text
    assert "no robustness card" not in text
    assert invoke(str(path), "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["valid"], document["card"]) == (False, None)


def test_a_card_that_does_not_validate_makes_the_bundle_invalid(tmp_path: Path) -> None:
    path = write_carded_bundle(tmp_path / "bundle")
    data = encode_card(tiny_card(read_manifest(path))).replace(b'"seed"', b'"sead"')
    replace_file(path, CARD_FILE, data)
    problem = inspect_bundle(path).problem
    assert problem is not None
    assert problem.startswith("robustness-card.json: seed: Field required")
