"""What a bundle's manifest.json says: the members, what was fitted for each subset of them, hashes and provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import combinations
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from models.ensemble import DetectorName, RuleName

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
MEMBER_NAME = r"^[a-z][a-z0-9_-]{0,63}$"
WEIGHT_SUM_TOLERANCE = 1e-6


class InvalidBundle(ValueError):
    """A bundle that must not be used: the sentence names the file, what was expected and what came."""


def _printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("expected one line of printable characters")
    return text


def _plain_file_name(name: str) -> str:
    """A bundle is flat: a name without separators cannot leave the folder, whatever the system's rules on paths are."""
    separators = any(mark in name for mark in '/\\:*?"<>|')
    if separators or not name.isprintable() or name in ("", ".", "..", MANIFEST_FILE):
        raise ValueError(f"expected the plain name of a file inside the bundle's folder, got {name!r}")
    return name


Line = Annotated[str, AfterValidator(_printable)]
FileName = Annotated[str, AfterValidator(_plain_file_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MemberName = Annotated[str, Field(pattern=MEMBER_NAME)]
Strength = Literal["accurate", "robust"]
Role = Literal["classifier", "detector"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InputSpec(_Frozen):
    """Images are uint8 (n, height, width, channels)."""

    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    channels: Literal[1, 3]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.height, self.width, self.channels)


class NetworkSpec(_Frozen):
    """Which network of models/networks the weights belong to, and its settings."""

    kind: Line
    config: dict[str, JsonValue] = {}


class StochasticSpec(_Frozen):
    """Masks (samples, width), each entry 0 or 1/keep."""

    samples: int = Field(ge=2, le=4096)
    width: int = Field(ge=1)
    keep: float = Field(gt=0, le=1)


class FileHash(_Frozen):
    file: FileName
    sha256: Sha256


class CalibrationFile(FileHash):
    """`source` says whose clean images these were, `fingerprint` is a hash over them."""

    n: int = Field(ge=1)
    source: Line
    fingerprint: Line


class SamplesFile(FileHash):
    n: int = Field(ge=1)


class MasksSpec(_Frozen):
    """The seed of the masks of `masks: fixed`."""

    seed: int = Field(ge=0, lt=2**63)


class MemberManifest(_Frozen):
    name: MemberName
    network: NetworkSpec
    strength: Strength
    roles: tuple[Role, ...] = Field(min_length=1)
    onnx: FileHash  # its metadata entry phalanx.weights_sha256 equals weights.sha256
    weights: FileHash
    temperature: float = Field(gt=0)
    stochastic: StochasticSpec | None = None
    centers: bool = False  # logits are negative squared distances to class centers, times a constant
    parameters: int = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.centers and self.stochastic:  # the average over masks of such logits is kept as probabilities, not distances
            raise ValueError("expected centers or masks, got both")
        return self


class SubsetRow(_Frozen):
    """What was fitted, under attack, for one subset of the classifiers."""

    classifiers: tuple[MemberName, ...] = Field(min_length=1)  # sorted
    rule: RuleName  # the best one for this subset
    weights: dict[MemberName, Annotated[float, Field(ge=0, le=1)]]  # sums to 1
    alpha: float = Field(ge=0.5, le=1)
    scale: float = Field(gt=0)
    clean: float = Field(ge=0, le=1)  # accuracy on held-out data
    robust: float = Field(ge=0, le=1)  # the same under the fit's quick attack, a mixture's accurate voters at their worst
    n: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.classifiers) != sorted(set(self.classifiers)):
            raise ValueError(f"expected classifiers sorted and each once, got {', '.join(self.classifiers)}")
        if set(self.weights) != set(self.classifiers):
            raise ValueError(f"expected weights of {', '.join(self.classifiers)}, got {', '.join(self.weights)}")
        if abs((total := sum(self.weights.values())) - 1) > WEIGHT_SUM_TOLERANCE:
            raise ValueError(f"expected weights that sum to 1, got a sum of {total:g}")
        return self


class Provenance(_Frozen):
    """Enough to build the bundle again."""

    recipe: dict[str, JsonValue]
    seed: int
    data_name: Line
    data_fingerprint: Line
    epsilon: float = Field(ge=0)  # what the members were hardened against, l-infinity, in pixel units 0..255
    commit: str
    created: Line  # ISO 8601
    libraries: dict[str, str]


class Manifest(_Frozen):
    schema_version: Literal[1] = 1
    name: Line
    version: str = ""  # content_version of all the rest
    input: InputSpec
    classes: tuple[Line, ...] = Field(min_length=2, max_length=32767)
    members: tuple[MemberManifest, ...] = Field(min_length=1)
    subsets: tuple[SubsetRow, ...]
    deciding: Annotated[tuple[DetectorName, ...], Field(min_length=1)] | None = (
        None  # detectors that the verdict hangs on; None: all
    )
    masks: MasksSpec
    calibration: CalibrationFile
    samples: SamplesFile
    documents: tuple[FileHash, ...] = ()  # licences, a robustness card (models/card.py): hashed and copied
    provenance: Provenance
    licenses: dict[str, str] = {}

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Members that may vote, sorted."""
        return tuple(sorted(member.name for member in self.members if "classifier" in member.roles))

    @property
    def files(self) -> tuple[FileHash, ...]:
        """Every file of the bundle but the manifest itself."""
        members = [file for member in self.members for file in (member.onnx, member.weights)]
        return (*members, self.calibration, self.samples, *self.documents)

    @property
    def subject(self) -> str:
        """Twelve hexadecimal digits over what decides answers: members, weights, rules, tables. Documents may come later."""
        decisive = {"input", "classes", "members", "subsets", "deciding", "masks", "calibration"}
        return _digest(self.model_dump(mode="json", include=decisive, exclude_defaults=True))

    def member(self, name: str) -> MemberManifest:
        return next(member for member in self.members if member.name == name)

    def masks_of(self, members: Iterable[str]) -> StochasticSpec | None:
        """The masks that these members take, None where none is stochastic; those that are share them."""
        return next((spec for name in members if (spec := self.member(name).stochastic)), None)

    def subset(self, classifiers: Iterable[str]) -> SubsetRow:
        """The row fitted for exactly these classifiers."""
        wanted = tuple(sorted(classifiers))
        return next(row for row in self.subsets if row.classifiers == wanted)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_twice("classes", self.classes)
        _refuse_twice("members", [member.name for member in self.members])
        # as folded by file systems that ignore case
        _refuse_twice("files", [file.file.casefold() for file in self.files])
        masks = [member.stochastic for member in self.members if member.stochastic]
        if any(spec != masks[0] for spec in masks):
            raise ValueError("expected stochastic members to share their masks, got more than one kind of mask")
        if not self.classifiers:
            raise ValueError("expected at least one member with the role classifier, got none")
        sizes = range(1, len(self.classifiers) + 1)
        expected = {subset for size in sizes for subset in combinations(self.classifiers, size)}
        got = [row.classifiers for row in self.subsets]
        _refuse_twice("subsets", ["+".join(row) for row in got])
        if missing := sorted(expected - set(got)):
            raise ValueError(f"expected subsets: all {len(expected)} of the classifiers, got none for {'+'.join(missing[0])}")
        if unknown := sorted(set(got) - expected):
            raise ValueError(f"expected subsets: of {', '.join(self.classifiers)}, got {'+'.join(unknown[0])}")
        return self


def _refuse_twice(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what}: expected each once, got {name} twice")
        seen.add(name)


def content_version(document: dict[str, Any]) -> str:
    """Twelve hexadecimal digits over all that the manifest says but its version, its documents and the time it was made.

    Documents change nothing that a bundle answers: one that is given its robustness card stays the version it was.

    Taken over the JSON as written, so that a later field with a default leaves the versions of older bundles alone.
    """
    provenance = {key: value for key, value in document["provenance"].items() if key != "created"}
    content = {**{key: value for key, value in document.items() if key != "version"}, "provenance": provenance, "documents": []}
    return _digest(content)


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON, its version filled in."""
    document = manifest.model_dump(mode="json")
    document["version"] = content_version(document)
    return json.dumps(document, indent=2, allow_nan=False).encode() + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Refuses a schema of another version before anything else: its fields mean what we cannot know."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidBundle(f"{MANIFEST_FILE}: expected JSON, got {error}") from error
    if not isinstance(document, dict):
        raise InvalidBundle(f"{MANIFEST_FILE}: expected a JSON object, got {type(document).__name__}")
    version = document.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InvalidBundle(f"{MANIFEST_FILE}: expected schema_version {SCHEMA_VERSION}, got {version!r}")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        raise InvalidBundle(f"{MANIFEST_FILE}: {validation_sentence(error)}") from error
    if (expected := content_version(document)) != manifest.version:
        raise InvalidBundle(f"{MANIFEST_FILE}: expected version {expected} from its content, got {manifest.version!r}")
    return manifest


def validation_sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    said = first["type"] == "value_error" or isinstance(first["input"], dict | list | tuple | BaseModel)
    shown = "" if said else f", got {first['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place + ': ' if place else ''}{message}{shown}{more}"
