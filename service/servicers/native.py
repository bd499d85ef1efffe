"""phalanx.v1.DefenseEnsemble."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from time import perf_counter

import grpc

from service.codec import Answers, decode_images, disclosure, encode_results
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc
from service.servicers.description import describe
from service.servicers.gate import Gate, compute
from service.servicers.stream import answer_stream


class DefenseEnsembleServicer(pb_grpc.DefenseEnsembleServicer):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        ensembles = [describe(served, gate) for served in gate.served.values()]
        self._descriptions = {ensemble.name: ensemble for ensemble in ensembles}

    def Classify(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> pb.ClassifyResponse:
        return self._gate.answer("Classify", request.ensemble, context, partial(self._classify, request, context))

    def ClassifyStream(
        self, request_iterator: Iterator[pb.ClassifyStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ClassifyStreamResponse]:
        return answer_stream(self._gate, request_iterator, context)

    def ListEnsembles(self, request: pb.ListEnsemblesRequest, context: grpc.ServicerContext) -> pb.ListEnsemblesResponse:
        return pb.ListEnsemblesResponse(ensembles=self._descriptions.values())

    def GetEnsemble(self, request: pb.GetEnsembleRequest, context: grpc.ServicerContext) -> pb.GetEnsembleResponse:
        def description() -> pb.GetEnsembleResponse:
            return pb.GetEnsembleResponse(ensemble=self._descriptions[self._gate.find(request.ensemble).name])

        return self._gate.answer("GetEnsemble", request.ensemble, context, description)

    def _classify(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> pb.ClassifyResponse:
        served, limits = self._gate.find(request.ensemble), self._gate.limits
        level = disclosure(request.disclosure, limits.disclosure)
        began = perf_counter()
        decoded = decode_images(request.images, served.spec, limits, context.is_active)
        served.metrics.decode(perf_counter() - began)
        result = compute(served, decoded.pixels, context) if len(decoded.pixels) else None
        began = perf_counter()
        response = pb.ClassifyResponse(
            ensemble=served.name, bundle_version=served.bundle_version, disclosure=pb.Disclosure.ValueType(level)
        )
        encode_results(response.results, decoded, Answers(result, served.names, level) if result else None)
        served.metrics.encode(perf_counter() - began)
        if decoded.errors:
            self._gate.metrics.image_errors(served.name, grpc.StatusCode.INVALID_ARGUMENT.name, len(decoded.errors))
        return response
