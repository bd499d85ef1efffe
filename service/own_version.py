"""Which Phalanx this is, as it is told to others."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version(otherwise: str = "unknown") -> str:
    """`otherwise` where it runs from a checkout that is not installed."""
    try:
        return version("phalanx-ensemble")
    except PackageNotFoundError:
        return otherwise
