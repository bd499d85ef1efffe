"""A small typed client for Phalanx."""

from phalanx_client.answers import (
    Answer,
    Bundle,
    Classification,
    Detection,
    Detector,
    Disclosure,
    Ensemble,
    ImageError,
    InputSpec,
    Limits,
    Masks,
    Member,
    Rates,
    Reason,
    Robustness,
    Rule,
    Share,
    StreamAnswer,
    Verdict,
    Vote,
)
from phalanx_client.client import Client
from phalanx_client.errors import PhalanxError
from phalanx_client.images import ImageLike, RawPixels

__all__ = [
    "Answer",
    "Bundle",
    "Classification",
    "Client",
    "Detection",
    "Detector",
    "Disclosure",
    "Ensemble",
    "ImageError",
    "ImageLike",
    "InputSpec",
    "Limits",
    "Masks",
    "Member",
    "PhalanxError",
    "Rates",
    "RawPixels",
    "Reason",
    "Robustness",
    "Rule",
    "Share",
    "StreamAnswer",
    "Verdict",
    "Vote",
]
