"""Half an hour at 70% of what the server can do: whether its memory grows, whether it keeps files open, whether a call fails.

    python -m benchmarks.soak

The peak is found first, with callers who ask again as soon as they are answered. Memory and descriptors are read every few
seconds; growth is that of the median of the last tenth over that of the tenth after the first five minutes (or the first
sixth, if that is less). Ends with 1 where a floor is missed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.load import Load, counted, ended, quantile, rate
from benchmarks.processes import (
    Process,
    await_serving,
    command_line,
    image_shape,
    phalanx,
    provenance,
    random_images,
    read_config,
    request,
)

GROWTH = 0.02
SETTLING = 300.0  # seconds in which memory may grow
SAMPLES = 360


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=4, help="images per call (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the peak (default: %(default)s)")
    given = parser.parse_args()
    print(f"{given.minutes:g} minutes, {given.images} images per call, seed 0; {provenance()}")
    with tempfile.TemporaryDirectory() as folder, phalanx(read_config(given.config), Path(folder)) as server:
        await_serving(server)
        with Load(server.address, request(random_images(given.images, image_shape(server)))) as load:
            load.together(16, 2.0)
            peak = rate(load.together(16, 10.0))
            time.sleep(1.0)  # for the connections to be closed
            before = server.open_files
            print(f"peak {peak:.1f} calls/s; {given.load * peak:.1f} calls/s are asked", flush=True)
            watch = Watch(server, given.minutes * 60)
            answers = load.at_rate(given.load * peak, given.minutes * 60)
        growth = watch.growth()
        time.sleep(1.0)  # for the last connections to be closed
        leaked = server.open_files - before
    for code, count in sorted(counted(answers).items()):
        took = [answer.from_due for answer in ended(answers, code)]
        print(f"  {code:20} {count:>7}, p50 {quantile(took, 0.5):.1f} ms, p99 {quantile(took, 0.99):.1f} ms")
    print(
        f"resident memory: {watch.first:.0f} MB once settled, {watch.last:.0f} MB at the end: {growth:+.2%} (at most {GROWTH:.0%})"
    )
    print(f"descriptors: {leaked:+d} (at most 0)")
    sys.exit(int(growth > GROWTH or leaked > 0 or set(counted(answers)) != {"OK"}))


class Watch:
    """Reads a process's memory until the time is over."""

    def __init__(self, server: Process, seconds: float) -> None:
        self._server, self._seconds = server, seconds
        self._settling = min(SETTLING, seconds / 6)
        self._seen: list[tuple[float, float]] = []  # seconds from the start, megabytes
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def growth(self) -> float:
        self._thread.join()
        return self.last / self.first - 1

    @property
    def first(self) -> float:
        return self._median(self._settling, self._settling + self._seconds / 10)

    @property
    def last(self) -> float:
        return self._median(self._seconds * 0.9, self._seconds)

    def _median(self, start: float, end: float) -> float:
        return statistics.median(megabytes for at, megabytes in self._seen if start <= at <= end)

    def _watch(self) -> None:
        began, pause = time.monotonic(), self._seconds / SAMPLES
        while (now := time.monotonic() - began) <= self._seconds:
            self._seen.append((now, self._server.resident_megabytes))
            time.sleep(pause)


if __name__ == "__main__":
    main()
