"""`phalanx-train` as a person types it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from training.cli import main

ROOT = Path(__file__).parents[2]
SMOKE = ("--suite", "smoke", "--threads", "1")  # of attack, ablate and report


def answered(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In this process: what is refused at once is not worth the seconds that another takes to begin."""
    threads, out, err = torch.get_num_threads(), io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code: object = main(list(arguments))
    except SystemExit as error:  # of argparse
        code = error.code
    finally:
        torch.set_num_threads(threads)
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def phalanx_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "training.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
