"""`phalanx calibrate`: a new bundle from an operator's own images, or a sentence that says why not."""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.bundle import Bundle, read_bundle
from models.card import CARD_FILE
from models.composition import EnsembleChoice, compose
from models.ensemble import Verdict, decide
from models.masks import draw_masks
from models.member_session import member_runs
from service.calibrate import add_arguments, run
from tests.bundles import CLASSES, random_images, write_tiny_bundle
from tests.service.cards import write_carded_bundle

REVIEW_RATE = 0.2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle", images=400)


def operator_images(bundle: Path, n: int, seed: int) -> NDArray[np.uint8]:
    """Darker and of less contrast than those the bundle was calibrated on."""
    return random_images(read_bundle(bundle).manifest.input, n, seed) // 4


def save(images: NDArray[np.uint8], folder: Path, suffix: str = "png") -> Path:
    """Under class folders, in turn."""
    for index, image in enumerate(images):
        path = folder / CLASSES[index % len(CLASSES)] / f"{index}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def invoke(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def flagged(bundle: Bundle, images: NDArray[np.uint8]) -> float:
    """The share of images that are not CLEAN at the review rate."""
    ensemble = compose(bundle, EnsembleChoice(name="full", review_rate=REVIEW_RATE, reject_rate=0.05))
    outputs = {}
    for name, member in member_runs(bundle).items():
        spec = member.stochastic
        masks = draw_masks(bundle.manifest.masks.seed, spec.samples, spec.width, spec.keep) if spec else None
        outputs[name] = member.logits(images, masks)
    return float(np.mean(decide(ensemble, outputs).verdict != Verdict.CLEAN))


def test_false_alarms_on_the_operators_images_come_back_to_the_rate_configured(bundle: Path, tmp_path: Path) -> None:
    folder = save(operator_images(bundle, 400, seed=1), tmp_path / "images")
    assert invoke(bundle, folder, "-o", tmp_path / "new") == 0
    unseen = operator_images(bundle, 400, seed=2)
    before, after = flagged(read_bundle(bundle), unseen), flagged(read_bundle(tmp_path / "new"), unseen)
    assert abs(before - REVIEW_RATE) > 0.1
    assert abs(after - REVIEW_RATE) < 0.08  # twice the deviation of two samples of 400


def test_all_but_the_calibration_stays(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(operator_images(bundle, 150, seed=1), tmp_path / "images")
    assert invoke(bundle, folder, "-o", tmp_path / "new") == 0
    old, new = read_bundle(bundle), read_bundle(tmp_path / "new")
    assert (new.onnx_bytes, new.weights, new.documents) == (old.onnx_bytes, old.weights, old.documents)
    kept = old.manifest.model_dump(exclude={"version", "calibration"})
    assert new.manifest.model_dump(exclude={"version", "calibration"}) == kept
    assert new.manifest.version != old.manifest.version
    assert new.manifest.calibration.n == len(new.calibration) == 150
    assert new.manifest.calibration.source == "folder 'images'"
    assert sorted(new.calibration.labels.tolist()) == sorted(list(range(10)) * 15)  # from the folders' names
    said = capsys.readouterr()
    assert f"version {new.manifest.version} (was {old.manifest.version}), calibrated on 150 images" in " ".join(said.out.split())
    assert "150 images give p-values in steps of 0.0066; 1,000 or more are recommended" in " ".join(said.err.split())


def test_a_card_of_the_old_p_values_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carded = write_carded_bundle(tmp_path / "carded")
    folder = save(operator_images(carded, 100, seed=1), tmp_path / "images")
    assert invoke(carded, folder, "-o", tmp_path / "new") == 0
    old, new = read_bundle(carded), read_bundle(tmp_path / "new")
    assert new.manifest.subject != old.manifest.subject
    assert new.documents == {file: data for file, data in old.documents.items() if file != CARD_FILE}
    assert not (tmp_path / "new" / CARD_FILE).exists()
    assert f"left out: {CARD_FILE}, whose figures are of the old p-values" in " ".join(capsys.readouterr().err.split())


def test_the_same_images_in_other_files_give_the_same_fingerprint(bundle: Path, tmp_path: Path) -> None:
    images = operator_images(bundle, 100, seed=1)
    for name, order in (("one", images), ("other", images[::-1])):
        assert invoke(bundle, save(order, tmp_path / name / "images"), "-o", tmp_path / name / "new") == 0
    one, other = (read_bundle(tmp_path / name / "new").manifest.calibration for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint


def test_what_cannot_be_used_is_left_out_and_said(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = operator_images(bundle, 120, seed=1)
    folder = save(images, tmp_path / "images")
    shutil.copy(folder / "forest" / "1.png", folder / "again.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    (folder / "notes.txt").write_text("not an image, and not named like one")
    Image.fromarray(np.kron(255 - images[0], np.ones((3, 2, 1), np.uint8))).save(folder / "large.webp", lossless=True)
    assert invoke(bundle, folder, "-o", tmp_path / "new") == 0
    assert read_bundle(tmp_path / "new").manifest.calibration.n == 121
    said = " ".join(capsys.readouterr().err.split())
    assert "left out, as it cannot be decoded: 1, for example broken.jpg: expected a complete JPEG file" in said
    assert "left out, as it repeats another image: 1" in said
    assert "resized to 8 × 8: 1 of 121" in said


def test_a_limit_draws_some_images(bundle: Path, tmp_path: Path) -> None:
    folder = save(operator_images(bundle, 150, seed=1), tmp_path / "images")
    assert invoke(bundle, folder, "-o", tmp_path / "new", "--limit", "110") == 0
    new = read_bundle(tmp_path / "new")
    assert len(new.calibration) == 110
    assert set(new.calibration.labels.tolist()) == set(range(10))


REFUSED = {
    "fewer than a hundred images": (99, [], "expected at least 100 different images .*, got 99"),
    "a rate finer than the images resolve": (
        150,
        ["--reject-rate", "0.005"],
        r"expected at least 199 different images for a reject rate of 0.005 \(1,000 or more recommended\), got 150",
    ),
    "a rate that is none": (100, ["--reject-rate", "0"], "expected a reject rate between 0 and 1, got 0"),
}


@pytest.mark.parametrize(("n", "options", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], n: int, options: list[str], match: str) -> None:
    folder = save(operator_images(bundle, n, seed=1), tmp_path / "images")
    assert invoke(bundle, folder, "-o", tmp_path / "new", *options) == 1
    assert not (tmp_path / "new").exists()
    assert re.search(match, " ".join(capsys.readouterr().err.split()))


def test_images_that_are_all_the_same_are_too_few(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(np.repeat(operator_images(bundle, 1, seed=1), 150, axis=0), tmp_path / "images")
    assert invoke(bundle, folder, "-o", tmp_path / "new") == 1
    assert "got 1" in capsys.readouterr().err


def test_an_output_that_exists_is_replaced_only_when_said(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(operator_images(bundle, 100, seed=1), tmp_path / "images")
    path = shutil.copytree(bundle, tmp_path / "live")
    before = read_bundle(path).manifest.version
    assert invoke(path, folder, "-o", path) == 1
    assert "exists; name another output, or say --replace" in " ".join(capsys.readouterr().err.split())
    assert read_bundle(path).manifest.version == before
    assert invoke(path, folder, "-o", path, "--replace") == 0
    assert read_bundle(path).manifest.calibration.n == 100


def test_a_full_disk_leaves_the_bundle_that_was_there(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(operator_images(bundle, 100, seed=1), tmp_path / "images")
    path = shutil.copytree(bundle, tmp_path / "live")
    before = read_bundle(path).manifest
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        assert invoke(path, folder, "-o", path, "--replace") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search("live could not be written, and is as it was: .*File too large", said)
    assert read_bundle(path).manifest == before


def test_a_folder_of_photographs_is_never_replaced(bundle: Path, tmp_path: Path) -> None:
    folder = save(operator_images(bundle, 100, seed=1), tmp_path / "images")
    assert invoke(bundle, folder, "-o", folder, "--replace") == 1
    assert len(list(folder.rglob("*.png"))) == 100


@pytest.mark.parametrize("missing", ["bundle", "folder"])
def test_a_path_that_leads_nowhere(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    nowhere = tmp_path / "nowhere"
    arguments = (nowhere, tmp_path) if missing == "bundle" else (bundle, nowhere)
    assert invoke(*arguments, "-o", tmp_path / "new") == 1
    assert "nowhere: expected a folder" in " ".join(capsys.readouterr().err.split())


def test_no_torch_is_needed() -> None:
    code = "import sys, service.calibrate, service.inspect; sys.exit('torch' in sys.modules or 'training' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
