"""The server's certificates, read again whenever their files change, so that a rotation needs no restart.

gRPC asks at every handshake. Files that are half written, or do not belong together, change nothing: what was read last
stays, the log says why, and `phalanx_tls_certificate_expiry_timestamp_seconds` tells when that runs out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from service.config import TlsConfig

log = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int], ...]


class InvalidCertificate(RuntimeError):
    """The files cannot be used: which, and why."""


class Certificates:
    """One port's, as each must hear of new files; thread-safe."""

    def __init__(self, tls: TlsConfig, told: Callable[[float], None]) -> None:
        """`told` gets the time at which the certificate expires, in seconds since the epoch, whenever one is read."""
        self._tls, self._told = tls, told
        self._lock = threading.Lock()
        self._signature = self._look()

    def credentials(self) -> grpc.ServerCredentials:
        """What a port is opened with, now; the certificates themselves are asked for at every handshake.

        Raises InvalidCertificate.
        """
        renewed = cast(Callable[[], grpc.ServerCertificateConfiguration], self._renewed)  # None is foreseen, its type is not
        return grpc.dynamic_ssl_server_credentials(self._read(), renewed, self._tls.client_ca is not None)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The files' content where they changed; None to go on as before."""
        with self._lock:
            try:
                signature = self._look()
                if signature == self._signature:
                    return None
                self._signature = signature
                renewed = self._read()
            except InvalidCertificate as error:
                log.error("%s; the certificate read before stays in use", error)
                return None
        log.info("a new certificate is in use: %s", self._tls.certificate.name)
        return renewed

    def _look(self) -> Signature:
        try:
            found = [path.stat() for path in self._files]
        except OSError as error:
            raise InvalidCertificate(f"tls: {error.filename}: {error.strerror}") from None
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        tls = self._tls
        try:
            key, chain = tls.key.read_bytes(), tls.certificate.read_bytes()
            authority = tls.client_ca.read_bytes() if tls.client_ca else None
            # gRPC would not say what is wrong with them; these very bytes, as the files may change in the meantime
            certificates = x509.load_pem_x509_certificates(chain)
            if load_pem_private_key(key, None).public_key() != certificates[0].public_key():
                raise ValueError("expected the key of the first certificate, got another one")
            if authority is not None:
                x509.load_pem_x509_certificates(authority)
            expires = min(each.not_valid_after_utc for each in certificates)
        except (OSError, TypeError, ValueError, UnsupportedAlgorithm) as error:  # TypeError: a password is wanted
            raise InvalidCertificate(f"tls: {_listed(self._files)}: {getattr(error, 'strerror', None) or error}") from None
        self._told(expires.timestamp())
        return grpc.ssl_server_certificate_configuration([(key, chain)], authority)

    @property
    def _files(self) -> list[Path]:
        return [path for path in (self._tls.certificate, self._tls.key, self._tls.client_ca) if path is not None]


def _listed(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths)
