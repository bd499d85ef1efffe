"""phalanx.v1.DefenseEnsemble."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import grpc

from service.batcher import Result
from service.codec import Answers, check_number, decode_images, encode_results
from service.config import Scope
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc
from service.servicers.call import Call
from service.servicers.description import describe
from service.servicers.gate import Gate
from service.servicers.inference import Asked, Inference
from service.servicers.stream import answer_stream


class DefenseEnsembleServicer(pb_grpc.DefenseEnsembleServicer):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.classify: Inference[pb.ClassifyRequest, pb.ClassifyResponse] = Inference(
            gate, "Classify", lambda request: request.ensemble, self._read, _only_pixels
        )

    def Classify(self, request: Any, context: grpc.ServicerContext) -> pb.ClassifyResponse:
        return self.classify(request, context)  # an iterator, of which nothing is read: see service/servicers/inference.py

    def ClassifyStream(
        self, request_iterator: Iterator[pb.ClassifyStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ClassifyStreamResponse]:
        return answer_stream(self._gate, request_iterator, context)

    def ListEnsembles(self, request: pb.ListEnsemblesRequest, context: grpc.ServicerContext) -> pb.ListEnsemblesResponse:
        def listed(call: Call) -> pb.ListEnsemblesResponse:
            ensembles = [
                describe(served, call.catalogue, call.caller.disclosure(served.name)) for served in call.catalogue.served.values()
            ]
            return pb.ListEnsemblesResponse(ensembles=ensembles)

        return self._gate.answer("ListEnsembles", "", context, listed, Scope.DESCRIBE)

    def GetEnsemble(self, request: pb.GetEnsembleRequest, context: grpc.ServicerContext) -> pb.GetEnsembleResponse:
        def description(call: Call) -> pb.GetEnsembleResponse:
            served = call.catalogue.find(request.ensemble)
            return pb.GetEnsembleResponse(ensemble=describe(served, call.catalogue, call.caller.disclosure(served.name)))

        return self._gate.answer("GetEnsemble", request.ensemble, context, description, Scope.DESCRIBE)

    def _read(self, request: pb.ClassifyRequest, call: Call) -> Asked[pb.ClassifyResponse]:
        served = call.ensemble(request.ensemble)
        level = call.disclosure(request.disclosure, served)
        check_number(request.images, call.catalogue.limits)
        call.spend(len(request.images))
        began = perf_counter()
        decoded = decode_images(request.images, served.spec, call.catalogue.limits, call.context.is_active)
        call.decoded(served, began)

        def answer(result: Result | None) -> pb.ClassifyResponse:
            began = perf_counter()
            response = pb.ClassifyResponse(
                ensemble=served.name, bundle_version=served.bundle_version, disclosure=pb.Disclosure.ValueType(level)
            )
            encode_results(response.results, decoded, Answers(result, served.names, level) if result else None)
            call.encoded(served, began)
            if decoded.errors:
                self._gate.metrics.image_errors(served.name, grpc.StatusCode.INVALID_ARGUMENT.name, len(decoded.errors))
            return response

        return Asked(served, decoded.pixels, answer)


def _only_pixels(request: pb.ClassifyRequest) -> bool:
    return all(image.WhichOneof("content") == "raw" for image in request.images)
