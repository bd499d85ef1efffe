"""The control of the conjecture: one adversarially trained network as large as all members together.

Whoever builds an ensemble could have spent its parameters and its training on a single network. `report --control BUNDLE` holds
the ensemble against that network, attacked by the same suite on the same images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from models.card import Card, Check, Comparison, EqualSize
from training.evaluation.attack import open_campaign
from training.evaluation.campaign import Campaign, Unit
from training.evaluation.card import NO_CONTROL, compared
from training.evaluation.scores import REVIEW, Ledger, answer, ledger, share
from training.evaluation.subjects import full_and_members
from training.recipe import BOUNDED
from training.refused import TrainingRefused

SMALLER = 0.95  # of the members' parameters: a control that has fewer flatters the ensemble


def open_control(args: argparse.Namespace, campaign: Campaign) -> Campaign:
    """The campaign on the bundle of `--control`, which must be of this one's images, attacks and epsilon; or TrainingRefused."""
    control = open_campaign(argparse.Namespace(**{**vars(args), "bundle": args.control, "out": args.control_out}))
    found = control.bundle.manifest
    if len(found.members) != 1 or not found.classifiers:
        names = ", ".join(member.name for member in found.members)
        raise TrainingRefused(f"--control {args.control}: expected a bundle of one classifier, got {names}")
    if found.members[0].strength == "accurate":
        raise TrainingRefused(
            f"--control {args.control}: expected an adversarially trained network, got one trained on clean images"
        )
    if found.members[0].network.kind in BOUNDED:
        raise TrainingRefused(f"--control {args.control}: expected an adversarially trained network, got one trained on bounds")
    if campaign.epsilon != control.epsilon:
        raise TrainingRefused(f"--control {args.control}: expected epsilon {campaign.epsilon:g}, got {control.epsilon:g}")
    if campaign.splits.fingerprint != control.splits.fingerprint:  # whose training images may be these test images
        raise TrainingRefused(
            f"--control {args.control}: expected one made of the ensemble's images and splits, got one of "
            f"{found.provenance.data_name}, divided otherwise"
        )
    if found.subject == campaign.bundle.manifest.subject:
        raise TrainingRefused(f"--control {args.control}: expected another network than the ensemble's own, got the same")
    if (wanted := _parameters(campaign)) * SMALLER > (got := _parameters(control)):
        raise TrainingRefused(
            f"--control {args.control}: expected about the {wanted:,} parameters that all members of the ensemble have together, "
            f"got {got:,}: a smaller network proves nothing"
        )
    return control


def finished(control: Campaign, args: argparse.Namespace) -> list[Unit]:
    """All that `phalanx-train attack` does on the one network, or TrainingRefused."""
    units = list(control.units(full_and_members(control.bundle.manifest)))
    if left := sum(not control.done(unit) for unit in units):
        elsewhere = f" --data {args.data}" * bool(args.data) + f" --out {args.control_out}" * bool(args.control_out)
        raise TrainingRefused(
            f"{control.folder}: expected all {len(units)} units done, got {left} that are not; attack the control first: "
            f"phalanx-train attack {args.control} --suite {control.suite.name} --images {len(control.images)} --seed {control.seed}"
            f"{elsewhere}"
        )
    return units


def held_against(card: Card, campaign: Campaign, whole: Ledger, control: Campaign, units: Sequence[Unit]) -> Card:
    """The card with the one network on it: what the ensemble is against it, and one safeguard less that is missing.

    `whole` is the ensemble's ledger; `units` are the control's.
    """
    ensemble = control.system(full_and_members(control.bundle.manifest)[-1]).ensemble
    mine, theirs = (each.where(lambda row: row.counts) for each in (whole, ledger(control, ensemble, units)))
    label, _ = answer(ensemble, control.clean("test")[0])
    clean = share(label == control.splits.test.labels)
    full, name = card.headline.ensemble, control.bundle.manifest.name
    ahead = card.headline.clean.value - clean.value
    found = EqualSize(
        bundle=f"{name} {control.bundle.manifest.version}",
        parameters=_parameters(control),
        members_parameters=_parameters(campaign),
        clean=clean,
        robust=share(theirs.robust),
        rejecting_5=share(theirs.robust_at(REVIEW)),
        compared=compared(full, name, mine.robust, theirs.robust, ahead),
        compared_rejecting_5=compared(full, name, mine.robust_at(REVIEW), theirs.robust_at(REVIEW), ahead),
    )
    kept = [control.found(unit) for unit in units]
    losses, gradients = sum(each.losses for each in kept), sum(each.gradients for each in kept)
    finite = Check(
        name="every loss and gradient of the one network is finite",
        passed=losses + gradients == 0,
        measured=f"{losses} losses and {gradients} gradients of an image were not",
    )
    conjecture = f"{card.headline.conjecture} {sentence(found.compared, card.n)}"
    return card.model_copy(
        update={
            "equal_size": found,
            "checks": (*card.checks, finite),
            "commit": ", ".join(sorted({*card.commit.split(", "), *(each.commit for each in kept)})),
            "missing": tuple(lack for lack in card.missing if lack != NO_CONTROL),
            "headline": card.headline.model_copy(update={"conjecture": conjecture}),
        }
    )


def sentence(found: Comparison, n: int) -> str:
    """What the one network is, seen from the ensemble."""
    said = "shows no difference" if found.p_value >= 0.05 else "is more robust" if found.robust < 0 else "is less robust"
    return (
        f"One adversarially trained network as large as all members {said} ({-100 * found.robust:+.1f} points, "
        f"+{found.lost}/-{found.won} images, McNemar p = {found.p_value:.2g}, n = {n})."
    )


def _parameters(campaign: Campaign) -> int:
    """Of all members together."""
    return sum(member.parameters for member in campaign.bundle.manifest.members)
