"""`phalanx-train ablate`: attack every subset of the members, those that decide alike together, and say what each adds."""

from __future__ import annotations

import argparse

from training.evaluation import attack
from training.evaluation.subjects import controls, every_subset, full_and_members


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx-train attack`, but for the choice of systems; the same folder is gone on with."""
    attack.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Attack every subset, then print the figures; `phalanx-train report` has Shapley values and heat maps."""
    campaign = attack.open_campaign(args)
    manifest = campaign.bundle.manifest
    return attack.work(args, campaign, [*full_and_members(manifest), *controls(manifest), *every_subset(manifest)])
