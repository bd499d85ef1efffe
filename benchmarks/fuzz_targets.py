"""What makes images, and the outputs that are asked for, of a caller's bytes: without a server, for `fuzz_codec`."""

from __future__ import annotations

import contextlib

from google.protobuf.message import DecodeError

from models.manifest import InputSpec
from service.codec import AnswerNames, decode_images
from service.config import Disclosure, LimitsConfig
from service.errors import CODES
from service.pb.inference import open_inference_pb2 as inference
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.tensors import Outputs, read_input

SPEC = InputSpec(height=64, width=64, channels=3)
LIMITS = LimitsConfig(max_image_pixels=10**6, max_request_pixels=10**6)
OUTPUTS = Outputs(AnswerNames(("a", "b"), ("voter",), ("margin",), masks=True), Disclosure.PROBABILITIES)
FORESEEN: tuple[type[BaseException], ...] = (DecodeError, *CODES)


def read(data: bytes) -> None:
    """As a message of either API; raises what is not foreseen."""
    for target in (read_classify, read_infer):
        with contextlib.suppress(*FORESEEN):
            target(data)


def read_classify(data: bytes) -> None:
    decode_images(pb.ClassifyRequest.FromString(data).images, SPEC, LIMITS)


def read_infer(data: bytes) -> None:
    request = inference.ModelInferRequest.FromString(data)
    try:
        OUTPUTS.requested(request.outputs)
    finally:  # whichever comes first, both are read
        read_input(request, SPEC, LIMITS)
