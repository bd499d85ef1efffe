"""Short versions of `benchmarks.overload` and `benchmarks.soak`, with the bundle that ships and a real server process."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest

from benchmarks.load import Answer, Load, counted, ended, quantile, rate
from benchmarks.overload import EXPECTED, report
from benchmarks.processes import Process, await_serving, image_shape, phalanx, random_images, request
from benchmarks.soak import Watch

QUEUE, CALLS = 64, 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    config = {"batching": {"max_queue": QUEUE}, "limits": {"max_concurrent_calls": CALLS}}
    with phalanx(config, tmp_path_factory.mktemp("graphs")) as process:
        await_serving(process)
        yield process


Asking = Callable[[int], Load]  # images a call


@pytest.fixture(scope="module")
def asking(server: Process) -> Iterator[Asking]:
    """Callers of so many images a call, each kind with its processes."""
    with ExitStack() as ends:
        shape = image_shape(server)
        yield cache(lambda images: ends.enter_context(Load(server.address, request(random_images(images, shape)))))


def test_under_three_times_its_peak_it_answers_as_much_and_refuses_the_rest_at_once(asking: Asking) -> None:
    load = asking(8)
    peak = rate(load.together(6, 2.0))
    answers = load.at_rate(3 * peak, 3.0)
    codes = counted(answers)
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert codes["OK"] / 3.0 > peak / 2  # alone on a machine: 80% and more
    refused = ended(answers, "RESOURCE_EXHAUSTED")
    assert len(refused) > peak  # some two thirds of what was offered
    assert {answer.reason for answer in refused} <= {"QUEUE_FULL", "TOO_MANY_CALLS"}
    took = quantile([answer.from_begun for answer in ended(answers, "OK")], 0.5)
    assert quantile([answer.from_begun for answer in refused], 0.5) < took / 4
    assert set(counted(load.together(2, 0.5))) == {"OK"}  # and then it is as it was


@pytest.mark.parametrize(("images", "limit"), [(1, "TOO_MANY_CALLS"), (QUEUE // 2, "QUEUE_FULL")])
def test_a_refusal_says_which_limit_it_was(asking: Asking, images: int, limit: str) -> None:
    answers = asking(images).together(4 * CALLS if images == 1 else CALLS, 0.5)
    assert {answer.end for answer in answers} == {"OK", f"RESOURCE_EXHAUSTED {limit}"}


def test_at_a_third_of_what_it_can_do_nobody_is_refused_and_no_connection_is_kept(server: Process, asking: Asking) -> None:
    load = asking(8)
    before = server.open_files
    peak = rate(load.together(6, 1.0))
    watch = Watch(server, 3.0)
    answers = load.at_rate(peak / 3, 3.0)
    assert set(counted(answers)) == {"OK"}
    assert watch.growth() < 0.05  # of memory, in three seconds; half an hour may take 2% (`benchmarks.soak`)
    until = time.monotonic() + 10
    while server.open_files > before and time.monotonic() < until:
        time.sleep(0.05)
    assert server.open_files <= before


def test_as_many_calls_are_made_as_were_asked_for_and_each_has_its_moments_in_order(asking: Asking) -> None:
    answers = asking(1).at_rate(20.0, 1.0)
    assert len(answers) == 20
    assert max(answer.due for answer in answers) - min(answer.due for answer in answers) < 1.0
    for answer in answers:
        assert answer.due <= answer.begun <= answer.ended
        assert answer.from_due == pytest.approx(answer.late + answer.from_begun)


def test_the_end_of_every_call_is_an_end_one_should_have(server: Process) -> None:
    with Load(server.address, request(random_images(8, image_shape(server))), timeout=0.001) as load:
        assert set(counted(load.together(2, 0.3))) <= EXPECTED


# --- what is held against the floors: 300 calls in ten seconds, ten times a peak of three a second, of which 27 are answered


def offered(code: str, seconds: float, calls: int, reason: str = "") -> list[Answer]:
    """Calls that were due one after the other in ten seconds, begun at once."""
    moments = [100 + index * 10 / calls for index in range(calls)]
    return [Answer(code, moment, moment, moment + seconds, reason) for moment in moments]


ANSWERED, REFUSED = offered("OK", 0.0, 27), offered("RESOURCE_EXHAUSTED", 0.01, 273, "QUEUE_FULL")


def delayed(answers: Sequence[Answer], seconds: float) -> list[Answer]:
    """Begun later, with their callers to blame."""
    return [replace(answer, begun=answer.begun + seconds, ended=answer.ended + seconds) for answer in answers]


@pytest.mark.parametrize(
    ("answers", "missed"),
    [
        pytest.param(ANSWERED + REFUSED, [], id="all is well"),
        pytest.param(ANSWERED[:20] + REFUSED + REFUSED[:7], ["0.67 of the peak was answered"], id="too few are answered"),
        pytest.param(
            offered("OK", 11.0, 27) + REFUSED, ["0.00 of the peak was answered"], id="they are answered too late to count"
        ),
        pytest.param(ANSWERED + offered("RESOURCE_EXHAUSTED", 0.03, 273), ["refusals took 30.0 ms"], id="refused slowly"),
        pytest.param(ANSWERED + delayed(REFUSED, 0.03), [], id="the caller was late, and not the refusal"),
        pytest.param(
            ANSWERED + REFUSED + offered("INTERNAL", 0.1, 1), ["calls ended with INTERNAL"], id="an end that none should have"
        ),
        pytest.param(offered("OK", 0.0, 300), ["nothing was refused"], id="no overload"),
        pytest.param(
            ANSWERED + REFUSED[:200] + delayed(REFUSED[200:], 20.0), ["the callers began 22.7 of 30.0 calls/s"], id="not offered"
        ),
    ],
)
def test_a_missed_floor_is_told(answers: list[Answer], missed: list[str]) -> None:
    told = report(answers, peak=3.0, times=10.0, seconds=10.0)
    assert len(told) == len(missed), told
    for sentence, expected in zip(told, missed, strict=True):
        assert sentence.startswith(expected)


def test_refusals_are_counted_by_the_limit_that_refused(capsys: pytest.CaptureFixture[str]) -> None:
    answers = ANSWERED + REFUSED[:100] + [replace(answer, reason="TOO_MANY_CALLS") for answer in REFUSED[100:]]
    report(answers, peak=3.0, times=10.0, seconds=10.0)
    printed = capsys.readouterr().out
    assert re.search(r"RESOURCE_EXHAUSTED QUEUE_FULL +100, p50 10.0 ms, p99 10.0 ms from begun", printed)
    assert re.search(r"RESOURCE_EXHAUSTED TOO_MANY_CALLS +173,", printed)
    assert re.search(r"all refusals +273,", printed)
