"""The codec alone: requests to arrays, decisions to messages, and nothing above the disclosure that was asked for."""

from __future__ import annotations

from concurrent.futures import CancelledError
from io import BytesIO

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from PIL import Image

from models.ensemble import Decision, Reason, Verdict
from models.manifest import InputSpec
from service.batcher import Result
from service.codec import AnswerNames, Answers, Decoded, decode_images, disclosure, encode_results
from service.config import Disclosure, LimitsConfig
from service.errors import InvalidImage, InvalidRequest, NotDisclosed
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

SPEC = InputSpec(height=4, width=4, channels=3)
NAMES = AnswerNames(("forest", "river", "sea"), ("metric", "edge"), ("disagreement", "distance"))
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)

# 0.5, 0.25 and 0.125 have an exact float32, so that JSON shows them as they are
DECISION = Decision(
    probabilities=np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], np.float32),
    label=np.array([0, 2]),
    confidence=np.array([0.5, 0.75], np.float32),
    votes=np.array([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], [[0, 0, 1], [0, 0, 1]]], np.float32),
    scores=np.array([[0.5, -8], [0.125, -2]], np.float32),
    p_values=np.array([[0.25, 0.5], [1, 1]], np.float32),
    statistic=np.array([2, 0], np.float32),
    p_value=np.array([0.03125, 1], np.float32),
    verdict=np.array([Verdict.SUSPECT, Verdict.CLEAN]),
    reason=np.array([Reason.LOW_P_VALUE, Reason.NONE]),
    finite=np.array([True, True]),
)
RESULT = Result(DECISION, (11, 12), 0.0, 0.0, 2)

LABEL = {"class_index": 0, "class_name": "forest", "resized": False}
VERDICT = {"verdict": "VERDICT_SUSPECT", "reason": "REASON_LOW_P_VALUE"}
PROBABILITIES = {"confidence": 0.5, "probabilities": [0.5, 0.25, 0.25], "p_value": 0.03125}
EVIDENCE = {
    "votes": [
        {"member": "metric", "class_index": 0, "class_name": "forest"} | {"confidence": 0.5, "probabilities": [0.5, 0.25, 0.25]},
        {"member": "edge", "class_index": 1, "class_name": "river"} | {"confidence": 0.5, "probabilities": [0.25, 0.5, 0.25]},
    ],
    "detections": [
        {"detector": "disagreement", "score": 0.5, "p_value": 0.25},
        {"detector": "distance", "score": -8.0, "p_value": 0.5},
    ],
    "masks_seed": "11",
}
UNTOLD = {
    "verdict": "VERDICT_UNSPECIFIED",
    "reason": "REASON_UNSPECIFIED",
    "probabilities": [],
    "votes": [],
    "detections": [],
}


def raw(pixels: np.ndarray) -> pb.Image:
    height, width, channels = pixels.shape
    return pb.Image(raw=pb.RawImage(pixels=pixels.tobytes(), height=height, width=width, channels=channels))


def png(pixels: np.ndarray) -> pb.Image:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return pb.Image(encoded=buffer.getvalue())


@pytest.mark.parametrize(
    ("level", "told"),
    [
        (Disclosure.LABEL, LABEL),
        (Disclosure.VERDICT, LABEL | VERDICT),
        (Disclosure.PROBABILITIES, LABEL | VERDICT | PROBABILITIES),
        (Disclosure.EVIDENCE, LABEL | VERDICT | PROBABILITIES | EVIDENCE),
    ],
)
def test_an_answer_holds_its_level_and_nothing_above(level: Disclosure, told: dict[str, object]) -> None:
    answer = pb.Classification()
    Answers(RESULT, NAMES, level).write(0, answer, resized=False)
    written = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    assert written == UNTOLD | told


def test_without_detectors_there_is_no_p_value() -> None:
    answer = pb.Classification()
    Answers(RESULT, AnswerNames(NAMES.classes, NAMES.voters, ()), Disclosure.PROBABILITIES).write(0, answer, resized=False)
    assert answer.HasField("confidence")
    assert not answer.HasField("p_value")


def test_images_of_both_kinds_are_read_in_their_order() -> None:
    images = [raw(PIXELS[0]), png(PIXELS[1]), png(np.kron(PIXELS[2], np.ones((2, 2, 1), np.uint8))), raw(PIXELS[3])]
    decoded = decode_images(images, SPEC, LimitsConfig())
    np.testing.assert_array_equal(decoded.pixels[[0, 1, 3]], PIXELS[[0, 1, 3]])
    assert decoded.resized == (False, False, True, False)
    assert not decoded.errors


def test_one_raw_image_is_not_copied() -> None:
    decoded = decode_images([raw(PIXELS[0])], SPEC, LimitsConfig())
    assert decoded.pixels.shape == (1, 4, 4, 3)
    assert not decoded.pixels.flags.owndata


def test_bad_images_are_answered_in_place_and_their_mates_unharmed() -> None:
    images = [pb.Image(encoded=b"x"), raw(PIXELS[0]), pb.Image(), raw(PIXELS[1]), raw(PIXELS[2][..., :2])]
    decoded = decode_images(images, SPEC, LimitsConfig())
    np.testing.assert_array_equal(decoded.pixels, PIXELS[:2])
    assert {index: error.field for index, error in decoded.errors.items()} == {
        0: "images[0].encoded", 2: "images[2].content", 4: "images[4].raw.channels",
    }  # fmt: skip
    response = pb.ClassifyResponse()
    encode_results(response.results, decoded, Answers(RESULT, NAMES, Disclosure.LABEL))
    assert [result.WhichOneof("outcome") for result in response.results] == [
        "error", "classification", "error", "classification", "error",
    ]  # fmt: skip
    assert [response.results[index].classification.class_name for index in (1, 3)] == ["forest", "sea"]
    assert response.results[4].error.code == 3  # INVALID_ARGUMENT
    assert response.results[4].error.message == "expected 3 channels, got 2"
    assert response.results[4].error.field == "images[4].raw.channels"


def test_a_request_of_bad_images_alone_is_answered_too() -> None:
    response = pb.ClassifyResponse()
    decoded = Decoded(np.empty((0, 4, 4, 3), np.uint8), (None,), {0: InvalidImage("expected better", "encoded")})
    encode_results(response.results, decoded, None)
    assert response.results[0].error.message == "expected better"


@pytest.mark.parametrize(("count", "got"), [(0, 0), (4, 4)])
def test_the_number_of_images_is_limited(count: int, got: int) -> None:
    with pytest.raises(InvalidRequest, match=f"expected 1 to 3 images, got {got}") as raised:
        decode_images([raw(PIXELS[0])] * count, SPEC, LimitsConfig(max_images_per_request=3))
    assert raised.value.field == "images"


def test_decoding_stops_when_nobody_waits_any_more() -> None:
    asked: list[None] = []

    def still_wanted() -> bool:
        asked.append(None)
        return len(asked) < 2

    with pytest.raises(CancelledError):
        decode_images([raw(PIXELS[0])] * 5, SPEC, LimitsConfig(), still_wanted)
    assert len(asked) == 2


def test_what_is_asked_is_bounded_by_what_is_allowed() -> None:
    assert disclosure(pb.DISCLOSURE_UNSPECIFIED, Disclosure.VERDICT) is Disclosure.VERDICT
    assert disclosure(pb.DISCLOSURE_LABEL, Disclosure.VERDICT) is Disclosure.LABEL
    assert disclosure(pb.DISCLOSURE_VERDICT, Disclosure.VERDICT) is Disclosure.VERDICT
    with pytest.raises(NotDisclosed, match="expected at most VERDICT, got EVIDENCE"):
        disclosure(pb.DISCLOSURE_EVIDENCE, Disclosure.VERDICT)
    with pytest.raises(InvalidRequest, match="expected a disclosure of 0 to 4, got 9"):
        disclosure(9, Disclosure.EVIDENCE)


def test_the_proto_and_the_core_agree_on_numbers() -> None:
    assert {f"DISCLOSURE_{level.name}": level.value for level in Disclosure} | {"DISCLOSURE_UNSPECIFIED": 0} == dict(
        pb.Disclosure.items()
    )
    assert {f"VERDICT_{verdict.name}": verdict + 1 for verdict in Verdict} | {"VERDICT_UNSPECIFIED": 0} == dict(pb.Verdict.items())
    assert [reason.value for reason in Reason] == list(pb.Reason.values())
