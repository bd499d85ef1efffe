"""A bare gRPC server that parses a ClassifyRequest and sends it back: what gRPC and protobuf cost here, nothing else.

python -m benchmarks.echo 127.0.0.1:50061                          a server of threads, as Phalanx is
python -m benchmarks.echo 127.0.0.1:50061 --asyncio                one of asyncio
python -m benchmarks.echo 127.0.0.1:50061 --graph CACHE [CONFIG]   one of threads that runs the default ensemble's graph in between
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from benchmarks.bare import bare_graph
from benchmarks.processes import random_images, read_config
from service.config import ServiceConfig
from service.engine import open_session
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

METHOD = "/benchmark.Echo/Echo"
OPTIONS = [("grpc.so_reuseport", 0)]
HANDLED = pb.ClassifyRequest.FromString, pb.ClassifyRequest.SerializeToString


def serve(address: str, in_between: Callable[[], object] = lambda: None) -> None:
    def answer(request: pb.ClassifyRequest, _: grpc.ServicerContext) -> pb.ClassifyRequest:
        in_between()
        return request

    server = grpc.server(ThreadPoolExecutor(16), options=OPTIONS)
    echo = grpc.unary_unary_rpc_method_handler(answer, *HANDLED)
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


def graph(cache: str, config: Path | None) -> Callable[[], object]:
    """One run of the default ensemble's graph on one image."""
    settings = ServiceConfig.model_validate(read_config(config))
    bare = bare_graph(settings, Path(cache))
    session, feeds = open_session(bare.content, settings.device), bare.feeds(random_images(1, bare.shape))
    return lambda: session.run(None, feeds)


def main(address: str, how: str = "", cache: str = "", config: str = "") -> None:
    match how:
        case "--asyncio":
            asyncio.run(serve_asyncio(address))
        case "--graph":
            serve(address, graph(cache, Path(config) if config else None))
        case _:
            serve(address)


if __name__ == "__main__":
    main(*sys.argv[1:])
