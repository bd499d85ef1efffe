"""The robustness report: a card's figures, and the images behind them, as one page that loads nothing and runs no script.

report.html.j2 holds the words and the order; here are the charts, the pictures and how a number is written.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from models.card import Card, Estimate, RocCurve, Share, SystemCard, Worth
from models.ensemble import Verdict

TEMPLATE = Path(__file__).with_name("report.html.j2")
LARGEST = 128  # pixels to a side of a picture; larger ones are reduced
NBSP = "\u00a0"  # a line does not break there
BUDGET = 800_000  # characters of pictures; whole examples beyond it are left out

INK, MUTED, RULE = "#1b1f24", "#5b6470", "#d8dce1"
SERIES = ("#0b5fa5", "#b8480f", "#14745a", "#84469b", "#8a6500", "#47515d", "#b3255e")
MARKERS, STROKES = "osD^vPX", ("-", "--", ":", "-.")
THEME = {INK: "ink", MUTED: "muted", RULE: "rule"} | {colour: f"series-{i}" for i, colour in enumerate(SERIES)}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # measured with; the page sets its own, which is narrower
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
FIGURES = {"clean": "clean accuracy", "robust": "robust accuracy", "rejecting_5": "robust accuracy with rejection at 5%"}


@dataclass(frozen=True)
class Said:
    """What an ensemble said of one image."""

    label: str
    verdict: Verdict
    p_value: float  # of no meaning where the verdict is UNSCREENED


@dataclass(frozen=True, eq=False)
class Example:
    """One attacked image: what the headline's ensemble said of it, what each member saw, and how each voted."""

    attack: str
    truth: str
    clean_said: Said
    adversarial_said: Said
    clean: NDArray[np.uint8]  # (h, w, c), c = 1 or 3
    adversarial: NDArray[np.uint8]  # (h, w, c)
    seen: Mapping[str, NDArray[np.float32]]  # member -> (h, w) or (h, w, 3) in 0..1, of the adversarial image
    votes: Mapping[str, tuple[str, float]]  # member -> its class and confidence on the adversarial image

    @property
    def outcome(self) -> str:
        """In words, at the review rate, where a suspect image counts as rejected."""
        said = self.adversarial_said
        if said.verdict in (Verdict.SUSPECT, Verdict.REJECTED):
            return f"{'right' if said.label == self.truth else 'wrong'}, and {said.verdict.name.lower()}"
        return "right and accepted, so the attack failed" if said.label == self.truth else "wrong and accepted, so the attack won"


@dataclass(frozen=True)
class Chart:
    """An SVG's inside; its size is in points."""

    width: float
    height: float
    body: Markup
    alt: str


@dataclass(frozen=True)
class Picture:
    caption: str
    alt: str
    uri: str


@dataclass(frozen=True, eq=False)
class Shown:
    """An example with its pictures."""

    example: Example
    pictures: tuple[Picture, ...]


def render(card: Card, examples: Sequence[Example]) -> str:
    """The page; the same card and examples give the same characters."""
    shown = within_budget([Shown(example, pictures(example, card)) for example in examples])
    systems = sorted(card.systems, key=lambda system: system.name != card.headline.ensemble)  # the headline's first
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        number.__name__: number for number in (percent, interval, points, span, count, sample, significant, hundredths)
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card=card,
        systems=systems,
        shown=shown,
        left_out=len(examples) - len(shown),
        overview=overview_chart(systems),
        curves=curve_chart(card, systems) if any(system.curve for system in systems) else None,
        masks=masks_chart(card) if any(point.samples for point in card.fresh_masks) else None,
        rocs=[(system, roc_chart(system)) for system in systems if system.roc],
        worths=[(rows, worth_chart(rows)) for rows in (grouped(card.ablation.worths) if card.ablation else ())],
        figures=FIGURES,
        heat=heat,
        caught=caught,
    )


# Numbers


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def interval(share: Share) -> str:
    return f"{100 * share.low:.1f} to {100 * share.high:.1f}%".replace(" ", NBSP)


def points(difference: float) -> str:
    """Percentage points with their sign, and no sign on nothing."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def span(estimate: Estimate) -> str:
    return f"{points(estimate.low)} to {points(estimate.high)}".replace(" ", NBSP)


def count(number: float) -> str:
    return f"{number:,.0f}"


def sample(number: int) -> str:
    return f"n = {count(number)}".replace(" ", NBSP)


def significant(number: float) -> str:
    """Three significant digits: p-values, thresholds, pixel units."""
    return f"{number:.3g}".replace("-", "−")


def hundredths(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")


def caught(curve: RocCurve, rate: float) -> float:
    """The true positives at a false-positive rate of at most `rate`."""
    return max((hit for false, hit in zip(curve.false_positives, curve.true_positives, strict=True) if false <= rate), default=0.0)


def heat(value: float, diverging: bool) -> str:
    """CSS colours of a heat map's cell, legible on a light and on a dark page: 0 to 1, or -1 to 1 if diverging."""
    colour = colormaps["PuOr_r"]((value + 1) / 2) if diverging else colormaps["Blues"](0.85 * value)
    luminance = np.dot([0.2126, 0.7152, 0.0722], np.array(colour[:3]) ** 2.2)
    return f"background:{to_hex(colour)};color:{'#000' if luminance > 0.18 else '#fff'}"


# Charts


def overview_chart(systems: Sequence[SystemCard]) -> Chart:
    """A line per system: clean, robust and robust with rejection, the last two with their intervals."""
    kinds = ("clean", "robust", "rejecting_5")
    with rc_context(STYLE | {"svg.hashsalt": "overview"}):
        figure, axes = _figure(0.7 + 0.42 * len(systems))
        rows = np.arange(len(systems))
        drawn = []
        for i, kind in enumerate(kinds):
            shares: list[Share] = [getattr(system, kind) for system in systems]
            drawn.append(_horizontal(axes, shares, rows + 0.2 * (i - 1), i, hollow=kind == "clean"))
        axes.set(yticks=rows, yticklabels=[system.name for system in systems], xlim=(-0.02, 1.02), ylim=(len(systems) - 0.4, -0.6))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(visible=False, axis="y")
        _legend(figure, drawn, [FIGURES[kind] for kind in kinds], "outside upper left", 2)
        alt = "; ".join(f"{s.name}: clean {percent(s.clean.value)}, robust {percent(s.robust.value)}" for s in systems)
        return _chart(figure, f"Accuracy of every system. {alt}.")


def curve_chart(card: Card, systems: Sequence[SystemCard]) -> Chart:
    """Robust accuracy at multiples of epsilon, a curve per system; the headline's is drawn the heaviest."""
    systems = [system for system in systems if system.curve]
    with rc_context(STYLE | {"svg.hashsalt": "curve"}):
        figure, axes = _figure(3.3 + 0.17 * ((len(systems) + 2) // 3))
        for i, system in enumerate(systems):
            ordered = sorted(system.curve, key=lambda point: point.factor)
            shares = [point.robust for point in ordered]
            axes.errorbar(
                [point.factor for point in ordered],
                [share.value for share in shares],
                yerr=_errors(shares),
                color=SERIES[i % len(SERIES)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=STROKES[i // len(SERIES) % len(STROKES)],
                linewidth=2.2 if system.name == card.headline.ensemble else 1.2,
                elinewidth=0.8,
                markersize=4,
            )
        factors = sorted({point.factor for system in systems for point in system.curve})
        axes.set_xlim(-0.03, 1.05 * max(1.0, *factors))
        axes.set_xscale("function", functions=(_spread, lambda y: np.expm1(y) / 4))  # small factors are many
        axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axes.set(ylim=(-0.02, 1.02), ylabel="robust accuracy")
        axes.set_xlabel(f"multiple of ε = {card.epsilon:g}/255 (spaced by log(1 + 4x))")
        axes.axvline(1, color=MUTED, linestyle=":", linewidth=1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        names = [system.name for system in systems]
        _legend(figure, axes.containers, names, "outside lower left", 3)
        return _chart(figure, f"Robust accuracy against epsilon of {', '.join(names)}; the table below has the values.")


def masks_chart(card: Card) -> Chart:
    """What is left under fresh masks, against how many draws each step of the attack averages over."""
    points = [point for point in card.fresh_masks if point.samples]
    known = [point.robust for point in card.fresh_masks if not point.samples]
    with rc_context(STYLE | {"svg.hashsalt": "masks"}):
        figure, axes = _figure(2.8)
        axes.plot([point.samples for point in points], [point.robust for point in points], color=SERIES[0], marker=MARKERS[0])
        for height in known:
            axes.axhline(height, color=MUTED, linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks([point.samples for point in points], [f"{point.samples}" for point in points])
        axes.set(ylim=(-0.02, 1.02), ylabel="accuracy under attack", xlabel="draws of masks that a step averages over")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        return _chart(figure, "Accuracy under fresh masks against draws of a step; the table below has the values.")


def roc_chart(system: SystemCard) -> Chart:
    """A curve per detector of one system."""
    with rc_context(STYLE | {"svg.hashsalt": f"roc {system.name}"}):
        figure, axes = _figure(3.6 + 0.17 * len(system.roc), width=4.0)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
        drawn = []
        for i, roc in enumerate(system.roc):
            at = np.unique(np.linspace(0, len(roc.false_positives) - 1, 200).round().astype(int))
            x, y = np.array(roc.false_positives)[at], np.array(roc.true_positives)[at]
            drawn += axes.plot(x, y, color=SERIES[i % len(SERIES)], linestyle=STROKES[i % len(STROKES)], linewidth=1.6)
        axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="clean images flagged", ylabel="fooling images flagged", aspect="equal")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        names = [f"{roc.detector}, area {roc.area:.3f}" for roc in system.roc]
        _legend(figure, drawn, names, "outside lower left", 1)
        return _chart(figure, f"ROC of {system.name}: {'; '.join(names)}.")


def worth_chart(worths: Sequence[Worth]) -> Chart:
    """Per member a bar of its Shapley value over one of its marginal value, with their intervals, in points."""
    with rc_context(STYLE | {"svg.hashsalt": f"worth {worths[0].figure} {worths[0].attacker}"}):
        figure, axes = _figure(1.1 + 0.42 * len(worths), width=4.2)
        rows = np.arange(len(worths))
        bars = []
        for i, estimates in enumerate(([worth.shapley for worth in worths], [worth.marginal for worth in worths])):
            values, at = [100 * estimate.value for estimate in estimates], rows + 0.38 * i - 0.19
            bars.append(axes.barh(at, values, height=0.34, color=SERIES[i], alpha=1 - 0.5 * i))
            axes.errorbar(values, at, xerr=100 * _errors(estimates), fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set(yticks=rows, yticklabels=[worth.member for worth in worths], ylim=(len(worths) - 0.5, -0.5))
        axes.set_xlabel("percentage points")
        axes.grid(visible=False, axis="y")
        _legend(figure, bars, ["Shapley value", "marginal value"], "outside upper left", 2)
        alt = ", ".join(f"{worth.member} Shapley {points(worth.shapley.value)} points" for worth in worths)
        return _chart(figure, f"What each member adds to {FIGURES[worths[0].figure]}: {alt}.")


def grouped(worths: Sequence[Worth]) -> list[list[Worth]]:
    """Those of one figure under one attacker together, attacker by attacker."""
    groups: dict[tuple[str, int], list[Worth]] = {}
    for worth in worths:
        groups.setdefault((worth.attacker, list(FIGURES).index(worth.figure)), []).append(worth)
    return [groups[key] for key in sorted(groups)]


def _figure(height: float, width: float = 4.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, drawn: Sequence[Any], names: Sequence[str], loc: Any, columns: int) -> None:
    figure.legend(drawn, names, loc=loc, ncols=columns, columnspacing=1.2, handlelength=2.4, borderaxespad=0.1)


def _spread(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.log1p(4 * np.maximum(x, -0.2)))


def _errors(shares: Sequence[Share] | Sequence[Estimate]) -> NDArray[np.float64]:
    """Down and up; (2, n).  An interval need not hold its value to the last bit."""
    return np.array([[max(0.0, s.value - s.low) for s in shares], [max(0.0, s.high - s.value) for s in shares]])


def _horizontal(axes: Axes, shares: Sequence[Share], rows: NDArray[np.floating[Any]], i: int, hollow: bool) -> ErrorbarContainer:
    style: dict[str, Any] = {"fmt": MARKERS[i], "color": SERIES[i], "markersize": 5, "elinewidth": 1.2}
    return axes.errorbar(
        [s.value for s in shares], rows, xerr=_errors(shares), markerfacecolor="none" if hollow else SERIES[i], **style
    )


def _chart(figure: Figure, alt: str) -> Chart:
    """The figure as the inside of an inline SVG, in the page's colours, light or dark."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(
        r"<style.*?</style>|<metadata.*?</metadata>", "", body, flags=re.DOTALL
    )  # a style in it would be the whole page's
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")  # every figure calls its parts alike
    body = re.sub("|".join(THEME), lambda colour: f"var(--{THEME[colour[0]]})", body)
    width, height = 72 * figure.get_size_inches()
    return Chart(round(width, 1), round(height, 1), Markup(body), alt)  # matplotlib escapes what it writes


# Pictures


def pictures(example: Example, card: Card) -> tuple[Picture, ...]:
    """The clean image, the adversarial one, what was changed, and what each member saw."""
    change = example.adversarial.astype(np.float32) - example.clean
    largest = float(np.abs(change).max())
    factor = max(1, int(127 // max(largest, card.epsilon)))
    amplified = (127.5 + factor * change).clip(0, 255).astype(np.uint8)
    told = f"Change, amplified {factor} times; grey is none, the largest is {largest:g} of 255"
    return (
        Picture("Clean", f"Clean image of {example.truth}", png(example.clean)),
        Picture("Adversarial", f"The same image after {example.attack}", png(example.adversarial)),
        Picture(told, f"Difference of the two images, amplified {factor} times", png(amplified)),
        *(
            Picture(f"As {name} saw it", f"The adversarial image as member {name} sees it", png(as_bytes(picture)))
            for name, picture in example.seen.items()
        ),
    )


def within_budget(shown: Sequence[Shown]) -> list[Shown]:
    """The first examples, as many as keep the page small."""
    sizes = np.cumsum([sum(len(picture.uri) for picture in one.pictures) for one in shown])
    return [one for one, size in zip(shown, sizes, strict=True) if size <= BUDGET]


def as_bytes(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray((255 * np.nan_to_num(picture).clip(0, 1)).round().astype(np.uint8))


def png(pixels: NDArray[np.uint8]) -> str:
    """A data URI of pixels (h, w), (h, w, 1) or (h, w, 3)."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
