"""Signed bundles: by the library's own command as by ours, and what a server makes of every other bundle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from models.bundle import InvalidBundle, read_bundle
from service.cli import main
from service.ensembles import read_trusted
from service.graph_cache import GraphCache
from service.server import Server
from service.signing import SIGNATURE_FILE, InvalidSignature, sign, verify
from tests.bundles import edit_manifest, write_tiny_bundle
from tests.service.serving import configured

pytest.importorskip("model_signing")


def keys(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """Files of a new private key and of its public half."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """A bundle and the public key of who signed it."""
    bundle, (private, public) = write_tiny_bundle(tmp_path / "bundle", images=100), keys(tmp_path)
    assert main(["sign", str(bundle), "--key", str(private)]) == 0
    return bundle, public


def test_a_signed_bundle_is_served_and_its_files_are_what_was_verified(
    signed: tuple[Path, Path], graphs: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, public = signed
    verified: dict[str, bytes] = {}

    def watched(path: Path, files: dict[str, bytes], key: Path) -> None:
        verify(path, files, key)
        verified.update(files)

    monkeypatch.setattr("service.signing.verify", watched)
    with Server(configured(bundle, signature={"public_key": public}), graphs) as server:
        assert server.ensembles
    manifest = read_bundle(bundle).manifest
    assert verified.keys() == {"manifest.json", *(file.file for file in manifest.files)}


def test_the_librarys_own_command_verifies_it(signed: tuple[Path, Path]) -> None:
    bundle, public = signed
    command = ["-m", "model_signing", "verify", "key", str(bundle), "--signature", str(bundle / SIGNATURE_FILE)]
    options = ["--public_key", str(public), "--ignore-paths", str(bundle / SIGNATURE_FILE)]
    done = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def renamed(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document.update(name="other"))


def rates(bundle: Path) -> None:
    """The manifest alone, whose own hashes then all agree."""
    edit_manifest(bundle, lambda document: document["subsets"][0].update(alpha=0.5))


def unsigned(bundle: Path) -> None:
    (bundle / SIGNATURE_FILE).unlink()


def nonsense(bundle: Path) -> None:
    (bundle / SIGNATURE_FILE).write_text("{}")


def of_another_key(bundle: Path) -> None:
    private, _ = keys(bundle.parent, "another")
    sign(bundle, private)


@pytest.mark.parametrize("spoil", [renamed, rates, unsigned, nonsense, of_another_key], ids=lambda spoil: spoil.__name__)
def test_any_other_bundle_is_refused(signed: tuple[Path, Path], spoil: Callable[[Path], None]) -> None:
    bundle, public = signed
    spoil(bundle)
    read_bundle(bundle)  # valid in itself: the signature alone is what is wrong
    with pytest.raises(InvalidSignature, match=r"model\.sig: expected a signature") as refused:
        read_trusted(configured(bundle, signature={"public_key": public}))
    assert "/tmp" not in str(refused.value)


def test_a_bundle_swapped_between_reading_and_verifying_gains_nothing(signed: tuple[Path, Path]) -> None:
    """The folder is another one by the time the signature is looked at: the bytes that were read are what counts."""
    bundle, public = signed
    files: dict[str, bytes] = {}
    read_bundle(bundle, told=files.update)
    shutil.copytree(bundle, bundle.parent / "genuine")
    rates(bundle)
    verify(bundle, files, public)  # what was read was genuine, and is what will be served
    forged: dict[str, bytes] = {}
    read_bundle(bundle, told=forged.update)
    shutil.rmtree(bundle)
    (bundle.parent / "genuine").rename(bundle)
    with pytest.raises(InvalidSignature):
        verify(bundle, forged, public)  # the folder is genuine again, what was read is not


def test_clumsy_keys_are_told(signed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, public = signed
    for key in (public, tmp_path / "none.pem"):
        assert main(["sign", str(bundle), "--key", str(key)]) == 1
        assert "expected a private key of an elliptic curve in PEM" in capsys.readouterr().err
    with pytest.raises(InvalidBundle, match="public key of an elliptic curve in PEM, got no file"):
        read_trusted(configured(bundle, signature={"public_key": tmp_path / "none.pub"}))


def test_signing_again_replaces_and_a_card_needs_a_new_signature(signed: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, public = signed
    before = (bundle / SIGNATURE_FILE).read_bytes()
    sign(bundle, tmp_path / "key.pem")
    assert (bundle / SIGNATURE_FILE).read_bytes() != before
    read_trusted(configured(bundle, signature={"public_key": public}))


def test_a_signed_bundles_graphs_are_not_taken_from_a_folder(signed: tuple[Path, Path], tmp_path: Path) -> None:
    """Whoever can write there could write another graph, with a hash that agrees."""
    bundle, public = signed
    with Server(configured(bundle, signature={"public_key": public}), GraphCache(tmp_path / "graphs")):
        assert not (tmp_path / "graphs").exists()
