"""A robustness card for the tiny bundle: figures that nobody measured, of two of the ensembles it can be served as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from models.bundle import BundleParts, write_bundle
from models.card import CARD_FILE, Card, Check, Headline, Share, SystemCard, encode_card
from models.manifest import MANIFEST_FILE, Manifest, decode_manifest
from tests.bundles import tiny_parts

ALL = ("adversarial", "bayesian", "edge", "metric")
DETECTORS = ("mutual_information", "variance", "disagreement", "distance", "margin")
CONJECTURE = "full beat metric, its best member, by 4.0 points (McNemar p = 0.03, n = 300)."
VANISHED = Check(name="gradients reach the image", passed=False, measured="zero on 12% of [images]")


def write_carded_bundle(path: Path, **changes: Any) -> Path:
    """The tiny bundle with its card, of which `changes` are other fields."""
    write_bundle(path, with_card(tiny_parts(images=100), **changes))
    return path


def with_card(parts: BundleParts, **changes: Any) -> BundleParts:
    card = encode_card(tiny_card(manifest_of(parts), **changes))
    return replace(parts, documents={**parts.documents, CARD_FILE: card})


def manifest_of(parts: BundleParts) -> Manifest:
    return decode_manifest(parts.files()[MANIFEST_FILE])


def tiny_card(manifest: Manifest, **changes: Any) -> Card:
    full = system_card("full", ALL, "mixed", DETECTORS, robust=0.62)
    fields: dict[str, Any] = {
        "bundle": manifest.name,
        "subject": manifest.subject,
        "threat_model": "white box, l-infinity",
        "data": "random images",
        "epsilon": manifest.provenance.epsilon,
        "n": 300,
        "seed": 0,
        "suite": "quick",
        "missing": ("1,000 images", "FAB"),
        "commit": manifest.provenance.commit,
        "libraries": {},
        "commands": ("phalanx-train attack",),
        "headline": headline_of(full, manifest.provenance.epsilon),
        "systems": (full, system_card("votes", ALL, "majority", (), robust=0.4)),
        "comparisons": (),
        "checks": (Check(name="loss falls", passed=True, measured="on 99% of steps"),),
        "oblivious": (),
    }
    return Card(**{**fields, **changes})


def headline_of(system: SystemCard, epsilon: float, publishable: bool = False) -> Headline:
    return Headline(
        ensemble=system.name,
        epsilon=epsilon,
        clean=system.clean,
        robust=system.robust,
        rejecting_5=system.rejecting_5,
        suite="quick",
        publishable=publishable,
        conjecture=CONJECTURE,
    )


def system_card(name: str, members: tuple[str, ...], rule: str, detectors: tuple[str, ...], robust: float) -> SystemCard:
    clean, attacked, rejecting = share(0.94, 5400), share(robust, 300), share(robust + 0.09, 300)
    return SystemCard(
        name=name,
        members=members,
        rule=rule,
        detectors=detectors,
        clean=clean,
        clean_rejected_5=share(0.05, 5400) if detectors else None,
        clean_rejected_1=share(0.01, 5400) if detectors else None,
        robust=attacked,
        robust_float=attacked,
        robust_uint8=attacked,
        rejecting_5=rejecting,
        rejecting_1=attacked,
        robust_error=0.3,
        tau=0.1,
        attacks=(),
    )


def share(value: float, n: int) -> Share:
    return Share(value=value, low=value - 0.01, high=value + 0.01, n=n)
