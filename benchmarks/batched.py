"""The default ensemble behind the real codec and the real batcher, and as little else as a front end can have.

python -m benchmarks.batched 127.0.0.1:50061 CACHE             a server of threads, as Phalanx is
python -m benchmarks.batched 127.0.0.1:50061 CACHE --asyncio   one of asyncio
python -m benchmarks.batched 127.0.0.1:50061 CACHE --native    one of threads, that reads and writes in Rust (`front_end: native`)
python -m benchmarks.batched 127.0.0.1:50061 CACHE --events    the same without a thread for each call: whoever computed answers

A configuration may follow.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pygrpc_native

from benchmarks.processes import read_config
from service.batcher import Result
from service.codec import Answers, Decoded, decode_images, encode_results
from service.config import Disclosure, ServiceConfig
from service.ensembles import load_ensembles
from service.graph_cache import GraphCache
from service.metrics import Metrics
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.servicers.catalogue import Catalogue

SERVICE = "phalanx.v1.DefenseEnsemble"
OPTIONS = [("grpc.so_reuseport", 0)]
HANDLED = pb.ClassifyRequest.FromString, pb.ClassifyResponse.SerializeToString
THREADS = 144  # as many as the server has


class Classifier:
    """What both front ends do with a message."""

    def __init__(self, cache: Path, config: ServiceConfig) -> None:
        catalogue = Catalogue(config, load_ensembles(config, Metrics(), GraphCache(cache)))
        self._served, self._limits = catalogue.default, config.limits
        self.batcher = self._served.loaded.batcher

    def decode(self, request: pb.ClassifyRequest) -> Decoded:
        return decode_images(request.images, self._served.spec, self._limits)

    def encode(self, decoded: Decoded, answers: Answers) -> pb.ClassifyResponse:
        response = pb.ClassifyResponse(ensemble=self._served.name, bundle_version=self._served.bundle_version)
        encode_results(response.results, decoded, answers)
        return response

    def answers(self, result: Result) -> Answers:
        return Answers(result, self._served.names, Disclosure.EVIDENCE)


def serve(address: str, classifier: Classifier, native: bool = False) -> None:
    def answer(request: pb.ClassifyRequest, _: grpc.ServicerContext) -> pb.ClassifyResponse:
        decoded = classifier.decode(request)
        result = classifier.batcher.compute_now(decoded.pixels) or classifier.batcher.submit(decoded.pixels).result()
        return classifier.encode(decoded, classifier.answers(result))

    server = (pygrpc_native if native else grpc).server(ThreadPoolExecutor(THREADS), options=OPTIONS)
    server.add_registered_method_handlers(SERVICE, {"Classify": grpc.unary_unary_rpc_method_handler(answer, *HANDLED)})
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


def serve_events(address: str, classifier: Classifier) -> None:
    """One thread reads calls; a lane's thread writes the answers of its run."""
    front = pygrpc_native.NativeGrpcFront(address, [(f"/{SERVICE}/Classify", False)], io_threads=1)
    front.start()

    def respond(call: int, decoded: Decoded, future: Future[Result]) -> None:
        front.respond(call, classifier.encode(decoded, classifier.answers(future.result())).SerializeToString())

    while (events := front.recv_batch(64)) is not None:
        for kind, call, _, payload, _ in events:
            if kind == pygrpc_native.EVENT_CALL and payload is not None:
                decoded = classifier.decode(pb.ClassifyRequest.FromString(payload))
                classifier.batcher.submit(decoded.pixels).add_done_callback(partial(respond, call, decoded))


async def serve_asyncio(address: str, classifier: Classifier) -> None:
    async def answer(
        request: pb.ClassifyRequest, _: grpc.aio.ServicerContext[pb.ClassifyRequest, pb.ClassifyResponse]
    ) -> pb.ClassifyResponse:
        decoded = classifier.decode(request)
        result = await asyncio.wrap_future(classifier.batcher.submit(decoded.pixels))
        return classifier.encode(decoded, classifier.answers(result))

    server = grpc.aio.server(options=OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(answer, *HANDLED)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Classify": handler}),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


def main(address: str, cache: str, how: str = "", config: str = "") -> None:
    settings = ServiceConfig.model_validate(read_config(Path(config) if config else None))
    classifier = Classifier(Path(cache), settings)
    match how:
        case "--asyncio":
            asyncio.run(serve_asyncio(address, classifier))
        case "--events":
            serve_events(address, classifier)
        case _:
            serve(address, classifier, native=how == "--native")


if __name__ == "__main__":
    main(*sys.argv[1:])
