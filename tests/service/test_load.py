"""Short versions of `benchmarks.overload` and `benchmarks.soak`, with the bundle that ships and a real server process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from benchmarks.load import Answer, Load, counted, quantile, rate
from benchmarks.overload import EXPECTED, report
from benchmarks.processes import Process, await_serving, image_shape, phalanx, random_images, request
from benchmarks.soak import Watch

QUEUE = 256


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    config = {"batching": {"max_queue": QUEUE}}
    with phalanx(config, tmp_path_factory.mktemp("graphs")) as process:
        await_serving(process)
        yield process


def load(server: Process, deadline: float = 5.0) -> Load:
    return Load(server.address, request(random_images(8, image_shape(server))), deadline)


def test_under_three_times_its_peak_it_answers_as_much_and_refuses_the_rest_at_once(server: Process) -> None:
    asking = load(server)
    peak = rate(asking.together(6, 2.0))
    answers = asking.at_rate(3 * peak, 3.0)
    codes = counted(answers)
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert codes["OK"] / 3.0 > peak / 2  # alone on a machine: 80% and more
    assert codes["RESOURCE_EXHAUSTED"] > peak  # some two thirds of what was offered
    assert quantile(answers, "RESOURCE_EXHAUSTED", 0.5) < quantile(answers, "OK", 0.5) / 4
    assert set(counted(asking.together(2, 0.5))) == {"OK"}  # and then it is as it was


def test_at_a_third_of_what_it_can_do_nobody_is_refused_and_no_connection_is_kept(server: Process) -> None:
    asking = load(server)
    before = server.open_files
    peak = rate(asking.together(6, 1.0))
    watch = Watch(server, 3.0)
    answers = asking.at_rate(peak / 3, 3.0)
    assert set(counted(answers)) == {"OK"}
    assert abs(watch.growth()) < 0.2  # of memory, and in three seconds
    until = time.monotonic() + 10
    while server.open_files > before and time.monotonic() < until:
        time.sleep(0.05)
    assert server.open_files <= before


@pytest.mark.parametrize(
    ("answers", "missed"),
    [
        ([Answer("OK", 0.1, 1.0)] * 9 + [Answer("RESOURCE_EXHAUSTED", 0.01, 1.0)] * 20, 0),
        ([Answer("OK", 0.1, 1.0)] * 7 + [Answer("RESOURCE_EXHAUSTED", 0.01, 1.0)] * 20, 1),  # too few
        ([Answer("OK", 0.1, 11.0)] * 9 + [Answer("RESOURCE_EXHAUSTED", 0.01, 1.0)] * 20, 1),  # too late to count
        ([Answer("OK", 0.1, 1.0)] * 9 + [Answer("RESOURCE_EXHAUSTED", 0.03, 1.0)] * 20, 1),  # refused too slowly
        ([Answer("OK", 0.1, 1.0)] * 9 + [Answer("RESOURCE_EXHAUSTED", 0.01, 1.0)] * 20 + [Answer("INTERNAL", 0.1, 1.0)], 1),
        ([Answer("OK", 0.1, 1.0)] * 9, 1),  # never refused: that was no overload
    ],
)
def test_a_missed_floor_is_told(answers: list[Answer], missed: int) -> None:
    assert report(answers, peak=1.0, seconds=10.0, end=10.0) == missed


def test_the_end_of_every_call_is_an_end_one_should_have(server: Process) -> None:
    assert set(counted(load(server, 0.001).together(2, 0.3))) <= EXPECTED
