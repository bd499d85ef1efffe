"""`mlserver start FOLDER`, and two answers more: ModelConfig and ModelStatistics, without which perf_analyzer asks nothing.

They are messages kept in FOLDER, the same for every call; what is measured does not pass through here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grpc
import mlserver.server
from mlserver.cli.main import main
from mlserver.grpc import GRPCServer

KEPT = ("ModelConfig", "ModelStatistics")


class AnsweringServer(GRPCServer):  # type: ignore[misc]  # mlserver is not installed where types are checked
    def _create_server(self) -> Any:
        server = super()._create_server()
        handlers: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(_kept(name)) for name in KEPT}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)])
        return server


def _kept(name: str) -> Any:
    answer = Path(sys.argv[-1], name).read_bytes()

    async def handler(_request: bytes, _context: Any) -> bytes:
        return answer

    return handler


if __name__ == "__main__":
    mlserver.server.GRPCServer = AnsweringServer
    sys.argv[0] = "mlserver"
    main()
