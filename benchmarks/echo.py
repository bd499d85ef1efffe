"""A bare gRPC server that parses a ClassifyRequest and sends it back: what gRPC and protobuf cost here, nothing else.

python -m benchmarks.echo 127.0.0.1:50061
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb

METHOD = "/benchmark.Echo/Echo"


def main(address: str) -> None:
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    echo = grpc.unary_unary_rpc_method_handler(
        lambda request, _: request, pb.ClassifyRequest.FromString, pb.ClassifyRequest.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", {"Echo": echo}),))
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1])
