"""Unusual images are kept as they were classified, within bounds, and whatever goes wrong with keeping is no caller's business."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.durable import PARTIAL
from service.batch import sliced
from service.cli import main
from service.codec import AnswerNames
from service.config import InvalidConfig, QuarantineConfig, load_config
from service.graph_cache import GraphCache
from service.metrics import Metrics
from service.pb.inference import open_inference_pb2
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.quarantine import keeper as keeping
from service.quarantine.entry import Entry, read_entry
from service.quarantine.folder import LOCK, Folder, entries
from service.quarantine.keeper import MOST_WAITING, CannotKeep, Keeper
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


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


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
    kept = {pixels_of(path).tobytes(): read_entry(path) for path in entries(tmp_path / "kept")}
    assert kept.keys() == unusual.keys()
    for content, entry in kept.items():
        assert entry.seen.class_name == unusual[content].class_name
        assert entry.seen.verdict == unusual[content].verdict
        assert np.allclose([d.p_value for d in entry.seen.detections], [d.p_value for d in unusual[content].detections])
        assert np.allclose(entry.seen.votes[0].probabilities, unusual[content].votes[0].probabilities, atol=1e-5)
        assert (entry.caller, entry.ensemble, entry.bundle_version) == ("anonymous", "full", answer.bundle_version)
    assert mode(tmp_path / "kept") == 0o700
    assert {mode(path) for path in (tmp_path / "kept").iterdir()} == {0o600}


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


def test_a_disk_that_refuses_costs_neither_the_start_nor_an_answer_and_is_told_once(
    tiny_bundle: Path, graphs: GraphCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "mounted" / "kept"
    folder.parent.symlink_to(disk)  # which is not there yet
    sections = {"ensembles": {"full": {}}, "decision": UNUSUAL, "quarantine": {"folder": folder}}
    with caplog.at_level(logging.INFO, "service.quarantine.keeper"), serving(tiny_bundle, graphs, **sections) as running:
        keeper = running.server.catalogue.default.witnesses[0]
        assert isinstance(keeper, Keeper)
        for seed in range(3):
            assert len(running.native.Classify(request(random_pixels(IMAGES, seed))).results) == IMAGES
        keeper.flush()
        dropped = running.scrape()['phalanx_quarantine_dropped_images_total{reason="disk"}']
        disk.mkdir()
        running.native.Classify(request(random_pixels(IMAGES, 3)))
        keeper.flush()
        kept = sum(value for series, value in running.scrape().items() if series.startswith("phalanx_quarantine_kept_images_total"))
    assert dropped > IMAGES
    assert len(entries(folder)) == kept > 0
    told = [record.message for record in caplog.records if record.name == "service.quarantine.keeper"]
    assert [message.split(":")[1].split(" ")[1] for message in told] == ["cannot", str(folder)]


# The keeper


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def sampled(metrics: Metrics) -> dict[str, float]:
    """By what follows `phalanx_quarantine_`, and the reason where there is one."""
    return {
        " ".join([sample.name.removeprefix("phalanx_quarantine_"), *filter(None, [sample.labels.get("reason")])]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def lie_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


@pytest.fixture(scope="module")
def unusual(tiny_bundle: Path, graphs: GraphCache) -> Answered:
    """More suspect and rejected images than may wait."""
    with serving(tiny_bundle, graphs, ensembles={"full": {}}, decision=UNUSUAL) as running:
        served, pixels = running.server.catalogue.default, random_pixels(8 * MOST_WAITING)
        result = served.loaded.batcher.submit(pixels).result()
        return Answered(served.name, served.bundle_version, served.names, pixels, result, "somebody", "a-request")


def first(answered: Answered, images: int) -> Answered:
    return replace(answered, result=replace(answered.result, decision=sliced(answered.result.decision, 0, images)))


class Untouchable(np.ndarray[Any, np.dtype[np.uint8]]):
    def __getitem__(self, rows: Any) -> Any:
        raise AssertionError(f"rows {rows} of what cannot be kept were touched")


def test_of_a_flood_what_has_no_room_is_counted_and_never_copied(unusual: Answered, metrics: Metrics, tmp_path: Path) -> None:
    many = int((unusual.result.decision.verdict > 0).sum())
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the disk takes forever
        keeper = Keeper(QuarantineConfig(folder=tmp_path), metrics.quarantine())
        keeper.saw(unusual)
        keeper.saw(replace(unusual, images=unusual.images.view(Untouchable)))
    keeper.close(60.0)
    assert len(entries(tmp_path)) == MOST_WAITING
    assert sampled(metrics)["dropped_images_total queue_full"] == 2 * many - MOST_WAITING


def test_a_fault_of_ours_is_told_in_full_once_and_then_seldom(
    unusual: Answered, metrics: Metrics, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless = replace(unusual, names=AnswerNames((), (), ()))
    keeper = Keeper(QuarantineConfig(folder=tmp_path), metrics.quarantine())
    keeper.saw(nameless)
    keeper.flush()
    assert [bool(record.exc_info) for record in caplog.records] == [True]
    assert sampled(metrics)["dropped_images_total internal"] == MOST_WAITING
    monkeypatch.setattr(keeping, "QUIET_SECONDS", 0.0)  # the minute is over
    keeper.saw(first(nameless, IMAGES))
    keeper.close(60.0)
    says = f"quarantine: {MOST_WAITING} more that could not be written, at last for IndexError('tuple index out of range')"
    assert caplog.records[1].message == says


@pytest.mark.parametrize("path", ["file", "file/kept"])
def test_a_file_where_the_folder_should_be_ends_the_start(tmp_path: Path, metrics: Metrics, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotKeep, match=r"quarantine\.folder: expected a folder, .*got .*file is a file"):
        Keeper(QuarantineConfig(folder=tmp_path / path), metrics.quarantine())


def test_the_gauge_is_right_after_a_write_whoever_removed_the_folder(unusual: Answered, metrics: Metrics, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keeper = Keeper(QuarantineConfig(folder=folder), metrics.quarantine())
    keeper.saw(unusual)
    keeper.flush()
    assert sampled(metrics)["bytes"] == lie_in(folder) > 0
    shutil.rmtree(folder)
    keeper.saw(first(unusual, IMAGES))
    keeper.close(60.0)
    assert sampled(metrics)["bytes"] == lie_in(folder)
    assert 0 < len(entries(folder)) <= IMAGES


def test_the_gauge_follows_what_others_write(metrics: Metrics, tmp_path: Path) -> None:
    keeper = Keeper(QuarantineConfig(folder=tmp_path), metrics.quarantine(), look_seconds=0.001)
    held = Folder(tmp_path, 2**20).keep(name(0), CONTENT).bytes
    end = time.monotonic() + 60
    while sampled(metrics)["bytes"] != held and time.monotonic() < end:
        keeper.flush()
    keeper.close(60.0)
    assert sampled(metrics)["bytes"] == held == len(CONTENT)


# The folder


CONTENT = bytes(1000)


def name(number: int) -> str:
    return f"20260101T000000.{number:06}Z-suspect-{number:08x}.png"


def numbers(folder: Path) -> list[int]:
    return [int(path.name.split(".")[1].split("Z")[0]) for path in entries(folder)]


def entry(seconds: int) -> Entry:
    seen = pb.Classification(class_name="River", verdict=pb.VERDICT_SUSPECT, p_value=float("nan"), masks_seed=2**62 + 1)
    return Entry(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds), "c", "r", "full", "1", seen)


def some_pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 1), np.uint8)


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    wrote = entry(1)
    (tmp_path / "x.png").write_bytes(wrote.encode(some_pixels()))
    read = read_entry(tmp_path / "x.png")
    assert np.array_equal(pixels_of(tmp_path / "x.png"), some_pixels()[..., 0])
    assert np.isnan(read.seen.p_value)
    assert (read.time, read.seen.masks_seed, read.verdict) == (wrote.time, 2**62 + 1, "suspect")


def test_the_oldest_make_room_whoever_wrote_them(tmp_path: Path) -> None:
    writers = [Folder(tmp_path, 32 * len(CONTENT)) for _ in range(3)]
    evicted = 0
    for i in range(100):
        held = writers[0 if i < 40 else i % 3].keep(name(i), CONTENT)  # one alone may fill it
        evicted += held.evicted
        assert held.bytes == lie_in(tmp_path) == writers[0].noted() <= 32 * len(CONTENT)
        assert numbers(tmp_path) == list(range(evicted, i + 1))
    assert 30 <= 100 - evicted <= 32  # a sixteenth is freed at once


def test_what_is_written_after_the_clock_went_back_is_the_newest(tmp_path: Path) -> None:
    """A full folder of tomorrow's images, found as it is by who comes later, makes room for today's."""
    for i in range(32):
        Folder(tmp_path, 32 * len(CONTENT)).keep(f"20260102T235959.{999990 + i % 10:06}Z-suspect-{i:08x}.png", CONTENT)
    folder = Folder(tmp_path, 32 * len(CONTENT))
    for i in range(32, 132):
        if i == 64:
            (tmp_path / LOCK).unlink()
        folder.keep(f"20260101T000000.{i % 7:06}Z-{'suspect' if i % 2 else 'rejected'}-{i:08x}.png", CONTENT)
        there = [int(path.stem[-8:], 16) for path in entries(tmp_path)]
        assert there == list(range(i + 1 - len(there), i + 1))  # in the order in which they were written
    assert len(there) >= 30
    folder.keep("20270101T000000.000000Z-suspect-00000000.png", CONTENT)
    assert entries(tmp_path)[-1].name == "20270101T000000.000000Z-suspect-00000000.png"


@pytest.mark.parametrize("time", ["20261345T000000.000000Z", "99991231T235959.999999Z"])
def test_a_file_of_no_day_there_is_stops_nothing(tmp_path: Path, time: str) -> None:
    (tmp_path / f"{time}-suspect-00000000.png").write_bytes(CONTENT)
    assert Folder(tmp_path, 4 * len(CONTENT)).keep(name(1), CONTENT).bytes == 2 * len(CONTENT)
    assert (tmp_path / name(1)).exists()


def test_others_files_are_no_entries_and_stay(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(bytes(10 * len(CONTENT)))
    folder = Folder(tmp_path, 4 * len(CONTENT))
    for i in range(8):
        folder.keep(name(i), CONTENT)
    assert (tmp_path / "holiday.png").exists()
    assert numbers(tmp_path) == [4, 5, 6, 7] or numbers(tmp_path) == [5, 6, 7]


def test_a_smaller_bound_holds_from_the_start(tmp_path: Path) -> None:
    for i in range(5):
        Folder(tmp_path, 10 * len(CONTENT)).keep(name(i), CONTENT)
    assert Folder(tmp_path, 3 * len(CONTENT)).tidy().evicted == 3
    assert numbers(tmp_path) == [3, 4]


def test_what_an_operator_removes_is_room_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 5 * len(CONTENT))
    for i in range(4):
        folder.keep(name(i), CONTENT)
    stamp = tmp_path.stat().st_mtime_ns
    entries(tmp_path)[2].unlink()
    while tmp_path.stat().st_mtime_ns == stamp:  # the kernel's clock has ticks
        (tmp_path / "x").touch()
        (tmp_path / "x").unlink()
    assert folder.keep(name(4), CONTENT).bytes == 4 * len(CONTENT)
    assert numbers(tmp_path) == [0, 1, 3, 4]


def write_many(path: Path, bound: int, first: int, step: int) -> None:
    for i in range(first, 200, step):
        Folder(path, bound).keep(name(i), CONTENT)


def test_threads_and_processes_keep_one_bound(tmp_path: Path) -> None:
    bound = 20 * len(CONTENT)
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=write_many, args=(tmp_path, bound, first, 4)) for first in (2, 3)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(2) as threads:
        for each in [threads.submit(write_many, tmp_path, bound, first, 4) for first in (0, 1)]:
            each.result()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert Folder(tmp_path, bound).noted() == lie_in(tmp_path)
    assert 18 <= len(entries(tmp_path)) <= 20


def test_a_writer_killed_anywhere_leaves_the_folder_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.service.killed_keeper", str(tmp_path / "kept")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 50  # places


def test_who_waited_for_a_folder_that_was_removed_writes_into_the_new_one(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "kept", 2**20)
    folder.make()
    with (folder.path / LOCK).open("w") as lock, ThreadPoolExecutor(1) as thread:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = thread.submit(folder.keep, name(0), CONTENT)
        waits_for(folder.path / LOCK)
        shutil.rmtree(folder.path)
        assert folder.keep(name(1), CONTENT).bytes == len(CONTENT)  # that lock is nobody's any more
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result().bytes == folder.noted() == lie_in(folder.path) == 2 * len(CONTENT)


def waits_for(file: Path) -> None:
    """Return when somebody is blocked at this file's lock, as Linux lists it."""
    end, inode = time.monotonic() + 60, f":{file.stat().st_ino} "
    while time.monotonic() < end:
        if any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines()):
            return
    pytest.fail("nobody waits")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow by much."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_takes_nothing_of_what_was_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2 * len(CONTENT) + 500)
    for i in range(2):
        folder.keep(name(i), CONTENT)
    refused: list[OSError] = []
    with full_disk():
        for i in range(2, 5):
            try:
                folder.keep(name(i), CONTENT)
            except OSError as error:
                refused.append(error)
    assert len(refused) == 3
    assert numbers(tmp_path) == [0, 1]
    assert not list(tmp_path.glob(f"*{PARTIAL}"))
    folder.keep(name(5), CONTENT)
    assert numbers(tmp_path) == [1, 5]


def test_its_path_is_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "phalanx.yaml").write_text("quarantine: {folder: kept}")
    config = load_config(tmp_path / "phalanx.yaml", {})
    assert config.quarantine is not None
    assert config.quarantine.folder == tmp_path / "kept"


@pytest.mark.parametrize("nothing", ["", " "])
def test_an_empty_path_is_refused(tmp_path: Path, nothing: str) -> None:
    (tmp_path / "phalanx.yaml").write_text(f"quarantine: {{folder: '{nothing}'}}")
    says = f"line 1: quarantine.folder: expected the path of a folder for nothing but the quarantine, got '{nothing}'"
    with pytest.raises(InvalidConfig, match=says):
        load_config(tmp_path / "phalanx.yaml", {})
    with pytest.raises(InvalidConfig, match=f"PHALANX_QUARANTINE__FOLDER: .*got '{nothing}'"):
        load_config(None, {"PHALANX_QUARANTINE__FOLDER": nothing})


# The command


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = Folder(tmp_path / "kept", 2**20)
    for i in range(3):
        folder.keep(entry(i).file_name(), entry(i).encode(some_pixels()))
    return folder.path


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


def test_ls_reads_no_pixels(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in entries(kept):
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"IDAT") + 8])
    assert main(["quarantine", "ls", "--folder", str(kept)]) == 0
    assert capsys.readouterr().out.count("River") == 3


def test_ls_prints_each_entry_as_soon_as_it_is_read(kept: Path) -> None:
    last = entries(kept)[-1]
    last.unlink()
    os.mkfifo(last)
    command = [sys.executable, "-u", "-m", "service.cli", "quarantine", "ls", "--json", "--folder", str(kept)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        assert [json.loads(listing.stdout.readline())["caller"] for _ in range(2)] == ["c", "c"]
        last.write_bytes(b"")  # it waited for this one
