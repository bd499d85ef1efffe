"""phalanx.v1.Admin, on a port of its own."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from service.config import Scope
from service.pb.phalanx.v1 import admin_pb2 as pb
from service.pb.phalanx.v1 import admin_pb2_grpc as pb_grpc
from service.reload import Reloaded, Reloader
from service.servicers.gate import Call, Gate


class AdminServicer(pb_grpc.AdminServicer):
    def __init__(self, gate: Gate, reloader: Reloader) -> None:
        self._gate, self._reloader = gate, reloader

    def Reload(self, request: pb.ReloadRequest, context: grpc.ServicerContext) -> pb.ReloadResponse:
        return self._changed("Reload", context, self._reloader.reload)

    def AddEnsemble(self, request: pb.AddEnsembleRequest, context: grpc.ServicerContext) -> pb.ReloadResponse:
        return self._changed("AddEnsemble", context, lambda who: self._reloader.add(who, request.name, request.choice))

    def RemoveEnsemble(self, request: pb.RemoveEnsembleRequest, context: grpc.ServicerContext) -> pb.ReloadResponse:
        return self._changed("RemoveEnsemble", context, lambda who: self._reloader.remove(who, request.name))

    def _changed(self, method: str, context: grpc.ServicerContext, change: Callable[[str], Reloaded]) -> pb.ReloadResponse:
        def work(call: Call) -> pb.ReloadResponse:
            reloaded = change(call.caller.name)
            manifest = reloaded.catalogue.ensembles.bundle.manifest
            return pb.ReloadResponse(
                ensembles=list(reloaded.catalogue.served),
                bundle=manifest.name,
                bundle_version=manifest.version,
                seconds=reloaded.seconds,
            )

        return self._gate.answer(method, "", context, work, Scope.ADMIN)
