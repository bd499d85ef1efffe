"""The port that Prometheus scrapes: plain text for a scraper on this machine, else TLS as the service has it.

prometheus-client's own server shakes hands where it accepts, so that one silent connection would stop every scrape, and reads
the certificate once.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from service.config import Address, TlsConfig

PATIENCE = 10.0  # seconds a scraper may be silent


class MetricsPort:
    """Answers from the moment it is made until `close`; raises OSError where the address cannot be had."""

    def __init__(self, address: Address, registry: CollectorRegistry, tls: TlsConfig | None) -> None:
        secured = tls if tls is not None and not address.loopback else None
        if secured is not None:
            _context(secured)  # raises now rather than at the first scrape
        kind: type[WSGIServer] = type("Server", (_Server,), {"address_family": _family(address), "tls": secured})
        self._server = make_server(address.host, address.port, make_wsgi_app(registry), kind, _Quiet)
        self.address = Address(address.host, self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Whoever is being answered is cut off."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingWSGIServer):
    tls: TlsConfig | None = None
    block_on_close = False

    def get_request(self) -> tuple[Any, Any]:
        """A connection, its handshake left to the thread that answers it; the certificate is the one of now."""
        connection, peer = super().get_request()
        connection.settimeout(PATIENCE)
        if self.tls is None:
            return connection, peer
        try:
            return _context(self.tls).wrap_socket(connection, server_side=True, do_handshake_on_connect=False), peer
        except (OSError, ValueError) as error:  # files half written: this scrape fails, the next may not
            connection.close()
            raise OSError(str(error)) from error

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):
            super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """A scraper that hangs up, or shows no certificate, is no error of ours."""


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Not a line for every scrape."""


def _context(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _family(address: Address) -> socket.AddressFamily:
    return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
