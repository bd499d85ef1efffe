"""A short version of `benchmarks.fuzz`: broken messages to a real server, none of which is an error of ours."""

from __future__ import annotations

import pytest

from benchmarks.fuzz import FORBIDDEN, answers, fuzz, valid_messages
from tests.service.serving import SIZE, Running, random_pixels, request


def test_what_is_broken_is_told_apart_from_what_is_not(running: Running) -> None:
    for method, data in valid_messages((SIZE, SIZE, 3)):
        assert answers(running.channel, method, data) == ["OK"], method


@pytest.mark.parametrize("seed", range(2))
def test_broken_messages_are_answered_with_a_sentence(running: Running, seed: int) -> None:
    before = running.native.Classify(request(random_pixels(2)))
    codes = fuzz(running.channel, valid_messages((SIZE, SIZE, 3)), 500, seed)
    assert not FORBIDDEN & {code.removeprefix("image: ") for code in codes}, codes
    assert codes["INVALID_ARGUMENT"] > 50  # it did break them
    assert codes["image: INVALID_ARGUMENT"] > 50
    assert running.native.Classify(request(random_pixels(2))).results == before.results
