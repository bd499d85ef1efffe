"""Progress of training on a terminal as bars, elsewhere as one line an epoch."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm


def counted(total: int, done: int, unit: str, name: str, position: int = 0) -> tqdm[Any]:
    """A bar over pieces of work with the time left; twice a minute where output is no terminal."""
    seldom = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=done, unit=unit, desc=name, position=position, mininterval=seldom)


class Progress:
    """Bars with loss, clean and robust accuracy and time left; lines where output is not a terminal."""

    def __init__(self, stream: TextIO = sys.stderr, position: int = 0) -> None:
        self.stream, self.position = stream, position
        self.kind = ""
        self.bar: tqdm[Any] | None = None
        self.figures: dict[str, str] = {}
        self.total = self.first = self.now = 0
        self.started = time.monotonic()

    def start(self, kind: str, total: int, step: int) -> None:
        """Begin a member of `total` steps, `step` of them done in an earlier run."""
        self.kind, self.figures, self.total, self.first, self.now, self.started = kind, {}, total, step, step, time.monotonic()
        if step:
            print(f"{kind}: goes on at step {step} of {total}", file=self.stream, flush=True)
        if self.stream.isatty():
            self.bar = tqdm(desc=kind, total=total, initial=step, position=self.position, file=self.stream, unit="step")

    def advance(self, step: int, loss: float, training: float) -> None:
        """Step number `step` is done, at this loss and this accuracy on its (attacked) training batch."""
        self.now = step
        self.figures |= {"loss": f"{loss:.3f}", "training": f"{training:.2f}"}
        if self.bar is not None:
            self.bar.set_postfix(self.figures, refresh=False)
            self.bar.update(step - self.bar.n)

    def epoch(self, epoch: int, epochs: int, clean: float, robust: float) -> None:
        """An epoch is done and checked on held-out images."""
        self.figures |= {"clean": f"{clean:.3f}", "robust": f"{robust:.3f}"}
        if self.bar is None:
            shown = " ".join(f"{name} {value}" for name, value in self.figures.items())
            left = (self.total - self.now) * (time.monotonic() - self.started) / max(1, self.now - self.first)
            print(f"{self.kind}: epoch {epoch}/{epochs} {shown}, {left / 60:.1f} min left", file=self.stream, flush=True)

    def finish(self) -> None:
        """The member is trained."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
