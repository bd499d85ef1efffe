"""`make demo` as a person runs it, and the tiles it shows."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from service.config import ServiceConfig
from service.demo import Answer, Attack, DemoFailed, find_tiles, moved, print_answers, true_class
from tests.bundles import write_tiny_bundle

REPOSITORY = Path(__file__).resolve().parents[2]
TILES, ADVERSARIAL = REPOSITORY / "examples" / "tiles", REPOSITORY / "examples" / "adversarial"
SHIPPED = ServiceConfig().bundle_path
CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
    "Pasture", "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip

needs_shipped = pytest.mark.skipif(
    not (SHIPPED / "manifest.json").is_file() or not any(ADVERSARIAL.glob("*.png")),
    reason="this checkout has no default bundle, or no adversarial tiles",
)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Example tiles under noise of 4/255, which say that `edge` was attacked."""
    folder = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    for path in TILES.glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image, np.int16)
        changed = np.clip(pixels + rng.choice([-4, 4], pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(changed).save(folder / path.name, pnginfo=Attack("edge", 4.0, "another").chunks())
    return folder


def run_demo(*arguments: object, columns: str = "160") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.demo", *map(str, arguments)]
    # a configuration that would fail the server, did it reach it
    environment = {**os.environ, "COLUMNS": columns, "PHALANX_ENSEMBLES": "{full: {without: [nobody]}}"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, encoding="utf-8", capture_output=True, timeout=120, check=False)


def test_the_demo_serves_asks_shows_both_sides_and_what_moved_and_stops(noisy: Path, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", height=64, width=64, images=120, classes=CLASSES)
    done = run_demo("--bundle", bundle, "--adversarial", noisy)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for path in TILES.glob("*.png"):
        (row,) = (line for line in lines if line.startswith(f"{path.stem} "))
        assert row.count("✓") + row.count("✗") == 4  # the ensemble and edge alone, clean and attacked
    assert "no pixel changed by more than 4 of 255, to fool edge alone (epsilon = 4/255)" in done.stdout
    assert "They were made on bundle another, not on the one that is served." in done.stdout
    assert 'phalanx_request_seconds_count{method="Classify"}' in done.stdout
    verdicts = [line.split()[-2:] for line in lines if line.startswith("phalanx_verdicts_total")]
    assert [sum(map(int, side)) for side in zip(*verdicts, strict=True)] == [20, 20]
    assert any(line.startswith("phalanx_dissent_total{") for line in lines)
    assert any(line.startswith("phalanx_p_value_bucket{") for line in lines)
    assert lines[-1] == "SIGTERM: the server drained and stopped."


def test_a_server_that_refuses_to_start_is_quoted(noisy: Path, tmp_path: Path) -> None:
    done = run_demo("--bundle", tmp_path / "none", "--adversarial", noisy)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: the server did not start (exit status 1):\nphalanx serve: ")
    assert "none: expected a folder with a bundle" in done.stderr


def relabel(folder: Path, name: str, attack: Attack | None, shift: int = 0) -> None:
    """Write one tile again, with other text chunks, or with every pixel moved."""
    with Image.open(folder / name) as image:
        pixels = np.asarray(image) // 2 + shift
    Image.fromarray(pixels.astype(np.uint8)).save(folder / name, pnginfo=attack.chunks() if attack else None)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        pytest.param(lambda f: (f / "river-1.png").unlink(), r"lacks 1 of 20 tiles, river-1\.png first", id="a tile is missing"),
        pytest.param(lambda f: relabel(f, "river-1.png", None), "does not say how it was made", id="a tile says nothing"),
        pytest.param(lambda f: relabel(f, "river-1.png", Attack("metric", 4.0, "v")), "mixes tiles of 2 attacks", id="two attacks"),
        pytest.param(
            lambda f: relabel(f, "river-1.png", Attack("edge", 4.0, "another"), shift=100),
            r"differs by \d+ from the clean one; expected at most 4",
            id="a tile left its ball",
        ),
    ],
)
def test_adversarial_tiles_are_checked(spoil: Any, sentence: str, noisy: Path, tmp_path: Path) -> None:
    for path in noisy.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert find_tiles(TILES, tmp_path).attack == Attack("edge", 4.0, "another")
    spoil(tmp_path)
    with pytest.raises(DemoFailed, match=sentence):
        find_tiles(TILES, tmp_path)


def test_a_file_name_tells_the_class() -> None:
    assert true_class(Path("annual-crop-12.png"), CLASSES) == 0
    assert true_class(Path("t-shirt-top-1.png"), ["Bag", "T - shirt / top"]) == 1
    with pytest.raises(DemoFailed, match="named for no class of this bundle; expected one of AnnualCrop"):
        true_class(Path("desert-1.png"), CLASSES)


@pytest.mark.parametrize("width", [160, 80, 50])
def test_a_narrow_terminal_gets_one_table_after_the_other(width: int) -> None:
    answer = Answer("HerbaceousVegetation", False, "REJECTED", "PermanentCrop", True)
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    print_answers(console, ["herbaceous-vegetation-1"], {"clean": [answer], "attacked": [answer]}, "full", "bayesian")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("tile,") for line in lines) == (1 if width == 160 else 2)
    # 50 columns are less than a table's longest words: they are folded, and nothing is lost
    assert sum(line.count("✗ HerbaceousVegetation" if width > 50 else "✗ Herb") for line in lines) == 2


def test_only_what_moved_is_shown() -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(moved({"a": 1, "b": 2}, {"a": 4, "b": 2}, {"a": 4, "b": 2, 'c{x="1"}': 5}, "full"))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()[1:]]
    assert rows == [["a", "+3", "+0"], ['c{x="1"}', "+0", "+5"]]


def test_the_attack_on_a_linear_member_goes_to_the_corner_of_its_ball_in_whole_pixels() -> None:
    script = runpy.run_path(str(REPOSITORY / "examples" / "make_adversarial.py"))
    settings = script["Settings"](epsilon=4.0, steps=6, starts=1, lead=100.0, seed=0)
    weight = torch.tensor([[1.0, -1.0], [-2.0, 2.0]])  # (pixels, classes): raise the first pixel, and class 0 gains
    clean = torch.tensor([[[100], [2]]], dtype=torch.uint8)  # (1, 2, 1)
    found = script["attack"](lambda x: x.flatten(1) @ weight, clean, 0, settings, torch.Generator())
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == [96, 6]


@needs_shipped
def test_the_shipped_adversarial_tiles_belong_to_the_shipped_bundle() -> None:
    from models.bundle import read_bundle

    tiles, manifest = find_tiles(TILES, ADVERSARIAL), read_bundle(SHIPPED).manifest
    assert tiles.attack == Attack("bayesian", manifest.provenance.epsilon, manifest.version)
    assert {path.name for path in ADVERSARIAL.glob("*.png")} == {path.name for path in tiles.clean}


@needs_shipped
def test_the_demo_runs_as_shipped() -> None:
    done = run_demo()
    assert done.returncode == 0, done.stderr
    assert "not on the one that is served" not in done.stdout
