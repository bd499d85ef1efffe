"""`phalanx token` makes an API token; `phalanx admin` changes what a running server offers."""

from __future__ import annotations

import argparse
import secrets
import sys

import grpc

from service import connect
from service.access import token_digest
from service.pb.phalanx.v1 import admin_pb2 as pb
from service.pb.phalanx.v1 import admin_pb2_grpc as pb_grpc

TOKEN = """\
Make an API token. The token goes to the caller and is shown once; its hash goes
into the server's configuration, which never holds the token itself:

  callers:
    shop: {token_sha256: HASH, scopes: [classify]}

scopes: classify (the default ensemble), ablate (every ensemble), describe (what
ensembles are made of), admin (reload, add and remove ensembles)."""

ADMIN = """\
Change what a running server offers, through its admin port (`admin:` in its
configuration), as a caller with the scope `admin`.

  phalanx admin reload                     the configuration and the bundle, again
  phalanx admin add no-edge '{without: [edge]}'
  phalanx admin remove no-edge

What is wrong changes nothing: the server goes on with what it has."""

DEFAULT_SERVER = "127.0.0.1:50052"


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """None: a token has no options."""


def make_token(_: argparse.Namespace) -> int:
    """Print a new token of 256 random bits, and its hash."""
    token = secrets.token_urlsafe(32)
    print(f"token:        {token}\ntoken_sha256: {token_digest(token)}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `phalanx admin`."""
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="HOST:PORT", help="its admin port (%(default)s)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="(%(default)s)")
    connect.add_arguments(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("reload", help="read the configuration and the bundle again")
    add = actions.add_parser("add", help="add an ensemble, or replace the one of that name")
    add.add_argument("name")
    add.add_argument("choice", help="YAML, as under `ensembles` of the configuration: '{without: [edge]}'")
    actions.add_parser("remove", help="take an ensemble away").add_argument("name")


def run(args: argparse.Namespace) -> int:
    """Ask for one change; says what is served afterwards."""
    try:
        with connect.channel(args.server, args) as channel:
            stub = pb_grpc.AdminStub(channel)
            match args.action:
                case "reload":
                    done = stub.Reload(pb.ReloadRequest(), timeout=args.timeout)
                case "add":
                    done = stub.AddEnsemble(pb.AddEnsembleRequest(name=args.name, choice=args.choice), timeout=args.timeout)
                case _:
                    done = stub.RemoveEnsemble(pb.RemoveEnsembleRequest(name=args.name), timeout=args.timeout)
    except OSError as error:
        return _refused(str(error))
    except grpc.RpcError as error:
        call: object = error
        assert isinstance(call, grpc.Call)
        if call.code() is grpc.StatusCode.UNAVAILABLE:
            return _refused(
                f"no server answers on {args.server} ({call.details()}); `admin: HOST:PORT` in its configuration opens one"
            )
        return _refused(f"{call.code().name}: {call.details()}")
    print(f"served now: {', '.join(done.ensembles)} over {done.bundle} {done.bundle_version}, after {done.seconds:.2f} s")
    return 0


def _refused(sentence: str) -> int:
    print(f"phalanx admin: {sentence}", file=sys.stderr)
    return 1
