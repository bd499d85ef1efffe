"""From a torch network to an ONNX file that answers alike."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from models.networks.bayesian import BayesianNetwork
from training.refused import TrainingRefused

PARITY = 1e-4
"""Largest difference of any logit, torch against ONNX Runtime, relative to the larger of 1 and the logit."""

PARITY_BATCHES = (1, 2, 7)


class ParityError(TrainingRefused):
    """An exported graph that does not answer as its network does."""


def export_onnx(network: nn.Module, example: NDArray[np.uint8]) -> bytes:
    """The network as a self-contained ONNX model: `image` uint8 (N, h, w, c) [and `masks` (T, d)] -> `logits`.

    `example` (n, h, w, c), n >= 2: one image would let the exporter take the batch for a constant.
    """
    arguments: dict[str, torch.Tensor] = {"image": torch.from_numpy(example[:2])}
    shapes: dict[str, dict[int, torch.export.Dim]] = {"image": {0: torch.export.Dim("N", min=1, max=65536)}}
    if isinstance(network, BayesianNetwork):
        arguments["masks"] = torch.ones(network.config.samples, network.mask_width)
        shapes["masks"] = {0: torch.export.Dim("T", min=1, max=65536)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it would miss torchvision, for whose operators there is no need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            network.eval(), tuple(arguments.values()), input_names=list(arguments), output_names=["logits"],
            dynamic_shapes=tuple(shapes.values()), dynamo=True, opset_version=20, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    _forget_the_exporter(model)
    return model.SerializeToString(deterministic=True)


def _forget_the_exporter(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes for its own debugging: stack traces with the paths of the machine that exported."""
    del model.metadata_props[:]
    model.graph.doc_string = model.doc_string = ""
    del model.graph.metadata_props[:]
    graph = model.graph
    elements: list[Any] = [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]
    for element in elements:
        element.doc_string = ""
        del element.metadata_props[:]


def check_parity(network: nn.Module, model: bytes, images: NDArray[np.uint8], masks: NDArray[np.float32] | None) -> float:
    """Largest difference of torch and ONNX Runtime at batches of 1, 2 and 7; raises ParityError beyond `PARITY`.

    A stochastic network must also disagree with itself over masks: ONNX Runtime drops dropout without a word.
    """
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    worst = 0.0
    for n in PARITY_BATCHES:
        batch = images[:n]
        if len(batch) < n:
            raise ParityError(f"parity needs {n} images, got {len(batch)}")
        feeds: dict[str, NDArray[np.generic]] = {"image": batch}
        with torch.inference_mode():
            if masks is None:
                expected = network(torch.from_numpy(batch)).numpy()
            else:
                feeds["masks"] = masks
                expected = network(torch.from_numpy(batch), torch.from_numpy(masks)).numpy()
        (got,) = session.run(["logits"], feeds)
        if got.shape != expected.shape:
            raise ParityError(f"batch {n}: the network answers {expected.shape}, its ONNX graph {got.shape}")
        worst = max(worst, float((np.abs(got - expected) / np.maximum(1, np.abs(expected))).max()))
        if masks is not None and not float(got.std(axis=0).max()) > PARITY:
            raise ParityError("the stochastic member's answers do not vary over masks in ONNX Runtime")
    if not worst <= PARITY:
        raise ParityError(f"torch and ONNX Runtime differ by {worst:.2e}, more than {PARITY:.0e}")
    return worst
