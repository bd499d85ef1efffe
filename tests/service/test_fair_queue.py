"""Turns and room, whoever comes in whatever order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.batch import Request
from service.fair_queue import FairQueue, Holdings

IMAGE = np.zeros((1, 2, 2, 3), np.uint8)
CALLERS = st.lists(st.sampled_from("abc"), max_size=30)


def queued(callers: list[str]) -> tuple[FairQueue, list[Request]]:
    queue, requests = FairQueue(), [Request(IMAGE, None, float(i), caller) for i, caller in enumerate(callers)]
    for request in requests:
        queue.append(request)
    return queue, requests


def first(queue: FairQueue) -> Request:
    with queue.turn() as requests:
        return requests.popleft()


@given(CALLERS)
def test_everybody_comes_out_once_and_each_callers_in_their_order(callers: list[str]) -> None:
    queue, requests = queued(callers)
    assert len(queue) == len(list(queue)) == len(requests)
    out = [first(queue) for _ in requests]
    assert not queue
    for caller in "abc":
        assert [r.submitted for r in out if r.caller == caller] == [r.submitted for r in requests if r.caller == caller]


@given(CALLERS)
def test_nobody_is_served_twice_while_another_waits_once(callers: list[str]) -> None:
    queue, requests = queued(callers)
    served = dict.fromkeys(callers, 0)
    for _ in requests:
        waiting = {request.caller for request in queue}
        chosen = first(queue).caller
        served[chosen] += 1
        assert all(served[chosen] <= served[other] + 1 for other in waiting)


def test_callers_who_are_not_told_apart_are_first_in_first_out() -> None:
    queue, requests = queued([""] * 10)
    assert [first(queue) for _ in requests] == requests


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(1, 12)), max_size=60), st.integers(1, 100))
def test_what_enters_fits_and_what_left_is_forgotten(entries: list[tuple[str, int]], limit: int) -> None:
    holdings = Holdings(limit)
    inside: list[tuple[str, int]] = []
    for caller, images in entries:
        empty = not inside
        if holdings.has_room(caller, images):
            holdings.add(caller, images)
            inside.append((caller, images))
            assert empty or holdings.total <= limit
        else:
            assert not empty
    for caller, images in inside:
        holdings.remove(caller, images)
    assert holdings.total == 0
    assert holdings.has_room("a", 10 * limit)


@given(st.integers(20, 2000), st.integers(1, 5))
def test_however_many_greedy_callers_one_more_finds_room(limit: int, greedy: int) -> None:
    holdings = Holdings(limit)
    for turn in range(2 * limit):
        name = f"greedy {turn % greedy}"
        if holdings.has_room(name, 1):
            holdings.add(name, 1)
    assert limit - holdings.total >= 1
    assert holdings.has_room("another", 1)
