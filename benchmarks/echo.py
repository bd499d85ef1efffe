"""A bare gRPC server that parses a ClassifyRequest and sends it back: what gRPC and protobuf cost here, nothing else.

python -m benchmarks.echo 127.0.0.1:50061             a server of threads, as Phalanx is
python -m benchmarks.echo 127.0.0.1:50061 --asyncio   one of asyncio
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

METHOD = "/benchmark.Echo/Echo"
OPTIONS = [("grpc.so_reuseport", 0)]
HANDLED = pb.ClassifyRequest.FromString, pb.ClassifyRequest.SerializeToString


def serve(address: str) -> None:
    server = grpc.server(ThreadPoolExecutor(16), options=OPTIONS)
    echo = grpc.unary_unary_rpc_method_handler(lambda request, _: request, *HANDLED)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", {"Echo": echo}),))
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


async def serve_asyncio(address: str) -> None:
    async def answer(request: pb.ClassifyRequest, _: grpc.aio.ServicerContext[object, object]) -> pb.ClassifyRequest:
        return request

    server = grpc.aio.server(options=OPTIONS)
    echo = grpc.unary_unary_rpc_method_handler(answer, *HANDLED)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", {"Echo": echo}),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    if "--asyncio" in sys.argv[2:]:
        asyncio.run(serve_asyncio(sys.argv[1]))
    else:
        serve(sys.argv[1])
