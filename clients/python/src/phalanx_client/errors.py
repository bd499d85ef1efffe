"""What a call raises when the server, or the way to it, refuses it."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from phalanx_client.pb import status_pb2

_DETAILS = "grpc-status-details-bin"
_DOMAIN = "phalanx"


class PhalanxError(Exception):
    """A refused call: gRPC's code, the server's sentence and, where it says so, which fields, when to try again, what ran out."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        fields: Mapping[str, str] | None = None,
        retry_seconds: float | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.fields = dict(fields or {})  # path of a field in the request -> what is wrong with it
        self.retry_seconds = retry_seconds
        self.reason = reason  # of RESOURCE_EXHAUSTED: QUEUE_FULL, TOO_MANY_CALLS or QUOTA; a later server may know others


def from_call(error: grpc.RpcError) -> PhalanxError:
    """From what a call raised."""
    fields: dict[str, str] = {}
    retry_seconds: float | None = None
    reason = ""
    for detail in _details(error):
        match detail.type_url.rpartition("/")[2]:
            case "google.rpc.BadRequest":
                bad = status_pb2.BadRequest.FromString(detail.value)
                fields |= {violation.field: violation.description for violation in bad.field_violations}
            case "google.rpc.RetryInfo":
                delay = status_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_seconds = delay.seconds + delay.nanos / 1e9
            case "google.rpc.ErrorInfo":
                info = status_pb2.ErrorInfo.FromString(detail.value)
                reason = info.reason if info.domain == _DOMAIN else ""
    return PhalanxError(error.code(), error.details() or "", fields, retry_seconds, reason)


def _details(error: grpc.RpcError) -> list[status_pb2.Detail]:
    for entry in error.trailing_metadata() or ():
        if entry.key == _DETAILS and isinstance(entry.value, bytes):
            return list(status_pb2.Status.FromString(entry.value).details)
    return []
