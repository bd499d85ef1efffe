"""A bundle comes back as it was written, and only what can be read is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models.bundle import Bundle, InvalidBundle, check_files, link_weights, read_bundle, read_manifest, write_bundle
from models.member_graph import SCHEMA, WEIGHTS_KEY
from tests.bundles import subset_rows, tiny_parts, write_tiny_bundle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    parts = tiny_parts()
    written = write_bundle(tmp_path / "bundle", parts)
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.manifest == written.manifest
    assert {m.name: (m.onnx, m.weights) for m in parts.members} == {
        name: (bundle.onnx_bytes[name], bundle.weights[name]) for name in bundle.onnx_bytes
    }
    assert bundle.documents == {"CARD.md": b"# A card\n"}
    assert np.array_equal(bundle.samples.images, parts.samples.images)
    assert len(bundle.manifest.subsets) == 15
    for name, outputs in bundle.calibration.members.items():
        assert np.array_equal(outputs.log_softmax, parts.calibration.members[name].log_softmax)
    bayesian = bundle.calibration.members["bayesian"]
    assert bayesian.variance is not None
    assert bayesian.fresh is not None
    assert bayesian.variance.min() > 0  # masks survive ONNX Runtime
    assert not np.array_equal(bayesian.log_softmax, bayesian.fresh.log_softmax)


def test_what_is_made_of_a_bundle_again_is_the_same_bundle(tiny: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tiny)
    assert write_bundle(tmp_path / "again", bundle.parts()).manifest == bundle.manifest
    assert {f.name: f.read_bytes() for f in tiny.iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()}


def test_the_version_follows_the_content_but_not_the_clock(tiny: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tiny)
    later = bundle.manifest.provenance.model_copy(update={"created": "2027-01-01T00:00:00+00:00"})
    other = bundle.manifest.provenance.model_copy(update={"seed": 1})
    versions = [
        write_bundle(tmp_path / name, dataclasses.replace(bundle.parts(), provenance=provenance)).manifest.version
        for name, provenance in (("later", later), ("other", other))
    ]
    assert versions[0] == bundle.manifest.version != versions[1]


def test_a_server_reads_without_keeping_weights(tiny: Path) -> None:
    assert read_bundle(tiny, weights=False).weights == {}


def test_links_that_stay_inside_are_followed(copy: Path) -> None:
    """As in a Kubernetes volume, where every file is a link into a folder whose name changes with each version."""
    (copy / "..data").mkdir()
    for file in [entry for entry in copy.iterdir() if entry.is_file()]:
        file.rename(copy / "..data" / file.name)
        file.symlink_to(Path("..data") / file.name)
    read_bundle(copy)


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 1), (28, 28, 1), (64, 48, 3)], ids=str)
def test_input_sizes(tmp_path: Path, height: int, width: int, channels: int) -> None:
    path = write_tiny_bundle(tmp_path / "bundle", height=height, width=width, channels=channels, images=10)
    assert read_bundle(path).samples.images.shape == (8, height, width, channels)


def test_what_would_be_refused_is_not_written(tiny: Path, tmp_path: Path) -> None:
    bundle: Bundle = read_bundle(tiny)
    edge = dataclasses.replace(bundle.parts().members[1], weights=b"others")
    for parts, match in (
        (dataclasses.replace(bundle.parts(), members=[edge]), r"manifest\.json: expected subsets: of edge"),
        (
            dataclasses.replace(bundle.parts(), members=[edge], subsets=subset_rows(["edge"])),
            r"edge\.onnx: expected metadata",
        ),
        (
            dataclasses.replace(bundle.parts(), documents={"../x": b""}),
            r"manifest\.json: .*expected the plain name of a file",
        ),
    ):
        with pytest.raises(InvalidBundle, match=match):
            write_bundle(tmp_path / "new", parts)
    assert not (tmp_path / "new").exists()


def test_each_file_is_read_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    read_bundle(tiny)
    assert sorted(read) == sorted(file.name for file in tiny.iterdir())


def test_check_files_lists_every_file_that_is_wrong(copy: Path) -> None:
    (copy / "edge.onnx").write_bytes(b"something else")
    (copy / "metric.safetensors").unlink()
    checks = {check.file: check for check in check_files(copy, read_manifest(copy))}
    assert {file for file, check in checks.items() if check.problem} == {"edge.onnx", "metric.safetensors"}
    assert checks.keys() == {file.name for file in copy.iterdir()} - {"manifest.json"} | {"metric.safetensors"}


def test_link_weights_keeps_other_metadata(tiny: Path) -> None:
    model = onnx.load_model_from_string((tiny / "edge.onnx").read_bytes())
    onnx.helper.set_model_props(model, {"author": "somebody"})
    linked = onnx.load_model_from_string(link_weights(model.SerializeToString(), b"weights"))
    assert {entry.key for entry in linked.metadata_props} == {"author", WEIGHTS_KEY}


def test_the_fields_of_onnx_that_are_looked_at_have_the_numbers_onnx_gives_them() -> None:
    named: dict[str, Any] = {
        "Entry": onnx.StringStringEntryProto,
        "Training": onnx.TrainingInfoProto,
        "Sparse": onnx.SparseTensorProto,
        "TensorType": onnx.TypeProto.Tensor,
        "Shape": onnx.TensorShapeProto,
        "Dimension": onnx.TensorShapeProto.Dimension,
    }
    for message, columns in SCHEMA.items():
        descriptor = (named.get(message) or getattr(onnx, f"{message}Proto")).DESCRIPTOR
        for name, column in columns.items():
            field = descriptor.fields_by_name[name]
            assert column.startswith(f"{field.number} "), (message, name)
            assert column.endswith("*") == field.is_repeated, (message, name)


def test_the_manifest_is_readable(tiny: Path) -> None:
    text = (tiny / "manifest.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["members"][0]["name"] == "metric"
