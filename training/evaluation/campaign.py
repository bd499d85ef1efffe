"""A campaign: a bundle's systems under a suite of attacks, cut into units of work that are done once and kept.

One folder holds one campaign. A unit is one attack on one system over a few images; its file holds the adversarial
images and what every member of the bundle answers to them, so that every figure, of every system, can be computed
again, and every system is also judged on what was made against the others. A killed run goes on at the next unit;
several processes, or machines that share the folder (or have theirs copied together), take a shard of the units each.
More images are more units: whole ones are the same, whatever a campaign was begun with.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.bundle import Bundle
from models.composition import compose
from models.durable import replace_file
from models.ensemble import is_finite
from training.attacks.pgd import to_uint8
from training.attacks.problem import Findings, Problem
from training.data import Images, Splits
from training.evaluation.subjects import FULL, Subject, canonical
from training.evaluation.suites import CONTROL, Entry, Suite
from training.provenance import commit
from training.refused import TrainingRefused
from training.system import Members, System, load_networks

UNIT = 50  # images
ROUNDED, FLOAT = "uint8", "float"  # the versions of an adversarial image: whole pixels, as served, and as the attack left it
Outputs = dict[str, NDArray[np.float32]]
"""Member name -> logits (n, k), or (T, n, k) of a stochastic member."""


class CampaignRefused(TrainingRefused):
    """A folder that holds another campaign, or a unit that cannot be read."""


@dataclass(frozen=True)
class Unit:
    """One attack on one system over the images `start` to `stop` of the campaign's."""

    subject: Subject
    entry: Entry
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"{self.subject.name}/{self.entry.name}/{self.start:05d}-{self.stop:05d}.safetensors"


@dataclass(frozen=True)
class Found:
    """What a unit kept of its images: the outputs on each version, and what was odd."""

    start: int
    stop: int
    outputs: Mapping[str, Outputs]  # version -> member -> logits
    losses: int  # images for which an answer was not finite
    gradients: int
    seconds: float
    commit: str  # of the code that attacked


class Campaign:
    """A folder of units, tied to one bundle, shuffle of the test images, suite and seed; seen over the first `images`."""

    def __init__(
        self, folder: Path, bundle: Bundle, splits: Splits, suite: Suite, images: int, seed: int, device: torch.device
    ) -> None:
        self.folder, self.bundle, self.suite, self.seed, self.splits = folder, bundle, suite, seed, splits
        self.epsilon = bundle.manifest.provenance.epsilon
        self.members = Members(load_networks(bundle, device), bundle.manifest.masks.seed)
        shuffle = np.random.default_rng(seed).permutation(len(splits.test))
        self.index = shuffle[:images]
        self.images = splits.test.take(self.index)
        self._systems: dict[str, System] = {}
        self._found: dict[str, Found] = {}  # of units that were read: every ledger asks for all of them
        self._clean: dict[str, Outputs] = {}
        self._claim(shuffle)

    def system(self, subject: Subject) -> System:
        """A subject's ensemble over this bundle's members."""
        if subject.name not in self._systems:
            self._systems[subject.name] = System(compose(self.bundle, subject.choice), self.members)
        return self._systems[subject.name]

    def units(self, subjects: Sequence[Subject]) -> Iterator[Unit]:
        """All work on these subjects, in order, each piece once; a shard takes every n-th."""
        seen = set[str]()
        for subject in subjects:
            for entry in self.suite.entries:
                if not self._tries(entry, subject):
                    continue
                owner, stop = self.owner(subject, entry), min(len(self.images), entry.images or len(self.images))
                for start in range(0, stop, UNIT):
                    unit = Unit(owner, entry, start, min(start + UNIT, stop))
                    if unit.file not in seen:
                        seen.add(unit.file)
                        yield unit

    def owner(self, subject: Subject, entry: Entry) -> Subject:
        """The first system for which this attack is the same work: silent voters, and detectors that only tell, change nothing."""
        if subject.control:
            return subject
        key = entry.identity(self.system(subject))
        others = (other for other in canonical(self.bundle.manifest) if entry.applies(self.system(other)))
        return next((other for other in others if entry.identity(self.system(other)) == key), subject)

    def _tries(self, entry: Entry, subject: Subject) -> bool:
        system = self.system(subject)
        if subject.control:
            return entry.name == CONTROL
        return entry.applies(system) and (subject.name == FULL or not entry.sanity)

    def done(self, unit: Unit) -> bool:
        return (self._units / unit.file).is_file()

    def attack(self, unit: Unit) -> None:
        """Do one unit of work and keep it."""
        started, device = time.monotonic(), self.members.device
        clean = torch.from_numpy(self.images.pixels[unit.start : unit.stop]).to(device).float()
        y = torch.from_numpy(self.images.labels[unit.start : unit.stop]).to(device)
        findings = Findings()
        # The draws depend on the attack and the images, not on the system: what is compared was attacked alike.
        seed = zlib.crc32(f"{self.seed}/{unit.entry.name}/{unit.start}".encode())
        epsilon = self.epsilon * unit.entry.epsilon_factor
        with findings.listening(self.members.networks.values()):
            found = unit.entry.attack(Problem(self.system(unit.subject), clean, y, epsilon, seed, findings))
        delta = (found - clean).half().clamp(-(reach := largest_half(epsilon)), reach)  # what is judged is what is kept
        versions = {FLOAT: _restored(clean, delta), ROUNDED: to_uint8(_restored(clean, delta), clean)}
        tensors = {"delta": delta.cpu().contiguous()}
        for version, pixels in versions.items():
            tensors |= {f"{version}.{name}": output for name, output in self.outputs(pixels).items()}
        finite = [is_finite(tensors[f"{FLOAT}.{m}"]) & is_finite(tensors[f"{ROUNDED}.{m}"]) for m in self.members.networks]
        odd = sum(int((~each).sum()) for each in finite)
        record = {
            "losses": findings.losses + odd,
            "gradients": findings.gradients,
            "seconds": round(time.monotonic() - started, 2),
            "commit": commit(),
        }
        write_whole(self._units / unit.file, save(tensors, {"found": json.dumps(record)}))

    def outputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every member's output on pixels (n, h, w, c), on the CPU."""
        with torch.inference_mode():
            found = self.members.outputs(self.members.networks, pixels)
        return {name: output.float().cpu().contiguous() for name, output in found.items()}

    def found(self, unit: Unit) -> Found:
        """What a unit that is done has kept, but for the images."""
        if unit.file not in self._found:
            names = self.members.networks
            with self._opened(unit) as file:
                outputs = {version: {name: file.get_tensor(f"{version}.{name}") for name in names} for version in (FLOAT, ROUNDED)}
                self._found[unit.file] = Found(unit.start, unit.stop, outputs, **json.loads(file.metadata()["found"]))
        return self._found[unit.file]

    def adversarial(self, unit: Unit, version: str) -> NDArray[Any]:
        """The adversarial pixels (n, h, w, c) of a unit that is done: float32, or uint8 as they are served."""
        clean = torch.from_numpy(self.images.pixels[unit.start : unit.stop]).float()
        with self._opened(unit) as file:
            found = _restored(clean, torch.from_numpy(file.get_tensor("delta")))
        return (found if version == FLOAT else to_uint8(found, clean)).numpy()

    def clean(self, split: str) -> tuple[Outputs, NDArray[np.int64]]:
        """Every member's outputs on a whole clean split, `test` or `calibration`, with its labels; kept, like a unit."""
        images: Images = getattr(self.splits, split)
        path = self.folder / f"clean-{split}.safetensors"
        if not path.is_file():
            parts = [self.outputs(torch.from_numpy(images.pixels[i : i + 256])) for i in range(0, len(images), 256)]
            whole = {name: torch.cat([part[name] for part in parts], dim=parts[0][name].ndim - 2) for name in self.members.networks}
            write_whole(path, save(whole))
        if split not in self._clean:
            with safe_open(path, "np") as file:
                self._clean[split] = {name: file.get_tensor(name) for name in self.members.networks}
        return self._clean[split], images.labels

    @property
    def _units(self) -> Path:
        return self.folder / "units"

    @contextmanager
    def _opened(self, unit: Unit) -> Iterator[Any]:
        path = self._units / unit.file
        try:
            with safe_open(path, "np") as file:
                yield file
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CampaignRefused(f"{path}: expected a unit of this campaign, got {error}; delete it to do it again") from error

    def _claim(self, shuffle: NDArray[np.int64]) -> None:
        """Say whose folder this is; refuse one that is another campaign's."""
        manifest = self.bundle.manifest
        identity = {
            "bundle": f"{manifest.name} {manifest.subject}",
            "data": self.splits.fingerprint,
            "epsilon": self.epsilon,
            "suite": self.suite.name,
            "attacks": self.suite.digest,
            "seed": self.seed,
            "images": hashlib.sha256(shuffle.tobytes()).hexdigest(),
        }
        claim(self.folder / "campaign.json", identity, "campaign", CampaignRefused)


def largest_half(bound: float) -> float:
    """The largest float16 that is not above `bound`: a perturbation rounded to it stays within."""
    half = np.float16(bound)
    return float(half if float(half) <= bound else np.nextafter(half, np.float16(0)))


def _restored(clean: Tensor, delta: Tensor) -> Tensor:
    return (clean + delta.float()).clamp(0, 255)


def claim(path: Path, identity: Mapping[str, object], what: str, refused: type[TrainingRefused]) -> None:
    """Say in a file whose folder this is, `what` it holds (campaign, attack); refuse a folder that is another's."""
    if not path.is_file():
        write_whole(path, json.dumps(identity, indent=1).encode())
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))  # which another process may have written at the same time
    except (TypeError, ValueError) as error:
        raise refused(f"{path}: expected the identity of a kept {what} as JSON, got {error}; give another folder") from error
    for key, value in identity.items():
        if there.get(key) != value:
            raise refused(f"{path.parent} holds another {what}: expected {key} {value}, got {there.get(key)}; give another folder")


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all, among processes that may write the same thing at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data, shared=True)
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}); what was done is kept, run the same command to go on"
        raise TrainingRefused(message) from error
