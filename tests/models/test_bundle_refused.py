"""A bundle with anything wrong is refused, with a sentence that says in which file, what was expected and what came."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load, save

from models.bundle import InvalidBundle, read_bundle
from models.member_graph import WEIGHTS_KEY
from tests.bundles import edit_manifest, replace_file, write_tiny_bundle

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def _flip_last_byte(file: str) -> Damage:
    def damage(bundle: Path) -> None:
        data = (bundle / file).read_bytes()
        (bundle / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return damage


def _edited(edit: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda bundle: edit_manifest(bundle, edit)


def _text(text: str) -> Damage:
    return lambda bundle: (bundle / "manifest.json").write_text(text)


def _linked_outside(bundle: Path) -> None:
    (bundle / "edge.onnx").rename(bundle.parent / "elsewhere.onnx")
    (bundle / "edge.onnx").symlink_to("../elsewhere.onnx")


def _pipe(bundle: Path) -> None:
    (bundle / "edge.onnx").unlink()
    os.mkfifo(bundle / "edge.onnx")


def _loop(bundle: Path) -> None:
    (bundle / "edge.onnx").unlink()
    (bundle / "edge.onnx").symlink_to("edge.onnx")


def _model(member: str, edit: Callable[[onnx.ModelProto], object]) -> Damage:
    def damage(bundle: Path) -> None:
        file = f"{member}.onnx"
        model = onnx.load(str(bundle / file))
        edit(model)
        replace_file(bundle, file, model.SerializeToString())

    return damage


def _tensors(file: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(bundle: Path) -> None:
        tensors = load((bundle / file).read_bytes())
        edit(tensors)
        replace_file(bundle, file, save(tensors))

    return damage


def _external(tensor: onnx.TensorProto) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.ClearField("raw_data")


def _external_constant(model: onnx.ModelProto) -> None:
    _external(next(a.t for node in model.graph.node for a in node.attribute if a.HasField("t")))


def _external_in_subgraph(model: onnx.ModelProto) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "hidden")
    _external(tensor)
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    middle = onnx.helper.make_graph([onnx.helper.make_node("If", [], [], then_branch=inner)], "middle", [], [])
    model.graph.node.append(onnx.helper.make_node("If", [], [], else_branch=middle))


def _external_in_function(model: onnx.ModelProto) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "hidden")
    _external(tensor)
    node = onnx.helper.make_node("Constant", [], ["out"], value=tensor)
    model.functions.append(onnx.helper.make_function("local", "F", [], ["out"], [node], []))


def _external_sparse(model: onnx.ModelProto) -> None:
    values = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "sparse")
    _external(values)
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3]))


REFUSED: dict[str, tuple[Damage, str]] = {
    "a byte of a graph changed": (_flip_last_byte("edge.onnx"), r"edge\.onnx: expected SHA-256 \w{64}, got \w{64}"),
    "a byte of weights changed": (_flip_last_byte("metric.safetensors"), r"metric\.safetensors: expected SHA-256"),
    "a byte of the calibration changed": (
        _flip_last_byte("calibration.safetensors"),
        r"calibration\.safetensors: expected SHA",
    ),
    "a byte of the samples changed": (
        _flip_last_byte("samples.safetensors"),
        r"samples\.safetensors: expected SHA-256",
    ),
    "a byte of a document changed": (_flip_last_byte("CARD.md"), r"CARD\.md: expected SHA-256"),
    "a missing graph": (lambda bundle: (bundle / "edge.onnx").unlink(), r"edge\.onnx: expected a file in .*, got none"),
    "missing weights": (lambda bundle: (bundle / "edge.safetensors").unlink(), r"edge\.safetensors: expected a file"),
    "no manifest": (
        lambda bundle: (bundle / "manifest.json").unlink(),
        r"manifest\.json: expected a file in .*, got none",
    ),
    "no bundle": (shutil.rmtree, "bundle: expected a folder with a bundle, got nothing"),
    "a manifest that is not JSON": (_text("{"), r"manifest\.json: expected JSON, got "),
    "a manifest nested too deeply": (_text("[" * 100_000), r"manifest\.json: expected JSON, got "),
    "a manifest that is a list": (_text("[]"), r"manifest\.json: expected a JSON object, got list"),
    "a schema of the future, whatever else changed": (
        _text('{"schema_version": 2, "pieces": []}'),
        r"manifest\.json: expected schema_version 1, got 2",
    ),
    "no schema version": (_text("{}"), r"expected schema_version 1, got None"),
    "a schema version that is true": (_text('{"schema_version": true}'), r"expected schema_version 1, got True"),
    "an unknown key": (
        _edited(lambda m: m.update(sparkle=1)),
        r"manifest\.json: sparkle: Extra inputs are not permitted",
    ),
    "a manifest changed by hand": (
        lambda bundle: (bundle / "manifest.json").write_text(
            (bundle / "manifest.json").read_text().replace('"temperature": 1.1', '"temperature": 9.9')
        ),
        r"manifest\.json: expected version \w{12} from its content, got '\w{12}'",
    ),
    "a temperature that is not finite": (
        _text('{"schema_version": 1, "masks": {"seed": NaN}}'),
        r"manifest\.json: ",
    ),
    "an absolute file name": (
        _edited(lambda m: m["members"][1]["onnx"].update(file="/etc/passwd")),
        r"members\.1\.onnx\.file: expected the plain name of a file inside the bundle's folder, got '/etc/passwd'",
    ),
    "a file name that climbs": (
        _edited(lambda m: m["samples"].update(file="../samples.safetensors")),
        r"samples\.file: expected the plain name of a file .*, got '\.\./samples\.safetensors'",
    ),
    "a file name of another system": (
        _edited(lambda m: m["samples"].update(file="C:samples")),
        r"samples\.file: expected the plain name of a file",
    ),
    "a file name that is the folder's": (
        _edited(lambda m: m["samples"].update(file="..")),
        r"samples\.file: expected the plain",
    ),
    "a link that leaves the folder": (
        _linked_outside,
        r"edge\.onnx: expected a file inside .*, got a link to .*elsewhere\.onnx",
    ),
    "a link in a circle": (_loop, r"edge\.onnx: expected a readable file"),
    "a pipe": (_pipe, r"edge\.onnx: expected a regular file, got something else"),
    "one file under two names of members": (
        _edited(lambda m: m["members"][1].update(onnx=m["members"][0]["onnx"])),
        r"manifest\.json: files: expected each once, got metric\.onnx twice",
    ),
    "a member twice": (
        _edited(lambda m: m["members"][1].update(name="metric")),
        r"manifest\.json: members: expected each once, got metric twice",
    ),
    "a class twice": (_edited(lambda m: m["classes"].__setitem__(1, m["classes"][0])), "classes: expected each once"),
    "control characters in a class": (
        _edited(lambda m: m["classes"].__setitem__(1, "\x1b[2J")),
        r"classes\.1: expected one line of printable characters",
    ),
    "a subset missing": (
        _edited(lambda m: m["subsets"].pop(4)),
        r"expected subsets: all 15 of the classifiers, got none for adversarial\+bayesian",
    ),
    "a subset twice": (
        _edited(lambda m: m["subsets"].append(m["subsets"][4])),
        "subsets: expected each once, got adversarial",
    ),
    "a subset of strangers": (
        _edited(lambda m: m["subsets"].append(m["subsets"][0] | {"classifiers": ["zebra"], "weights": {"zebra": 1.0}})),
        "expected subsets: of adversarial, bayesian, edge, metric, got zebra",
    ),
    "weights that do not sum to one": (
        _edited(lambda m: m["subsets"][0].update(weights={"adversarial": 0.5})),
        r"subsets\.0: expected weights that sum to 1, got a sum of 0\.5",
    ),
    "weights of others": (
        _edited(lambda m: m["subsets"][0].update(weights={"edge": 1.0})),
        r"subsets\.0: expected weights of adversarial, got edge",
    ),
    "a rule nobody knows": (
        _edited(lambda m: m["subsets"][0].update(rule="oracle")),
        r"subsets\.0\.rule: .*, got 'oracle'",
    ),
    "no classifier": (
        _edited(lambda m: [member.update(roles=["detector"]) for member in m["members"]]),
        "expected at least one member with the role classifier, got none",
    ),
    "two kinds of masks": (
        _edited(lambda m: m["members"][1].update(stochastic={"samples": 8, "width": 4, "keep": 0.5})),
        "expected stochastic members to share their masks",
    ),
    "centers behind masks": (
        _edited(lambda m: m["members"][3].update(centers=True)),
        "expected centers or masks, got both",
    ),
    "a graph of other weights": (
        _model("edge", lambda m: onnx.helper.set_model_props(m, {WEIGHTS_KEY: "0" * 64})),
        rf"edge\.onnx: expected metadata {WEIGHTS_KEY} \w{{64}}, got 0{{64}}",
    ),
    "a graph that names no weights": (
        _model("edge", lambda m: m.ClearField("metadata_props")),
        r"edge\.onnx: .*, got None",
    ),
    "a graph that is no ONNX": (
        lambda bundle: replace_file(bundle, "edge.onnx", b"\xff\xff"),
        r"edge\.onnx: expected an ONNX model, got ",
    ),
    "external data in a constant": (
        _model("edge", _external_constant),
        r"edge\.onnx: expected all data in the file, got ext",
    ),
    "external data in a graph in a graph": (
        _model("edge", _external_in_subgraph),
        "got external data for tensor 'hidden'",
    ),
    "external data in a function": (_model("edge", _external_in_function), "got external data for tensor 'hidden'"),
    "external data in a sparse tensor": (_model("edge", _external_sparse), "got external data for tensor 'sparse'"),
    "a graph for nine classes": (
        _model("edge", lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 9)),
        r"edge\.onnx: logits: expected float32 \(any, 10\), got float32 \(any, 9\)",
    ),
    "a graph for other images": (
        _model("edge", lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 9)),
        r"edge\.onnx: image: expected uint8 \(any, 8, 8, 3\), got uint8 \(any, 9, 8, 3\)",
    ),
    "a graph for a fixed number of images": (
        _model("edge", lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1)),
        r"edge\.onnx: image: expected any number of images, got a fixed batch",
    ),
    "a graph that takes floats": (
        _model("edge", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.DOUBLE)),
        r"edge\.onnx: image: expected uint8 .*, got data type 11",
    ),
    "a stochastic member without masks": (
        _edited(lambda m: m["members"][3].update(stochastic=None)),
        r"bayesian\.onnx: expected inputs image, got image, masks",
    ),
    "masks of another width": (
        _edited(lambda m: m["members"][3]["stochastic"].update(width=8)),
        r"bayesian\.onnx: masks: expected float32 \(any, 8\), got float32 \(any, 16\)",
    ),
    "calibration outputs of nine classes": (
        _tensors("calibration.safetensors", lambda t: t.update({"edge.log_softmax": t["edge.log_softmax"][:, :9].copy()})),
        r"calibration\.safetensors: edge\.log_softmax: expected float16 \(200, 10\), got float16 \(200, 9\)",
    ),
    "calibration outputs of a member missing": (
        _tensors("calibration.safetensors", lambda t: t.pop("edge.log_softmax")),
        r"calibration\.safetensors: missing tensor edge\.log_softmax",
    ),
    "calibration outputs of a stranger": (
        _tensors("calibration.safetensors", lambda t: t.update(zebra=np.zeros(1))),
        r"calibration\.safetensors: unexpected tensor zebra",
    ),
    "a calibration output that is not finite": (
        _tensors("calibration.safetensors", lambda t: t.update({"bayesian.variance": np.full(200, np.nan, np.float32)})),
        r"calibration\.safetensors: bayesian\.variance: expected finite values",
    ),
    "fewer calibration images than declared": (
        _edited(lambda m: m["calibration"].update(n=201)),
        r"calibration\.safetensors: labels: expected int16 \(201,\), got int16 \(200,\)",
    ),
    "labels out of range": (
        _tensors("samples.safetensors", lambda t: t.update(labels=np.full(8, 10, np.int16))),
        r"samples\.safetensors: labels: expected -1 to 9, got 10 to 10",
    ),
    "samples that are no safetensors": (
        lambda bundle: replace_file(bundle, "samples.safetensors", b"no such thing"),
        r"samples\.safetensors: expected safetensors, got ",
    ),
    "samples of another size": (
        _tensors("samples.safetensors", lambda t: t.update(images=t["images"][:, :4].copy())),
        r"samples\.safetensors: images: expected uint8 \(8, 8, 8, 3\), got uint8 \(8, 4, 8, 3\)",
    ),
}


@pytest.mark.parametrize(("damage", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(copy: Path, damage: Damage, match: str) -> None:
    damage(copy)
    with pytest.raises(InvalidBundle, match=match):
        read_bundle(copy)
