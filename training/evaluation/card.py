"""From a campaign to the robustness card: every figure computed anew from what the campaign kept."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import combinations, pairwise
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray

from models.card import (
    Ablation,
    AttackRow,
    Card,
    Check,
    Comparison,
    CurvePoint,
    Deployment,
    Estimate,
    Headline,
    MaskPoint,
    Matrix,
    Oblivious,
    Orthogonality,
    Query,
    RocCurve,
    SubsetCard,
    SystemCard,
    Worth,
)
from models.composition import compose
from models.ensemble import Ensemble
from training.attacks.pgd import margin
from training.evaluation.campaign import FLOAT, ROUNDED, Campaign, Outputs, Unit
from training.evaluation.proofs import proven_on
from training.evaluation.scores import REJECT, REVIEW, Bools, Ledger, Outcome, answer, ledger, mcnemar, share
from training.evaluation.subjects import NAIVE, Subject, controls, every_subset, full_and_members, undefended
from training.evaluation.suites import CONTROL
from training.system import Members

NOTHING_LEFT = 0.01  # what a large epsilon may leave: an attack that aims gets below chance
CONTROL_FALLS = 0.01  # what may be left of an undefended member
NAIVE_FALLS = 0.10  # and of a naive soft vote
SAME = 0.01 + 1e-9  # figures this close agree: more steps, more starts; one image of a hundred is close, whatever floats make of it
MASK_DRAWS = 10
LEAST_ABLATED = 300  # images of an ablation, of those there are
FEW = 0.03  # what an attack may lose when the masks it knew are drawn anew
DEPLOYED = 1e-3  # how far probabilities of the served graph may be from torch's
TIES = 1e-3  # share of images whose p-value is so near the threshold that rounding decides
GRADIENT_IMAGES = 200
BOOTSTRAPS = 2000
MORE_OF_THE_SAME = (  # an attack, what it has more of, and than which
    ("longer-margin-pgd", "four times the steps", "pushed-margin-pgd"),  # both from one start
    ("restarted-margin-pgd", "three times the starts", CONTROL),
    ("longer-joint", "four times the steps of the joint attack", "joint"),
    ("restarted-joint", "three times the starts of the joint attack", "joint"),
)
NO_CONTROL = "a single adversarially trained network of the ensemble's size to compare with"  # training/evaluation/equal_size.py

THREAT_MODEL = (
    "The attacker perturbs an image by at most epsilon in every channel of every pixel (l-infinity) and wants a wrong class, or a "
    "wrong class that the ensemble accepts. Adaptive: knows weights, rule, temperatures, thresholds, calibration tables and the "
    "dropout masks. Oblivious: attacks one member alone and shows the ensemble what was found. Query: has nothing but the running "
    "server's public answers."
)


def ledgers_of(campaign: Campaign, units: Sequence[Unit]) -> dict[str, Ledger]:
    """What each member alone, and last the ensemble, answers to all that was tried on any of them."""
    mains = full_and_members(campaign.bundle.manifest)
    return {subject.name: ledger(campaign, campaign.system(subject).ensemble, units) for subject in mains}


def _counted(ledgers: Mapping[str, Ledger]) -> dict[str, Ledger]:
    """Of what was tried, what the figures are about."""
    return {name: whole.where(lambda row: row.counts) for name, whole in ledgers.items()}


def _proofs(campaign: Campaign, subjects: Sequence[Subject]) -> dict[str, Bools | None]:
    return {subject.name: proven_on(campaign.system(subject), campaign.images, campaign.epsilon) for subject in subjects}


def checks(campaign: Campaign, units: Sequence[Unit]) -> list[Check]:
    """Sanity checks and positive controls of what was tried on the ensemble, its members and the controls."""
    mains = full_and_members(campaign.bundle.manifest)
    ledgers = ledgers_of(campaign, units)
    counted, proofs = _counted(ledgers), _proofs(campaign, mains)
    return _checks(campaign, ledgers, counted, proofs, units, tuple(under_fresh_masks(campaign, mains[-1], units)), None)


def build(
    campaign: Campaign,
    units: Sequence[Unit],
    ledgers: Mapping[str, Ledger],
    commands: Sequence[str],
    queries: Sequence[Query] = (),
    deployment: Deployment | None = None,
) -> Card:
    """The card of `full` and its members, of whom `ledgers` are; with an ablation on as many images as every subset met."""
    manifest = campaign.bundle.manifest
    mains = full_and_members(manifest)
    counted, proofs = _counted(ledgers), _proofs(campaign, mains)
    systems = tuple(
        _system(campaign, subject, ledgers[subject.name], counted[subject.name], proofs[subject.name]) for subject in mains
    )
    main = mains[-1].name
    ablated = ablated_on(campaign, units)
    comparisons = _comparisons(systems, counted)
    masks = tuple(under_fresh_masks(campaign, mains[-1], units))
    card = systems[-1]
    return Card(
        bundle=f"{manifest.name} {manifest.version}",
        subject=manifest.subject,
        threat_model=THREAT_MODEL,
        data=f"{manifest.provenance.data_name}, test split",
        epsilon=campaign.epsilon,
        n=len(campaign.images),
        seed=campaign.seed,
        suite=campaign.suite.name,
        missing=tuple(_missing(campaign, ablated, queries, deployment)),
        commit=", ".join(sorted({campaign.found(unit).commit for unit in units})),
        libraries={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        commands=tuple(commands),
        headline=Headline(
            ensemble=main,
            epsilon=campaign.epsilon,
            clean=card.clean,
            robust=card.robust,
            rejecting_5=card.rejecting_5,
            suite=campaign.suite.name,
            publishable=campaign.suite.publishable and len(campaign.images) >= 1000,
            conjecture=_conjecture(comparisons, len(campaign.images), campaign.suite.name),
        ),
        systems=systems,
        comparisons=tuple(comparisons),
        fresh_masks=masks,
        checks=tuple(_checks(campaign, ledgers, counted, proofs, units, masks, deployment)),
        oblivious=tuple(_oblivious(counted[main], manifest.classifiers)),
        ablation=_ablation(campaign, units, counted, ablated) if ablated else None,
        orthogonality=_orthogonality(campaign, mains, counted) if len(mains) > 1 else None,
        queries=tuple(queries),
        deployment=deployment,
    )


LIBRARIES = ("torch", "numpy", "pyautoattack", "foolbox", "adversarial-robustness-toolbox")


def _system(campaign: Campaign, subject: Subject, whole: Ledger, counted: Ledger, certified: Bools | None) -> SystemCard:
    ensemble = campaign.system(subject).ensemble
    test_label, test_p = answer(ensemble, campaign.clean("test")[0])
    screened = bool(ensemble.detectors)
    tau, worst = _tau(campaign, ensemble), counted.outcomes(REVIEW)
    return SystemCard(
        name=subject.name,
        members=tuple(voter.name for voter in ensemble.voters),
        rule=str(ensemble.rule),
        detectors=tuple(str(detector.name) for detector in ensemble.detectors if detector.decides),
        clean=share(test_label == campaign.splits.test.labels),
        clean_rejected_5=share(test_p <= REVIEW) if screened else None,
        clean_rejected_1=share(test_p <= REJECT) if screened else None,
        robust=share(counted.robust),
        robust_float=share(counted.where(lambda row: row.version == FLOAT).robust),
        robust_uint8=share(counted.where(lambda row: row.version == ROUNDED).robust),
        rejecting_5=share(counted.robust_at(REVIEW)),
        rejecting_1=share(counted.robust_at(REJECT)),
        rejected_5=share(worst == Outcome.REJECTED),
        wrong_5=share(worst == Outcome.WRONG),
        certified=None if certified is None else share(certified),
        robust_error=counted.robust_error(tau),
        tau=tau,
        attacks=tuple(_attacks(counted)),
        curve=tuple(_curve(campaign, subject, whole)),
        roc=tuple(_roc(campaign, subject, counted)),
    )


def _tau(campaign: Campaign, ensemble: Ensemble) -> float:
    """The p-value that 99% of the rightly classified calibration images reach; 0 where nothing is ever rejected."""
    if not ensemble.detectors:
        return 0.0
    outputs, labels = campaign.clean("calibration")
    label, p = answer(ensemble, outputs)
    right = p[label == labels]
    return float(np.quantile(right, 0.01, method="lower")) if len(right) else 0.0


def _attacks(counted: Ledger) -> list[AttackRow]:
    """Each attack alone, on the images it was tried on; both versions of its pixels count."""
    found = []
    for against, entry in dict.fromkeys((row.against, row.entry) for row in counted.rows):
        alone = counted.where(lambda row, a=against, e=entry: (row.against, row.entry) == (a, e))  # type: ignore[misc]
        tried = alone.tried[0]
        robust, rejecting = share(alone.robust[tried]), share(alone.robust_at(REVIEW)[tried])
        found.append(AttackRow(name=entry, against=against, access=alone.rows[0].access, robust=robust, rejecting=rejecting))
    return found


def _curve(campaign: Campaign, subject: Subject, whole: Ledger) -> list[CurvePoint]:
    """Robust accuracy over multiples of epsilon, one attack, all on the same images."""
    points = [entry for entry in campaign.suite.entries if not entry.counts]
    made = {entry.epsilon_factor: _made(campaign, subject, whole, entry.name) for entry in points}
    if not any(attacked.rows for attacked in made.values()):
        return []
    n = int(made[points[0].epsilon_factor].tried[0].sum())
    made |= {0.0: whole.where(lambda _: False), 1.0: _made(campaign, subject, whole, CONTROL)}
    return [CurvePoint(factor=factor, robust=share(made[factor].first(n).robust)) for factor in sorted(made)]


def _made(campaign: Campaign, subject: Subject, whole: Ledger, entry: str) -> Ledger:
    """What one attack of the suite made against one system, or against another for which it is the same work."""
    named = next(e for e in campaign.suite.entries if e.name == entry)
    owner = campaign.owner(subject, named).name
    return whole.where(lambda row: (row.against, row.entry) == (owner, entry))


def _roc(campaign: Campaign, subject: Subject, counted: Ledger) -> list[RocCurve]:
    """Detectors on clean test images against the images of margin-PGD on this system that fool it, and of the joint attack."""
    ensemble = campaign.system(subject).ensemble
    if not ensemble.detectors:
        return []
    _, clean_p = answer(ensemble, campaign.clean("test")[0])
    curves = []
    for entry in (CONTROL, "joint"):
        maker = campaign.owner(subject, next(e for e in campaign.suite.entries if e.name == entry)).name
        chosen = [i for i, row in enumerate(counted.rows) if (row.against, row.entry, row.version) == (maker, entry, ROUNDED)]
        fooled = (counted.label[chosen] != counted.labels) & counted.tried[chosen] if chosen else np.zeros((0, 1), bool)
        if fooled.any():
            curves.append(_roc_curve(f"combined, under {entry}", clean_p, counted.p[chosen][fooled]))
    return curves


def _roc_curve(name: str, clean: NDArray[np.float32], attacked: NDArray[np.float32]) -> RocCurve:
    """Thresholds at 101 quantiles of the clean p-values; the area over all of them."""
    rates = np.linspace(0, 1, 101)
    thresholds = np.quantile(clean, rates, method="lower")
    false = [0.0, *(float((clean <= t).mean()) for t in thresholds), 1.0]
    true = [0.0, *(float((attacked <= t).mean()) for t in thresholds), 1.0]
    return RocCurve(
        detector=name,
        false_positives=tuple(false),
        true_positives=tuple(true),
        area=min(1.0, float(np.trapezoid(true, false))),
        fooling=len(attacked),
    )


def _comparisons(systems: Sequence[SystemCard], counted: Mapping[str, Ledger]) -> list[Comparison]:
    """The last system, which has all members, against every other, the most robust first."""
    *members, full = systems
    mine, ordered = counted[full.name].robust, sorted(members, key=lambda system: -system.robust.value)
    return [compared(full.name, o.name, mine, counted[o.name].robust, full.clean.value - o.clean.value) for o in ordered]


def compared(system: str, other: str, mine: Bools, theirs: Bools, clean: float) -> Comparison:
    """Two systems on the same images, (n,) each; `clean` is the difference of their clean accuracies."""
    won, lost = int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
    difference = float(mine.mean() - theirs.mean())
    return Comparison(
        system=system, other=other, robust=difference, won=won, lost=lost, p_value=mcnemar(won, lost), clean=clean
    )  # fmt: skip


def _conjecture(comparisons: Sequence[Comparison], n: int, suite: str) -> str:
    """Whether the ensemble was strictly more powerful than its best member, in one sentence."""
    if not comparisons:
        return "There is one classifier: nothing to compare."
    best = comparisons[0]
    figures = f"{100 * best.robust:+.1f} points, +{best.won}/-{best.lost} images, McNemar p = {best.p_value:.2g}"
    if best.p_value >= 0.05:
        said = "The conjecture did not hold against the adaptive attacker: no difference is shown to the best member"
    elif best.robust > 0:
        said = "The conjecture held against the adaptive attacker: the ensemble is more robust than its best member"
    else:
        said = "The conjecture failed against the adaptive attacker: the ensemble is weaker than its best member"
    return f"{said} {best.other} ({figures}, n = {n}, suite {suite})."


# Sanity checks and positive controls


def _checks(
    campaign: Campaign,
    ledgers: Mapping[str, Ledger],
    counted: Mapping[str, Ledger],
    proofs: Mapping[str, Bools | None],
    units: Sequence[Unit],
    masks: Sequence[MaskPoint],
    deployment: Deployment | None,
) -> list[Check]:
    manifest = campaign.bundle.manifest
    main = full_and_members(manifest)[-1]
    whole = ledgers[main.name]
    checks = []
    for name in undefended(manifest):
        alone = name if name in counted else main.name if manifest.classifiers == (name,) else None
        if alone:
            left = float(counted[alone].robust.mean())
            measured = f"{left:.1%} left, at most {CONTROL_FALLS:.0%} expected"
            checks.append(_check(f"the undefended member {name} falls", left <= CONTROL_FALLS, measured))
    for name, certified in proofs.items():
        if certified is not None:
            refuted = int((certified & ~counted[name].robust).sum())
            measured = f"{refuted} of {certified.sum()} images fell"
            checks.append(_check(f"no attack gets through what is proven of {name}", refuted == 0, measured))
    if naive := [unit for unit in units if unit.subject.name == NAIVE]:
        left = float(ledger(campaign, campaign.system(naive[0].subject).ensemble, naive).robust.mean())
        measured = f"{left:.1%} left, at most {NAIVE_FALLS:.0%} expected"
        checks.append(_check("a naive soft vote of weak members falls", left <= NAIVE_FALLS, measured))
    names = campaign.suite.names
    for entry, what, than in MORE_OF_THE_SAME:
        if entry in names and (more := _made(campaign, main, whole, entry)).rows:
            less, n = _made(campaign, main, whole, than), int(more.tried[0].sum())
            fewer, others = (side.first(n).robust_at(REVIEW) if than == "joint" else side.first(n).robust for side in (less, more))
            change = float(fewer.mean() - others.mean())
            measured = f"{100 * change:+.1f} points (n = {n}), 1 point expected at most"
            checks.append(_check(f"{what} change nothing", change <= SAME, measured))
    plain = _made(campaign, main, whole, CONTROL)
    for entry in ("square", "noise", "longer-noise"):
        if entry in names and (made := _made(campaign, main, whole, entry)).rows and plain.rows:
            n = int(made.tried[0].sum())
            black, white = (float(side.first(n).robust.mean()) for side in (made, plain))
            measured = f"{black:.1%} against {white:.1%} left (n = {n})"
            checks.append(_check(f"{entry} does not beat the gradient", black >= white, measured))
    if curve := _curve(campaign, main, whole):
        last = curve[-1].robust.value
        measured = f"{last:.1%} left at {curve[-1].factor:g} epsilon, at most {NOTHING_LEFT:.0%} expected"
        checks.append(_check("nothing is left as epsilon grows", last <= NOTHING_LEFT, measured))
        falls = all(a.robust.value >= b.robust.value - SAME for a, b in pairwise(curve))
        checks.append(_check("accuracy never rises with epsilon", falls, ", ".join(f"{point.robust.value:.1%}" for point in curve)))
    if len(masks) > 1:
        fewer_draws, most_draws = masks[-2:]
        change = fewer_draws.robust - most_draws.robust
        measured = f"{100 * change:+.1f} points from {fewer_draws.samples} to {most_draws.samples}, 1 point expected at most"
        checks.append(_check("more draws of masks a step change nothing", change <= SAME, measured))
    if draws := _mask_draws(campaign, main, units):
        fixed, fresh = draws
        measured = f"{fixed:.1%} wrong and accepted under the fixed masks, {fresh:.1%} over {MASK_DRAWS} fresh draws"
        checks.append(_check("the attack does not live on the fixed masks", fixed - fresh <= FEW, measured))
    found = [campaign.found(unit) for unit in units]
    losses, gradients = sum(f.losses for f in found), sum(f.gradients for f in found)
    if deployment is not None:
        run = deployment
        measured = (
            f"of {run.images} images {run.labels_differ} labels and {run.verdicts_differ} verdicts differ, probabilities by "
            f"{run.probability_difference:.1g} and p-values by {run.p_value_difference:.1g} at most"
        )
        same = run.labels_differ == 0 and run.verdicts_differ <= TIES * run.images and run.probability_difference <= DEPLOYED
        checks.append(_check("what is deployed is what was attacked", same, measured))
    checks.append(
        _check(
            "every loss and gradient is finite",
            losses + gradients == 0,
            f"{losses} losses and {gradients} gradients of an image were not",
        )
    )
    return checks


def _mask_draws(campaign: Campaign, subject: Subject, units: Sequence[Unit]) -> tuple[float, float] | None:
    """Wrong and accepted, of the joint attack's images as served, under the masks they were made for and under fresh ones."""
    entry = next((entry for entry in campaign.suite.entries if entry.name == "joint"), None)
    if entry is None or not _stochastic(campaign):
        return None
    owner = campaign.owner(subject, entry).name
    joint = [unit for unit in units if (unit.subject.name, unit.entry.name) == (owner, entry.name)]
    if not joint:
        return None
    fixed, fresh = (compose(campaign.bundle, replace(subject.choice, masks=masks)) for masks in ("fixed", "fresh"))
    before, after = [], []
    for unit in joint:
        labels = campaign.images.labels[unit.start : unit.stop]
        before.append(_past(fixed, campaign.found(unit).outputs[ROUNDED], labels))
        after += [_past(fresh, outputs, labels) for outputs in _redrawn(campaign, unit)]
    return float(np.concatenate(before).mean()), float(np.concatenate(after).mean())


def under_fresh_masks(campaign: Campaign, subject: Subject, units: Sequence[Unit]) -> Iterator[MaskPoint]:
    """What the attack that knows the fixed masks leaves under fresh ones, and those that average over draws, fewest first."""
    if not _stochastic(campaign):
        return
    fresh = compose(campaign.bundle, replace(subject.choice, masks="fresh"))
    system, entries = campaign.system(subject), campaign.suite.entries
    averaging = [entry for entry in entries if entry.masks and entry.applies(system)]
    for entry in (*(e for e in entries if averaging and e.name == CONTROL), *averaging):
        owner = campaign.owner(subject, entry).name
        right = [
            answer(fresh, outputs)[0] == campaign.images.labels[unit.start : unit.stop]
            for unit in units
            if (unit.subject.name, unit.entry.name) == (owner, entry.name)
            for outputs in _redrawn(campaign, unit)
        ]
        if right:
            every = np.concatenate(right)
            yield MaskPoint(samples=entry.masks, robust=float(every.mean()), n=len(every) // MASK_DRAWS, draws=MASK_DRAWS)


def _stochastic(campaign: Campaign) -> list[str]:
    return [name for name, masks in campaign.members.masks.items() if masks is not None]


def _redrawn(campaign: Campaign, unit: Unit) -> Iterator[Outputs]:
    """What the members answer to a unit's images as served, the masks drawn anew each time."""
    networks = {name: campaign.members.networks[name] for name in _stochastic(campaign)}
    known, pixels = campaign.found(unit).outputs[ROUNDED], torch.from_numpy(campaign.adversarial(unit, ROUNDED))
    for draw in range(MASK_DRAWS):
        members = Members(networks, campaign.members.masks_seed + 1 + draw)
        with torch.inference_mode():
            drawn = {name: output.float().cpu().numpy() for name, output in members.outputs(networks, pixels).items()}
        yield {**known, **drawn}


def _past(ensemble: Ensemble, outputs: Outputs, labels: NDArray[np.int64]) -> Bools:
    label, p = answer(ensemble, outputs)
    return np.asarray((label != labels) & (p > REVIEW))


def _check(name: str, passed: bool, measured: str) -> Check:
    return Check(name=name, passed=passed, measured=measured)


def _missing(campaign: Campaign, ablated: int, queries: Sequence[Query], deployment: Deployment | None) -> list[str]:
    """What a published figure has, and this one has not."""
    missing, manifest = [], campaign.bundle.manifest
    if not campaign.suite.publishable:
        missing.append(f"the standard suite (this is {campaign.suite.name}: fewer steps and starts, no FAB)")
    if len(campaign.images) < 1000:
        missing.append(f"1,000 images (these are {len(campaign.images)})")
    if not ablated:
        missing.append("an ablation of every subset")
    elif ablated < (least := min(LEAST_ABLATED, len(campaign.images))):
        missing.append(f"an ablation on {least} images (it has {ablated})")
    if not queries:
        missing.append("query attacks on the running server")
    made = sum(unit.stop - unit.start for unit in campaign.units(full_and_members(manifest)))
    if (scored := deployment.images if deployment else 0) < made:
        missing.append(f"the adversarial images scored by the running server (it saw {scored:,} of {made:,})")
    if not undefended(manifest):
        missing.append("an undefended member as a positive control")
    if not controls(manifest):
        missing.append("a naive soft vote as a positive control")
    names = campaign.suite.names
    if "longer-noise" not in names:
        missing.append("random noise of 10,000 draws on 50 images")
    if "longer-joint" not in names:
        missing.append("more steps and starts of the joint attack, to see that they change nothing")
    if "joint-below-1%" not in names:
        missing.append("an attack that aims below the 1% threshold (the joint attack aims below that of 5%)")
    if _stochastic(campaign) and not any(entry.masks for entry in campaign.suite.entries):
        missing.append("attacks over fresh masks (the bundle serves fixed ones, and these are known to the attacker)")
    missing.append(NO_CONTROL)
    missing.append("several training seeds")
    return missing


def _oblivious(full: Ledger, members: Sequence[str]) -> list[Oblivious]:
    found = []
    for member in members:
        shown = full.where(lambda row, m=member: row.against == m)  # type: ignore[misc]
        if shown.rows:
            induced = shown.right & (shown.clean_p > REVIEW) & shown.wrong_and_accepted(REVIEW)
            wrong = shown.wrong_and_accepted(REVIEW) | (~shown.right & (shown.clean_p > REVIEW))
            found.append(Oblivious(member=member, wrong_and_accepted=share(wrong), induced=share(induced)))
    return found


# Ablation


def ablated_on(campaign: Campaign, units: Sequence[Unit]) -> int:
    """How many of the campaign's images, counted from the first, every subset met all its attacks on; 0 if there is one member."""
    subsets, done = every_subset(campaign.bundle.manifest), {unit.file for unit in units}
    missed = (unit.start for unit in campaign.units(subsets) if unit.file not in done)
    return min(missed, default=len(campaign.images)) if len(subsets) > 1 else 0


def _ablation(campaign: Campaign, units: Sequence[Unit], counted: Mapping[str, Ledger], n: int) -> Ablation:
    """Of the first n images, as not every subset met the others; `counted`: what is known of some subsets already."""
    classifiers, subsets = campaign.bundle.manifest.classifiers, every_subset(campaign.bundle.manifest)
    members = {subject.name: tuple(sorted(set(classifiers) - set(subject.choice.without))) for subject in subsets}
    rows, values = [], dict[tuple[str, str, tuple[str, ...]], Bools]()
    for subject in subsets:
        ensemble, names = campaign.system(subject).ensemble, members[subject.name]
        known = counted.get(subject.name) or ledger(campaign, ensemble, units).where(lambda row: row.counts)
        adaptive = known.first(n)
        oblivious = adaptive.where(lambda row: row.against in classifiers)
        test = answer(ensemble, campaign.clean("test")[0])[0] == campaign.splits.test.labels
        robust, rejecting = share(adaptive.robust), share(adaptive.robust_at(REVIEW))
        rows.append(SubsetCard(members=names, clean=share(test), robust=robust, rejecting_5=rejecting))
        for attacker, seen in (("adaptive", adaptive), ("oblivious", oblivious)):
            for figure, right in (("clean", seen.right), ("robust", seen.robust), ("rejecting_5", seen.robust_at(REVIEW))):
                values[attacker, figure, names] = right
    worths = [
        _worth(
            member, figure, attacker, classifiers, {names: v for (a, f, names), v in values.items() if (a, f) == (attacker, figure)}
        )
        for attacker in ("adaptive", "oblivious")
        for figure in ("clean", "robust", "rejecting_5")
        for member in classifiers
    ]
    return Ablation(suite=campaign.suite.name, n=n, subsets=tuple(rows), worths=tuple(worths))


def _worth(member: str, figure: str, attacker: str, players: Sequence[str], value: Mapping[tuple[str, ...], Bools]) -> Worth:
    each = shapley(member, players, value)
    rest = tuple(sorted(set(players) - {member}))
    marginal = value[tuple(sorted(players))].astype(float) - (value[rest].astype(float) if rest else 0.0)
    return Worth.model_validate(
        {"member": member, "figure": figure, "attacker": attacker, "shapley": bootstrap(each), "marginal": bootstrap(marginal)}
    )


def shapley(member: str, players: Sequence[str], value: Mapping[tuple[str, ...], Bools]) -> NDArray[np.float64]:
    """Each image's part in a member's Shapley value (1953), (n,): their mean is the value, for it is linear in v.

    phi = sum over S without the member of |S|! (k-|S|-1)! / k! (v(S + member) - v(S)), v(nothing) = 0.
    value: sorted members -> whether that subset is right, (n,).
    """
    others, k = [name for name in players if name != member], len(players)
    total = np.zeros(len(next(iter(value.values()))))
    for size in range(k):
        for chosen in combinations(others, size):
            without = value[tuple(sorted(chosen))].astype(float) if chosen else 0.0
            total += (value[tuple(sorted((*chosen, member)))] - without) / (k * comb(k - 1, size))
    return total


def bootstrap(each: NDArray[np.float64]) -> Estimate:
    """The mean of (n,) values with its 95% percentile interval over images drawn again."""
    draws = np.random.default_rng(0).integers(0, len(each), (BOOTSTRAPS, len(each)))
    low, high = np.quantile(each[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(value=float(each.mean()), low=float(low), high=float(high))


# Orthogonality


def _orthogonality(campaign: Campaign, mains: Sequence[Subject], counted: Mapping[str, Ledger]) -> Orthogonality:
    names = tuple(subject.name for subject in mains)
    transfer = [[_fooled(_made(campaign, maker, counted[judge], "pushed-margin-pgd")) for judge in names] for maker in mains]
    members = campaign.bundle.manifest.classifiers
    failed = [~counted[name].robust for name in members]
    correlation = [[_phi(a, b) for b in failed] for a in failed]
    return Orthogonality(
        transfer=_matrix(names, transfer, len(campaign.images)),
        gradient_cosine=_matrix(members, _gradient_cosine(campaign, members), min(GRADIENT_IMAGES, len(campaign.images))),
        error_correlation=_matrix(members, correlation, len(campaign.images)),
    )


def _matrix(names: Sequence[str], values: Sequence[Sequence[float]], n: int) -> Matrix:
    return Matrix(names=tuple(names), values=tuple(tuple(float(v) for v in row) for row in values), n=n)


def _fooled(made: Ledger) -> float:
    """Of the images that a system gets right, the share that is wrong under the attacks that were made."""
    return float((~made.robust)[made.right].mean()) if made.rows and made.right.any() else 0.0


def _phi(a: Bools, b: Bools) -> float:
    """Phi coefficient of two yes-or-no variables; 0 where one never varies."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def _gradient_cosine(campaign: Campaign, members: Sequence[str]) -> list[list[float]]:
    """Mean cosine of the gradients of the members' margins on the campaign's first clean images."""
    clean = torch.from_numpy(campaign.images.pixels[:GRADIENT_IMAGES]).to(campaign.members.device).float()
    y = torch.from_numpy(campaign.images.labels[:GRADIENT_IMAGES]).to(clean.device)
    units = []
    for name in members:
        x = clean.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(margin(campaign.members.logits(name, x), y).sum(), x)
        units.append(torch.nn.functional.normalize(gradient.flatten(1), dim=1))
    return [[float((a * b).sum(dim=1).mean().clamp(-1, 1)) for b in units] for a in units]
