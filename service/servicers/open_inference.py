"""inference.GRPCInferenceService: the same ensembles through the Open Inference Protocol, an ensemble for a model.

Clients of the protocol take a model's version for a small number, so it is always "1"; the bundle's version is in the
parameters of an answer and of the configuration.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any

import grpc

from service.batcher import Result
from service.config import Scope
from service.errors import UnknownName
from service.own_version import own_version
from service.pb.inference import open_inference_pb2 as pb
from service.pb.inference import open_inference_pb2_grpc as pb_grpc
from service.servicers.call import Call
from service.servicers.catalogue import Served
from service.servicers.gate import Gate
from service.servicers.inference import Asked, Inference
from service.servicers.statistics import statistics
from service.tensors import DATATYPE, INPUT, TYPES, read_input

MODEL_VERSION = "1"
PLATFORM = "phalanx_onnxruntime"


class OpenInferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.infer: Inference[pb.ModelInferRequest, pb.ModelInferResponse] = Inference(
            gate, "ModelInfer", lambda request: request.model_name, _read, lambda request: bool(request.raw_input_contents)
        )

    def ServerLive(self, request: pb.ServerLiveRequest, context: grpc.ServicerContext) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: pb.ServerReadyRequest, context: grpc.ServicerContext) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._gate.ready)

    def ModelReady(self, request: pb.ModelReadyRequest, context: grpc.ServicerContext) -> pb.ModelReadyResponse:
        def readiness(call: Call) -> pb.ModelReadyResponse:
            if Scope.DESCRIBE not in call.caller.scopes:
                call.caller.check_ensemble(request.name)
            _find(call, request.name, request.version, "name", "version")
            return pb.ModelReadyResponse(ready=self._gate.ready)

        return self._gate.answer("ModelReady", request.name, context, readiness)

    def ServerMetadata(self, request: pb.ServerMetadataRequest, context: grpc.ServicerContext) -> pb.ServerMetadataResponse:
        def metadata(_: Call) -> pb.ServerMetadataResponse:
            extensions = ["model_configuration", "statistics"]
            return pb.ServerMetadataResponse(name="phalanx", version=own_version(), extensions=extensions)

        return self._gate.answer("ServerMetadata", "", context, metadata)

    def ModelMetadata(self, request: pb.ModelMetadataRequest, context: grpc.ServicerContext) -> pb.ModelMetadataResponse:
        return self._gate.answer("ModelMetadata", request.name, context, partial(_metadata, request), Scope.DESCRIBE)

    def ModelConfig(self, request: pb.ModelConfigRequest, context: grpc.ServicerContext) -> pb.ModelConfigResponse:
        return self._gate.answer("ModelConfig", request.name, context, partial(_configuration, request), Scope.DESCRIBE)

    def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: grpc.ServicerContext) -> pb.ModelStatisticsResponse:
        def counted(call: Call) -> pb.ModelStatisticsResponse:
            served = call.catalogue.served.values()
            found = [_find(call, request.name, request.version, "name", "version")] if request.name else served
            return pb.ModelStatisticsResponse(model_stats=[statistics(each, self._gate, MODEL_VERSION) for each in found])

        return self._gate.answer("ModelStatistics", request.name, context, counted, Scope.ADMIN)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> pb.ModelInferResponse:
        return self.infer(request, context)  # an iterator, of which nothing is read: see service/servicers/inference.py


def _read(request: pb.ModelInferRequest, call: Call) -> Asked[pb.ModelInferResponse]:
    call.caller.check_ensemble(request.model_name)
    served = _find(call, request.model_name, request.model_version, "model_name", "model_version")
    chosen = served.outputs[call.caller.disclosure(served.name)].requested(request.outputs)
    began = perf_counter()
    images = read_input(request, served.spec, call.catalogue.limits)
    call.decoded(served, began)
    call.spend(len(images))

    def answer(result: Result | None) -> pb.ModelInferResponse:
        assert result is not None, "there is an image in every request that can be read"
        began = perf_counter()
        response = pb.ModelInferResponse(model_name=served.name, model_version=MODEL_VERSION, id=request.id)
        response.parameters["bundle_version"].string_param = served.bundle_version
        chosen.write(response, result)
        call.encoded(served, began)
        return response

    return Asked(served, images, answer)


def _metadata(request: pb.ModelMetadataRequest, call: Call) -> pb.ModelMetadataResponse:
    served = _find(call, request.name, request.version, "name", "version")
    tensor = pb.ModelMetadataResponse.TensorMetadata
    outputs = served.outputs[call.caller.disclosure(served.name)].all
    return pb.ModelMetadataResponse(
        name=served.name,
        versions=[MODEL_VERSION],
        platform=PLATFORM,
        inputs=[tensor(name=INPUT, datatype=DATATYPE, shape=[-1, *served.spec.shape])],
        outputs=[tensor(name=output.name, datatype=output.datatype, shape=[-1, *output.shape]) for output in outputs],
    )


def _configuration(request: pb.ModelConfigRequest, call: Call) -> pb.ModelConfigResponse:
    served, batching = _find(call, request.name, request.version, "name", "version"), call.catalogue.config.batching
    outputs = served.outputs[call.caller.disclosure(served.name)].all
    config = pb.ModelConfig(
        name=served.name,
        platform=PLATFORM,
        backend="phalanx",
        max_batch_size=call.catalogue.limits.max_images_per_request,
        input=[pb.ModelInput(name=INPUT, data_type=pb.TYPE_UINT8, format=pb.ModelInput.FORMAT_NHWC, dims=served.spec.shape)],
        output=[
            # one number per image has no dimension of its own; the extension writes [1]
            pb.ModelOutput(name=output.name, data_type=TYPES[output.datatype], dims=output.shape or [1])
            for output in outputs
        ],
        dynamic_batching=pb.ModelDynamicBatching(
            preferred_batch_size=[min(batching.max_batch_size, served.loaded.engine.most_at_once)],
            max_queue_delay_microseconds=int(batching.max_delay_ms * 1000),
            preserve_ordering=True,
        ),
    )
    parameters = {"bundle_version": served.bundle_version, "classes": "\n".join(served.names.classes)}
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return pb.ModelConfigResponse(config=config)


def _find(call: Call, name: str, wanted: str, name_field: str, version_field: str) -> Served:
    if name not in call.catalogue.served:  # here an empty name is a mistake and not the default
        raise UnknownName("model", name, call.catalogue.served, name_field)
    if wanted not in ("", MODEL_VERSION):
        raise UnknownName("version", wanted, [MODEL_VERSION], version_field)
    return call.catalogue.served[name]
