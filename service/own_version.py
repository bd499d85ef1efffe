"""Which Phalanx this is, as it is told to others."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    try:
        return version("phalanx-ensemble")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
