"""`phalanx-train report`: the robustness card and its report from what `attack` and `ablate` have kept."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import write_bundle
from models.card import CARD_FILE, encode_card
from models.durable import replace_file
from models.ensemble import Decision, Ensemble, Verdict, decide
from models.networks.edge import EdgeNetwork
from models.networks.thermometer import thermometer_of
from training.evaluation import attack, equal_size
from training.evaluation.campaign import ROUNDED, Campaign, Unit
from training.evaluation.card import ablated_on, build, ledgers_of
from training.evaluation.html import Example, Said, render
from training.evaluation.queries import kept_deployment, kept_queries
from training.evaluation.subjects import Subject, controls, every_subset, full_and_members
from training.refused import TrainingRefused

EXAMPLES, OF_EACH = 6, 2  # adversarial images on the page, and at most of one attack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that chose the campaign, and where the report goes."""
    attack.add_arguments(parser)
    parser.add_argument("--html", type=Path, help="where the report goes (default: report.html in the campaign's folder)")
    parser.add_argument("--embed", action="store_true", help="put the card into the bundle")
    parser.add_argument(
        "--control", type=Path, metavar="BUNDLE",
        help="hold the ensemble against the one classifier in this bundle, as large as all members together and attacked alike",
    )  # fmt: skip
    parser.add_argument("--control-out", type=Path, help="the folder of the control's campaign (default: as for --out)")


def run(args: argparse.Namespace) -> int:
    """Write card and report; nothing is attacked again."""
    if args.control_out and not args.control:
        raise TrainingRefused(f"--control-out {args.control_out}: expected --control BUNDLE beside it, got none")
    campaign = attack.open_campaign(args)
    units = finished(campaign)
    control = equal_size.open_control(args, campaign) if args.control else None
    alone = equal_size.finished(control, args) if control else []  # a refusal comes before the figures are computed
    ledgers = ledgers_of(campaign, units)
    again = commands(args, len(campaign.images), ablated_on(campaign, units))
    card = build(campaign, units, ledgers, again, kept_queries(campaign), kept_deployment(campaign))
    if control:
        card = equal_size.held_against(card, campaign, ledgers[card.headline.ensemble], control, alone)
    replace_file(campaign.folder / CARD_FILE, encode_card(card))
    page = args.html or campaign.folder / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_file(page, render(card, list(examples(campaign, units))).encode())
    print(f"{page}: report on {card.n} images; {campaign.folder / CARD_FILE}: card")
    if args.embed:
        parts = campaign.bundle.parts()
        written = write_bundle(args.bundle, replace(parts, documents={**parts.documents, CARD_FILE: encode_card(card)}))
        print(f"{args.bundle}: version {written.manifest.version}, now with the card")
    for check in card.checks:
        if not check.passed:
            print(f"FAILED: {check.name}: {check.measured}", file=sys.stderr)
    return 0


def finished(campaign: Campaign) -> list[Unit]:
    """The units of the ensemble, its members and the controls, which must be done; the subsets' on images that all of them met."""
    manifest = campaign.bundle.manifest
    needed = list(campaign.units([*full_and_members(manifest), *controls(manifest)]))
    if missing := [unit for unit in needed if not campaign.done(unit)]:
        raise TrainingRefused(
            f"{campaign.folder}: expected all {len(needed)} units of phalanx-train attack done, got {len(missing)} that are not, "
            f"the first {missing[0].file}; run it again with --images {len(campaign.images)}, it goes on"
        )
    known = {unit.file for unit in needed}
    others = [unit for unit in campaign.units(every_subset(manifest)) if unit.file not in known]
    met = ablated_on(campaign, [*needed, *(unit for unit in others if campaign.done(unit))])
    return needed + [unit for unit in others if unit.stop <= met]


def commands(args: argparse.Namespace, n: int, ablated: int) -> list[str]:
    """What to type to get these figures again, of n images; where a folder lies is nobody else's business."""
    common = f"--suite {args.suite}" + " --data FOLDER" * bool(args.data) + f" --seed {args.seed}" * bool(args.seed)
    options = common + f" --images {n}"
    attacks = [f"phalanx-train attack {args.bundle} {options}"]
    attacks += [f"phalanx-train ablate {args.bundle} {common} --images {ablated}"] * bool(ablated)
    report = f"phalanx-train report {args.bundle} {options}"
    if not args.control:
        return [*attacks, report]
    return [*attacks, f"phalanx-train attack {args.control} {options}", f"{report} --control {args.control}"]


def examples(campaign: Campaign, units: Sequence[Unit]) -> Iterator[Example]:
    """Images that the ensemble gets right and what the attacks on it made of them, two of each in the suite's order."""
    subject = full_and_members(campaign.bundle.manifest)[-1]
    ensemble, classes = campaign.system(subject).ensemble, campaign.bundle.manifest.classes
    test, _ = campaign.clean("test")
    shown, of_entry = set[int](), Counter[str]()
    for unit in against(campaign, subject, units):
        entry = unit.entry.name
        wanted = min(OF_EACH - of_entry[entry], EXAMPLES - len(shown))
        if wanted == 0:
            continue
        here = campaign.index[unit.start : unit.stop]
        clean = decide(ensemble, {name: output[..., here, :] for name, output in test.items()})
        attacked = decide(ensemble, campaign.found(unit).outputs[ROUNDED])
        labels = campaign.splits.test.labels[here]
        fooled = np.flatnonzero((clean.label == labels) & (attacked.label != labels))
        for i in [int(i) for i in fooled if int(here[i]) not in shown][:wanted]:
            shown.add(int(here[i]))
            of_entry[entry] += 1
            adversarial = campaign.adversarial(unit, ROUNDED)[i]
            yield Example(
                attack=entry,
                truth=classes[int(labels[i])],
                clean_said=_said(classes, clean, i),
                adversarial_said=_said(classes, attacked, i),
                clean=campaign.splits.test.pixels[here[i]],
                adversarial=adversarial,
                seen=_seen(campaign, adversarial),
                votes=_votes(ensemble, classes, attacked, i),
            )


def against(campaign: Campaign, subject: Subject, units: Sequence[Unit]) -> list[Unit]:
    """Of these units those that are attacks on this system, or are the same work, in the suite's order."""
    order = [entry.name for entry in campaign.suite.entries]
    on_it = [unit for unit in units if unit.entry.counts and unit.subject == campaign.owner(subject, unit.entry)]
    return sorted(on_it, key=lambda unit: (order.index(unit.entry.name), unit.start))


def _said(classes: Sequence[str], decision: Decision, i: int) -> Said:
    return Said(classes[int(decision.label[i])], Verdict(int(decision.verdict[i])), float(decision.p_value[i]))


def _votes(ensemble: Ensemble, classes: Sequence[str], decision: Decision, i: int) -> dict[str, tuple[str, float]]:
    votes = zip(ensemble.voters, decision.votes[i], strict=True)
    return {voter.name: (classes[int(vote.argmax())], float(vote.max())) for voter, vote in votes}


def _seen(campaign: Campaign, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """What the members that transform an image see of it, as a picture (h, w) in 0..1."""
    seen = {}
    for name, network in campaign.members.networks.items():
        if isinstance(network, EdgeNetwork):
            planes = network.edges(torch.from_numpy(pixels[None]).to(campaign.members.device))
            strength = torch.stack([plane.mean(dim=1) + 0.5 for plane in planes]).mean(dim=0)
            seen[name] = strength[0].cpu().numpy()
        elif (thermometer := thermometer_of(network)) is not None:
            seen[name] = thermometer(torch.from_numpy(pixels[None]).to(campaign.members.device)).mean(dim=1)[0].cpu().numpy()
    return seen
