"""Who made a bundle: signatures by OpenSSF Model Signing over all of its files, with a key of the operator's.

What is verified is what is loaded: the bundle's files are read once, and the library verifies a private copy of these very
bytes, not the folder, which somebody may change in the meantime. Needs the extra `signing`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.bundle import InvalidBundle, read_bundle
from models.durable import replace_file

SIGNATURE_FILE = "model.sig"

DESCRIPTION = """\
Sign a bundle with a private key of an elliptic curve. The signature, as
`model_signing verify key` reads it, is written into the bundle as model.sig.

  openssl ecparam -name prime256v1 -genkey -noout -out key.pem
  openssl ec -in key.pem -pubout -out key.pub
  phalanx sign BUNDLE --key key.pem

and in the server's configuration, which then refuses any other bundle:

  signature: {public_key: key.pub}

Needs the extra `signing`: pip install 'phalanx-ensemble[signing]'."""


class InvalidSignature(InvalidBundle):
    """A bundle that is not signed by whom it should be, or was changed since."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx sign`."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--key", type=Path, required=True, metavar="PEM", help="the private key")


def run(args: argparse.Namespace) -> int:
    """Sign, and say what was signed."""
    try:
        version = sign(args.bundle, args.key)
    except (InvalidBundle, OSError, ValueError) as error:
        sys.stderr.write(f"phalanx sign: {error}\n")
        return 1
    sys.stdout.write(f"{args.bundle}: signed, {version}\n")
    return 0


def sign(bundle: Path, key: Path) -> str:
    """Write the signature of a valid bundle into it; returns the bundle's name and version."""
    signing, _ = _library()
    files: dict[str, bytes] = {}
    manifest = read_bundle(bundle, told=files.update).manifest
    if not key.is_file():
        raise InvalidSignature(f"{key}: expected a private key of an elliptic curve in PEM, got no file")
    with tempfile.TemporaryDirectory() as folder:
        copy, signature = _written(files, Path(folder))
        try:
            signing.Config().use_elliptic_key_signer(private_key=key).sign(copy, signature)
        except Exception as error:  # of cryptography and of the library: they have no common base
            raise InvalidSignature(f"{key}: expected a private key of an elliptic curve in PEM, got {error}") from error
        replace_file(bundle / SIGNATURE_FILE, signature.read_bytes())
    return f"{manifest.name} {manifest.version}"


def verify(bundle: Path, files: Mapping[str, bytes], public_key: Path) -> None:
    """InvalidSignature unless model.sig in the bundle's folder is by the key's owner over exactly these files."""
    _, verifying = _library()
    if not public_key.is_file():
        raise InvalidSignature(f"signature: expected a public key of an elliptic curve in PEM, got no file {public_key}")
    try:
        signature = (bundle / SIGNATURE_FILE).read_bytes()
    except OSError as error:
        raise InvalidSignature(f"{SIGNATURE_FILE}: expected a signature, got {error.strerror}; `phalanx sign` makes one") from None
    with tempfile.TemporaryDirectory() as folder:
        copy, beside = _written(files, Path(folder))
        beside.write_bytes(signature)
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(copy, beside)
        except Exception as error:
            reason = str(error).replace(folder, "") or type(error).__name__
            raise InvalidSignature(
                f"{SIGNATURE_FILE}: expected a signature by {public_key.name} over these files: {reason}"
            ) from error


def _written(files: Mapping[str, bytes], folder: Path) -> tuple[Path, Path]:
    """The files in a folder of their own, and where their signature goes."""
    copy = folder / "bundle"
    copy.mkdir()
    for name, data in files.items():
        (copy / name).write_bytes(data)
    return copy, folder / SIGNATURE_FILE


def _library() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise InvalidSignature(f"signatures need the extra `signing`: pip install 'phalanx-ensemble[signing]' ({error})") from error
    return signing, verifying
