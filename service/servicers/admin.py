"""phalanx.v1.Admin, on a port of its own."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from service.config import Scope
from service.pb.phalanx.v1 import admin_pb2 as pb
from service.pb.phalanx.v1 import admin_pb2_grpc as pb_grpc
from service.reload import Changes, Reloaded
from service.servicers.call import Call
from service.servicers.gate import Gate


class AdminServicer(pb_grpc.AdminServicer):
    def __init__(self, gate: Gate, changes: Changes) -> None:
        self._gate, self._changes = gate, changes

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

        return self._gate.answer(method, "", context, work, Scope.ADMIN)
