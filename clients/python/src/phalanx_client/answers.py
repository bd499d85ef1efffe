"""What the server answers, as frozen types with the names of the proto; what was not disclosed is None or empty."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from phalanx_client.pb.phalanx.v1 import defense_ensemble_pb2 as pb


class Disclosure(IntEnum):
    """How much of an answer leaves the server; each level holds the ones before it."""

    UNSPECIFIED = 0  # as much as the server allows
    LABEL = 1
    VERDICT = 2
    PROBABILITIES = 3
    EVIDENCE = 4


class Verdict(IntEnum):
    UNSPECIFIED = 0  # not disclosed
    CLEAN = 1
    SUSPECT = 2
    REJECTED = 3
    UNSCREENED = 4  # the ensemble has no detector


class Reason(IntEnum):
    UNSPECIFIED = 0
    LOW_P_VALUE = 1
    NON_FINITE = 2


class Masks(IntEnum):
    UNSPECIFIED = 0  # no stochastic member
    FIXED = 1
    FRESH = 2


@dataclass(frozen=True, slots=True)
class Vote:
    """What one member would have answered alone."""

    member: str
    class_index: int
    class_name: str
    confidence: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Detection:
    """How unusual one detector finds the image; p_value is the share of clean images that score as high."""

    detector: str
    score: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Classification:
    class_index: int
    class_name: str
    resized: bool
    verdict: Verdict
    reason: Reason
    confidence: float | None
    probabilities: tuple[float, ...]
    p_value: float | None
    votes: tuple[Vote, ...]
    detections: tuple[Detection, ...]
    masks_seed: int | None

    @property
    def trusted(self) -> bool:
        """Whether the verdict is CLEAN. False also where no verdict was asked for, or none could be given."""
        return self.verdict is Verdict.CLEAN


@dataclass(frozen=True, slots=True)
class ImageError:
    """Why one image of a request could not be classified; `code` is gRPC's."""

    code: int
    message: str
    field: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Results in the order of the images."""

    ensemble: str
    bundle_version: str
    disclosure: Disclosure
    results: tuple[Classification | ImageError, ...]


@dataclass(frozen=True, slots=True)
class StreamAnswer:
    """`id` is the caller's."""

    id: str
    ensemble: str
    bundle_version: str
    disclosure: Disclosure
    result: Classification | ImageError


@dataclass(frozen=True, slots=True)
class InputSpec:
    height: int
    width: int
    channels: int


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    kind: str
    strength: str
    votes: bool
    weight: float
    temperature: float
    parameters: int
    stochastic: bool


@dataclass(frozen=True, slots=True)
class Detector:
    name: str
    member: str  # empty where it reads all of them
    decides: bool  # whether the verdict hangs on it


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    alpha: float
    scale: float


@dataclass(frozen=True, slots=True)
class Rates:
    review: float
    reject: float
    calibration_images: int


@dataclass(frozen=True, slots=True)
class Bundle:
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Limits:
    disclosure: Disclosure
    max_images_per_request: int
    max_message_bytes: int
    max_image_pixels: int
    max_request_pixels: int


@dataclass(frozen=True, slots=True)
class Share:
    """A share of images, 0 to 1, with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Robustness:
    """What was measured under attack on an ensemble of these voters, rule and detectors; its shares are upper bounds."""

    epsilon: float  # how far any pixel's value was moved at most, of 255
    images: int
    clean: Share
    robust: Share
    robust_with_rejection: Share
    suite: str
    publishable: bool
    conjecture: str  # empty where that was asked of another ensemble
    failed_checks: tuple[str, ...]  # where there is one, the figures prove nothing


@dataclass(frozen=True, slots=True)
class Ensemble:
    name: str
    is_default: bool
    classes: tuple[str, ...]
    input: InputSpec
    members: tuple[Member, ...]
    detectors: tuple[Detector, ...]
    rule: Rule
    rates: Rates
    bundle: Bundle
    masks: Masks
    provider: str
    limits: Limits
    robustness: Robustness | None  # None where nothing was measured on this very ensemble


def result(message: pb.ImageResult) -> Classification | ImageError:
    if message.WhichOneof("outcome") == "error":
        return ImageError(message.error.code, message.error.message, message.error.field)
    c = message.classification
    return Classification(
        class_index=c.class_index,
        class_name=c.class_name,
        resized=c.resized,
        verdict=Verdict(c.verdict),
        reason=Reason(c.reason),
        confidence=c.confidence if c.HasField("confidence") else None,
        probabilities=tuple(c.probabilities),
        p_value=c.p_value if c.HasField("p_value") else None,
        votes=tuple(Vote(v.member, v.class_index, v.class_name, v.confidence, tuple(v.probabilities)) for v in c.votes),
        detections=tuple(Detection(d.detector, d.score, d.p_value) for d in c.detections),
        masks_seed=c.masks_seed if c.HasField("masks_seed") else None,
    )


def answer(message: pb.ClassifyResponse) -> Answer:
    results = tuple(result(item) for item in message.results)
    return Answer(message.ensemble, message.bundle_version, Disclosure(message.disclosure), results)


def stream_answer(message: pb.ClassifyStreamResponse) -> StreamAnswer:
    disclosure = Disclosure(message.disclosure)
    return StreamAnswer(message.id, message.ensemble, message.bundle_version, disclosure, result(message.result))


def ensemble(message: pb.Ensemble) -> Ensemble:
    m, limits = message, message.limits
    return Ensemble(
        name=m.name,
        is_default=m.is_default,
        classes=tuple(m.classes),
        input=InputSpec(m.input.height, m.input.width, m.input.channels),
        members=tuple(
            Member(x.name, x.kind, x.strength, x.votes, x.weight, x.temperature, x.parameters, x.stochastic) for x in m.members
        ),
        detectors=tuple(Detector(d.name, d.member, d.decides) for d in m.detectors),
        rule=Rule(m.rule.name, m.rule.alpha, m.rule.scale),
        rates=Rates(m.rates.review, m.rates.reject, m.rates.calibration_images),
        bundle=Bundle(m.bundle.name, m.bundle.version),
        masks=Masks(m.masks),
        provider=m.provider,
        limits=Limits(
            Disclosure(limits.disclosure),
            limits.max_images_per_request,
            limits.max_message_bytes,
            limits.max_image_pixels,
            limits.max_request_pixels,
        ),
        robustness=robustness(m.robustness) if m.HasField("robustness") else None,
    )


def robustness(message: pb.Robustness) -> Robustness:
    m = message
    return Robustness(
        epsilon=m.epsilon,
        images=m.images,
        clean=share(m.clean),
        robust=share(m.robust),
        robust_with_rejection=share(m.robust_with_rejection),
        suite=m.suite,
        publishable=m.publishable,
        conjecture=m.conjecture,
        failed_checks=tuple(m.failed_checks),
    )


def share(message: pb.Share) -> Share:
    return Share(message.value, message.low, message.high)
