"""One ONNX graph for a whole ensemble: the members' graphs behind one image input, in front of the rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

import ndonnx as ndx
import onnx
import spox

from models.bundle import Bundle, MemberManifest
from models.ensemble import Decision, Ensemble, decide

CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}


def build_graph(bundle: Bundle, ensemble: Ensemble) -> bytes:
    """Image (N, h, w, c) uint8, and masks (T, d) float32 if a member is stochastic -> the fields of Decision, by name.

    Of members that neither vote nor feed a detector there is no trace.  Free of control flow, for CUDA graphs' sake.
    """
    manifest = bundle.manifest
    members = [manifest.member(name) for name in ensemble.members]
    inputs = {"image": ndx.argument(shape=("N", *manifest.input.shape), dtype=ndx.uint8)}
    for spec in (member.stochastic for member in members if member.stochastic):
        inputs["masks"] = ndx.argument(shape=(spec.samples, spec.width), dtype=ndx.float32)
    outputs = {m.name: _inlined(bundle.onnx_bytes[m.name], m, ensemble.classes, inputs) for m in members}
    decision = decide(ensemble, outputs)
    model = ndx.build(inputs, {column.name: getattr(decision, column.name) for column in fields(Decision)})
    assert not (found := CONTROL_FLOW.intersection(op_types(model))), f"control flow in the fused graph: {found}"
    return model.SerializeToString(deterministic=True)


def op_types(model: onnx.ModelProto) -> Iterator[str]:
    """The operator of every node, in whatever graph, function or body."""
    yield from _op_types(model.graph.node)
    for function in model.functions:
        yield from _op_types(function.node)


def _op_types(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield node.op_type
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _op_types(graph.node)


def _inlined(data: bytes, member: MemberManifest, classes: int, inputs: dict[str, ndx.Array]) -> ndx.Array:
    """A member's logits (N, K) or (T, N, K), with K and T stated: the rule needs to know them, an export may not."""
    model = onnx.load_model_from_string(data)
    dims = model.graph.output[0].type.tensor_type.shape.dim
    dims[-1].dim_value = classes
    if member.stochastic:
        dims[0].dim_value = member.stochastic.samples
    wanted = ["image", "masks"] if member.stochastic else ["image"]
    logits = spox.inline(model)(**{name: inputs[name].unwrap_spox() for name in wanted})["logits"]
    return ndx.asarray(logits)
