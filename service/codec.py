"""Protobuf in, arrays through, protobuf out: no protobuf type goes further in than this, and no array further out.

It runs once per request in the thread that answers it, so it is written for few Python steps: one image of raw pixels
is a view of the message's bytes, and answers are filled in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from numpy.typing import NDArray

from models.manifest import InputSpec
from service.batcher import Result
from service.config import Disclosure, LimitsConfig
from service.errors import Failure, InvalidImage, InvalidRequest, NotDisclosed, failure_of
from service.images import PixelBudget, Pixels, decode_image, raw_image
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

Results = RepeatedCompositeFieldContainer[pb.ImageResult]


@dataclass(frozen=True, slots=True)
class Decoded:
    """The images of a request that could be read, and what was wrong with the others."""

    pixels: NDArray[np.uint8]  # (m, height, width, channels), the readable ones in their order
    resized: tuple[bool | None, ...]  # one per image of the request; None where it could not be read
    errors: dict[int, InvalidImage]  # by place in the request


def decode_one(image: pb.Image, spec: InputSpec, budget: PixelBudget, field: str) -> Pixels:
    """`field` is the image's own path in the request, with which an error's begins."""
    try:
        return _decoded(image, spec, budget)
    except InvalidImage as error:
        raise InvalidImage(str(error), f"{field}.{error.field}") from None


def _decoded(image: pb.Image, spec: InputSpec, budget: PixelBudget) -> Pixels:
    content = image.WhichOneof("content")
    if content == "raw":
        raw = image.raw
        return raw_image(raw.pixels, raw.height, raw.width, raw.channels, spec)
    if content == "encoded":
        return decode_image(image.encoded, spec, budget)
    raise InvalidImage("expected `encoded` bytes or `raw` pixels, got neither", "content")


def decode_images(
    images: Sequence[pb.Image],
    spec: InputSpec,
    limits: LimitsConfig,
    still_wanted: Callable[[], bool] = lambda: True,
) -> Decoded:
    """Every readable image of a request.  `still_wanted` is asked between them: decoding for nobody is a waste."""
    check_number(images, limits)
    budget = PixelBudget(limits.max_image_pixels, limits.max_request_pixels)
    arrays: list[NDArray[np.uint8]] = []
    resized: list[bool | None] = []
    errors: dict[int, InvalidImage] = {}
    for index, image in enumerate(images):
        if index and not still_wanted():
            raise CancelledError
        try:
            one = decode_one(image, spec, budget, f"images[{index}]")
        except InvalidImage as error:
            errors[index] = error
            resized.append(None)
        else:
            arrays.append(one.array)
            resized.append(one.resized)
    if len(arrays) == 1:
        return Decoded(arrays[0][np.newaxis], tuple(resized), errors)
    return Decoded(np.stack(arrays) if arrays else np.empty((0, *spec.shape), np.uint8), tuple(resized), errors)


def check_number(images: Sequence[pb.Image], limits: LimitsConfig) -> None:
    """Raise InvalidRequest where these are more images than a request may hold, or none."""
    if not 1 <= len(images) <= limits.max_images_per_request:
        raise InvalidRequest(f"expected 1 to {limits.max_images_per_request} images, got {len(images)}", "images")


def disclosure(asked: int, limit: Disclosure) -> Disclosure:
    """What the caller asks for, or all that may be told where it asks for nothing in particular."""
    if asked == pb.DISCLOSURE_UNSPECIFIED:
        return limit
    if asked not in Disclosure.__members__.values():
        raise InvalidRequest(f"expected a disclosure of 0 to {max(Disclosure)}, got {asked}", "disclosure")
    if asked > limit:
        raise NotDisclosed(f"expected at most {limit.name}, got {Disclosure(asked).name}: the server's limit", "disclosure")
    return Disclosure(asked)


@dataclass(frozen=True, slots=True)
class AnswerNames:
    """What the columns of a decision are called."""

    classes: tuple[str, ...]  # K
    voters: tuple[str, ...]  # M
    detectors: tuple[str, ...]  # D
    masks: bool = False  # whether a member is stochastic, so that the seed of its masks belongs to an answer


class Answers:
    """The rows (N) of a result, taken out of their arrays once, to be written into messages."""

    __slots__ = ("_columns", "_evidence", "_level", "_names")

    def __init__(self, result: Result, names: AnswerNames, level: Disclosure) -> None:
        decision = result.decision
        self._names, self._level = names, level
        self._columns: Any = (
            decision.label.tolist(),
            decision.verdict.tolist(),
            decision.reason.tolist(),
            decision.confidence.tolist(),
            decision.p_value.tolist(),
            decision.probabilities.tolist(),
        )
        self._evidence: Any = None
        if level >= Disclosure.EVIDENCE:
            votes = decision.votes  # (N, M, K)
            best = votes.argmax(axis=2)  # (N, M)
            self._evidence = (
                votes.tolist(),
                best.tolist(),
                decision.scores.tolist(),
                decision.p_values.tolist(),
                result.masks_seeds,
            )

    def write(self, row: int, answer: pb.Classification, resized: bool) -> None:
        label, verdict, reason, confidence, p_value, probabilities = self._columns
        names, level = self._names, self._level
        answer.class_index = label[row]
        answer.class_name = names.classes[label[row]]
        if resized:
            answer.resized = True
        if level < Disclosure.VERDICT:
            return
        answer.verdict = verdict[row] + 1  # as proto enums begin with UNSPECIFIED
        answer.reason = reason[row]
        if level < Disclosure.PROBABILITIES:
            return
        answer.confidence = confidence[row]
        answer.probabilities.extend(probabilities[row])
        if names.detectors:
            answer.p_value = p_value[row]
        if level >= Disclosure.EVIDENCE:
            self._write_evidence(row, answer)

    def _write_evidence(self, row: int, answer: pb.Classification) -> None:
        votes, best, scores, p_values, masks_seeds = self._evidence
        classes, votes_of, detections = self._names.classes, answer.votes, answer.detections
        for member, index, vote in zip(self._names.voters, best[row], votes[row], strict=True):
            votes_of.add(member=member, class_index=index, class_name=classes[index], confidence=vote[index], probabilities=vote)
        for detector, score, p in zip(self._names.detectors, scores[row], p_values[row], strict=True):
            detections.add(detector=detector, score=score, p_value=p)
        if masks_seeds[row] is not None:
            answer.masks_seed = masks_seeds[row]


def encode_results(results: Results, decoded: Decoded, answers: Answers | None) -> None:
    """One entry per image of the request, in its order: the next row of the answers, or what is wrong with it."""
    row = 0
    for index, resized in enumerate(decoded.resized):
        outcome = results.add()
        if resized is None:
            write_error(outcome, failure_of(decoded.errors[index]))
        else:
            assert answers is not None
            answers.write(row, outcome.classification, resized)
            row += 1


def write_error(outcome: pb.ImageResult, failure: Failure) -> None:
    outcome.error.code = failure.number
    outcome.error.message = failure.message
    outcome.error.field = failure.field
