"""An ensemble as a caller of a running server has it: described, asked, and told as much as is disclosed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Self, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from models.ensemble import Ensemble
from models.manifest import Manifest
from service.config import Disclosure
from service.connect import TOKEN, with_token
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc
from training.refused import TrainingRefused

CHANNEL = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
CALL_SECONDS, PATIENCE = 60.0, 30.0
FIRST_WAIT, LONGEST_WAIT = 0.05, 5.0  # seconds between two tries, doubled every time
TRANSIENT = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
REQUEST_BYTES, IMAGE_BYTES = 4096, 64  # of a request beside its images, and of an image beside its pixels
ACCEPTED = (pb.VERDICT_CLEAN, pb.VERDICT_UNSCREENED)
FLIGHTS = 8  # images attacked, or requests made, at once

Pixels = NDArray[np.uint8]
Request = TypeVar("Request")
Response = TypeVar("Response")


class EndpointRefused(TrainingRefused):
    """No server, one that serves something else, or one that tells too little."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What n images were answered; None is what was not disclosed, and then every answer passes for an acceptance."""

    label: NDArray[np.int64]  # (n,)
    accepted: NDArray[np.bool_]  # (n,), CLEAN or UNSCREENED
    p_value: NDArray[np.float32] | None  # (n,); None without detectors, too
    probabilities: NDArray[np.float32] | None  # (n, k)


class Endpoint:
    """One ensemble of a running server, asked at one level of disclosure; safe to share between threads.

    A server that wants a token is sent what PHALANX_TOKEN holds. Where the server is busy or away, a call is tried again
    for `patience` seconds.
    """

    def __init__(
        self, address: str, ensemble: str = "", disclosure: Disclosure = Disclosure.VERDICT, patience: float = PATIENCE
    ) -> None:
        self.address, self.disclosure, self.patience = address, disclosure, patience
        self._channel = with_token(grpc.insecure_channel(address, CHANNEL), os.environ.get(TOKEN, ""))
        self._stub = pb_grpc.DefenseEnsembleStub(self._channel)
        self._pool = ThreadPoolExecutor(FLIGHTS, thread_name_prefix="endpoint")
        try:
            self.served = self._call(self._stub.GetEnsemble, pb.GetEnsembleRequest(ensemble=ensemble)).ensemble
            self.expect_disclosure(disclosure)
            self._most = self._images_per_request()
        except BaseException:
            self.close()
            raise

    @property
    def ensemble(self) -> str:
        """Its name; that of the server's default where none was asked for."""
        return self.served.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the images that are taken as they are."""
        return self.served.input.height, self.served.input.width, self.served.input.channels

    def answers(self, pixels: Pixels, disclosure: Disclosure | None = None) -> Answers:
        """Of images (n, h, w, c), in as few requests as the server's limits allow, several of them at once."""
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.shape:
            raise EndpointRefused(
                f"{self.address}: {self.ensemble} takes uint8 images {self.shape}, got {pixels.dtype} {pixels.shape[1:]}"
            )
        level = self.disclosure if disclosure is None else disclosure
        parts = [pixels[i : i + self._most] for i in range(0, len(pixels), self._most)]
        ask = partial(self._ask, level)
        found = list(chain.from_iterable(self._pool.map(ask, parts) if len(parts) > 1 else map(ask, parts)))
        told, screened = level >= Disclosure.PROBABILITIES, bool(self.served.detectors)
        return Answers(
            np.array([each.class_index for each in found], np.int64),
            np.array([level < Disclosure.VERDICT or each.verdict in ACCEPTED for each in found], np.bool_),
            np.array([each.p_value for each in found], np.float32) if told and screened else None,
            np.array([each.probabilities for each in found], np.float32) if told else None,
        )

    def expect_disclosure(self, level: Disclosure) -> None:
        """EndpointRefused where the server tells less."""
        limit = self.served.limits.disclosure
        if level > limit:
            allowed = Disclosure(limit).name.lower()
            raise EndpointRefused(
                f"{self.address} discloses {allowed} at most, expected {level.name.lower()}: its `limits: disclosure` says so"
            )

    def expect_bundle(self, manifest: Manifest) -> None:
        """EndpointRefused unless the server answers for this very bundle."""
        served = self.served
        compared = {
            "classes": (", ".join(manifest.classes), ", ".join(served.classes)),
            "images": (manifest.input.shape, self.shape),
            "bundle": (f"{manifest.name} {manifest.version}", f"{served.bundle.name} {served.bundle.version}"),
        }
        for what, (expected, got) in compared.items():
            if expected != got:
                raise EndpointRefused(f"{self.address} does not serve what was attacked: {what}: expected {expected}, got {got}")

    def expect_ensemble(self, ensemble: Ensemble) -> None:
        """EndpointRefused unless this is what the server composed of its bundle, whatever it is called there."""
        if (expected := _parts_of(ensemble)) != (got := parts_served(self.served)):
            raise EndpointRefused(f"{self.address}: expected {self.ensemble} to be {expected}, got {got}")

    def close(self) -> None:
        """Let go of the connection."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _images_per_request(self) -> int:
        limits, size = self.served.limits, math.prod(self.shape) + IMAGE_BYTES
        room = (limits.max_message_bytes - REQUEST_BYTES) // size
        if room < 1:
            raise EndpointRefused(
                f"{self.address} takes messages of {limits.max_message_bytes} bytes, expected {REQUEST_BYTES + size} or more"
            )
        return min(room, limits.max_images_per_request)

    def _ask(self, level: Disclosure, pixels: Pixels) -> list[pb.Classification]:
        """One request; whose answers are of the bundle that was there in the beginning."""
        h, w, c = self.shape
        request = pb.ClassifyRequest(ensemble=self.ensemble, disclosure=pb.Disclosure.ValueType(level))
        for image in pixels:
            request.images.add(raw=pb.RawImage(pixels=image.tobytes(), height=h, width=w, channels=c))
        response = self._call(self._stub.Classify, request)
        if response.bundle_version != (version := self.served.bundle.version):
            raise EndpointRefused(f"{self.address}: expected bundle version {version} to the end, got {response.bundle_version}")
        for i, result in enumerate(response.results):
            if result.HasField("error"):
                raise EndpointRefused(f"{self.address}: expected an answer to image {i}, got {result.error.message}")
        return [result.classification for result in response.results]

    def _call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        wait, left = FIRST_WAIT, self.patience
        while True:
            try:
                return method(request, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                call: object = error  # grpcio's errors are calls as well; its types do not say so
                if not isinstance(call, grpc.Call):
                    raise
                if call.code() not in TRANSIENT or left <= 0:
                    raise EndpointRefused(self._sentence(call)) from None
            time.sleep(min(wait, left))
            wait, left = min(2 * wait, LONGEST_WAIT), left - wait

    def _sentence(self, call: grpc.Call) -> str:
        if call.code() is grpc.StatusCode.UNAVAILABLE:
            return f"no server answers at {self.address} ({call.details()}); `phalanx serve` starts one"
        return f"{self.address}: {call.code().name}: {call.details()}"


def _parts_of(ensemble: Ensemble) -> str:
    voters = [(voter.name, voter.weight) for voter in ensemble.voters]
    detectors = [(detector.name, detector.member or "") for detector in ensemble.detectors if detector.decides]
    return _parts(voters, (ensemble.rule, ensemble.alpha, ensemble.scale), detectors, ensemble.masks)


def parts_served(served: pb.Ensemble) -> str:
    voters = [(member.name, member.weight) for member in served.members if member.votes]
    detectors = [(detector.name, detector.member) for detector in served.detectors if detector.decides]
    rule, masks = served.rule, "fresh" if served.masks == pb.MASKS_FRESH else "fixed"
    return _parts(voters, (rule.name, rule.alpha, rule.scale), detectors, masks)


def _parts(
    voters: Iterable[tuple[str, float]], rule: tuple[str, float, float], detectors: Iterable[tuple[str, str]], masks: str
) -> str:
    """What decides an answer, as one comparable line."""
    votes = " + ".join(f"{weight:g} {name}" for name, weight in sorted(voters))
    screens = ", ".join(f"{name} {member}".strip() for name, member in detectors) or "no detector"
    return f"{votes} ({rule[0]}, alpha {rule[1]:g}, scale {rule[2]:g}; {screens}; {masks} masks)"
