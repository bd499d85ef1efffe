"""Which code it was: the commit that bundles and units of an attack are marked with."""

from __future__ import annotations

import os
import subprocess
from importlib import resources


def commit() -> str:
    """The commit of the code that runs, with `+changes` where the tree differs from it; `unknown` outside a checkout."""
    root = str(resources.files("training"))
    try:
        described = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            capture_output=True, text=True, check=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
