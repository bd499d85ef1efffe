"""What `benchmarks.throughput` holds the server against."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import throughput
from benchmarks.processes import Process
from benchmarks.throughput import Cell, Setting, best, highest, measure, settings_of
from service.engine import cores
from tests.service.serving import Running, configured


@pytest.fixture(scope="module")
def settings(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Setting]:
    return settings_of(configured(tiny_bundle), tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize(
    ("before", "after", "floor", "chosen"),
    [
        pytest.param([100.0, 90.0], [100.0, 90.0], 100.0, 0, id="the faster one, where nothing changes"),
        pytest.param([100.0, 90.0], [60.0, 90.0], 90.0, 1, id="the faster one of both readings, not of the first"),
        pytest.param([100.0, 90.0], [50.0, 55.0], 75.0, 0, id="a machine that became slower is held against its mean"),
    ],
)
def test_the_floor_of_a_cell_is_the_best_mean_of_before_and_after(
    before: list[float], after: list[float], floor: float, chosen: int
) -> None:
    assert highest(before, after) == (floor, chosen)


def test_a_setting_has_the_batch_size_whose_readings_are_best_together(
    settings: list[Setting], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readings = {1: [10.0, 10.0], 2: [30.0, 30.0], 4: [20.0, 44.0]}  # by batch; one after the other
    monkeypatch.setattr(throughput, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(throughput, "PASSES", 2)
    monkeypatch.setattr(Setting, "images_per_second", lambda self, _: readings[self.batch].pop(0))
    assert best(settings[0], 0.0).batch == 4
    assert "10 in 1s, 30 in 2s, 32 in 4s" in capsys.readouterr().out


def test_settings_differ_in_who_shares_what(settings: list[Setting]) -> None:
    assert [setting.callers for setting in settings] == [cores(), 1, 1]
    assert [setting.session.get_session_options().intra_op_num_threads for setting in settings] == [1, cores(), cores()]
    assert all(setting.images_per_second(0.01) > 0 for setting in settings)


def test_a_server_is_held_against_the_floor_in_every_cell_of_every_round(
    running: Running, settings: list[Setting], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = (Cell(4, 2, 0.9), Cell(1, 4, 0.8))
    monkeypatch.setattr(throughput, "CELLS", cells)
    shares = measure(Process(0, str(running.server.address)), settings, rounds=2, seconds=0.1, floor_seconds=0.01)
    assert {cell: len(found) for cell, found in shares.items()} == dict.fromkeys(cells, 2)
    assert all(share > 0 for found in shares.values() for share in found)
    assert capsys.readouterr().out.count("images/s (") == 4  # and says which setting it was
