"""A caller with NVIDIA's own client, run by test_triton_client.py in an environment that has it and not Phalanx.

    python triton_caller.py ADDRESS MODEL < PIXELS

PIXELS is an array of images as `numpy.save` writes it; printed is what the client made of the server's answers, as JSON.
"""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def main(address: str, model: str) -> None:
    pixels = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    client = triton.InferenceServerClient(address)
    given = triton.InferInput("image", pixels.shape, "UINT8")
    given.set_data_from_numpy(pixels)
    result = client.infer(model, [given])
    chosen = client.infer(model, [given], outputs=[triton.InferRequestedOutput("verdict")], request_id="mine", client_timeout=10)
    wrong = triton.InferInput("pixels", pixels.shape, "UINT8")
    wrong.set_data_from_numpy(pixels)
    json.dump(
        {
            "live": client.is_server_live(),
            "ready": [client.is_server_ready(), client.is_model_ready(model), client.is_model_ready(model, "1")],
            "metadata": client.get_model_metadata(model, as_json=True),
            "config": client.get_model_config(model, as_json=True)["config"],
            "statistics": client.get_inference_statistics(model, as_json=True)["model_stats"],
            "outputs": {
                output.name: [output.datatype, result.as_numpy(output.name).tolist()] for output in result.get_response().outputs
            },
            "chosen": [chosen.get_response().id, chosen.as_numpy("verdict").tolist(), chosen.as_numpy("label")],
            "refused": refusal(lambda: client.infer(model, [wrong])),
            "unknown": refusal(lambda: client.infer("nobody", [given])),
        },
        sys.stdout,
    )


def refusal(call: object) -> list[str]:
    """[code, sentence] of the error that a call ends with."""
    try:
        call()  # type: ignore[operator]
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return []


if __name__ == "__main__":
    main(*sys.argv[1:])
