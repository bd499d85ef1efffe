"""Three times as much as the server can do, for a minute: how much it still answers, and how soon it refuses the rest.

    python -m benchmarks.overload

First callers who ask again as soon as they are answered: the most it answers is the peak. Then calls at three times that rate,
whether it keeps up or not, each with a deadline. Callers and server share the machine. Ends with 1 where a floor is missed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.load import Answer, Load, counted, quantile, rate
from benchmarks.processes import await_serving, command_line, image_shape, phalanx, provenance, random_images, read_config, request

ANSWERED, REFUSED_MS = 0.8, 20.0  # the floors
EXPECTED = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=8, help="images per call (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=16, help="at once, to find the peak (default: %(default)s)")
    parser.add_argument("--times", type=float, default=3.0, help="the peak (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=5.0, help="of each call, in seconds (default: %(default)s)")
    given = parser.parse_args()
    print(f"{given.images} images per call, deadline {given.deadline:g} s, seed 0; {provenance()}")
    with tempfile.TemporaryDirectory() as folder, phalanx(read_config(given.config), Path(folder)) as server:
        await_serving(server)
        load = Load(server.address, request(random_images(given.images, image_shape(server))), given.deadline)
        load.together(given.callers, 2.0)  # warm
        seconds = max(2.0, given.seconds / 4)
        peak = rate(load.together(given.callers, seconds))
        print(f"peak: {peak:.1f} calls/s, {peak * given.images:.0f} images/s ({given.callers} callers, {seconds:g} s)")
        began = time.monotonic()
        answers = load.at_rate(given.times * peak, given.seconds)
        end = began + given.seconds
    sys.exit(report(answers, peak, given.seconds, end))


def report(answers: list[Answer], peak: float, seconds: float, end: float) -> int:
    """1 where a floor is missed, or a call ended as none should."""
    in_time = sum(answer.code == "OK" and answer.ended <= end for answer in answers)
    share = in_time / seconds / peak
    late = max(0.0, max(answer.ended - answer.seconds for answer in answers) - end)
    print(f"offered {len(answers)} calls in {seconds + late:.1f} s, {len(answers) / (seconds + late) / peak:.2f} times the peak")
    for code, count in sorted(counted(answers).items()):
        median, most = quantile(answers, code, 0.5), quantile(answers, code, 0.99)
        print(f"  {code:20} {count:>7}, after {median:.1f} ms in the median, p99 {most:.1f} ms")
    print(f"answered while it lasted: {share:.2f} of the peak (at least {ANSWERED})")
    refused = quantile(answers, "RESOURCE_EXHAUSTED", 0.99)
    print(f"time to refuse, p99: {refused:.1f} ms (at most {REFUSED_MS:g})")
    return int(share < ANSWERED or not refused <= REFUSED_MS or bool(counted(answers).keys() - EXPECTED))


if __name__ == "__main__":
    main()
