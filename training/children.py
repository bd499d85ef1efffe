"""Processes that a command starts for its shares of the work."""

from __future__ import annotations

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Called in a child before it begins: where its parent is killed, Linux sends it SIGTERM (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
