"""phalanx.v1.Admin, on a port of its own."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable

import grpc

from service.config import Scope
from service.errors import Forbidden, Unauthenticated
from service.pb.phalanx.v1 import admin_pb2 as pb
from service.pb.phalanx.v1 import admin_pb2_grpc as pb_grpc
from service.reload import Changes, Reloaded
from service.seldom import Seldom
from service.servicers.call import Call
from service.servicers.gate import Gate

log = logging.getLogger(__name__)

QUIET_SECONDS = 1.0  # between two lines about one caller's refusals: whoever tries all the time must not fill the disk


class AdminServicer(pb_grpc.AdminServicer):
    def __init__(self, gate: Gate, changes: Changes) -> None:
        self._gate, self._changes = gate, changes
        self._refused: defaultdict[str, Seldom] = defaultdict(Seldom)  # by caller; all strangers are one

    def Reload(self, request: pb.ReloadRequest, context: grpc.ServicerContext) -> pb.ReloadResponse:
        return self._changed("Reload", context, self._changes.reload)

    def AddEnsemble(self, request: pb.AddEnsembleRequest, context: grpc.ServicerContext) -> pb.ReloadResponse:
        return self._changed("AddEnsemble", context, lambda who: self._changes.add(who, request.name, request.choice))

    def RemoveEnsemble(self, request: pb.RemoveEnsembleRequest, context: grpc.ServicerContext) -> pb.ReloadResponse:
        return self._changed("RemoveEnsemble", context, lambda who: self._changes.remove(who, request.name))

    def _changed(self, method: str, context: grpc.ServicerContext, change: Callable[[str], Reloaded]) -> pb.ReloadResponse:
        def work(call: Call) -> pb.ReloadResponse:
            done = change(call.caller.name)
            its = done.offered
            return pb.ReloadResponse(
                ensembles=its.ensembles, bundle=its.bundle, bundle_version=its.bundle_version, seconds=done.seconds
            )

        self._audit_refusal(method, context)
        return self._gate.answer(method, "", context, work, Scope.ADMIN)

    def _audit_refusal(self, method: str, context: grpc.ServicerContext) -> None:
        """A line about who may not do this, whom the gate will refuse."""
        who = ""
        try:
            caller = self._gate.identify(context).caller
            who = caller.name
            caller.check(Scope.ADMIN, method)
        except (Forbidden, Unauthenticated) as error:
            if count := self._refused[who].due(1, QUIET_SECONDS):
                fields = {"audit": method, "caller": who, "peer": context.peer(), "outcome": "refused", "count": count}
                said = "audit: %s by %s from %s refused, %d since the last such line: %s"
                log.warning(said, method, who or "a stranger", context.peer(), count, error, extra=fields)
