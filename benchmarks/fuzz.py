"""Malformed messages and images: a server must answer every one with a sentence of its own, and leak nothing.

    python -m benchmarks.fuzz

A message is a valid one of some method, broken: bits flipped, cut, spliced, lengthened, or its images broken the same way.
Counted is what came back; a crash, a status UNKNOWN or INTERNAL, or memory and descriptors that do not come back, is a failure.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from benchmarks.processes import Process, await_serving, command_line, image_shape, phalanx, provenance, read_config
from service.pb.inference import open_inference_pb2 as inference
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

NATIVE, OPEN = "/phalanx.v1.DefenseEnsemble/", "/inference.GRPCInferenceService/"
FORBIDDEN = {"UNKNOWN", "INTERNAL", "UNAVAILABLE"}
IMAGE = "image: "  # before the status of an image, or of an answer in a stream
MOST_GROWTH = 1.05  # of resident memory over the second half of the messages

Message = tuple[str, bytes]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--messages", type=int, default=40_000, help="broken messages to a server (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, phalanx(read_config(given.config), Path(folder)) as server:
        await_serving(server)
        with server.channel() as channel:
            print(f"{given.messages} broken messages, seed {given.seed}; {provenance()}")
            status = report(server, channel, valid_messages(image_shape(server)), given.messages, given.seed)
    sys.exit(status)


def report(server: Process, channel: grpc.Channel, valid: Sequence[Message], messages: int, seed: int) -> int:
    """Send them, print what came back; 1 if anything must not be."""
    codes: Counter[str] = Counter()
    codes += fuzz(channel, valid, messages // 2, seed)
    memory, files = server.resident_megabytes, server.open_files
    codes += fuzz(channel, valid, messages - messages // 2, seed + 1)
    for code, count in codes.most_common():
        print(f"{code:>20} {count}")
    growth = server.resident_megabytes / memory
    more = server.open_files - files
    print(f"resident memory {memory:.0f} MB after the first half, times {growth:.3f} after the second; {more} more files open")
    bad = failed(codes, growth, more)
    print("FAILED" if bad else "no crash, no leak, no status UNKNOWN or INTERNAL")
    return int(bad)


def failed(codes: Counter[str], growth: float = 1.0, more_files: int = 0) -> bool:
    """Whether anything came back that must not, for a call or for an image in its answer, or did not come back."""
    return any(code.removeprefix(IMAGE) in FORBIDDEN for code in codes) or growth > MOST_GROWTH or more_files > 0


def fuzz(channel: grpc.Channel, valid: Sequence[Message], messages: int, seed: int) -> Counter[str]:
    """What came back of so many broken messages: the status of each call, and of each image or answer in it."""
    codes: Counter[str] = Counter()
    for index in range(messages):
        draw = random.Random(f"{seed}/{index}")
        method, data = draw.choice(valid)
        codes.update(answers(channel, method, broken(draw, data)))
    return codes


def answers(channel: grpc.Channel, method: str, data: bytes) -> list[str]:
    """The statuses in one call's answer."""
    try:
        if method.endswith("Stream"):
            stream: Any = channel.stream_stream(method)
            results = [pb.ClassifyStreamResponse.FromString(response).result for response in stream(iter([data]), timeout=30)]
        else:
            call: Any = channel.unary_unary(method)
            response = call(data, timeout=30)
            results = list(pb.ClassifyResponse.FromString(response).results) if method.endswith("Classify") else []
    except grpc.RpcError as error:
        ended: object = error
        assert isinstance(ended, grpc.Call)
        return [ended.code().name]
    numbers = {code.value[0]: code.name for code in grpc.StatusCode}
    return ["OK", *(f"{IMAGE}{numbers[result.error.code]}" for result in results if result.HasField("error"))]


def broken(draw: random.Random, data: bytes) -> bytes:
    """A few changes of a few kinds."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(6):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = draw.randbytes(draw.randrange(1, 40))
            case 3:
                del changed[at : at + draw.randrange(1, 40)]
            case 4:
                other = draw.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + draw.randrange(1, 200)]
            case _:
                length = draw.randrange(1, 8)
                changed[at : at + length] = draw.choice((b"\xff", b"\0", b"\x80", b"\x7f")) * length
    return bytes(changed)


def valid_messages(shape: tuple[int, int, int]) -> list[Message]:
    """Of every method that takes something to be got wrong, images of every kind in them."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    raw = pb.Image(raw=pb.RawImage(pixels=pixels.tobytes(), height=shape[0], width=shape[1], channels=shape[2]))
    images = [raw, *(pb.Image(encoded=file) for file in image_files(pixels))]
    tensor = inference.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1, *shape])
    infer = inference.ModelInferRequest(model_name="full", inputs=[tensor], raw_input_contents=[pixels.tobytes()])
    listed = inference.ModelInferRequest(model_name="full", inputs=[tensor])
    listed.inputs[0].contents.uint_contents.extend(pixels.ravel())
    listed.outputs.add(name="label")
    return [
        *((NATIVE + "Classify", pb.ClassifyRequest(images=[image]).SerializeToString()) for image in images),
        (NATIVE + "Classify", pb.ClassifyRequest(ensemble="full", images=images).SerializeToString()),
        *((NATIVE + "ClassifyStream", pb.ClassifyStreamRequest(id="a", image=image).SerializeToString()) for image in images),
        (NATIVE + "GetEnsemble", pb.GetEnsembleRequest(ensemble="full").SerializeToString()),
        *((OPEN + "ModelInfer", each.SerializeToString()) for each in (infer, listed)),
        (OPEN + "ModelMetadata", inference.ModelMetadataRequest(name="full").SerializeToString()),
    ]


def image_files(pixels: np.ndarray) -> list[bytes]:
    """The same picture in every format that is taken, and in its stranger kinds."""
    picture = Image.fromarray(pixels.squeeze())
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, "PNG", {}),
        (picture.convert("P"), "PNG", {}),
        (picture.convert("LA"), "PNG", {}),
        (picture, "JPEG", {"progressive": True}),
        (picture.convert("L"), "JPEG", {}),
        (picture, "WEBP", {"lossless": True}),
        (picture, "WEBP", {}),
    ]
    files = []
    for image, kind, options in kinds:
        buffer = BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


if __name__ == "__main__":
    main()
