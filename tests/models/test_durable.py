"""Whatever interrupts a write, what was there before is whole, or the new one is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.bundle import InvalidBundle, read_bundle, write_bundle
from models.durable import replace_file, replace_folder
from tests.bundles import write_tiny_bundle


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where there is such a place: hundreds of bundles are synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        write_tiny_bundle(Path(name) / "sources" / "old")
        write_tiny_bundle(Path(name) / "sources" / "new", seed=1)
        yield Path(name)


def interrupt(folder: Path, mode: str) -> Counter[str]:
    """What was found at the bundle's place after every interruption; see interrupted_writer."""
    path, sources = folder / mode / "bundle", folder / "sources"
    shutil.copytree(sources / "old", path)
    command = [sys.executable, "-m", "tests.models.interrupted_writer", mode, str(path), str(sources / "new")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return Counter(finished.stdout.split())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_line_leaves_the_old_bundle_or_the_new_one(folder: Path) -> None:
    found = interrupt(folder, "kill")
    assert found.keys() - {"aside"} == {"old", "new"}  # aside: where the file system cannot exchange two folders
    assert found.total() > 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_without_atomic_exchange_leaves_the_old_bundle_or_the_new_one_or_says_where_the_old_one_is(
    folder: Path,
) -> None:
    found = interrupt(folder, "kill-without-exchange")
    assert found.keys() == {"old", "new", "aside"}
    assert found["aside"] < 5  # an instant


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
def test_a_full_disk_leaves_the_old_bundle(folder: Path) -> None:
    found = interrupt(folder, "full")
    assert found.keys() == {"old"}
    assert found.total() > 30


def test_a_write_through_a_link_replaces_what_it_leads_to(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "sources" / "old", tmp_path / "version-1")
    (tmp_path / "current").symlink_to("version-1")
    new = read_bundle(folder / "sources" / "new")
    write_bundle(tmp_path / "current", new.parts())
    assert (tmp_path / "current").is_symlink()
    assert read_bundle(tmp_path / "version-1").manifest == new.manifest
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["current", "version-1"]


@pytest.mark.parametrize(
    "occupied",
    [
        pytest.param({"holiday.jpg": b"\xff\xd8"}, id="a folder of something else"),
        pytest.param(b"text", id="a file"),
    ],
)
def test_what_is_no_bundle_is_not_replaced(folder: Path, tmp_path: Path, occupied: dict[str, bytes] | bytes) -> None:
    path = tmp_path / "photos"
    if isinstance(occupied, bytes):
        path.write_bytes(occupied)
    else:
        replace_folder(path, occupied)
    with pytest.raises(InvalidBundle, match=r"photos: expected a bundle or nothing .*, got something else"):
        write_bundle(path, read_bundle(folder / "sources" / "new").parts())
    assert path.read_bytes() == b"text" if path.is_file() else (path / "holiday.jpg").is_file()


def test_an_empty_folder_and_missing_parents_are_written_to(folder: Path, tmp_path: Path) -> None:
    parts = read_bundle(folder / "sources" / "new").parts()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "not" / "yet" / "there"):
        assert write_bundle(path, parts).manifest == read_bundle(path).manifest


def test_a_folder_of_another_name_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    others = [tmp_path / ".bundle", tmp_path / ".bundle.old", tmp_path / ".bundle2.0000.partial"]
    for other in others:
        other.mkdir()
    (tmp_path / ".bundle.0000.partial").mkdir()
    replace_folder(tmp_path / "bundle", {"file": b"content"})
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "bundle"])


def test_of_several_writers_of_a_shared_file_one_has_the_last_word(tmp_path: Path) -> None:
    contents = [bytes([writer]) * 100_000 for writer in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        for _ in range(20):
            for future in [pool.submit(replace_file, tmp_path / "file", content, shared=True) for content in contents]:
                future.result()
            assert (tmp_path / "file").read_bytes() in contents
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
