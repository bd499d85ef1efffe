"""Unusual images are kept as they were classified, within bounds, and whatever goes wrong with keeping is no caller's business."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.durable import PARTIAL
from service.cli import main
from service.config import QuarantineConfig, load_config
from service.graph_cache import GraphCache
from service.metrics import Metrics
from service.pb.inference import open_inference_pb2
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.quarantine.entry import Entry, read_entry
from service.quarantine.folder import Part, entries
from service.quarantine.keeper import MOST_WAITING, CannotKeep, Keeper, open_keeper
from service.servicers.catalogue import Catalogue
from service.witnesses import Answered
from tests.service.serving import Running, random_pixels, raw, request, serving

UNUSUAL = {"review_rate": 0.9999, "reject_rate": 0.975}  # so that nearly every image is at least suspect
UNSCREENED: dict[str, Any] = {"full": {"detectors": []}}
IMAGES = 12


def classify(running: Running, pixels: NDArray[np.uint8]) -> None:
    running.native.Classify(request(pixels))


def infer(running: Running, pixels: NDArray[np.uint8]) -> None:
    tensor = open_inference_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=pixels.shape)
    message = open_inference_pb2.ModelInferRequest(model_name="full", inputs=[tensor], raw_input_contents=[pixels.tobytes()])
    running.open_inference.ModelInfer(message)


def stream(running: Running, pixels: NDArray[np.uint8]) -> None:
    asked = [pb.ClassifyStreamRequest(id=str(i), image=raw(image)) for i, image in enumerate(pixels)]
    assert len(list(running.native.ClassifyStream(iter(asked)))) == len(pixels)


@pytest.mark.parametrize("front_end", ["grpcio", "native"])
@pytest.mark.parametrize("ask", [classify, infer, stream], ids=lambda ask: ask.__name__)
def test_what_is_kept_is_what_was_classified_whatever_its_caller_is_told(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, ask: Callable[[Running, Any], None], front_end: str
) -> None:
    pixels = random_pixels(IMAGES)
    sections = {"decision": UNUSUAL, "ensembles": {"full": {}}, "front_end": front_end}
    with serving(tiny_bundle, graphs, **sections) as open_to_all:
        answer = open_to_all.native.Classify(request(pixels))
    told = {image.tobytes(): result.classification for image, result in zip(pixels, answer.results, strict=True)}
    unusual = {content: seen for content, seen in told.items() if seen.verdict in (pb.VERDICT_SUSPECT, pb.VERDICT_REJECTED)}
    assert unusual

    quarantine = {"folder": tmp_path / "kept"}
    with serving(tiny_bundle, graphs, **sections, limits={"disclosure": "label"}, quarantine=quarantine) as running:
        ask(running, pixels)
    kept = {entry.pixels.tobytes(): entry for entry in map(read_entry, entries(tmp_path / "kept"))}
    assert kept.keys() == unusual.keys()
    for content, entry in kept.items():
        assert entry.seen.class_name == unusual[content].class_name
        assert entry.seen.verdict == unusual[content].verdict
        assert np.allclose([d.p_value for d in entry.seen.detections], [d.p_value for d in unusual[content].detections])
        assert np.allclose(entry.seen.votes[0].probabilities, unusual[content].votes[0].probabilities, atol=1e-5)
        assert (entry.caller, entry.ensemble, entry.bundle_version) == ("anonymous", "full", answer.bundle_version)
    assert ((tmp_path / "kept").stat().st_mode & 0o777) == 0o700


@pytest.mark.parametrize(
    ("ensembles", "verdicts", "expected"),
    [
        pytest.param(UNSCREENED, ["suspect", "rejected"], set[str](), id="nothing of what nobody screens"),
        pytest.param({"full": {}}, ["rejected"], {"rejected"}, id="rejected ones only"),
        pytest.param({"full": {}}, ["suspect"], {"suspect"}, id="suspect ones only"),
    ],
)
def test_nothing_else_is_kept(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, ensembles: dict[str, Any], verdicts: list[str], expected: set[str]
) -> None:
    quarantine = {"folder": tmp_path, "verdicts": verdicts}
    with serving(tiny_bundle, graphs, ensembles=ensembles, decision=UNUSUAL, quarantine=quarantine) as running:
        running.native.Classify(request(random_pixels(64)))
    assert {read_entry(path).verdict for path in entries(tmp_path)} == expected


def test_a_folder_that_is_gone_costs_no_answer_and_is_told_once(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"
    sections = {"ensembles": {"full": {}}, "decision": UNUSUAL, "quarantine": {"folder": folder}}
    with caplog.at_level(logging.INFO, "service.quarantine.keeper"), serving(tiny_bundle, graphs, **sections) as running:
        keeper = running.server.catalogue.default.witnesses[0]
        assert isinstance(keeper, Keeper)
        shutil.move(folder, tmp_path / "elsewhere")
        for seed in range(3):
            assert len(running.native.Classify(request(random_pixels(IMAGES, seed))).results) == IMAGES
        keeper.flush()
        dropped = running.scrape()['phalanx_quarantine_dropped_images_total{reason="disk"}']
        shutil.move(tmp_path / "elsewhere", folder)
        running.native.Classify(request(random_pixels(IMAGES, 3)))
        keeper.flush()
        kept = sum(value for series, value in running.scrape().items() if series.startswith("phalanx_quarantine_kept_images_total"))
    assert dropped > IMAGES
    assert len(entries(folder)) == kept > 0
    told = [record.message for record in caplog.records if record.name == "service.quarantine.keeper"]
    assert [message.split(":")[1].split(" ")[1] for message in told] == ["cannot", str(folder)]


def answered(catalogue: Catalogue, pixels: NDArray[np.uint8]) -> Answered:
    served = catalogue.default
    result = served.loaded.batcher.submit(pixels).result()
    return Answered(served.name, served.bundle_version, served.names, pixels, result, "somebody", "a-request")


def test_more_than_can_be_written_is_dropped_and_counted(tiny_bundle: Path, graphs: GraphCache, tmp_path: Path) -> None:
    metrics = Metrics()
    keeper = open_keeper(QuarantineConfig(folder=tmp_path), 1, metrics.quarantine())
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, decision=UNUSUAL) as running:
        seen = answered(running.server.catalogue, random_pixels(8 * MOST_WAITING))
    keeper.saw(seen)
    keeper.close(60.0)
    counts = {
        sample.name + str(sample.labels.get("reason", "")): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("phalanx_quarantine_dropped")
    }
    dropped = counts["phalanx_quarantine_dropped_images_totalqueue_full"]
    assert dropped > 0
    assert dropped + len(entries(tmp_path)) == int((seen.result.decision.verdict > 0).sum())


# The folder


def entry(seconds: int, side: int = 64) -> Entry:
    pixels = np.random.default_rng(seconds).integers(0, 256, (side, side, 1), np.uint8)
    seen = pb.Classification(class_name="River", verdict=pb.VERDICT_SUSPECT, p_value=float("nan"), masks_seed=2**62 + 1)
    return Entry(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds), "c", "r", "full", "1", seen, pixels)


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    wrote = entry(1)
    (tmp_path / "x.png").write_bytes(wrote.encode())
    read = read_entry(tmp_path / "x.png")
    assert np.array_equal(read.pixels, wrote.pixels)
    assert np.isnan(read.seen.p_value)
    assert (read.time, read.seen.masks_seed, read.verdict) == (wrote.time, 2**62 + 1, "suspect")


def test_the_oldest_make_room(tmp_path: Path) -> None:
    size = len(entry(0).encode())
    part = Part(tmp_path, 1, 10 * size)
    for i in range(25):
        part.keep(entry(i))
    times = [read_entry(path).time.second for path in entries(tmp_path)]
    assert times == list(range(25 - len(times), 25))
    assert 8 <= len(times) <= 10
    assert part.bytes == sum(path.stat().st_size for path in entries(tmp_path)) <= 10 * size


def test_who_starts_again_goes_on_with_what_is_there(tmp_path: Path) -> None:
    size = len(entry(0).encode())
    first = Part(tmp_path, 1, 10 * size)
    for i in range(5):
        first.keep(entry(i))
    first.close()
    again = Part(tmp_path, 1, 3 * size + size // 2)
    again.keep(entry(5))
    assert [read_entry(path).time.second for path in entries(tmp_path)] == [3, 4, 5]


def test_processes_have_parts_of_their_own_and_adopt_what_nobody_has(tmp_path: Path) -> None:
    size = len(entry(0).encode())
    two = [Part(tmp_path, 2, 8 * size) for _ in range(2)]
    for i in range(12):
        two[i % 2].keep(entry(i))
    assert len(list(tmp_path.glob("part-*"))) == 2
    assert all(part.bytes <= 4 * size for part in two)
    for part in two:
        part.close()
    Part(tmp_path, 1, 8 * size)
    assert len(list((tmp_path / "part-0").glob("*.png"))) == len(entries(tmp_path)) > 4


def test_what_a_killed_writer_left_is_no_entry_and_does_not_stay(tmp_path: Path) -> None:
    Part(tmp_path, 1, 2**20).close()
    leftover = tmp_path / "part-0" / f"20260101T000000.000000Z-suspect-0.png{PARTIAL}"
    leftover.write_bytes(entry(0).encode()[:100])
    assert entries(tmp_path) == []
    Part(tmp_path, 1, 2**20)
    assert not leftover.exists()


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_takes_nothing_of_what_was_kept(tmp_path: Path) -> None:
    size = len(entry(0).encode())
    part = Part(tmp_path, 1, 2 * size + size // 2)
    for i in range(2):
        part.keep(entry(i))
    refused: list[OSError] = []
    with full_disk():
        for i in range(2, 5):
            try:
                part.keep(entry(i))
            except OSError as error:
                refused.append(error)
    assert len(refused) == 3
    assert [read_entry(path).time.second for path in entries(tmp_path)] == [0, 1]
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))
    part.keep(entry(5))
    assert [read_entry(path).time.second for path in entries(tmp_path)] == [1, 5]


def test_a_folder_that_cannot_be_had_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotKeep, match=r"quarantine\.folder: cannot use .*file: "):
        open_keeper(QuarantineConfig(folder=tmp_path / "file"), 1, Metrics().quarantine())


def test_its_path_is_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "phalanx.yaml").write_text("quarantine: {folder: kept}")
    config = load_config(tmp_path / "phalanx.yaml", {})
    assert config.quarantine is not None
    assert config.quarantine.folder == tmp_path / "kept"


# The command


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    part = Part(tmp_path / "kept", 1, 2**20)
    for i in range(3):
        part.keep(entry(i))
    return tmp_path / "kept"


def test_ls_lists_and_show_shows(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quarantine", "ls", "--folder", str(kept), "--last", "2"]) == 0
    listed = capsys.readouterr().out
    assert "20260101T000000" not in listed
    assert "20260101T000002" in listed
    assert "River" in listed

    assert main(["quarantine", "show", "20260101T000001", "--folder", str(kept)]) == 0
    shown = capsys.readouterr().out
    assert "2026-01-01 00:00:01 UTC, caller c, request r" in shown
    assert "SUSPECT" in shown

    assert main(["quarantine", "ls", "--json", "--folder", str(kept)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["classification"]["class_name"] for line in lines] == ["River"] * 3
    assert main(["quarantine", "show", "--json", lines[0]["file"]]) == 0
    assert json.loads(capsys.readouterr().out) == lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["ls", "--folder", "nowhere"], "nowhere: no such folder", id="no folder"),
        pytest.param(["show", "2027", "--folder", "kept"], "begins with '2027'", id="no entry"),
        pytest.param(["show", "2026", "--folder", "kept"], "3 entries begin with '2026'", id="which entry"),
        pytest.param(["ls", "-c", "plain.yaml"], "has no `quarantine:", id="not configured"),
    ],
)
def test_a_clumsy_command_is_answered_in_one_sentence(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(kept.parent)
    Path("plain.yaml").write_text("listen: 127.0.0.1:0")
    assert main(["quarantine", *arguments]) == 1
    assert says in capsys.readouterr().err


def test_a_broken_file_is_named_and_hides_no_other(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = entries(kept)
    first.write_bytes(first.read_bytes()[:60])
    second.write_bytes(b"no image")
    assert main(["quarantine", "ls", "--folder", str(kept)]) == 1
    printed = capsys.readouterr()
    assert "20260101T000002" in printed.out
    assert printed.err.count("expected an image with its evidence") == 2
