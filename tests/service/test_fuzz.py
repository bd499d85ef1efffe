"""A short version of `benchmarks.fuzz`: broken messages to a real server, none of which is an error of ours."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from benchmarks.fuzz import MOST_GROWTH, answers, broken, failed, fuzz, valid_messages
from benchmarks.fuzz_targets import FORESEEN, SPEC, read, read_classify, read_infer
from tests.service.serving import SIZE, Running, random_pixels, request


def test_what_is_broken_is_told_apart_from_what_is_not(running: Running) -> None:
    for method, data in valid_messages((SIZE, SIZE, 3)):
        assert answers(running.channel, method, data) == ["OK"], method


@pytest.mark.parametrize(
    ("codes", "growth", "files", "bad"),
    [
        pytest.param({"OK": 9, "INVALID_ARGUMENT": 5, "image: INVALID_ARGUMENT": 3}, 1.01, 0, False, id="all is well"),
        pytest.param({"OK": 9, "INTERNAL": 1}, 1.0, 0, True, id="a call"),
        pytest.param({"OK": 9, "image: INTERNAL": 1}, 1.0, 0, True, id="an image in an answer"),
        pytest.param({"OK": 9}, MOST_GROWTH + 0.01, 0, True, id="memory"),
        pytest.param({"OK": 9}, 1.0, 1, True, id="a file"),
    ],
)
def test_what_must_not_come_back_is_a_failure(codes: dict[str, int], growth: float, files: int, bad: bool) -> None:
    assert failed(Counter(codes), growth, files) is bad


@pytest.mark.parametrize("seed", range(2))
def test_broken_messages_are_answered_with_a_sentence(running: Running, seed: int) -> None:
    before = running.native.Classify(request(random_pixels(2)))
    codes = fuzz(running.channel, valid_messages((SIZE, SIZE, 3)), 500, seed)
    assert not failed(codes), codes
    assert codes["INVALID_ARGUMENT"] > 50  # it did break them
    assert codes["image: INVALID_ARGUMENT"] > 50
    assert running.native.Classify(request(random_pixels(2))).results == before.results


READERS = {"Classify": read_classify, "ModelInfer": read_infer}
READ = [(method.rpartition("/")[2], data) for method, data in valid_messages(SPEC.shape) if method.endswith(tuple(READERS))]


def test_what_is_fuzzed_without_a_server_reads_what_is_valid() -> None:
    assert {method for method, _ in READ} == READERS.keys()
    for method, data in READ:
        READERS[method](data)


@pytest.mark.parametrize("method", READERS)
def test_broken_bytes_are_read_or_refused_with_an_error_that_is_foreseen(method: str) -> None:
    draw, refused = random.Random(0), 0
    valid = [data for its, data in READ if its == method]
    for _ in range(300):
        data = broken(draw, draw.choice(valid))
        read(data)
        try:
            READERS[method](data)
        except FORESEEN:
            refused += 1
    assert 30 < refused < 300
