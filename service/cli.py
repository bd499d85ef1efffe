"""The `phalanx` command.  A subcommand is imported only when it is called: --help should not load ONNX Runtime."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from service.own_version import own_version

if TYPE_CHECKING:
    from service.config import ServiceConfig

DESCRIPTION = """\
What is this image, and is somebody trying to fool us?

Phalanx answers with a class, a verdict (clean, suspect, rejected) and the
evidence: every member's vote and every detector's score."""

EPILOG = """\
a first look:
  phalanx serve                       serve the bundle that ships with Phalanx
  phalanx classify tile.png           in another terminal: ask the server
  phalanx classify --json *.png | jq  the same for programs

then:
  phalanx inspect BUNDLE              what is in a bundle; verifies every hash
  phalanx calibrate BUNDLE FOLDER -o NEW
                                      p-values from your own clean images
  phalanx quarantine ls               the unusual images that a server kept
  phalanx token                       an API token, and its hash for the server
  phalanx admin reload                change what a running server offers

`phalanx COMMAND --help` says more about each."""

SERVE = """\
Serve a bundle over gRPC: phalanx.v1.DefenseEnsemble, the Open Inference
Protocol, health and reflection; Prometheus metrics on a port of their own.

Without a configuration the bundle that ships with Phalanx is served on
127.0.0.1:50051, metrics on 127.0.0.1:9100."""

SERVE_EPILOG = """\
a configuration (every key has a default; paths are relative to the file):
  bundle: models/bundles/eurosat
  listen: 127.0.0.1:50051        # a public address needs TLS, or insecure: true
  metrics: 127.0.0.1:9100        # or off
  ensembles:                     # the first is the default
    full: {}
    no-edge: {without: [edge]}
    votes-only: {detectors: []}
    hard-vote: {rule: majority, shadow: {ensemble: full, share: 0.1}}
                                 # a tenth of its images runs through full, too, when
                                 # there is time, and it is counted how often they agree
  decision: {review_rate: 0.05, reject_rate: 0.01}
  batching: {max_batch_size: 64, max_delay_ms: 2, max_queue: 1024}
                                 # a run on a CPU is of at most 16 images
  device: {provider: auto, strict: false}
  workers: 1                     # processes that share the port (Linux); queues,
                                 # limits and quotas are each one's own
  front_end: grpcio              # or native: faster, plain text on a private
                                 # address; pip install 'phalanx-ensemble[native]'
  limits: {disclosure: evidence} # or label, verdict, probabilities
  signature: {public_key: FILE}  # serve nothing else than `phalanx sign` signed
  admin: 127.0.0.1:50052         # reload, add and remove ensembles; off without it
  tls: {certificate: FILE, key: FILE, client_ca: FILE}   # client_ca: mutual TLS
  callers:                       # once there is one, nobody else is answered
    shop: {token_sha256: HASH, scopes: [classify], disclosure: label}
    lab: {certificate: lab.example, scopes: [classify, ablate, describe]}
    ops: {token_sha256: HASH, scopes: [admin]}
  quota: {images_per_second: 100, burst_images: 256, concurrent_calls: 16}
  logging: {format: json, requests: all}   # or none, or (default) what is notable
  quarantine: {folder: quarantine, max_bytes: 1073741824}   # keeps unusual images
                                 # with their evidence; the oldest make room
  tracing: {endpoint: "http://127.0.0.1:4317", sample: 0.1}
                                 # OpenTelemetry: a span for each stage of a request;
                                 # pip install 'phalanx-ensemble[tracing]'

environment variables go over the file, the options here over both:
  PHALANX_LISTEN=127.0.0.1:50052
  PHALANX_BATCHING__MAX_DELAY_MS=5
  PHALANX_ENSEMBLES='{full: {}, no-edge: {without: [edge]}}'

SIGHUP reads the configuration and the bundle again; what is wrong with them is
logged, and the server goes on with what it has.
SIGTERM drains: health says NOT_SERVING, accepted calls are answered, then the
server stops. A second signal stops it at once; with several workers it ends the one
that watches them, and they answer what they have accepted."""


@dataclass(frozen=True)
class Command:
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    description: str = ""
    epilog: str = ""


def _serve() -> Command:
    return Command(_serve_arguments, _run_serve, SERVE, SERVE_EPILOG)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="a YAML file (or PHALANX_CONFIG)")
    parser.add_argument("--bundle", metavar="FOLDER", help="the bundle to serve")
    parser.add_argument("--listen", metavar="HOST:PORT", help="where gRPC listens; port 0 takes a free one")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="where Prometheus scrapes, or `off`")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that share the port (1)")
    parser.add_argument("--check", action="store_true", help="check the configuration against the bundle, and stop")
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")


def _run_serve(args: argparse.Namespace) -> int:
    from service.config import InvalidConfig, load_config

    overrides = {"bundle": args.bundle, "listen": args.listen, "metrics": args.metrics, "workers": args.workers}
    try:
        config = load_config(args.config, overrides=overrides)
    except InvalidConfig as error:
        return _refused("serve", error)
    if args.check:
        return _check(config)
    from service import logs

    logs.configure(config.logging, args.verbose)

    from models.bundle import InvalidBundle
    from models.composition import InvalidEnsemble
    from service.engine import ProviderUnavailable
    from service.extras import MissingExtra
    from service.quarantine.keeper import CannotKeep
    from service.serve import serve
    from service.server import CannotStart
    from service.workers.supervisor import WorkerFailed

    try:
        serve(config, lambda: load_config(args.config, overrides=overrides))
    except (CannotKeep, CannotStart, InvalidBundle, InvalidEnsemble, MissingExtra, ProviderUnavailable, WorkerFailed) as error:
        return _refused("serve", error)
    return 0


def _check(config: ServiceConfig) -> int:
    """All but the graphs: the bundle is read and every ensemble put together."""
    from models.bundle import InvalidBundle
    from models.card import read_card
    from models.composition import InvalidEnsemble
    from service.ensembles import compose_named, read_trusted
    from service.extras import MissingExtra, check

    try:
        check(config)
        bundle = read_trusted(config)
        read_card(bundle.manifest, bundle.documents)
        for name in config.ensembles:
            compose_named(bundle, config, name)
    except (InvalidBundle, InvalidEnsemble, MissingExtra) as error:
        return _refused("serve", error)
    print(f"the configuration is valid: {', '.join(config.ensembles)} over {config.bundle_path}")
    return 0


def _refused(command: str, error: Exception) -> int:
    for line in str(error).splitlines():
        print(f"phalanx {command}: {line}", file=sys.stderr)
    return 1


def _classify() -> Command:
    from service import classify

    return Command(classify.add_arguments, classify.run, classify.DESCRIPTION, classify.EPILOG)


def _inspect() -> Command:
    from service import inspect

    return Command(inspect.add_arguments, inspect.run, inspect.__doc__ or "")


def _calibrate() -> Command:
    from service import calibrate

    return Command(calibrate.add_arguments, calibrate.run, calibrate.__doc__ or "")


def _quarantine() -> Command:
    from service.quarantine import command

    return Command(command.add_arguments, command.run, command.DESCRIPTION, command.EPILOG)


def _sign() -> Command:
    from service import signing

    return Command(signing.add_arguments, signing.run, signing.DESCRIPTION)


def _token() -> Command:
    from service import admin

    return Command(admin.add_token_arguments, admin.make_token, admin.TOKEN)


def _admin() -> Command:
    from service import admin

    return Command(admin.add_arguments, admin.run, admin.ADMIN)


COMMANDS: Mapping[str, tuple[str, Callable[[], Command]]] = MappingProxyType(
    {
        "serve": ("serve a bundle over gRPC", _serve),
        "classify": ("ask a server about image files", _classify),
        "inspect": ("print a bundle and verify every hash", _inspect),
        "calibrate": ("take p-values from your own clean images", _calibrate),
        "quarantine": ("look at the unusual images that a server kept", _quarantine),
        "sign": ("sign a bundle", _sign),
        "token": ("make an API token and its hash", _token),
        "admin": ("reload a running server, add and remove ensembles", _admin),
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("phalanx", description=DESCRIPTION, epilog=EPILOG, formatter_class=plain)
    parser.add_argument("--version", action="version", version=f"phalanx {own_version('(not installed)')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((word for word in arguments if not word.startswith("-")), None)
    commands: dict[str, Command] = {}
    for name, (summary, load) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=plain)
        if name == called:
            commands[name] = command = load()
            subparser.description, subparser.epilog = command.description, command.epilog
            command.add_arguments(subparser)
    args = parser.parse_args(arguments)
    return commands[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
