"""The project as a user gets it: a wheel that works where nothing else is, versions that were tested, real samples."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PACKAGES = ("service", "models", "training")
# What a CUDA build of torch brings; those packages pin each other, and a machine without a GPU has none of them.
CUDA_LIBRARIES = ("cuda-", "nvidia-", "triton")
TILES = REPOSITORY / "examples" / "tiles"


def needed(requirements: list[str]) -> Iterator[Distribution]:
    """Every installed distribution that the requirements bring to this machine, each once."""
    waiting = [(Requirement(line), "") for line in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, of_extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found = distribution(name)
            waiting += [(Requirement(line), extra) for line in found.requires or ()]
            if (name, extra) == (name, ""):
                yield found


def run(*command: object, cwd: Path = REPOSITORY) -> str:
    """What the command printed; a failure shows what it complained about."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PHALANX", "MAKE"))}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and the base dependencies: no torch, no checkout.

    The dependencies are links to the packages of this environment: a second's work, where installing them takes thirty.
    """
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=True)
    binaries = home / "bin"
    site = Path(run(binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for found in needed(PROJECT["dependencies"]):
        for name in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(found.locate_file(name))))
    run(sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--no-deps", "--no-index", wheel)
    return binaries


def files_of(package: str) -> set[str]:
    """The files of a package in the working tree, as a wheel names them."""
    folder = REPOSITORY / package
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(REPOSITORY).as_posix() for path in found if not path.name.startswith(".")}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_file_of_a_package(wheel: Path, package: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert files_of(package) - packed == set()  # stubs, recipes and the default bundle among them


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_every_module_of_serving_imports_with_the_base_dependencies_alone(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys
import service, models
for package in (service, models):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        of_an_extra = module.name in ("service.native_front", "service.tracing")
        if not of_an_extra and not module.name.startswith("models.networks") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
assert not {"torch", "training", "datasets"} & set(sys.modules), "serving imported what only training may"
print(service.__file__)
"""
    assert Path(run(installed / "python", "-W", "error", "-c", code, cwd=tmp_path).strip()).is_relative_to(installed.parent)


def test_the_console_command_explains_itself(installed: Path, tmp_path: Path) -> None:
    assert "serve" in run(installed / "phalanx", "--help", cwd=tmp_path)


@pytest.mark.parametrize("check", [["--check"], []], ids=["checked", "served"])
@pytest.mark.parametrize(("asked", "extra"), [("front_end: native", "native"), ("tracing: {}", "tracing")])
def test_an_extra_that_is_not_installed_is_named(installed: Path, tmp_path: Path, asked: str, extra: str, check: list[str]) -> None:
    (tmp_path / "phalanx.yaml").write_text(f"{asked}\nlisten: 127.0.0.1:0\nmetrics: off\n")
    command = [str(installed / "phalanx"), "serve", "--config", "phalanx.yaml", *check]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"needs another package: pip install 'phalanx-ensemble[{extra}]'")


def test_the_installed_default_bundle_is_whole(installed: Path, tmp_path: Path) -> None:
    where = "from importlib.resources import files; print(files('models') / 'bundles' / 'eurosat')"
    bundle = run(installed / "python", "-c", where, cwd=tmp_path).strip()
    assert "eurosat" in run(installed / "phalanx", "inspect", bundle, cwd=tmp_path)


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("extra", ["", *sorted(EXTRAS.keys() - {"cuda", "fuzz"})])  # these two are for machines of their own
def test_what_is_installed_is_what_the_constraints_pin(extra: str) -> None:
    tested = pins()
    requirements = EXTRAS[extra] if extra else PROJECT["dependencies"]
    try:
        present = {canonicalize_name(one.metadata["Name"]): one.version for one in needed(requirements)}
    except PackageNotFoundError as error:
        pytest.fail(f"{error} is needed and not installed")
    # torch names its build after a plus sign: +cpu, +cu130
    found = {name: v.split("+")[0] for name, v in present.items() if not name.startswith(CUDA_LIBRARIES)}
    assert found == {name: tested.get(name, "not pinned") for name in found}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["serve", "demo", "train", "test", "lint"])
def test_a_second_make_installs_nothing(target: str, tmp_path: Path) -> None:
    home, triton = tmp_path / "venv", tmp_path / "triton"
    command = ("make", "--dry-run", f"VENV={home}", f"TRITON_VENV={triton}", target)
    assert "pip install" in run(*command)
    for stamp in (home / ".stamp-python", home / ".stamp-dev", home / ".stamp-train", home / ".stamp-serve"):
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()
    triton.mkdir()
    (triton / ".stamp").touch()
    assert "pip install" not in run(*command)


def test_the_sample_is_balanced_and_shares_no_tile_with_the_examples() -> None:
    rows = {}
    for split in ("train", "validation", "test"):
        table = pq.read_table(REPOSITORY / f"tests/data/eurosat/{split}-00000-of-00001.parquet")
        labels = table["label"].to_pylist()
        assert len({labels.count(label) for label in range(10)}) == 1, split
        rows[split] = [image["bytes"] for image in table["image"].to_pylist()]
    assert {split: len(images) for split, images in rows.items()} == {"train": 400, "validation": 100, "test": 50}

    def fingerprint(source: Path | io.BytesIO) -> str:
        with Image.open(source) as image:
            assert image.size == (64, 64)
            return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()

    sample = [fingerprint(io.BytesIO(encoded)) for images in rows.values() for encoded in images]
    examples = [fingerprint(path) for path in TILES.glob("*.png")]
    assert len(examples) == 20
    assert len({*sample, *examples}) == 570
