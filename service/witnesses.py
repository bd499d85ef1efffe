"""Who looks on as images are answered. A witness never changes an answer, and never makes one wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from service.batcher import Result
from service.codec import AnswerNames
from service.engine import Images


@dataclass(frozen=True, slots=True)
class Answered:
    """Images that were classified, and how, whatever of it their caller is told."""

    ensemble: str
    bundle_version: str
    names: AnswerNames
    images: Images
    result: Result
    caller: str
    request_id: str


class Witness(Protocol):
    """Thread-safe; called in the thread that answers."""

    def saw(self, answered: Answered) -> None:
        """Take note, at once and without an error: whatever takes longer is another thread's."""
