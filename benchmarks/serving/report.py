"""The page under docs/reports of one or more results files: tables and a plot.

python -m benchmarks.serving.report runs/serving/eurosat.jsonl runs/serving/smoke.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import REPOSITORY
from benchmarks.serving.results import (
    ASKED,
    BARE,
    BATCHES,
    CONCURRENCY,
    FLOORS,
    MLSERVER,
    NATIVE,
    PHALANX,
    SERVERS,
    TRITON,
    Results,
)
from benchmarks.spread import deviation, spread

PAGE = REPOSITORY / "docs" / "reports" / "beside-its-peers.md"
COLOURS = {PHALANX: "#1f5fa8", NATIVE: "#63a7e8", TRITON: "#6a9f1f", MLSERVER: "#c0662b", BARE: "#777777"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=PAGE, help="the plot is written beside it (default: %(default)s)")
    given = parser.parse_args()
    found = [Results(file) for file in given.results]
    plot(found, given.output.with_suffix(".svg"))
    given.output.write_text(page(found, given.output.with_suffix(".svg").name))


def missed(results: Results) -> bool:
    """Whether a floor of this bundle is, by the mean of the rounds' ratios."""
    floor = FLOORS.get(_bundle(results))
    if floor is None:
        return False
    throughput, p99 = (statistics.mean(results.ratios(what, *ASKED)) for what in ("images_per_second", "p99"))
    return throughput < floor.throughput or p99 > floor.p99


def tables(results: Results) -> str:
    """All figures of one bundle, as Markdown."""
    parts = [_against(results)]
    for batch in BATCHES:
        if not any(cell.batch == batch for cell in results.cells):
            continue
        parts.append(f"{'Single images' if batch == 1 else f'Batches of {batch}'}, images/s, p50 and p99 of a call in ms:\n\n")
        parts.append(_row("concurrency", SERVERS))
        parts.append("|" + " --- |" * (len(SERVERS) + 1) + "\n")
        for concurrency in CONCURRENCY:
            parts.append(_row(str(concurrency), [_cell(results, server, batch, concurrency) for server in SERVERS]))
        parts.append("\n")
    parts.append(_tried(results))
    return "".join(parts)


def page(found: Sequence[Results], picture: str) -> str:
    rounds = len(found[0].of(PHALANX, *ASKED))
    facts = found[0].facts
    client = f" ({facts['client']})" if facts["client"] else ""
    head = f"""# Beside its peers

Phalanx, Triton and MLServer with the same members on the same machine, asked by the same client. Measured by
`python -m benchmarks.serving`; this page is written by `python -m benchmarks.serving.report`.

Images are random pixels, seed 0. {rounds} rounds of {facts["seconds"]:g} s a figure, mean ± standard deviation over the rounds;
in a round the servers are asked in turns, each round beginning with another. A ratio is taken in each round, then averaged.
A bundle is told by its version: the default may be another by now.
**Client and servers share the cores**: what the client takes, no server has.

* **Client**: perf_analyzer{client}, `--async`, gRPC, the same for all servers. It asks for every output that a model's metadata
  names. MLServer lacks `ModelConfig` and `ModelStatistics`, without which perf_analyzer asks nothing:
  `benchmarks/serving/mlserver_start.py` adds two fixed answers for them, and nothing that a timed call passes through.
* **Phalanx**: its defaults, but for a queue of 4,096 images: of 64 callers with 32 images each, the default of 1,024 would
  refuse some. "Native" is `front_end: native`. It answers with all its outputs, votes and scores included; the peers with
  label, verdict, p-value and probabilities.
* **Triton**: {facts["triton"]}.
  An `ensemble` model: each member a Python model with ONNX Runtime and our session options, the members beside each other, then
  one model with the rule of `models/ensemble.py`, in Python or, beyond what an operator would have, as an ONNX graph. Requests
  that a step is handed together are computed together, in parts of at most 16 images as in our engine.
* **MLServer**: {facts["mlserver"]}.
  It is given the fused graph, in threads beside its event loop or in its parallel workers, batches divided as in our engine:
  its best case. Raw contents become a list of integers, one for each byte, before a model sees them.
* **Bare session**: the fused graph in process, in the setting and with the batch size that a sweep found fastest (as in
  `benchmarks.throughput`), of those that need no more images than the callers of the cell have waiting. Its latencies are
  those of a run.

Every setting of a peer in the lists below was tried at concurrency 16, twice, in turns with all others, for single images and
for batches; what had the highest mean throughput was measured. Before anything was timed, all servers had to give the same
label and verdict, the same p-value within one rank, and probabilities within 1e-5, for the bundle's samples and random images,
in a batch and alone. A run of perf_analyzer counts its first calls, so that p50 is too low where a call takes longer than a
window (64 callers with 32 images each); MLServer answers many calls at once, which makes its figures for batches coarse.

![Throughput and latency of each server]({picture})
"""
    return head + "".join(
        f"\n## Bundle {results.facts['bundle']}\n\n{results.facts['machine']}.\n\n{tables(results)}" for results in found
    )


def _against(results: Results) -> str:
    """The figures asked for, and whether they are reached."""
    floor = FLOORS.get(_bundle(results))
    limits = (f"≥ {floor.throughput:g}", f"≤ {floor.p99:.2g}") if floor else ("", "")
    batch, concurrency = ASKED
    said = "missed" if missed(results) else "reached"
    found = []
    for ours in (PHALANX, NATIVE):
        throughput, p99 = (_spread(results.ratios(what, batch, concurrency, ours), 2) for what in ("images_per_second", "p99"))
        found.append(f"throughput **{throughput} ×**, p99 **{p99} ×**")
    return (
        f"Against Triton at concurrency {concurrency}, single images: {found[0]} (aims {limits[0]} and {limits[1]}): {said}.\n"
        f"With the native front end: {found[1]}.\n\n"
        f"{_limit(results, batch, concurrency)}\n\n"
    )


def _limit(results: Results, batch: int, concurrency: int) -> str:
    """What no server could exceed here."""
    client = _spread([each.client for each in results.of(NATIVE, batch, concurrency)], 2)
    graph = _spread([1000 * results.facts["cores"] / each.images_per_second for each in results.of(BARE, batch, concurrency)], 2)
    most = _spread(results.free_of_charge(batch, concurrency), 2)
    return (
        f"A server that cost nothing beside the graph would reach **{most} ×**: of an image's CPU time {client} ms are the "
        f"client's, and {graph} ms the bare session's."
    )


def _cell(results: Results, server: str, batch: int, concurrency: int) -> str:
    found = results.of(server, batch, concurrency)
    if not found:
        return "not measured"
    rate = _spread([each.images_per_second for each in found], 0)
    p50, p99 = (_spread([getattr(each, name) for each in found], 1) for name in ("p50", "p99"))
    return f"{rate}; {p50}; {p99}"


def _tried(results: Results) -> str:
    lines = ["| tried at concurrency 16 | single images: images/s, p99 in ms | batches of 32 |\n| --- | --- | --- |\n"]
    for server, setting in dict.fromkeys((key.server, key.setting) for key in results.tried):
        cells = []
        for batch in BATCHES:
            found = results.trials(server, batch, setting)
            if not found:
                cells.append("not tried")
                continue
            mark = "**" if results.chosen(server, batch) == setting else ""
            rate, p99 = (_spread([getattr(each, name) for each in found], 0) for name in ("images_per_second", "p99"))
            cells.append(f"{mark}{rate}{mark}; {p99}")
        lines.append(_row(f"{server}: {setting}", cells))
    return "".join(lines)


def plot(found: Sequence[Results], file: Path) -> None:
    """A row for each bundle: throughput and p99 over concurrency, single images and batches."""
    from matplotlib.figure import Figure  # the extra `train`; nothing else here needs it

    figure = Figure(figsize=(12, 3.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 4, squeeze=False)
    for row, results in zip(axes, found, strict=True):
        panels = [(batch, what) for batch in BATCHES for what in ("images_per_second", "p99")]
        for axis, (batch, what) in zip(row, panels, strict=True):
            for server in SERVERS if what == "images_per_second" else SERVERS[:-1]:
                cells = [[getattr(each, what) for each in results.of(server, batch, c)] for c in CONCURRENCY]
                if not all(cells):
                    continue
                heights = [statistics.mean(values) for values in cells]
                errors = [deviation(values) for values in cells]
                axis.errorbar(
                    CONCURRENCY, heights, errors, label=server, color=COLOURS[server], marker="o", markersize=3, capsize=2
                )
            if not axis.has_data():  # not measured
                axis.set_visible(False)
                continue
            axis.set_xscale("log", base=2)
            axis.set_xticks(CONCURRENCY, [str(c) for c in CONCURRENCY])
            axis.set_xlabel("callers at once")
            axis.set_yscale("linear" if what == "images_per_second" else "log")
            named = "images/s" if what == "images_per_second" else "p99 of a call, ms"
            axis.set_title(f"{_bundle(results)}, {'single images' if batch == 1 else f'batches of {batch}'}: {named}", fontsize=9)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def _bundle(results: Results) -> str:
    return str(results.facts["bundle"]).partition(" ")[0]


def _spread(values: Sequence[float], digits: int) -> str:
    return spread(values, digits, "±")


def _row(first: str, rest: Sequence[str]) -> str:
    return f"| {first} | " + " | ".join(rest) + " |\n"


if __name__ == "__main__":
    main()
