"""What can be wrong with a request, and the one table that turns errors into gRPC statuses.

The core raises plain exceptions whose message says what was expected and what came.  Statuses are rich
(google.rpc.Status): BadRequest names the field, RetryInfo says when to come back, ErrorInfo which limit refused.  An error
that is not in the table is ours, not the caller's: it is logged in full and sent as "internal error" with the request's id.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError
from types import MappingProxyType
from typing import NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from service.batcher import DeadlineExceeded, Draining, QueueFull
from service.context import Context

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
DOMAIN = "phalanx"  # of the reasons in google.rpc.ErrorInfo


class InvalidRequest(ValueError):
    """Something in the request is not as expected; `field` is the path to it, such as `images[3].raw.pixels`."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidImage(InvalidRequest):
    """One image cannot be used; `field` is relative to the image."""


class NotDisclosed(InvalidRequest):
    """The caller asks for more of an answer than the configuration lets out."""


class UnknownName(InvalidRequest):
    """Nothing here has this name."""

    def __init__(self, kind: str, name: str, known: Iterable[str], field: str) -> None:
        super().__init__(f"unknown {kind} {name[:80]!r}; expected one of: {', '.join(known)}", field)


class Unauthenticated(Exception):
    """Nobody known here: no credentials, or none that are valid."""


class Forbidden(Exception):
    """The caller is known, and may not do this."""


class TooFast(Exception):
    """The caller has used up its own quota."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class Unfulfilled(Exception):
    """An operator's wish that cannot be fulfilled; all stays as it was."""


class SilentStream(Exception):
    """A stream that kept its place for longer than the configuration allows, and asked nothing."""


class TooManyCalls(Exception):
    """More calls at once than the configuration allows."""

    def __init__(self, limit: int, kind: str = "calls") -> None:
        super().__init__(f"{limit} {kind} are being answered already, which is the limit; come back later")
        self.retry_seconds = 0.1


CODES: Mapping[type[BaseException], grpc.StatusCode] = MappingProxyType(
    {
        Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        Forbidden: grpc.StatusCode.PERMISSION_DENIED,
        NotDisclosed: grpc.StatusCode.PERMISSION_DENIED,
        UnknownName: grpc.StatusCode.NOT_FOUND,
        InvalidImage: grpc.StatusCode.INVALID_ARGUMENT,
        InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
        QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
        TooManyCalls: grpc.StatusCode.RESOURCE_EXHAUSTED,
        TooFast: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Draining: grpc.StatusCode.UNAVAILABLE,
        Unfulfilled: grpc.StatusCode.FAILED_PRECONDITION,
        SilentStream: grpc.StatusCode.ABORTED,
        DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
        CancelledError: grpc.StatusCode.CANCELLED,
    }
)
# What a program is to tell apart where the code is the same: never renamed, as callers compare them.
REASONS: Mapping[type[BaseException], str] = MappingProxyType(
    {QueueFull: "QUEUE_FULL", TooManyCalls: "TOO_MANY_CALLS", TooFast: "QUOTA"}
)


class Failure(NamedTuple):
    """What a caller learns of an error."""

    code: grpc.StatusCode
    message: str
    field: str = ""
    retry_seconds: float | None = None
    reason: str = ""

    @property
    def number(self) -> int:
        """The code as google.rpc.Code has it."""
        return int(code_pb2.Code.Value(self.code.name))


def failure_of(error: BaseException, request_id: str = "none") -> Failure:
    code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), None)
    if code is None:
        log.error("request %s: internal error", request_id, exc_info=error)
        return Failure(grpc.StatusCode.INTERNAL, f"internal error; request id {request_id}")
    if isinstance(error, CancelledError):
        return Failure(code, "the caller gave up")
    retry = getattr(error, "retry_seconds", 1.0 if isinstance(error, Draining) else None)
    return Failure(code, str(error), getattr(error, "field", ""), retry, REASONS.get(type(error), ""))


def rich_status(failure: Failure) -> grpc.Status:
    status = status_pb2.Status(code=failure.number, message=failure.message)
    if failure.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=failure.field, description=failure.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if failure.retry_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(int(failure.retry_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if failure.reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN))
    return rpc_status.to_status(status)


def request_id_of(context: Context) -> str:
    """The caller's x-request-id, or a new one.  Only an error needs it, so nothing is done for it before."""
    for key, value in context.invocation_metadata():
        if key == REQUEST_ID and isinstance(value, str) and re.fullmatch(r"[\w.:/+=-]{1,128}", value):
            return value
    return uuid.uuid4().hex
