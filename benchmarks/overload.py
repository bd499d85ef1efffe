"""Three times as much as the server can do, for a minute: how much it still answers, and how soon it refuses the rest.

    python -m benchmarks.overload                         max_concurrent_calls refuses: its 128 calls never fill the queue

    echo 'batching: {max_queue: 256}' > short.yaml
    python -m benchmarks.overload --config short.yaml     the queue refuses

First callers who ask again as soon as they are answered: the most it answers is the peak. Then calls at three times that rate,
whether it keeps up or not, each with a deadline. Callers and server share the machine. A refusal's time is told from when the call
was begun, which is the server's and is held against the floor, and from when it was due, which counts a caller's lateness as well.
Ends with 1 where a floor is missed, a call ends as none should, or the callers could not offer the load.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import Answer, Load, ended, quantile, rate
from benchmarks.processes import await_serving, command_line, image_shape, phalanx, provenance, random_images, read_config, request

ANSWERED, REFUSED_MS, OFFERED = 0.8, 20.0, 0.95  # the floors; OFFERED: calls really begun, of those that are due
EXPECTED = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=8, help="images per call (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=16, help="at once, to find the peak (default: %(default)s)")
    parser.add_argument("--times", type=float, default=3.0, help="the peak (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=5.0, help="of each call, in seconds (default: %(default)s)")
    given = parser.parse_args()
    config = read_config(given.config)
    print(f"{given.images} images per call, deadline {given.deadline:g} s, seed 0, {config or 'defaults'}; {provenance()}")
    with tempfile.TemporaryDirectory() as folder, phalanx(config, Path(folder)) as server:
        await_serving(server)
        asked = request(random_images(given.images, image_shape(server)))
        with Load(server.address, asked, given.deadline) as load:
            load.together(given.callers, 2.0)  # warm
            seconds = max(2.0, given.seconds / 4)
            peak = rate(load.together(given.callers, seconds))
            print(f"peak: {peak:.1f} calls/s, {peak * given.images:.0f} images/s ({given.callers} callers, {seconds:g} s)")
            answers = load.at_rate(given.times * peak, given.seconds)
    missed = report(answers, peak, given.times, given.seconds)
    for sentence in missed:
        print(f"MISSED: {sentence}")
    sys.exit(bool(missed))


def report(answers: Sequence[Answer], peak: float, times: float, seconds: float) -> list[str]:
    """Prints what came of `times` the peak; what was missed, a sentence each."""
    over, due = min(answer.due for answer in answers) + seconds, times * peak
    offered = sum(answer.begun <= over for answer in answers) / seconds
    answered = sum(answer.ended <= over for answer in ended(answers, "OK")) / seconds / peak
    refused = [answer.from_begun for answer in ended(answers, "RESOURCE_EXHAUSTED")]
    print(f"offered: {offered:.1f} of {due:.1f} calls/s, {offered / peak:.2f} times the peak")
    print(f"callers' lateness, from due to begun: {spread([answer.late for answer in answers])}")
    for end in sorted({answer.end for answer in answers}):
        told(end, [answer for answer in answers if answer.end == end])
    told("all refusals", ended(answers, "RESOURCE_EXHAUSTED"))
    print(f"answered while it lasted: {answered:.2f} of the peak (at least {ANSWERED})")
    print(f"time to refuse, p99: {quantile(refused, 0.99):.1f} ms from begun (at most {REFUSED_MS:g})")
    unexpected = {answer.code for answer in answers} - EXPECTED
    judged = {
        f"the callers began {offered:.1f} of {due:.1f} calls/s: the load was not offered": offered >= OFFERED * due,
        f"{answered:.2f} of the peak was answered": answered >= ANSWERED,
        "nothing was refused: that was no overload": bool(refused),
        f"refusals took {quantile(refused, 0.99):.1f} ms (p99)": not refused or quantile(refused, 0.99) <= REFUSED_MS,
        f"calls ended with {', '.join(sorted(unexpected))}": not unexpected,
    }
    return [sentence for sentence, good in judged.items() if not good]


def told(name: str, answers: Sequence[Answer]) -> None:
    print(f"  {name:34} {len(answers):>7}, {spread([answer.from_begun for answer in answers])} from begun", end="")
    print(f"; {spread([answer.from_due for answer in answers])} from due")


def spread(seconds: Sequence[float]) -> str:
    return f"p50 {quantile(seconds, 0.5):.1f} ms, p99 {quantile(seconds, 0.99):.1f} ms"


if __name__ == "__main__":
    main()
