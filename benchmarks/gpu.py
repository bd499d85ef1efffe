"""On an NVIDIA device: whether every rule answers as on the CPU, and images a second and latency for every batch size.

    python -m benchmarks.gpu

Parity: the default ensemble under every rule that its bundle can serve, one engine on the CPU and one on CUDA, on the bundle's
samples and on random images. A label or verdict may be another one where it was a matter of less than the tolerance: two
probabilities that nearly tie, a p-value at its rate. Such ties are counted apart. Images are given in runs of every size that
has memory, and a CUDA graph, of its own. Speed: the engine as the server runs it, the same without CUDA graphs, and the bare
session, on the same device. Without such a device it says so and ends with 0; `--provider cpu` goes through all of it on the
CPU, where there are no such graphs. Ends with 1 where answers differ.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.bare import BareGraph, bare_graph
from benchmarks.processes import command_line, provenance, random_images, read_config
from models.bundle import Bundle, read_bundle
from models.composition import InvalidEnsemble
from models.ensemble import Decision, RuleName
from service.batch import joined
from service.bound_runs import sizes_up_to
from service.config import DecisionConfig, DeviceConfig, EnsembleConfig, ServiceConfig
from service.engine import Engine, Lanes, ProviderUnavailable, open_session
from service.ensembles import compose_named
from service.graph_cache import GraphCache

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
TOLERANCE = 1e-3  # of probabilities and scores: TF32 and other algorithms; two runs on one device agree within 1e-5
Provider = Literal["cpu", "cuda"]
Rows: TypeAlias = NDArray[np.bool_]  # (n,), which images
# What does not depend on which class is the label. Left out of `furthest` altogether: `statistic`, which is -log of p-values that
# are compared, and magnifies the small ones.
OF_NO_LABEL = ("probabilities", "confidence", "votes")
OF_A_LABEL = ("scores", "p_values", "p_value")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--provider", choices=get_args(Provider), default="cuda", help="what is compared with the CPU")
    parser.add_argument("--images", type=int, default=256, help="random images for parity (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each batch size (default: %(default)s)")
    given = parser.parse_args()
    settings = ServiceConfig.model_validate(read_config(given.config))
    bundle = read_bundle(settings.bundle_path, weights=False)
    print(f"bundle {bundle.manifest.name} {bundle.manifest.version}; {provenance()}")
    with tempfile.TemporaryDirectory() as folder, closing(Lanes(settings.device.threads)) as threads:
        engines = Engines(bundle, settings, GraphCache(Path(folder)), threads)
        try:
            agree = parity(engines, given.provider, given.images)
        except ProviderUnavailable as error:
            print(f"nothing is measured: {error}")
            sys.exit(0)
        with_graphs, without = (engines.on(given.provider, cuda_graphs=graphs) for graphs in (True, False))
        speed(with_graphs, without, bare_graph(settings, Path(folder)), only(given.provider), given.seconds)
    sys.exit(not agree)


class Engines:
    """The default ensemble under any rule, on any device."""

    def __init__(self, bundle: Bundle, config: ServiceConfig, cache: GraphCache, threads: Lanes) -> None:
        self.bundle, self._config, self._cache, self._threads = bundle, config, cache, threads
        self._name = next(iter(config.ensembles))
        self.rates = config.rates(self._name)

    def on(self, provider: Provider, rule: RuleName | None = None, cuda_graphs: bool = True) -> Engine:
        """Raises InvalidEnsemble where the bundle cannot serve the rule, ProviderUnavailable where there is no such device."""
        chosen = self._config.ensembles[self._name].model_copy(update={"rule": rule} if rule else {})
        ensembles: dict[str, EnsembleConfig] = {self._name: chosen}
        ensemble = compose_named(self.bundle, self._config.model_copy(update={"ensembles": ensembles}), self._name)
        device = only(provider).model_copy(update={"cuda_graphs": cuda_graphs})
        largest = self._config.batching.max_batch_size
        return Engine(self._cache.fused(self.bundle, ensemble), self.bundle, ensemble, device, self._threads, largest)


def only(provider: Provider) -> DeviceConfig:
    """This device, and no other in its place."""
    return DeviceConfig(provider=provider, strict=True)


def parity(engines: Engines, provider: Provider, n: int) -> bool:
    """Whether labels and verdicts are the same, and numbers nearly, for every rule."""
    samples = engines.bundle.samples.images
    images = np.concatenate([samples, random_images(n, samples.shape[1:])])
    print(f"{len(images)} images, CPU and {provider}; numbers may differ by {TOLERANCE:g}")
    good, served = True, 0
    for rule in RuleName:
        try:
            run = engines.on("cpu", rule).run(images)
        except InvalidEnsemble as error:
            print(f"  {rule.value:12} not served by this bundle: {error}")
            continue
        served += 1
        for graphs in (True, False):
            with closing(engines.on(provider, rule, graphs)) as engine:
                got = in_parts(engine, images, run.masks_seed)
            found = compared(got, run.decision, engines.rates)
            good &= found.same
            print(f"  {rule.value:12} {'with' if engine.cuda_graphs else 'no'} CUDA graphs: {found}", flush=True)
    return good and served > 0


def in_parts(engine: Engine, images: NDArray[np.uint8], masks_seed: int | None) -> Decision:
    """One answer, of runs of all sizes in turn."""
    runs, start = [], 0
    for size in itertools.cycle(sizes_up_to(engine.most_at_once)):
        if start >= len(images):
            break
        runs.append(engine.run(images[start : start + size], masks_seed).decision)
        start += size
    return joined(runs)


@dataclass(frozen=True)
class Comparison:
    moved: int  # images with another label or verdict
    ties: int  # images whose other label or verdict is a matter of less than the tolerance
    difference: float

    @property
    def same(self) -> bool:
        return self.moved == 0 and self.difference <= TOLERANCE

    def __str__(self) -> str:
        ties, verdict = f"{self.ties} more at a tie", "same" if self.same else "DIFFERENT"
        return f"{self.moved} labels or verdicts differ, {ties}, numbers by {self.difference:.1e}: {verdict}"


def compared(got: Decision, expected: Decision, rates: DecisionConfig) -> Comparison:
    relabelled, rejudged = got.label != expected.label, got.verdict != expected.verdict  # (n,)
    # what hangs on the label (a distance to its center) is another thing where the label is another one: so is the verdict then
    excused = np.where(relabelled, tied(got, expected), at_a_rate(got, expected, rates))
    flipped = relabelled | rejudged
    most = max(
        furthest(got, expected, OF_NO_LABEL, np.ones_like(flipped)), furthest(got, expected, OF_A_LABEL, ~(relabelled & excused))
    )
    return Comparison(int((flipped & ~excused).sum()), int((flipped & excused).sum()), most)


def tied(got: Decision, expected: Decision) -> Rows:
    """Whether the one's label and the other's are nearly as probable as each other, to both; (n,)."""
    labels = np.stack([got.label, expected.label], axis=1)  # (n, 2)
    near: Rows = np.ones_like(got.finite)
    for each in (got, expected):
        one, other = np.take_along_axis(each.probabilities, labels, axis=1).T
        near &= np.abs(one - other) <= TOLERANCE
    return near


def at_a_rate(got: Decision, expected: Decision, rates: DecisionConfig) -> Rows:
    """Whether the one's p-value and the other's are both nearly the review rate, or both the reject rate; (n,)."""
    near: Rows = np.zeros_like(got.finite)
    for rate in (rates.review_rate, rates.reject_rate):
        near |= (np.abs(got.p_value - rate) <= TOLERANCE) & (np.abs(expected.p_value - rate) <= TOLERANCE)
    near &= got.finite == expected.finite
    return near


def furthest(got: Decision, expected: Decision, columns: Sequence[str], rows: Rows) -> float:
    """The largest difference of any number in these; a number beside a NaN is infinitely far from it."""
    most = 0.0
    for column in columns:
        a, b = getattr(got, column)[rows], getattr(expected, column)[rows]
        if a.size:
            apart = np.where(a == b, 0.0, np.where(np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b)))
            most = max(most, float(np.nan_to_num(apart, nan=np.inf).max()))
    return most


def speed(engine: Engine, launched: Engine, bare: BareGraph, device: DeviceConfig, seconds: float) -> None:
    """One caller, one batch after the other; `launched` has no CUDA graphs."""
    print(
        f"on {engine.provider}, images/s and milliseconds a batch (median, p99): the engine; without CUDA graphs; the bare session"
    )
    session = open_session(bare.content, device)
    images = random_images(max(BATCHES), bare.shape)
    for batch in BATCHES:
        part, feeds = images[:batch], bare.feeds(images[:batch])
        found = [timed(run, batch, seconds) for run in (partial(engine.run, part), partial(launched.run, part))]
        found.append(timed(partial(session.run, None, feeds), batch, seconds))
        print(f"  {batch:>4} {'   '.join(found)}", flush=True)


def timed(run: Callable[[], Any], batch: int, seconds: float) -> str:
    for _ in range(3):
        run()
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        run()
        spent.append(time.perf_counter() - began)
    median, most = np.quantile(spent, [0.5, 0.99]) * 1000
    return f"{batch * len(spent) / sum(spent):7.0f} {median:7.2f} {most:7.2f}"


if __name__ == "__main__":
    main()
