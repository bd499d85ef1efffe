"""What a member's ONNX file must be: self-contained, no control flow, linked to its weights, with every member's inputs and output.

Read through the few fields of onnx.proto that matter here: importing `onnx` would cost every starting server some
0.15 s and 12 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from models.manifest import InputSpec, InvalidBundle, MemberManifest

WEIGHTS_KEY = "phalanx.weights_sha256"  # the entry of metadata_props that names the weights a graph was exported from
FLOAT, UINT8 = 1, 2  # TensorProto.DataType

# message -> field -> number and type, of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; a star means repeated
SCHEMA = {
    "Model": {
        "graph": "7 Graph",
        "metadata_props": "14 Entry*",
        "training_info": "20 Training*",
        "functions": "25 Function*",
    },
    "Entry": {"key": "1 string", "value": "2 string"},
    "Training": {"initialization": "1 Graph", "algorithm": "2 Graph"},
    "Function": {"node": "7 Node*"},
    "Graph": {
        "node": "1 Node*",
        "initializer": "5 Tensor*",
        "input": "11 ValueInfo*",
        "output": "12 ValueInfo*",
        "sparse_initializer": "15 Sparse*",
    },
    "Node": {"op_type": "4 string", "attribute": "5 Attribute*"},
    "Attribute": {
        "t": "5 Tensor",
        "g": "6 Graph",
        "tensors": "10 Tensor*",
        "graphs": "11 Graph*",
        "sparse_tensor": "22 Sparse",
        "sparse_tensors": "23 Sparse*",
    },
    "Sparse": {"values": "1 Tensor", "indices": "2 Tensor"},
    "Tensor": {"name": "8 string", "external_data": "13 Entry*", "data_location": "14 int32"},
    "ValueInfo": {"name": "1 string", "type": "2 Type"},
    "Type": {"tensor_type": "1 TensorType"},
    "TensorType": {"elem_type": "1 int32", "shape": "2 Shape"},
    "Shape": {"dim": "1 Dimension*"},
    "Dimension": {"dim_value": "1 int64"},
}


def link_weights(model: bytes, weights: bytes) -> bytes:
    """The ONNX file with the hash of the safetensors file it was exported from in its metadata."""
    import onnx  # where graphs are made, not where they are served

    proto = onnx.load_model_from_string(model)
    kept = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, kept | {WEIGHTS_KEY: hashlib.sha256(weights).hexdigest()})
    return proto.SerializeToString(deterministic=True)


def check_member_graph(data: bytes, member: MemberManifest, image: InputSpec, classes: int) -> None:
    """Image (N, h, w, c) uint8, and masks (T, d) float32 if stochastic -> logits (N, K) or (T, N, K) float32."""
    file, stochastic = member.onnx.file, member.stochastic
    try:
        model = _model_class().FromString(data)
    except DecodeError as error:
        raise InvalidBundle(f"{file}: expected an ONNX model, got {error}") from error
    for tensor in _tensors(model):
        # such data would be read from wherever its path leads, past every hash
        if tensor.data_location or tensor.external_data:
            raise InvalidBundle(f"{file}: expected all data in the file, got external data for tensor {tensor.name!r}")
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise InvalidBundle(f"{file}: expected a graph without control flow, got {node.op_type}")
    linked = {entry.key: entry.value for entry in model.metadata_props}.get(WEIGHTS_KEY)
    if linked != member.weights.sha256:
        raise InvalidBundle(f"{file}: expected metadata {WEIGHTS_KEY} {member.weights.sha256}, got {linked}")

    initialised = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in initialised}
    outputs = {value.name: value for value in model.graph.output}
    _check_names(file, "inputs", inputs, ["image", "masks"] if stochastic else ["image"])
    _check_names(file, "outputs", outputs, ["logits"])
    _check_tensor(file, inputs["image"], UINT8, [None, *image.shape])
    if inputs["image"].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise InvalidBundle(f"{file}: image: expected any number of images, got a fixed batch")
    if stochastic:
        _check_tensor(file, inputs["masks"], FLOAT, [None, stochastic.width])
    _check_tensor(file, outputs["logits"], FLOAT, [None, None, classes] if stochastic else [None, classes])


def _check_names(file: str, what: str, got: Iterable[str], expected: list[str]) -> None:
    if sorted(got) != expected:
        raise InvalidBundle(f"{file}: expected {what} {', '.join(expected)}, got {', '.join(got) or 'none'}")


def _check_tensor(file: str, value: Any, kind: int, shape: list[int | None]) -> None:
    """Dimensions that the file leaves open are checked when the samples are run."""
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    agree = len(dims) == len(shape) and all(a is None or b is None or a == b for a, b in zip(dims, shape, strict=True))
    if tensor.elem_type != kind or not agree:
        expected, got = _shown(kind, shape), _shown(tensor.elem_type, dims)
        raise InvalidBundle(f"{file}: {value.name}: expected {expected}, got {got}")


def _shown(kind: int, shape: Iterable[int | None]) -> str:
    dims = ", ".join("any" if dim is None else str(dim) for dim in shape)
    return f"{({FLOAT: 'float32', UINT8: 'uint8'}).get(kind, f'data type {kind}')} ({dims})"


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of the file, in whatever corner."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(graph)


@cache
def _model_class() -> Any:
    """Of a pool of its own, so that it does not meet the messages of the `onnx` package."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="member_graph.proto", package="member_graph", syntax="proto2")
    for message, columns in SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, column in columns.items():
            number, kind = column.removesuffix("*").split()
            added = described.field.add(name=name, number=int(number))
            added.label = kinds.LABEL_REPEATED if column.endswith("*") else kinds.LABEL_OPTIONAL
            if kind in SCHEMA:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".member_graph.{kind}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("member_graph.Model"))
