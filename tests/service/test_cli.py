"""The `phalanx` command as a person and as a program use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from service.cli import COMMANDS, main
from service.graph_cache import GraphCache
from tests.service.serving import Running, random_pixels, serving

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiles(tmp_path: Path) -> list[str]:
    for index, pixels in enumerate(random_pixels(3)):
        Image.fromarray(pixels).save(tmp_path / f"tile{index}.png")
    return [str(path) for path in sorted(tmp_path.glob("*.png"))]


def test_classify_prints_class_verdict_votes_and_detectors(
    running: Running, tiles: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "--server", str(running.server.address), *tiles]) == 0
    printed = capsys.readouterr().out
    for word in ("full, bundle", "CLEAN", "metric", "bayesian", "disagreement", "p = ", "tile2.png"):
        assert word in printed


def test_classify_json_has_the_field_names_of_the_proto(
    running: Running, tiles: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    address = str(running.server.address)
    assert main(["classify", "--server", address, "--json", "--ensemble", "no-edge", *tiles]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == tiles
    assert lines[0]["ensemble"] == "no-edge"
    answer = lines[0]["result"]["classification"]
    assert answer["class_index"] in range(10)
    assert answer["resized"] is False
    assert len(answer["probabilities"]) == 10
    assert {vote["member"] for vote in answer["votes"]} == {"metric", "adversarial", "bayesian"}
    assert {"detector", "score", "p_value"} == set(answer["detections"][0])


def test_classify_asks_for_no_more_than_it_is_told_to(
    running: Running, tiles: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "--server", str(running.server.address), "--json", "--disclosure", "label", tiles[0]]) == 0
    answer = json.loads(capsys.readouterr().out)["result"]["classification"]
    assert answer["votes"] == []
    assert "confidence" not in answer


def test_a_bad_file_is_a_row_of_its_own(running: Running, tiles: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(tiles[1]).write_bytes(b"[bold]no image")
    assert main(["classify", "--server", str(running.server.address), *tiles]) == 1
    printed = capsys.readouterr().out
    assert "ERROR" in printed
    assert "expected a PNG, JPEG" in printed
    assert printed.count("CLEAN") + printed.count("SUSPECT") + printed.count("REJECTED") == 2


def test_files_that_cannot_be_read_or_sent_are_rows_of_their_own(
    running: Running, tiles: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "large.png").write_bytes(bytes(17 * 2**20))
    files = [str(tmp_path / "nowhere.png"), tiles[0], str(tmp_path), str(tmp_path / "large.png"), tiles[1]]
    assert main(["classify", "--server", str(running.server.address), "--json", *files]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == files
    assert [line["disclosure"] for line in lines[:2]] == ["EVIDENCE", "EVIDENCE"]
    errors = [line["result"].get("error", {}).get("message", "") for line in lines]
    for error, expected in zip(errors, ["No such file", "", "Is a directory", "expected at most", ""], strict=True):
        assert error.startswith(expected) if expected else not error


def test_files_of_many_pixels_are_spread_over_requests(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(5):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{index}.png")
    files = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, limits={"max_request_pixels": 25_000}) as running:
        assert main(["classify", "--server", str(running.server.address), "--json", *files]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ensemble", "nobody"], "phalanx classify: NOT_FOUND: unknown ensemble 'nobody'"),
        (["--server", "127.0.0.1:1"], "phalanx classify: no server answers"),
    ],
)
def test_a_refusal_is_one_sentence(
    running: Running, tiles: list[str], arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "--server", str(running.server.address), *arguments, *tiles]) == 1
    assert sentence in capsys.readouterr().err


def test_more_files_than_a_request_takes_are_sent_in_several(
    running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, pixels in enumerate(random_pixels(300)):
        Image.fromarray(pixels).save(tmp_path / f"{index:03}.png")
    files = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    assert main(["classify", "--server", str(running.server.address), "--json", *files]) == 0
    assert [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()] == files


def test_a_wrong_configuration_is_refused_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "phalanx.yaml"
    path.write_text("listn: 127.0.0.1:1\nbatching: {max_queue: none}\n")
    assert main(["serve", "--config", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "phalanx serve: " in lines[0]
    assert "line 1: unknown key `listn`; did you mean `listen`?" in "\n".join(lines)


def test_a_configuration_can_be_checked_without_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "phalanx.yaml"
    path.write_text("ensembles: {full: {}, no-edge: {without: [edge]}}\n")
    assert main(["serve", "--config", str(path), "--check"]) == 0
    assert "valid: full, no-edge" in capsys.readouterr().out
    path.write_text("ensembles: {x: {without: [nosuch]}}\n")
    assert main(["serve", "--config", str(path), "--check"]) == 1
    assert "expected one of adversarial, bayesian, edge, metric, got 'nosuch'" in capsys.readouterr().err


def test_a_missing_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bundle", str(tmp_path / "none"), "--listen", "127.0.0.1:0", "--metrics", "off"]
    assert main(["serve", *arguments]) == 1
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert len(capsys.readouterr().out.splitlines()) > 8


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    script = """
import sys
from service.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(sorted({"numpy", "onnxruntime", "grpc", "pydantic", "PIL"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "phalanx classify tile.png" in done.stdout
