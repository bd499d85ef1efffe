"""The floor: the bare fused session in process, computing as many images at once as the callers of a cell have waiting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.serving.perf_analyzer import Figures
from benchmarks.throughput import BATCHES, Setting


@dataclass(frozen=True)
class Swept:
    """What `benchmarks.throughput` found of a setting with batches of one size."""

    setting: Setting
    images_per_second: float


def sweep(settings: Sequence[Setting], seconds: float) -> list[Swept]:
    """Every setting with every batch size; one of several callers at once also with one of them alone."""
    alone = [replace(each, name=f"{each.name}, one caller", callers=1) for each in settings if each.callers > 1]
    sized = [replace(setting, batch=batch) for setting in (*settings, *alone) for batch in BATCHES]
    return [Swept(setting, setting.images_per_second(seconds)) for setting in sized]


def fastest(found: Sequence[Swept], images: int) -> Swept:
    """Of all that have no more than so many images in hand."""
    return max(
        (each for each in found if each.setting.callers * each.setting.batch <= images), key=lambda each: each.images_per_second
    )


def measure(swept: Swept, seconds: float) -> Figures:
    """Its callers run batches over and over; latencies are those of single runs."""
    setting = swept.setting
    feeds = dict(setting.feeds) | {"image": setting.feeds["image"][: setting.batch]}
    began = time.perf_counter()

    def work(_: int) -> list[float]:
        taken = []
        while (start := time.perf_counter()) < began + seconds:
            setting.session.run(None, feeds)
            taken.append(time.perf_counter() - start)
        return taken

    with ThreadPoolExecutor(setting.callers) as pool:
        taken = [1000 * each for runs in pool.map(work, range(setting.callers)) for each in runs]
    rate = len(taken) * setting.batch / (time.perf_counter() - began)
    return Figures(rate, float(np.quantile(taken, 0.5)), float(np.quantile(taken, 0.99)))
