"""`make demo`: serve, classify real tiles and adversarial versions of them, show both side by side, stop.

It is a user of the service like any other: the server is a process of its own, and all that is shown came out of its
gRPC, health and metrics ports.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self
from urllib.request import ProxyHandler, build_opener

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.classify import VERDICT_STYLES, CannotAsk, FileAnswer, classify_files
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"  # in a checkout; a wheel has none
START_SECONDS, STOP_SECONDS, CALL_SECONDS = 120.0, 60.0, 60.0
PIPED_WIDTH = 150  # a file or a pipe has no width of its own: rich would take 80 columns
# Loopback needs no proxy; a server that is still loading is asked again soon.
CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
# The series of interest; of the p-values' cumulative buckets the one at the default review rate.
COUNTED = ("phalanx_request_seconds_count", "phalanx_verdicts_total", "phalanx_dissent_total", "phalanx_errors_total")
P_VALUES, P_BOUND = "phalanx_p_value_bucket", "0.05"

Series = Mapping[str, float]


class DemoFailed(RuntimeError):
    """Something did not go as it should; the message says what."""


@dataclass(frozen=True)
class Attack:
    """How adversarial tiles were made, as each says of itself in its PNG text chunks."""

    member: str
    epsilon: float  # the radius, in pixel units of 0..255
    bundle: str  # the version of the bundle that the member was taken from

    @classmethod
    def of(cls, path: Path) -> Self:
        with Image.open(path) as image:
            text = image.text if isinstance(image, PngImageFile) else {}
        try:
            return cls(text["phalanx.member"], float(text["phalanx.epsilon"]), text["phalanx.bundle"])
        except (KeyError, ValueError):
            raise DemoFailed(f"{path} does not say how it was made; examples/make_adversarial.py writes tiles that do") from None

    def chunks(self) -> PngInfo:
        info = PngInfo()
        for key, value in vars(self).items():
            info.add_text(f"phalanx.{key}", format(value, "g") if isinstance(value, float) else value)
        return info


@dataclass(frozen=True)
class Tiles:
    """Clean files and their adversarial versions of the same names, in the same order."""

    clean: Sequence[Path]
    attacked: Sequence[Path]
    attack: Attack
    distance: int  # the largest change of any pixel


@dataclass(frozen=True)
class Answer:
    """What the ensemble said of one tile, and what the attacked member would have said alone."""

    class_name: str
    right: bool
    verdict: str
    alone: str
    alone_right: bool

    @property
    def flagged(self) -> bool:
        return self.verdict in ("SUSPECT", "REJECTED")


@dataclass(frozen=True)
class Served:
    stub: pb_grpc.DefenseEnsembleStub
    metrics_url: str

    def scrape(self, ensemble: str) -> Series:
        """The series of interest of one ensemble, by their name and their other labels, as Prometheus writes them."""
        with build_opener(ProxyHandler({})).open(self.metrics_url, timeout=CALL_SECONDS) as response:
            families = text_string_to_metric_families(response.read().decode())
        series = {}
        for sample in (sample for family in families for sample in family.samples):
            labels = dict(sample.labels)
            if labels.pop("ensemble", None) != ensemble:
                continue
            if sample.name in COUNTED or (sample.name == P_VALUES and labels["le"] == P_BOUND):
                written = ", ".join(f'{key}="{value}"' for key, value in labels.items())
                series[f"{sample.name}{{{written}}}"] = sample.value
        return series


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m service.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="the bundle to serve; without it, the one that ships")
    parser.add_argument("--tiles", type=Path, default=EXAMPLES / "tiles", metavar="FOLDER", help="PNGs named for their class")
    parser.add_argument(
        "--adversarial", type=Path, default=EXAMPLES / "adversarial", metavar="FOLDER", help="their adversarial versions"
    )
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is stopped, too
    own_width = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    console = Console(width=None if own_width else PIPED_WIDTH, highlight=False, markup=False, emoji=False)
    try:
        show(find_tiles(args.tiles, args.adversarial), args.bundle, console)
    except (DemoFailed, CannotAsk, OSError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def show(tiles: Tiles, bundle: Path | None, console: Console) -> None:
    console.print("starting a server …" if _unicode(console) else "starting a server ...", style="dim")
    with serving(bundle) as served:
        ensemble = served.stub.GetEnsemble(pb.GetEnsembleRequest(), timeout=CALL_SECONDS).ensemble
        truths = [true_class(path, ensemble.classes) for path in tiles.clean]
        before = served.scrape(ensemble.name)
        clean = ask(served, tiles.clean, truths, tiles.attack.member)
        between = served.scrape(ensemble.name)
        attacked = ask(served, tiles.attacked, truths, tiles.attack.member)
        after = served.scrape(ensemble.name)
        print_head(console, ensemble, tiles)
        names = [path.stem for path in tiles.clean]
        print_answers(console, names, {"clean": clean, "attacked": attacked}, ensemble.name, tiles.attack.member)
        console.print(summary({"clean": clean, "attacked": attacked}, ensemble.name, tiles.attack.member), "")
        console.print(moved(before, between, after, ensemble.name))
        console.print(f'le="{P_BOUND}": images with a p-value of at most that, as 1 in 20 clean ones have\n', style="dim")
    console.print("SIGTERM: the server drained and stopped.", style="dim")


def find_tiles(clean: Path, adversarial: Path) -> Tiles:
    """The PNGs of both folders, in pairs, checked to be what they claim to be."""
    paths = sorted(clean.glob("*.png"))
    if not paths:
        raise DemoFailed(f"no PNG in {clean}: run the demo in a checkout, or name a folder with --tiles")
    attacked = [adversarial / path.name for path in paths]
    if missing := [path.name for path in attacked if not path.is_file()]:
        lacks = f"{adversarial} lacks {len(missing)} of {len(paths)} tiles, {missing[0]} first"
        raise DemoFailed(f"{lacks}: examples/make_adversarial.py makes them")
    attacks = {Attack.of(path) for path in attacked}
    if len(attacks) > 1:
        raise DemoFailed(f"{adversarial} mixes tiles of {len(attacks)} attacks; expected one member, epsilon and bundle")
    (attack,) = attacks
    distance = max(_distance(*pair) for pair in zip(paths, attacked, strict=True))
    if distance > attack.epsilon:
        raise DemoFailed(f"{adversarial}: a pixel differs by {distance} from the clean one; expected at most {attack.epsilon:g}")
    return Tiles(paths, attacked, attack, distance)


def _distance(clean: Path, attacked: Path) -> int:
    with Image.open(clean) as one, Image.open(attacked) as other:
        a, b = np.asarray(one, np.int16), np.asarray(other, np.int16)
    if a.shape != b.shape:
        raise DemoFailed(f"{attacked} has shape {b.shape}; expected that of {clean}, {a.shape}")
    return int(np.abs(a - b).max())


def true_class(path: Path, classes: Sequence[str]) -> int:
    """annual-crop-1.png shows an AnnualCrop."""
    named = _letters(re.sub(r"-\d+$", "", path.stem))
    for index, name in enumerate(classes):
        if _letters(name) == named:
            return index
    raise DemoFailed(f"{path} is named for no class of this bundle; expected one of {', '.join(classes)}, then -NUMBER.png")


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


@contextmanager
def serving(bundle: Path | None) -> Iterator[Served]:
    """A server process on free loopback ports, SERVING; ended by SIGTERM and its exit status checked."""
    listen, metrics = _free_addresses()
    command = [sys.executable, "-m", "service.cli", "serve", "--listen", listen, "--metrics", metrics]
    command += ["--bundle", str(bundle)] if bundle is not None else []
    # A configuration meant for another server does not reach this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PHALANX_")}
    with tempfile.TemporaryFile("w+", errors="replace") as log, grpc.insecure_channel(listen, CHANNEL) as channel:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _wait_until_serving(process, channel, log)
            yield Served(pb_grpc.DefenseEnsembleStub(channel), f"http://{metrics}/metrics")
        except (grpc.RpcError, CannotAsk) as error:
            reason = error.details() if isinstance(error, grpc.Call) else error
            raise DemoFailed(f"{reason}; the server's log ends:\n{_tail(log)}") from None
        finally:
            process.terminate()
            try:
                status = process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        if status:
            raise DemoFailed(f"on SIGTERM the server ended with status {status}; expected 0; its log ends:\n{_tail(log)}")


def _free_addresses() -> tuple[str, str]:
    """Two addresses that nobody listens on; asked for together, since the second might be the first again."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}", f"127.0.0.1:{other.getsockname()[1]}"


def _wait_until_serving(process: subprocess.Popen[bytes], channel: grpc.Channel, log: IO[str]) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)  # its published types know no methods
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise DemoFailed(f"the server did not start (exit status {process.returncode}):\n{_tail(log)}")
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=0.5, wait_for_ready=True)
        except grpc.RpcError:  # not there yet
            continue
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return
        time.sleep(0.05)
    raise DemoFailed(f"the server was not SERVING within {START_SECONDS:g} s; its log ends:\n{_tail(log)}")


def _tail(log: IO[str], lines: int = 12) -> str:
    log.seek(0)
    return "".join(log.readlines()[-lines:]).rstrip()


def ask(served: Served, files: Sequence[Path], truths: Sequence[int], member: str) -> list[Answer]:
    answers = classify_files(served.stub, files, "", pb.DISCLOSURE_EVIDENCE, CALL_SECONDS)
    return [_answer(found, truth, member) for found, truth in zip(answers, truths, strict=True)]


def _answer(found: FileAnswer, truth: int, member: str) -> Answer:
    if found.result.HasField("error"):
        raise DemoFailed(f"{found.file}: {found.result.error.message}")
    seen = found.result.classification
    alone = next((vote for vote in seen.votes if vote.member == member), None)
    if alone is None:
        votes = ", ".join(vote.member for vote in seen.votes)
        raise DemoFailed(f"the tiles attack `{member}`, which has no vote in `{found.ensemble}`; expected one of {votes}")
    verdict = pb.Verdict.Name(seen.verdict).removeprefix("VERDICT_")
    return Answer(seen.class_name, seen.class_index == truth, verdict, alone.class_name, alone.class_index == truth)


def print_head(console: Console, ensemble: pb.Ensemble, tiles: Tiles) -> None:
    attack, version = tiles.attack, ensemble.bundle.version
    members = ", ".join(member.name for member in ensemble.members)
    console.print(f"\n{ensemble.name}: {members} (rule: {ensemble.rule.name}), bundle {ensemble.bundle.name} {version}")
    console.print(
        f"clean: {len(tiles.clean)} real tiles. attacked: the same tiles, no pixel changed by more than {tiles.distance} of 255, "
        f"to fool {attack.member} alone (epsilon = {attack.epsilon:g}/255)."
    )
    if attack.bundle != version:
        console.print(f"They were made on bundle {attack.bundle}, not on the one that is served.", style="yellow")
    console.print()


def print_answers(
    console: Console, names: Sequence[str], answers: Mapping[str, Sequence[Answer]], ensemble: str, member: str
) -> None:
    """Clean and attacked in one table where the terminal is wide enough for it, else in one after the other."""
    together = answers_table(names, answers, ensemble, member, _unicode(console))
    needed = console.measure(together, options=console.options.update_width(1000)).minimum
    parts = [answers] if console.width >= needed else [{side: found} for side, found in answers.items()]
    for part in parts:
        console.print(answers_table(names, part, ensemble, member, _unicode(console)), "")


def answers_table(
    names: Sequence[str], answers: Mapping[str, Sequence[Answer]], ensemble: str, member: str, unicode: bool
) -> Table:
    """A row per tile; its name tells the true class, and a mark whether each answer agrees with it."""
    table = _table()
    table.add_column("tile, named\nfor its class", overflow="fold")
    for side, found in answers.items():  # a verdict may go under its class, a class not under its mark
        widths = (max(len(name) + 2 for name in names) for names in zip(*((a.class_name, a.alone) for a in found), strict=True))
        for heading, width in zip((ensemble, f"{member} alone"), widths, strict=True):
            table.add_column(f"{side}:\n{heading}", overflow="fold", min_width=width)
    for row, name in enumerate(names):
        cells = [Text(name)]
        for found in answers.values():
            answer = found[row]
            answered = _marked(answer.class_name, answer.right, unicode)
            cells += [
                answered.append(" ").append(answer.verdict, VERDICT_STYLES.get(answer.verdict, "")),
                _marked(answer.alone, answer.alone_right, unicode),
            ]
        table.add_row(*cells)
    return table


def _marked(class_name: str, right: bool, unicode: bool) -> Text:
    mark = ("✓" if right else "✗") if unicode else ("+" if right else "x")
    return Text().append(f"{mark} {class_name}", "" if right else "red")


def summary(answers: Mapping[str, Sequence[Answer]], ensemble: str, member: str) -> Table:
    tiles = len(next(iter(answers.values())))
    table = _table(f"of {tiles} tiles", *answers)
    rows = {
        f"{member} alone is wrong": [sum(not a.alone_right for a in found) for found in answers.values()],
        f"{ensemble} is wrong": [sum(not a.right for a in found) for found in answers.values()],
        f"{ensemble} is wrong and accepted": [sum(not (a.right or a.flagged) for a in found) for found in answers.values()],
        f"{ensemble} flags (SUSPECT, REJECTED)": [sum(a.flagged for a in found) for found in answers.values()],
    }
    for heading, counts in rows.items():
        table.add_row(heading, *map(str, counts))
    return table


def moved(before: Series, between: Series, after: Series, ensemble: str) -> Table:
    """By how much the clean and then the attacked tiles raised each time series; those that stayed are left out."""
    table = _table(f'metrics that moved (ensemble="{ensemble}")', "clean", "attacked")
    for series, value in after.items():
        steps = between.get(series, 0.0) - before.get(series, 0.0), value - between.get(series, 0.0)
        if any(steps):
            table.add_row(Text(series), *(f"+{step:g}" for step in steps))
    return table


def _table(heading: str = "", *counts: str) -> Table:
    """Lines would take the width that narrow terminals lack."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    if heading:
        table.add_column(heading, overflow="fold")
    for count in counts:
        table.add_column(count, justify="right")
    return table


def _unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


if __name__ == "__main__":
    sys.exit(main())
