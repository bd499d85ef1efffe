"""Serving imports neither torch nor training: nothing in `service` or `models` does, whatever is called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FORBIDDEN = {"torch", "torchmetrics", "lightning", "lightning_fabric", "kornia", "datasets", "tensorboard", "training"}
NETWORKS = Path("models/networks")  # the torch networks themselves, which nothing of serving may import


def sources() -> Iterator[Path]:
    for package in ("service", "models"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            relative = path.relative_to(REPOSITORY)
            if NETWORKS not in relative.parents:
                yield relative


def imported(path: Path) -> set[str]:
    """Every module a file imports, at any depth in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("path", list(sources()), ids=str)
def test_no_source_of_serving_imports_what_training_needs(path: Path) -> None:
    modules = imported(path)
    assert not {module for module in modules if module.split(".")[0] in FORBIDDEN}
    assert not {module for module in modules if module == "models.networks" or module.startswith("models.networks.")}


def test_a_server_runs_where_torch_cannot_be_imported() -> None:
    """Imports every module of serving with torch and training made impossible, as on a machine that has neither."""
    modules = [".".join(path.with_suffix("").parts) for path in sources()]
    modules = [module.removesuffix(".__init__") for module in modules]
    script = f"""
import importlib, sys
for name in {sorted(FORBIDDEN)!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
