"""How a command of ours reaches a server: in plain text or over TLS, with a client certificate, with a token."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc

TOKEN = "PHALANX_TOKEN"  # the environment variable; a command line is seen by every user of a machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a connection."""
    parser.add_argument("--tls", action="store_true", help="the server speaks TLS, under a certificate this machine trusts")
    parser.add_argument("--ca", type=Path, metavar="PEM", help="trust this certificate authority; implies --tls")
    parser.add_argument("--certificate", type=Path, metavar="PEM", help="show this client certificate; with --key, implies --tls")
    parser.add_argument("--key", type=Path, metavar="PEM", help="the private key of --certificate")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=f"the API token; without it, what {TOKEN} holds")


def channel(server: str, args: argparse.Namespace) -> grpc.Channel:
    """A channel as the options say; raises OSError where a file cannot be read."""
    options = [("grpc.max_receive_message_length", -1)]
    if args.tls or args.ca or args.certificate:
        files = [path.read_bytes() if path else None for path in (args.ca, args.key, args.certificate)]
        made = grpc.secure_channel(server, grpc.ssl_channel_credentials(*files), options)
    else:
        made = grpc.insecure_channel(server, options)
    return with_token(made, args.token_file.read_text().strip() if args.token_file else os.environ.get(TOKEN, ""))


def with_token(made: grpc.Channel, token: str) -> grpc.Channel:
    """The channel, sending the token with every call, if there is one."""
    return grpc.intercept_channel(made, Bearer(token)) if token else made


class Bearer(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Sends a token with every call. grpcio's own call credentials refuse to without TLS, which the loopback needs not."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        return continuation(self._with_token(details), requests)

    def _with_token(self, details: Any) -> _Details:
        metadata = [*(details.metadata or ()), ("authorization", f"Bearer {self._token}")]
        return _Details(details.method, details.timeout, metadata, details.credentials, details.wait_for_ready, details.compression)


class _Details(NamedTuple):
    """A call's details as grpcio has them, in a class that can be made."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any
