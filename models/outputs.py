"""What the members answer on the calibration images and on the samples: reduced over masks, stored as safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from models.ensemble import reduce_masks
from models.manifest import InputSpec, InvalidBundle, MemberManifest, StochasticSpec
from models.masks import draw_masks

CALIBRATION_BATCH = 64  # images that share one draw of fresh masks
LOWEST = float(np.finfo(np.float16).min)  # a log-probability below this is stored as this

Tensors = dict[str, NDArray[Any]]
Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype, shape
LogitsFunction = Callable[[NDArray[np.uint8], NDArray[np.float32] | None], NDArray[np.float32]]


@dataclass(frozen=True)
class MemberRun:
    """Images (n, h, w, c) -> logits (n, K); of a stochastic member, with masks (T, d) -> logits (T, n, K)."""

    logits: LogitsFunction
    stochastic: StochasticSpec | None = None


@dataclass(frozen=True, eq=False)
class MemberOutputs:
    """One member's answers on n images."""

    log_softmax: NDArray[np.float16]  # (n, K); of a stochastic member the log of the mean probability over masks
    log_normalizer: NDArray[np.float32] | None = None  # (n,), what log_softmax lacks to be the logits
    mutual_information: NDArray[np.float32] | None = None  # (n,)
    variance: NDArray[np.float32] | None = None  # (n,)
    fresh: MemberOutputs | None = None  # the same images, with masks drawn anew for every batch

    @property
    def logits(self) -> NDArray[np.float32]:
        """(n, K); the log probabilities, which are as good to vote with, where the normalizer was not kept."""
        log_p = self.log_softmax.astype(np.float32)
        return log_p if self.log_normalizer is None else log_p + self.log_normalizer[:, None]

    def tensors(self, prefix: str) -> Tensors:
        own: Tensors = {f"{prefix}.log_softmax": self.log_softmax}
        if self.log_normalizer is not None:
            own[f"{prefix}.log_normalizer"] = self.log_normalizer
        if self.mutual_information is not None and self.variance is not None:
            own |= {f"{prefix}.mutual_information": self.mutual_information, f"{prefix}.variance": self.variance}
        return own | (self.fresh.tensors(f"{prefix}.fresh") if self.fresh else {})

    @classmethod
    def from_tensors(cls, tensors: Tensors, prefix: str) -> Self:
        return cls(
            log_softmax=tensors[f"{prefix}.log_softmax"],
            log_normalizer=tensors.get(f"{prefix}.log_normalizer"),
            mutual_information=tensors.get(f"{prefix}.mutual_information"),
            variance=tensors.get(f"{prefix}.variance"),
            fresh=cls.from_tensors(tensors, f"{prefix}.fresh") if f"{prefix}.fresh.log_softmax" in tensors else None,
        )


@dataclass(frozen=True, eq=False)
class CalibrationOutputs:
    """Every member's answers on the clean calibration images, from which the p-value table of any ensemble follows."""

    members: Mapping[str, MemberOutputs]
    labels: NDArray[np.int16]  # (n,), -1 where unknown

    def __len__(self) -> int:
        return len(self.labels)

    def to_bytes(self, members: Iterable[MemberManifest]) -> bytes:
        """Without normalizers, but of members whose logits are distances: softmax, and so a vote, does not see them."""
        tensors: Tensors = {"labels": self.labels}
        for member in members:
            outputs = self.members[member.name]
            tensors |= (outputs if member.centers else replace(outputs, log_normalizer=None)).tensors(member.name)
        return save(tensors)

    @classmethod
    def from_bytes(cls, file: str, data: bytes, members: Iterable[MemberManifest], classes: int, n: int) -> Self:
        members = tuple(members)
        layout: Layout = {"labels": ("int16", (n,))}
        for member in members:
            prefixes = [member.name, f"{member.name}.fresh"] if member.stochastic else [member.name]
            scores = ["mutual_information", "variance"] if member.stochastic else ["log_normalizer"] * member.centers
            for prefix in prefixes:
                layout[f"{prefix}.log_softmax"] = ("float16", (n, classes))
                layout |= {f"{prefix}.{score}": ("float32", (n,)) for score in scores}
        tensors = _load(file, data, layout, classes)
        outputs = {member.name: MemberOutputs.from_tensors(tensors, member.name) for member in members}
        return cls(outputs, tensors["labels"])


@dataclass(frozen=True, eq=False)
class Samples:
    """Images with the answers every member must give on them again before a bundle is served."""

    images: NDArray[np.uint8]  # (m, h, w, c)
    labels: NDArray[np.int16]  # (m,), -1 where unknown
    expected: Mapping[str, NDArray[np.float32]]  # (m, K): logits, or log mean probability over the fixed masks

    def __len__(self) -> int:
        return len(self.labels)

    def to_bytes(self) -> bytes:
        answers = {f"expected.{name}": logits for name, logits in self.expected.items()}
        return save({"images": self.images, "labels": self.labels, **answers})

    @classmethod
    def from_bytes(cls, file: str, data: bytes, members: Iterable[MemberManifest], image: InputSpec, classes: int, m: int) -> Self:
        names = [member.name for member in members]
        layout: Layout = {"images": ("uint8", (m, *image.shape)), "labels": ("int16", (m,))}
        layout |= {f"expected.{name}": ("float32", (m, classes)) for name in names}
        tensors = _load(file, data, layout, classes)
        return cls(tensors["images"], tensors["labels"], {name: tensors[f"expected.{name}"] for name in names})


def calibration_outputs(
    members: Mapping[str, MemberRun],
    batches: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int16] | None,
    masks_seed: int,
) -> CalibrationOutputs:
    """Run every member on batches of images (b, h, w, c), b <= CALIBRATION_BATCH, and keep what calibration needs.

    A stochastic member runs twice: with the fixed masks of `masks_seed`, and with masks drawn anew for every batch.
    """
    fixed = {name: _masks(member, masks_seed) for name, member in members.items()}
    parts: dict[str, list[MemberOutputs]] = {name: [] for name in members}
    n = 0
    for index, images in enumerate(batches):
        for name, member in members.items():
            logits = [member.logits(images, fixed[name])]
            if member.stochastic:
                logits.append(member.logits(images, _masks(member, fresh_seed(masks_seed, index))))
            if not all(np.isfinite(each).all() for each in logits):
                where = f"calibration images {n} to {n + len(images) - 1}"
                raise InvalidBundle(f"member {name}: expected finite logits, got others among {where}")
            outputs, *fresh = (reduce_outputs(each) for each in logits)
            parts[name].append(replace(outputs, fresh=fresh[0]) if fresh else outputs)
        n += len(images)
    if n == 0:
        raise InvalidBundle("expected calibration images, got none")
    labels = np.full(n, -1, np.int16) if labels is None else labels
    return CalibrationOutputs({name: _joined(part) for name, part in parts.items()}, labels)


def reduce_outputs(logits: NDArray[np.float32]) -> MemberOutputs:
    """Logits (n, K), or (T, n, K) of a stochastic member, as they are stored."""
    if logits.ndim == 3:
        log_mean, mutual_information, variance = reduce_masks(logits)
        return MemberOutputs(
            _half(log_mean),
            mutual_information=mutual_information.astype(np.float32),
            variance=variance.astype(np.float32),
        )
    highest = logits.max(axis=1)
    normalizer = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return MemberOutputs(_half(logits - normalizer[:, None]), normalizer.astype(np.float32))


def expected_outputs(
    members: Mapping[str, MemberRun], images: NDArray[np.uint8], masks_seed: int
) -> dict[str, NDArray[np.float32]]:
    """What `Samples.expected` holds for these images."""
    answers = {}
    for name, member in members.items():
        logits = member.logits(images, _masks(member, masks_seed))
        answers[name] = np.asarray(reduce_masks(logits)[0] if member.stochastic else logits, np.float32)
    return answers


def fresh_seed(masks_seed: int, batch: int) -> int:
    """A seed of its own for every batch, so that fresh calibration outputs do not repeat one draw."""
    return int(np.random.SeedSequence([masks_seed, batch]).generate_state(1, np.uint64)[0] >> 1)


def _masks(member: MemberRun, seed: int) -> NDArray[np.float32] | None:
    spec = member.stochastic
    return draw_masks(seed, spec.samples, spec.width, spec.keep) if spec else None


def _half(log_probabilities: NDArray[Any]) -> NDArray[np.float16]:
    half: NDArray[np.float16] = np.clip(log_probabilities, LOWEST, 0).astype(np.float16)  # NaN stays NaN
    return half


def _joined(parts: list[MemberOutputs]) -> MemberOutputs:
    tensors = [part.tensors("") for part in parts]
    return MemberOutputs.from_tensors({key: np.concatenate([part[key] for part in tensors]) for key in tensors[0]}, "")


def _load(file: str, data: bytes, layout: Layout, classes: int) -> Tensors:
    """The tensors of a safetensors file, refused unless they are those of the layout, finite, with labels in range."""
    try:
        tensors: Tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InvalidBundle(f"{file}: expected safetensors, got {error}") from error
    for name in sorted(tensors.keys() ^ layout.keys()):
        raise InvalidBundle(f"{file}: {'unexpected' if name in tensors else 'missing'} tensor {name}")
    for name, (dtype, shape) in layout.items():
        got = tensors[name]
        if got.dtype != dtype or got.shape != shape:
            raise InvalidBundle(f"{file}: {name}: expected {dtype} {shape}, got {got.dtype} {got.shape}")
        if got.dtype.kind == "f" and not np.isfinite(got).all():
            raise InvalidBundle(f"{file}: {name}: expected finite values, got others")
    labels = tensors["labels"]
    if labels.min() < -1 or labels.max() >= classes:
        raise InvalidBundle(f"{file}: labels: expected -1 to {classes - 1}, got {labels.min()} to {labels.max()}")
    return tensors
