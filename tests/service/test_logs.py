"""What is logged of a call, of an operator's action, and of neither."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from models.ensemble import Verdict
from service import logs
from service.access import token_digest
from service.config import LoggingConfig
from service.connect import Bearer
from service.graph_cache import GraphCache
from service.logs import MOST_A_SECOND, RequestLog
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc
from tests.service.serving import random_pixels, request, serving

KNOWN = {"shop": {"token_sha256": token_digest("shop"), "scopes": ["classify"]}}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a server writes that logs JSON."""
    root, stream = logging.getLogger(), io.StringIO()
    before = root.handlers[:], root.level
    logs.configure(LoggingConfig(), stream=stream)
    yield stream
    root.handlers[:], level = before
    root.setLevel(level)


def lines(log: io.StringIO, event: str = "request") -> list[dict[str, Any]]:
    return [line for line in map(json.loads, log.getvalue().splitlines()) if line["event"] == event]


def test_a_call_is_logged_with_who_asked_what_and_what_came_of_it(tiny_bundle: Path, graphs: GraphCache, log: io.StringIO) -> None:
    with serving(tiny_bundle, graphs, callers=KNOWN, logging={"requests": "all"}) as running:
        stub = pb_grpc.DefenseEnsembleStub(grpc.intercept_channel(running.channel, Bearer("shop")))
        stub.Classify(request(random_pixels(3)), metadata=(("x-request-id", "order-17"),))
        list(stub.ClassifyStream(iter([pb.ClassifyStreamRequest(image=request(random_pixels(1)).images[0])])))
        with pytest.raises(grpc.RpcError):
            running.native.Classify(request(random_pixels(1)))
        with pytest.raises(grpc.RpcError):
            stub.Classify(request(random_pixels(1), "no such thing\n{}"))
    first, stream, stranger, unknown = lines(log)
    expected = {"method": "Classify", "ensemble": "full", "caller": "shop", "request_id": "order-17", "code": "OK", "images": 3}
    assert expected.items() <= first.items()
    assert sum(first["verdicts"].values()) == 3
    assert 0 < first["seconds"] < 10
    assert {"timestamp", "level", "logger"} <= first.keys()
    assert {"method": "ClassifyStream", "caller": "shop", "code": "OK", "images": 1}.items() <= stream.items()
    assert {"caller": "", "code": "UNAUTHENTICATED"}.items() <= stranger.items()
    assert len(stranger["request_id"]) == 32
    assert {"caller": "shop", "code": "PERMISSION_DENIED", "ensemble": ""}.items() <= unknown.items()  # never what a caller wrote


@pytest.mark.parametrize(
    "which, code, verdicts, wanted",
    [
        ("none", "INTERNAL", None, False),
        ("none", "OK", [Verdict.REJECTED], False),
        ("notable", "OK", [Verdict.CLEAN, Verdict.UNSCREENED], False),
        ("notable", "OK", [Verdict.CLEAN, Verdict.SUSPECT], True),
        ("notable", "OK", [Verdict.REJECTED], True),
        ("notable", "OK", None, False),
        ("notable", "DEADLINE_EXCEEDED", None, True),
        ("all", "OK", [Verdict.CLEAN], True),
    ],
)
def test_what_is_worth_a_line(which: str, code: str, verdicts: list[Verdict] | None, wanted: bool) -> None:
    assert RequestLog(which).wants(code, None if verdicts is None else np.array(verdicts)) is wanted


def test_a_flood_of_calls_is_no_flood_of_lines(log: io.StringIO) -> None:
    now = [10.0]
    requests = RequestLog("all", clock=lambda: now[0])
    for _ in range(3 * MOST_A_SECOND):
        requests.write("Classify", "full", "", "id", "UNAUTHENTICATED", 0.001, None)
    assert len(lines(log)) == MOST_A_SECOND
    now[0] += 1
    requests.write("Classify", "full", "", "id", "UNAUTHENTICATED", 0.001, None)
    assert lines(log)[-1]["lines_dropped"] == 2 * MOST_A_SECOND


def test_an_exception_is_one_line_and_an_audit_has_its_fields(log: io.StringIO) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("service.somewhere").exception("it %s", "broke")
    logging.getLogger("service.reload").info("audit: reload by ops", extra={"audit": "reload", "caller": "ops"})
    broke, audit = map(json.loads, log.getvalue().splitlines())
    assert (broke["event"], broke["level"]) == ("it broke", "error")
    assert "ValueError: broken" in broke["exception"]
    assert (audit["audit"], audit["caller"]) == ("reload", "ops")


def test_a_person_gets_lines_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    root, stream = logging.getLogger(), io.StringIO()
    before = root.handlers[:]
    try:
        logs.configure(LoggingConfig(format="console"), stream=stream)
        logging.getLogger("service.server").warning("some %s", "words")
    finally:
        root.handlers[:] = before
    assert "some words" in stream.getvalue()
    assert not stream.getvalue().startswith("{")
