"""A bundle is a folder with all that is served: read and verified whole, or refused; written whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from models.durable import leftover, replace_folder
from models.ensemble import DetectorName
from models.manifest import (
    MANIFEST_FILE,
    CalibrationFile,
    FileHash,
    InputSpec,
    InvalidBundle,
    Manifest,
    MasksSpec,
    MemberManifest,
    NetworkSpec,
    Provenance,
    Role,
    SamplesFile,
    StochasticSpec,
    Strength,
    SubsetRow,
    decode_manifest,
    encode_manifest,
    validation_sentence,
)
from models.member_graph import check_member_graph, link_weights
from models.outputs import CalibrationOutputs, MemberOutputs, MemberRun, Samples, calibration_outputs, expected_outputs

__all__ = [
    "Bundle",
    "BundleParts",
    "CalibrationOutputs",
    "FileCheck",
    "InputSpec",
    "InvalidBundle",
    "Manifest",
    "MemberManifest",
    "MemberOutputs",
    "MemberParts",
    "MemberRun",
    "NetworkSpec",
    "Provenance",
    "Samples",
    "StochasticSpec",
    "SubsetRow",
    "calibration_outputs",
    "check_files",
    "expected_outputs",
    "link_weights",
    "read_bundle",
    "read_manifest",
    "write_bundle",
]

CALIBRATION_FILE = "calibration.safetensors"
SAMPLES_FILE = "samples.safetensors"


@dataclass(frozen=True)
class MemberParts:
    """A member before its files have names and hashes."""

    name: str
    network: NetworkSpec
    strength: Strength
    roles: tuple[Role, ...]
    onnx: bytes  # linked to `weights` by link_weights
    weights: bytes  # safetensors
    temperature: float
    parameters: int
    stochastic: StochasticSpec | None = None
    centers: bool = False

    def manifest(self) -> MemberManifest:
        return MemberManifest(
            name=self.name,
            network=self.network,
            strength=self.strength,
            roles=self.roles,
            onnx=_file_hash(f"{self.name}.onnx", self.onnx),
            weights=_file_hash(f"{self.name}.safetensors", self.weights),
            temperature=self.temperature,
            stochastic=self.stochastic,
            centers=self.centers,
            parameters=self.parameters,
        )


@dataclass(frozen=True, eq=False)
class BundleParts:
    """What write_bundle makes a bundle of."""

    name: str
    input: InputSpec
    classes: Sequence[str]
    members: Sequence[MemberParts]
    subsets: Sequence[SubsetRow]  # one for every subset of the members with the role classifier
    masks_seed: int
    calibration: CalibrationOutputs
    calibration_source: str  # whose clean images they were
    calibration_fingerprint: str
    samples: Samples
    provenance: Provenance
    deciding: Sequence[DetectorName] | None = None  # detectors that the verdict hangs on; None: all
    licenses: Mapping[str, str] = field(default_factory=dict)  # what it covers -> SPDX name
    documents: Mapping[str, bytes] = field(default_factory=dict)  # file name -> content, as LICENSES or CARD.md

    def files(self) -> dict[str, bytes]:
        """All files of the bundle, the manifest among them."""
        members = {f"{member.name}.onnx": member.onnx for member in self.members}
        members |= {f"{member.name}.safetensors": member.weights for member in self.members}
        described = tuple(member.manifest() for member in self.members)
        calibration, samples = self.calibration.to_bytes(described), self.samples.to_bytes()
        manifest = Manifest(
            name=self.name,
            input=self.input,
            classes=tuple(self.classes),
            members=described,
            subsets=tuple(self.subsets),
            deciding=None if self.deciding is None else tuple(self.deciding),
            masks=MasksSpec(seed=self.masks_seed),
            calibration=CalibrationFile(
                file=CALIBRATION_FILE,
                sha256=_sha256(calibration),
                n=len(self.calibration),
                source=self.calibration_source,
                fingerprint=self.calibration_fingerprint,
            ),
            samples=SamplesFile(file=SAMPLES_FILE, sha256=_sha256(samples), n=len(self.samples)),
            documents=tuple(_file_hash(name, data) for name, data in self.documents.items()),
            provenance=self.provenance,
            licenses=dict(self.licenses),
        )
        named = {**members, CALIBRATION_FILE: calibration, SAMPLES_FILE: samples, **self.documents}
        return {**named, MANIFEST_FILE: encode_manifest(manifest)}


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle whose every byte was verified; nothing of it is read again."""

    path: Path
    manifest: Manifest
    onnx_bytes: Mapping[str, bytes]  # by member
    weights: Mapping[str, bytes]  # by member, safetensors; empty when read without
    calibration: CalibrationOutputs
    samples: Samples
    documents: Mapping[str, bytes]

    def parts(self) -> BundleParts:
        """What write_bundle would make this very bundle of."""
        manifest = self.manifest
        return BundleParts(
            name=manifest.name,
            input=manifest.input,
            classes=manifest.classes,
            members=[
                MemberParts(
                    name=member.name,
                    network=member.network,
                    strength=member.strength,
                    roles=member.roles,
                    onnx=self.onnx_bytes[member.name],
                    weights=self.weights[member.name],
                    temperature=member.temperature,
                    parameters=member.parameters,
                    stochastic=member.stochastic,
                    centers=member.centers,
                )
                for member in manifest.members
            ],
            subsets=manifest.subsets,
            deciding=manifest.deciding,
            masks_seed=manifest.masks.seed,
            calibration=self.calibration,
            calibration_source=manifest.calibration.source,
            calibration_fingerprint=manifest.calibration.fingerprint,
            samples=self.samples,
            provenance=manifest.provenance,
            licenses=manifest.licenses,
            documents=self.documents,
        )


@dataclass(frozen=True)
class FileCheck:
    """One file of a bundle against its manifest; `problem` is a sentence, or None."""

    file: str
    sha256: str  # as the manifest has it
    size: int | None  # in bytes, None if it could not be read
    problem: str | None


def read_bundle(
    path: str | os.PathLike[str], *, weights: bool = True, told: Callable[[Mapping[str, bytes]], object] | None = None
) -> Bundle:
    """The bundle in a folder, or InvalidBundle.  Every file is read once, and hashed as it is then used.

    `weights=False` verifies the safetensors files but does not keep them: a server has no use for them. `told` is given
    the bytes of every file, by name, before the bundle is returned: it may raise where it does not like them.
    """
    root, files = _root(path), dict[str, bytes]()

    def read(name: str) -> bytes:
        data = _read_file(root, name)
        if told is not None:
            files[name] = data
        return data

    bundle = _assemble(root, read, weights)
    if told is not None:
        told(files)
    return bundle


def write_bundle(path: str | os.PathLike[str], parts: BundleParts) -> Bundle:
    """Put a bundle at `path`, whole or not at all; a bundle that was there stays until the new one is on disk.

    What read_bundle would refuse is refused here too, and so is a folder that holds something other than a bundle.
    """
    path = Path(path)
    try:
        files = parts.files()
    except ValidationError as error:
        raise InvalidBundle(f"{MANIFEST_FILE}: {validation_sentence(error)}") from error
    bundle = _assemble(path, files.__getitem__, True)
    if path.exists() and not (path / MANIFEST_FILE).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidBundle(f"{path}: expected a bundle or nothing where a bundle is to be written, got something else")
    replace_folder(path, files)
    return bundle


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest alone, nothing it names verified."""
    return decode_manifest(_read_file(_root(path), MANIFEST_FILE))


def check_files(path: str | os.PathLike[str], manifest: Manifest) -> Iterator[FileCheck]:
    """Every file the manifest names, one that is wrong not hiding the next."""
    root = _root(path)
    for expected in manifest.files:
        size: int | None = None
        problem: str | None = None
        try:
            data = _read_file(root, expected.file)
            size = len(data)
            _check_hash(expected, data)
        except InvalidBundle as error:
            problem = str(error)
        yield FileCheck(expected.file, expected.sha256, size, problem)


def _assemble(path: Path, read: Callable[[str], bytes], keep_weights: bool) -> Bundle:
    manifest = decode_manifest(read(MANIFEST_FILE))
    classes = len(manifest.classes)
    onnx_bytes: dict[str, bytes] = {}
    weights: dict[str, bytes] = {}
    for member in manifest.members:
        data = _check_hash(member.weights, read(member.weights.file))
        if keep_weights:
            weights[member.name] = data
        onnx_bytes[member.name] = _check_hash(member.onnx, read(member.onnx.file))
        check_member_graph(onnx_bytes[member.name], member, manifest.input, classes)
    calibration, samples = manifest.calibration, manifest.samples
    data = _check_hash(calibration, read(calibration.file))
    outputs = CalibrationOutputs.from_bytes(calibration.file, data, manifest.members, classes, calibration.n)
    data = _check_hash(samples, read(samples.file))
    return Bundle(
        path=path,
        manifest=manifest,
        onnx_bytes=onnx_bytes,
        weights=weights,
        calibration=outputs,
        samples=Samples.from_bytes(samples.file, data, manifest.members, manifest.input, classes, samples.n),
        documents={document.file: _check_hash(document, read(document.file)) for document in manifest.documents},
    )


def _root(path: str | os.PathLike[str]) -> Path:
    root = Path(path).resolve()
    if root.is_dir():
        return root
    if previous := leftover(root):
        raise InvalidBundle(f"{path}: expected a folder, got none; an interrupted write left the old one at {previous}")
    raise InvalidBundle(f"{path}: expected a folder with a bundle, got {'a file' if root.exists() else 'nothing'}")


def _read_file(root: Path, name: str) -> bytes:
    """A regular file inside `root`; links are followed while they stay inside, as a Kubernetes volume's do."""
    try:
        target = (root / name).resolve(strict=True)
        if not target.is_relative_to(root):
            raise InvalidBundle(f"{name}: expected a file inside {root}, got a link to {target}")
        if not stat.S_ISREG(target.stat().st_mode):  # opening a pipe would wait for ever
            raise InvalidBundle(f"{name}: expected a regular file, got something else")
        return target.read_bytes()
    except FileNotFoundError as error:
        raise InvalidBundle(f"{name}: expected a file in {root}, got none") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise InvalidBundle(f"{name}: expected a readable file in {root}, got {error}") from error


def _check_hash(expected: FileHash, data: bytes) -> bytes:
    if (got := _sha256(data)) != expected.sha256:
        raise InvalidBundle(f"{expected.file}: expected SHA-256 {expected.sha256}, got {got}")
    return data


def _file_hash(file: str, data: bytes) -> FileHash:
    return FileHash(file=file, sha256=_sha256(data))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
