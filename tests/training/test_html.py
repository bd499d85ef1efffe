"""The report on a hand-made card: every figure is there, under its own heading, and nothing is loaded from anywhere."""

from __future__ import annotations

from base64 import b64decode
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from io import BytesIO
from itertools import product
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from models.card import (
    Ablation,
    AttackRow,
    Card,
    Check,
    Comparison,
    CurvePoint,
    Deployment,
    EqualSize,
    Estimate,
    Headline,
    MaskPoint,
    Matrix,
    Oblivious,
    Orthogonality,
    Query,
    RocCurve,
    Share,
    SubsetCard,
    SystemCard,
    Worth,
)
from models.ensemble import Verdict
from training.evaluation.html import BUDGET, Example, Said, caught, points, render

Figure = Literal["clean", "robust", "rejecting_5"]
Attacker = Literal["adaptive", "oblivious"]

MEMBERS = ("adversarial", "bayesian", "edge", "metric")
# clean, robust, with rejection at 5%
SYSTEMS: dict[str, tuple[float, float, float]] = {
    "adversarial": (0.8519, 0.5611, 0.5702),
    "bayesian": (0.9672, 0.0, 0.0031),
    "edge": (0.7869, 0.3217, 0.3217),
    "metric": (0.8067, 0.4981, 0.5129),
    "adversarial-alone": (0.8577, 0.5644, 0.5721),
    "full": (0.8553, 0.5712, 0.5893),
}
OWN = {
    "margin-pgd": 0.021, "pushed-margin-pgd": 0.024, "apgd-ce": 0.029, "apgd-targeted": 0.004, "fab-targeted": 0.017,
    "square": 0.091, "noise": 0.212, "reweighed": 0.013, "logits-pgd": 0.035, "probabilities-pgd": 0.041, "votes-pgd": 0.133,
    "features": 0.118, "soft-edges-pgd": 0.154, "joint": 0.031, "orthogonal": 0.077,
}  # fmt: skip
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)


def share(value: float, n: int = 1000) -> Share:
    """With the interval of a normal approximation, kept within 0 and 1."""
    half = 1.96 * (value * (1 - value) / n) ** 0.5 + 1 / n
    return Share(value=value, low=max(0.0, value - half), high=min(1.0, value + half), n=n)


def estimate(value: float, half: float = 0.031) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def attack_row(name: str, against: str, robust: float, rejecting: float, n: int = 1000) -> AttackRow:
    access: Literal["gradient", "scores", "none"] = "scores" if name == "square" else "none" if name == "noise" else "gradient"
    return AttackRow(name=name, against=against, access=access, robust=share(robust, n), rejecting=share(rejecting, n))


def attack_rows(system: str) -> Iterator[AttackRow]:
    clean, robust, rejecting = SYSTEMS[system]
    for against in SYSTEMS:
        for name, gap in OWN.items():
            left = min(clean, robust + gap + (0.0 if against == system else 0.11))
            yield attack_row(name, against, left, min(left, rejecting + gap))
    yield attack_row("margin-pgd", "edge+metric", 0.011, 0.011, n=300)  # by chance below what all leave of the thousand


def roc_curve(detector: str, area: float) -> RocCurve:
    """y = x^a has the area 1 / (1 + a)."""
    x = np.linspace(0, 1, 1001)
    return RocCurve(detector=detector, false_positives=tuple(x), true_positives=tuple(x ** (1 / area - 1)), area=area, fooling=120)


def system_card(name: str) -> SystemCard:
    clean, robust, rejecting = SYSTEMS[name]
    screened = name in ("full", "metric")
    return SystemCard(
        name=name,
        members=MEMBERS if name == "full" else (name,),
        rule="mixed" if name == "full" else "soft",
        detectors=("mutual_information", "distance", "disagreement") if name == "full" else ("distance",) if screened else (),
        clean=share(clean, 4050),
        clean_rejected_5=share(0.0523, 4050) if screened else None,
        clean_rejected_1=share(0.0114, 4050) if screened else None,
        robust=share(robust),
        robust_float=share(robust + 0.0021),
        robust_uint8=share(robust + 0.0046),
        rejecting_5=share(rejecting),
        rejecting_1=share(rejecting * 0.99),
        robust_error=1 - rejecting - 0.0123,
        tau=0.01034 + 0.001 * len(name),
        certified=share(0.3817) if name == "adversarial" else None,
        attacks=tuple(attack_rows(name)),
        curve=tuple(CurvePoint(factor=f, robust=share(robust ** (0.4 + 0.6 * f) if robust else 0.0, 300)) for f in FACTORS),
        roc=(roc_curve("combined, under margin-pgd", 0.713), roc_curve("combined, under joint", 0.524)) if screened else (),
    )


def subset(i: int) -> SubsetCard:
    members = tuple(name for j, name in enumerate(MEMBERS) if i >> j & 1)
    clean, robust, rejecting = share(0.7 + i / 77, 300), share(0.3 + i / 53, 300), share(0.31 + i / 51, 300)
    return SubsetCard(members=members, clean=clean, robust=robust, rejecting_5=rejecting)


def matrix(diagonal: float, rest: float) -> Matrix:
    values = [[diagonal if i == j else rest - 0.07 * abs(i - j) for j in range(4)] for i in range(4)]
    return Matrix(names=MEMBERS, values=tuple(map(tuple, values)), n=1000)


def worths() -> Iterator[Worth]:
    figures: tuple[Figure, ...] = ("clean", "robust", "rejecting_5")
    attackers: tuple[Attacker, ...] = ("adaptive", "oblivious")
    for figure, attacker, (i, member) in product(figures, attackers, enumerate(MEMBERS)):
        value = 0.31 - 0.098 * i - 0.01 * len(figure) - 0.003 * len(attacker)
        yield Worth(member=member, figure=figure, attacker=attacker, shapley=estimate(value), marginal=estimate(value / 9 - 0.02))


def headline(system: SystemCard, publishable: bool) -> Headline:
    return Headline(
        ensemble=system.name,
        epsilon=4,
        clean=system.clean,
        robust=system.robust,
        rejecting_5=system.rejecting_5,
        suite="standard" if publishable else "smoke",
        publishable=publishable,
        conjecture="The conjecture did not hold: full ties with its best member equal-size (-1.3 points, McNemar p = 0.31).",
    )


def whole_card() -> Card:
    systems = tuple(map(system_card, SYSTEMS))
    full = ("square", "full", "evidence", 5000, 1288.0, 0.187)
    label = ("boundary", "full", "label", 2000, 1931.5, 0.066)
    return Card(
        bundle="eurosat 1.2.0",
        subject="f25fd45447d8",
        threat_model="The attacker changes any pixel by at most 4 of 255, and knows weights, rule, thresholds and masks.",
        data="EuroSAT, 27,000 tiles, divided 70/15/15, seed 42",
        epsilon=4,
        n=1000,
        seed=0,
        suite="standard",
        missing=(),
        commit="f7ef7ca0d1",
        libraries={"torch": "2.13.0", "pyautoattack": "0.2.0", "numpy": "2.4.6"},
        commands=(
            "phalanx-train attack models/bundles/eurosat --data FOLDER --suite standard --out runs/campaign",
            "phalanx-train report",
        ),
        headline=headline(systems[-1], publishable=True),
        systems=systems,
        comparisons=(
            Comparison(system="full", other="adversarial", robust=0.0101, won=43, lost=33, p_value=0.3019, clean=0.0034),
            Comparison(system="full", other="metric", robust=0.0731, won=112, lost=39, p_value=2.1e-9, clean=0.0486),
            Comparison(system="full", other="adversarial-alone", robust=0.0068, won=51, lost=44, p_value=0.5381, clean=-0.0024),
        ),
        equal_size=EqualSize(
            bundle="one-network 3.1.4",
            parameters=1_873_456,
            members_parameters=1_902_331,
            clean=share(0.8702, 4050),
            robust=share(0.5838),
            rejecting_5=share(0.6038),
            compared=Comparison(system="full", other="one-network", robust=-0.0126, won=61, lost=74, p_value=0.0301, clean=-0.0149),
            compared_rejecting_5=Comparison(
                system="full", other="one-network", robust=-0.0145, won=58, lost=73, p_value=0.2207, clean=-0.0149
            ),
        ),
        fresh_masks=tuple(
            MaskPoint(samples=samples, robust=robust, n=1000, draws=10)
            for samples, robust in ((0, 0.6102), (1, 0.5931), (4, 0.5874), (16, 0.5861))
        ),
        checks=(
            Check(name="The undefended member falls to 1% or less", passed=True, measured="bayesian 0.0%, n = 1,000"),
            Check(name="A naive soft vote falls", passed=True, measured="4.9%, n = 1,000"),
            Check(name="More steps change nothing", passed=True, measured="160 steps: 57.3% to 57.2%, n = 300"),
        ),
        oblivious=tuple(
            Oblivious(member=name, wrong_and_accepted=share(0.041 + 0.037 * i), induced=share(0.011 + 0.037 * i))
            for i, name in enumerate(MEMBERS)
        ),
        ablation=Ablation(suite="quick", n=300, subsets=tuple(subset(i) for i in range(1, 16)), worths=tuple(worths())),
        orthogonality=Orthogonality(
            transfer=matrix(0.62, 0.41), gradient_cosine=matrix(1.0, 0.13), error_correlation=matrix(1.0, 0.88)
        ),
        queries=tuple(
            Query(attack=a, ensemble=e, disclosure=d, queries=most, median_queries=median, wrong_and_accepted=share(wrong, 200))
            for a, e, d, most, median, wrong in (full, label)
        ),
        deployment=Deployment(images=1000, labels_differ=0, p_value_difference=3.7e-6),
    )


def bare_card() -> Card:
    """Without whatever may be absent."""
    system = system_card("edge").model_copy(update={"attacks": (), "curve": (), "roc": ()})
    return Card(
        bundle="eurosat 1.2.0",
        subject="f25fd45447d8",
        threat_model="An attacker.",
        data="EuroSAT",
        epsilon=4,
        n=8,
        seed=0,
        suite="smoke",
        missing=("1,000 images", "the attack FAB-T"),
        commit="f7ef7ca0d1",
        libraries={},
        commands=(),
        headline=headline(system, publishable=False),
        systems=(system,),
        comparisons=(),
        checks=(),
        oblivious=(),
    )


def example(truth: str = "Forest", channels: int = 3, side: int = 64) -> Example:
    rng = np.random.default_rng(0)
    clean = rng.integers(20, 200, (side, side, channels), np.uint8)
    adversarial = (clean + rng.integers(-4, 5, clean.shape)).astype(np.uint8)
    gray = (adversarial.mean(axis=2) / 255).astype(np.float32)
    return Example(
        attack="apgd-targeted",
        truth=truth,
        clean_said=Said(truth, Verdict.CLEAN, 0.4213),
        adversarial_said=Said("Pasture", Verdict.SUSPECT, 0.0317),
        clean=clean,
        adversarial=adversarial,
        seen={"edge": (gray > 0.4).astype(np.float32), "metric": np.repeat(gray[..., None], 3, axis=2)},
        votes={"edge": ("Pasture", 0.6123), "metric": (truth, 0.5518)},
    )


class Page(HTMLParser):
    """The words of every section, and what is wrong with the markup."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = defaultdict(str)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []  # tag, section
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            inside = self.open[-1][1] if self.open else ""
            self.open.append((tag, attributes.get("id") or inside if tag == "section" else inside))

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop()[0]

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] != "style":
            self.sections[self.open[-1][1]] += data.replace("\u00a0", " ")

    def attributes(self, tag: str) -> Iterator[Mapping[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)

    @property
    def text(self) -> str:
        return "".join(self.sections.values())


def figures(model: object) -> Iterator[str]:
    """How every share and estimate in a part of the card is written, its interval and n included."""
    match model:
        case Share():
            yield f"{100 * model.value:.1f}%"
            yield f"{100 * model.low:.1f} to {100 * model.high:.1f}%, n = {model.n:,}"
        case Estimate():
            yield points(model.value)
            yield f"{points(model.low)} to {points(model.high)}"
        case BaseModel():
            for _, value in model:
                yield from figures(value)
        case tuple():
            for value in model:
                yield from figures(value)


@pytest.fixture(scope="module")
def markup() -> str:
    return render(whole_card(), [example(), example("River", channels=1)])


@pytest.fixture(scope="module")
def page(markup: str) -> Page:
    return Page(markup)


CARD = whole_card()


def test_masks_that_nobody_knows_are_told_with_the_draws_of_each_attack(page: Page) -> None:
    told = page.sections["masks"]
    assert "the fixed masks, known61.0%" in told
    assert "1 draw59.3%" in told
    assert "16 draws58.6%1,000, 10" in told


@pytest.mark.parametrize(
    "section, part",
    [
        ("headline", CARD.headline),
        ("systems", tuple(system.model_copy(update={"attacks": (), "curve": ()}) for system in CARD.systems)),
        ("attacks", tuple(system.attacks for system in CARD.systems)),
        ("curve", tuple(system.curve for system in CARD.systems)),
        ("comparisons", CARD.equal_size),
        ("ablation", CARD.ablation),
        ("oblivious", (CARD.oblivious, CARD.queries)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_share_stands_in_its_section_with_interval_and_n(page: Page, section: str, part: object) -> None:
    written = list(figures(part))
    assert written
    assert [text for text in written if text not in page.sections[section]] == []


@pytest.mark.parametrize(
    "section, text",
    [
        ("headline", CARD.headline.conjecture),
        ("checks", "160 steps: 57.3% to 57.2%, n = 300"),
        ("threat", CARD.threat_model),
        ("systems", "mutual_information, distance, disagreement"),
        ("systems", f"{100 * CARD.systems[-1].robust_error:.1f}%"),
        ("systems", "0.0143"),  # tau
        ("systems", "no detectors"),
        ("comparisons", "−1.3"),
        ("comparisons", "2.1e−09"),
        ("comparisons", "no difference shown"),
        ("comparisons", "1,902,331"),
        ("comparisons", "the one network is better"),
        ("detectors", "0.713"),
        ("ablation", "adversarial + bayesian + edge + metric"),
        ("ablation", "against the adaptive and the oblivious attacker"),
        ("ablation", "not shown against any"),
        ("orthogonality", "34.0%"),
        ("orthogonality", "−0.08"),
        ("orthogonality", "0.81"),
        ("orthogonality", "n = 1,000"),
        ("oblivious", "1,288"),
        ("deployment", "3.7e−06"),
        ("examples", "Forest under apgd-targeted: wrong, and suspect"),
        ("examples", "amplified 31 times; grey is none, the largest is 4 of 255"),
        ("examples", "0.0317"),
        ("examples", "61.2%"),
        ("reproduce", "phalanx-train attack models/bundles/eurosat"),
        ("reproduce", "numpy 2.4.6, pyautoattack 0.2.0, torch 2.13.0"),
        ("reproduce", CARD.commit),
    ],
)
def test_what_is_not_a_share_stands_in_its_section(page: Page, section: str, text: str) -> None:
    assert text in page.sections[section]


def test_a_member_earns_its_place_where_the_whole_interval_is_above_nothing() -> None:
    def worth(attacker: Attacker, value: float, figure: Figure = "rejecting_5") -> Worth:
        return Worth(member="edge", figure=figure, attacker=attacker, shapley=estimate(value), marginal=estimate(0.5))

    def earned(*worths: Worth) -> tuple[str, ...]:
        return Ablation(suite="quick", n=300, subsets=(), worths=worths).earned("edge")

    assert earned(worth("adaptive", 0.03), worth("oblivious", 0.04)) == ("oblivious",)
    assert earned(worth("adaptive", 0.04, "robust")) == ()
    assert earned(worth("adaptive", 0.04)) == ("adaptive",)


def test_nothing_is_loaded_and_nothing_runs(markup: str, page: Page) -> None:
    assert "http://" not in markup
    assert "https://" not in markup
    assert not list(page.attributes("script"))
    loads = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset")
    ]
    assert loads
    assert all(value and value.startswith(("#", "data:")) for value in loads)
    assert all(reference.startswith("#") for reference in (part.split(")")[0] for part in markup.split("url(")[1:]))


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [value[1:] for _, attributes in page.tags if (value := attributes.get("href")) and value.startswith("#")]
    assert set(links) <= set(ids)


def test_tables_and_pictures_can_be_read_aloud(page: Page) -> None:
    assert all(attributes.get("scope") in ("col", "row", "colgroup") for attributes in page.attributes("th"))
    assert all(attributes.get("alt") for attributes in page.attributes("img"))
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in page.attributes("svg"))


def test_the_pictures_are_the_images(page: Page) -> None:
    uris = [attributes["src"] or "" for attributes in page.attributes("img")]
    shown = [np.asarray(Image.open(BytesIO(b64decode(uri.partition(",")[2])))) for uri in uris]
    color, gray = example(), example("River", channels=1)
    assert np.array_equal(shown[0], color.clean)
    assert np.array_equal(shown[1], color.adversarial)
    assert np.abs(shown[2] - 127.0 - 31 * (color.adversarial.astype(float) - color.clean)).max() <= 1
    assert np.array_equal(shown[3] > 127, color.seen["edge"] > 0.5)
    assert np.array_equal(shown[5], gray.clean[..., 0])


def test_the_same_card_gives_the_same_page(markup: str) -> None:
    assert render(whole_card(), [example(), example("River", channels=1)]) == markup


def test_the_page_stays_small(markup: str) -> None:
    large = render(bare_card(), [example(side=224)] * 12)
    assert len(markup) + BUDGET < 2_000_000
    assert len(large) < len(render(bare_card(), [])) + 1.05 * BUDGET
    assert 2 < large.count("<article") < 12
    assert f"{12 - large.count('<article')} more examples were left out to keep this page small" in large


def test_what_is_absent_is_said_to_be() -> None:
    page = Page(render(bare_card(), []))
    silent = {name for name, text in page.sections.items() if "Not measured: " not in text}
    assert silent == {"", "alarm", "headline", "threat", "systems"}


def test_a_figure_that_is_not_publishable_says_what_is_missing_beside_it(page: Page) -> None:
    missing = Page(render(bare_card(), [])).sections["headline"]
    assert "Not a publishable figure." in missing
    assert "the attack FAB-T" in missing
    assert "Not a publishable figure." not in page.sections["headline"]


def test_a_failed_check_is_announced_before_any_figure() -> None:
    failed = Check(name="A naive soft vote falls", passed=False, measured="61.0%, n = 1,000")
    text = render(bare_card().model_copy(update={"checks": (*CARD.checks, failed)}), [])
    page = Page(text)
    assert "1 of 4 checks FAILED: the figures below prove nothing" in page.sections["alarm"]
    assert "61.0%, n = 1,000" in page.sections["alarm"]
    assert text.index('role="alert"') < text.index('id="headline"')
    assert "1 of 4 checks failed" in page.sections["headline"]
    assert page.sections["checks"].index("✗ FAILED") < page.sections["checks"].index("✓ passed")


def test_a_page_without_checks_says_so_at_the_top_and_one_with_passed_ones_does_not_shout(page: Page) -> None:
    assert "No check was run" in Page(render(bare_card(), [])).sections["alarm"]
    assert "alarm" not in page.sections
    assert "✓ all 3 passed" in page.sections[""]


def test_other_answers_of_the_server_are_announced() -> None:
    card = bare_card().model_copy(update={"deployment": Deployment(images=1000, labels_differ=3, p_value_difference=0.2)})
    assert "on 3 of n = 1,000 it gave another class" in " ".join(Page(render(card, [])).sections["deployment"].split())


def test_attacks_on_the_system_itself_come_first_and_the_strongest_of_all_is_marked() -> None:
    rows = (
        attack_row("square", "edge", 0.6, 0.61),
        attack_row("margin-pgd", "edge", 0.5, 0.52),
        attack_row("joint", "edge+metric", 0.40, 0.41, n=300),  # stronger by what 300 images are easier or harder
        attack_row("apgd-ce", "metric", 0.45, 0.58),
    )
    card = bare_card()
    changed = card.model_copy(update={"systems": (card.systems[0].model_copy(update={"attacks": rows}),)})
    told = " ".join(Page(render(changed, [])).sections["attacks"].split())
    assert "The strongest alone is apgd-ce, made against metric: it leaves 45.0%, n = 1,000." in told
    assert "Transfer from other systems (2), the strongest apgd-ce made against metric, leaving 45.0%" in told
    tables = told[told.index("Attacker uses") :]
    order = [tables.index(part) for part in ("margin-pgd", "52.0% strongest", "square", "Transfer", "45.0% strongest", "40.0%")]
    assert order == sorted(order)
    assert tables.count("strongest") == 3  # one for either figure, one in the sentence on transfer


HOSTILE = '<script>alert("&$\\frac{1}$")</script>'


def test_hostile_names_stay_words() -> None:
    card = whole_card()
    system = card.systems[-1].model_copy(update={"name": HOSTILE})
    worth = next(worths()).model_copy(update={"member": HOSTILE})
    changed = card.model_copy(
        update={
            "bundle": HOSTILE,
            "systems": (*card.systems[:-1], system),
            "checks": (Check(name=HOSTILE, passed=False, measured=HOSTILE),),
            "commands": (HOSTILE,),
            "libraries": {HOSTILE: HOSTILE},
            "ablation": Ablation(suite=HOSTILE, n=300, subsets=(), worths=(worth,)),
        }
    )
    text = render(changed, [example(truth=HOSTILE)])
    assert "<script" not in text
    page = Page(text)
    assert all(
        HOSTILE in page.sections[section]
        for section in ("alarm", "systems", "attacks", "curve", "detectors", "ablation", "examples")
    )


@pytest.mark.parametrize(
    "difference, text",
    [(0.0173, "+1.7"), (-0.0173, "−1.7"), (-0.0004, "0.0"), (0.0, "0.0")],
    ids=("won", "lost", "nearly nothing", "nothing"),
)
def test_points_have_a_sign_unless_they_are_nothing(difference: float, text: str) -> None:
    assert points(difference) == text


def test_a_detector_is_read_at_a_rate_that_it_reaches_and_never_between() -> None:
    false, true = (0.0, 0.02, 0.06, 1.0), (0.1, 0.4, 0.8, 1.0)
    curve = RocCurve(detector="d", false_positives=false, true_positives=true, area=0.9, fooling=50)
    assert caught(curve, 0.05) == 0.4
    assert caught(curve, 0.01) == 0.1


@pytest.mark.parametrize(
    "label, verdict, outcome",
    [
        ("Forest", Verdict.CLEAN, "right and accepted, so the attack failed"),
        ("Forest", Verdict.REJECTED, "right, and rejected"),
        ("River", Verdict.SUSPECT, "wrong, and suspect"),
        ("River", Verdict.CLEAN, "wrong and accepted, so the attack won"),
        ("River", Verdict.UNSCREENED, "wrong and accepted, so the attack won"),
    ],
)
def test_an_outcome_in_words(label: str, verdict: Verdict, outcome: str) -> None:
    plain = example()
    said = Said(label, verdict, 0.5)
    assert Example(plain.attack, "Forest", said, said, plain.clean, plain.adversarial, {}, {}).outcome == outcome
