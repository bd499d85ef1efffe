"""What `benchmarks.startup` holds a start against."""

from __future__ import annotations

import pytest

from benchmarks.startup import FOUR_MAY, ONE_MAY, Limits


@pytest.mark.parametrize(
    ("limits", "later", "used", "passed"),
    [
        pytest.param(ONE_MAY, [0.7, 1.9], 190.0, False, id="all is well"),
        pytest.param(ONE_MAY, [0.7, 2.1, 0.7], 190.0, True, id="one start in two seconds and more"),
        pytest.param(ONE_MAY, [0.7], 301.0, True, id="too much memory"),
        pytest.param(FOUR_MAY, [2.1], 320.0, False, id="four ensembles may take longer"),
        pytest.param(FOUR_MAY, [5.1], 320.0, True, id="but not as long"),
    ],
)
def test_a_limit_that_is_passed_is_a_failure(limits: Limits, later: list[float], used: float, passed: bool) -> None:
    assert limits.passed(later, used) is passed
