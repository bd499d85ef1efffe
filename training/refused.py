"""What a person at the terminal did wrong or cannot have: one sentence, and no traceback."""

from __future__ import annotations


class TrainingRefused(ValueError):
    """Says what was expected and what came; the base of every such error in training."""
