"""The Open Inference Protocol's tensors: the one input, and the columns of a decision as named outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.manifest import InputSpec
from service.batcher import Result
from service.codec import AnswerNames
from service.config import Disclosure, LimitsConfig
from service.errors import InvalidRequest, NotDisclosed
from service.pb.inference import open_inference_pb2 as pb

INPUT = "image"
DATATYPE = "UINT8"
MASKS_SEED = "masks_seed"
DTYPES: dict[str, Any] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}  # raw contents are little-endian
TYPES = {"FP32": pb.TYPE_FP32, "INT64": pb.TYPE_INT64}


@dataclass(frozen=True, slots=True)
class Output:
    """A column of the decision, whose field it is named after, or the seed of the masks."""

    name: str
    datatype: str
    shape: tuple[int, ...]  # of one image
    level: Disclosure


def possible_outputs(names: AnswerNames) -> tuple[Output, ...]:
    """All outputs of an ensemble, whatever may be told; verdict 0 is CLEAN, 1 SUSPECT, 2 REJECTED, 3 UNSCREENED."""
    classes, voters, detectors = len(names.classes), len(names.voters), len(names.detectors)
    screened = (
        Output("p_value", "FP32", (), Disclosure.PROBABILITIES),
        Output("statistic", "FP32", (), Disclosure.PROBABILITIES),
        Output("scores", "FP32", (detectors,), Disclosure.EVIDENCE),
        Output("p_values", "FP32", (detectors,), Disclosure.EVIDENCE),
    )
    return (
        Output("label", "INT64", (), Disclosure.LABEL),
        Output("verdict", "INT64", (), Disclosure.VERDICT),
        Output("reason", "INT64", (), Disclosure.VERDICT),
        Output("confidence", "FP32", (), Disclosure.PROBABILITIES),
        Output("probabilities", "FP32", (classes,), Disclosure.PROBABILITIES),
        Output("votes", "FP32", (voters, classes), Disclosure.EVIDENCE),
        *(screened if detectors else ()),
        *([Output(MASKS_SEED, "INT64", (), Disclosure.EVIDENCE)] if names.masks else ()),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Outputs in the order of a request, and what an answer about one image says of them."""

    outputs: tuple[Output, ...]
    of_one_image: pb.ModelInferResponse

    @classmethod
    def of(cls, outputs: Iterable[Output]) -> Chosen:
        chosen = tuple(outputs)
        return cls(chosen, pb.ModelInferResponse(outputs=[_described(output, 1) for output in chosen]))

    def write(self, response: pb.ModelInferResponse, result: Result) -> None:
        n = len(result.decision.label)
        if n == 1:
            response.MergeFrom(self.of_one_image)
        else:
            response.outputs.extend(_described(output, n) for output in self.outputs)
        for output in self.outputs:
            values = result.masks_seeds if output.name == MASKS_SEED else getattr(result.decision, output.name)
            response.raw_output_contents.append(np.asarray(values, DTYPES[output.datatype]).tobytes())


class Outputs:
    """What an ensemble may tell at one level of disclosure."""

    REMEMBERED = 64  # orders that callers ask in

    def __init__(self, names: AnswerNames, limit: Disclosure) -> None:
        self._possible = {output.name for output in possible_outputs(names)}
        self._limit = limit
        self.all = tuple(output for output in possible_outputs(names) if output.level <= limit)
        self._by_name = {output.name: output for output in self.all}
        # by what was asked for: every call of a caller asks the same
        self._known: dict[tuple[str, ...], Chosen] = {(): Chosen.of(self.all)}

    def requested(self, requested: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor]) -> Chosen:
        """The outputs asked for, in the order of the request; all that may be told where none is."""
        for index, output in enumerate(requested):
            if output.parameters:
                _refuse_shared_memory(output, f"outputs[{index}]")
        asked = tuple([output.name for output in requested])
        known = self._known.get(asked)
        if known is None:
            known = Chosen.of(self._checked(asked))
            if len(self._known) < self.REMEMBERED:
                self._known[asked] = known
        return known

    def _checked(self, asked: Sequence[str]) -> Iterator[Output]:
        for index, name in enumerate(asked):
            if name in asked[:index] or name not in self._by_name:
                raise self._wrong(name, f"outputs[{index}].name")
            yield self._by_name[name]

    def _wrong(self, name: str, field: str) -> InvalidRequest | NotDisclosed:
        if name in self._by_name:
            return InvalidRequest(f"expected each output once, got {name!r} twice", field)
        sentence = f"expected outputs among {', '.join(self._by_name)}, got {name[:80]!r}"
        if name in self._possible:
            return NotDisclosed(f"{sentence}, which is more than this server tells (limit: {self._limit.name.lower()})", field)
        return InvalidRequest(sentence, field)


def _described(output: Output, n: int) -> pb.ModelInferResponse.InferOutputTensor:
    return pb.ModelInferResponse.InferOutputTensor(name=output.name, datatype=output.datatype, shape=(n, *output.shape))


def read_input(request: pb.ModelInferRequest, spec: InputSpec, limits: LimitsConfig) -> NDArray[np.uint8]:
    """The images (n, height, width, channels); a view of the message's bytes where they came raw."""
    expected = f"expected one input, `{INPUT}` {DATATYPE} [-1, {', '.join(map(str, spec.shape))}]"
    if len(request.inputs) != 1:
        raise InvalidRequest(f"{expected}, got {len(request.inputs)} inputs", "inputs")
    tensor = request.inputs[0]
    _refuse_shared_memory(tensor, "inputs[0]")
    if tensor.name != INPUT:
        raise InvalidRequest(f"{expected}, got one called {tensor.name[:80]!r}", "inputs[0].name")
    if tensor.datatype != DATATYPE:
        raise InvalidRequest(f"{expected}, got datatype {tensor.datatype[:80]!r}", "inputs[0].datatype")
    shape = tuple(tensor.shape)
    if len(shape) != 4 or shape[1:] != spec.shape:
        raise InvalidRequest(f"{expected}, got shape {list(shape[:8])}", "inputs[0].shape")
    if not 1 <= shape[0] <= limits.max_images_per_request:
        raise InvalidRequest(f"expected 1 to {limits.max_images_per_request} images, got {shape[0]}", "inputs[0].shape")
    pixels = _raw(request, math.prod(shape)) if request.raw_input_contents else _listed(tensor, math.prod(shape))
    return pixels.reshape(shape)


def _raw(request: pb.ModelInferRequest, size: int) -> NDArray[np.uint8]:
    if len(request.raw_input_contents) != 1 or request.inputs[0].HasField("contents"):
        got = f"{len(request.raw_input_contents)} raw and {int(request.inputs[0].HasField('contents'))} listed"
        raise InvalidRequest(f"expected the contents of one input, raw or listed, got {got}", "raw_input_contents")
    content = request.raw_input_contents[0]
    if len(content) != size:
        raise InvalidRequest(
            f"expected {size} bytes for shape {list(request.inputs[0].shape)}, got {len(content)}", "raw_input_contents"
        )
    return np.frombuffer(content, np.uint8)


def _listed(tensor: pb.ModelInferRequest.InferInputTensor, size: int) -> NDArray[np.uint8]:
    field = "inputs[0].contents.uint_contents"
    values = np.array(tensor.contents.uint_contents, np.uint32)
    if len(values) != size:
        raise InvalidRequest(f"expected {size} values for shape {list(tensor.shape)}, got {len(values)}", field)
    if values.max() > 255:
        raise InvalidRequest(f"expected values of 0 to 255, got {values.max()}", field)
    return values.astype(np.uint8)


def _refuse_shared_memory(
    tensor: pb.ModelInferRequest.InferInputTensor | pb.ModelInferRequest.InferRequestedOutputTensor, field: str
) -> None:
    if "shared_memory_region" in tensor.parameters:
        raise InvalidRequest("expected contents in the message: this server offers no shared memory", f"{field}.parameters")
