"""The client: one connection, four calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TypeVar

import grpc

from phalanx_client import answers, errors
from phalanx_client.answers import Answer, Disclosure, Ensemble, StreamAnswer
from phalanx_client.images import ImageLike, to_message
from phalanx_client.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from phalanx_client.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

TIMEOUT = 30.0  # seconds: a call without a deadline can wait for ever
# Seconds before a call is made once more: a process that dies resets one connection after the other, and one that shuts down
# refuses calls for a moment before it closes them.
PAUSE = 0.3
PATIENCE = 5.0  # seconds that it then waits for a connection
# As large as a server's answers may get: some hundred images with all their evidence, over many classes.
OPTIONS = (("grpc.max_receive_message_length", 64 * 2**20),)

Metadata = tuple[tuple[str, str | bytes], ...]
Request = TypeVar("Request")
Response = TypeVar("Response")


class Client:
    """A connection to one server, opened when first used; safe to share between threads.

    with Client("127.0.0.1:50051") as client:
        for result in client.classify("forest.png", "river.png").results:
            print(result)

    `credentials` are grpcio's, as `grpc.ssl_channel_credentials()` makes them; without them the connection is plain
    text.  `token` is sent with every call, where the server asks for one.  Every call raises PhalanxError where it fails
    as a whole; an image that cannot be classified is an ImageError among the results.  `metadata` goes with one call:
    an `x-request-id`, which the server's log and traces then name, or the `traceparent` of the caller's own trace.

    Where a server that answered before is gone or shuts down (UNAVAILABLE), a call is made once more, over whatever
    connection there is then: a worker or a replica that ends is not noticed.  Streams are not begun again.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        options: Iterable[tuple[str, str | int]] = (),
    ) -> None:
        settings = [*OPTIONS, *options]
        if credentials is None:
            self._channel = grpc.insecure_channel(target, settings)
        else:
            self._channel = grpc.secure_channel(target, credentials, settings)
        self._metadata: Metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._stub = pb_grpc.DefenseEnsembleStub(self._channel)
        self._reached = False  # whether a server ever answered

    def classify(
        self,
        *images: ImageLike,
        ensemble: str = "",
        disclosure: Disclosure = Disclosure.UNSPECIFIED,
        timeout: float | None = TIMEOUT,
        metadata: Metadata = (),
    ) -> Answer:
        """Classify images together: paths, the bytes of image files, or RawPixels.  Ensemble "" is the default."""
        request = pb.ClassifyRequest(
            ensemble=ensemble, images=map(to_message, images), disclosure=pb.Disclosure.ValueType(disclosure)
        )
        return answers.answer(self._call(self._stub.Classify, request, timeout, metadata))

    def classify_stream(
        self,
        images: Iterable[tuple[str, ImageLike]],
        *,
        ensemble: str = "",
        disclosure: Disclosure = Disclosure.UNSPECIFIED,
        timeout: float | None = None,
        metadata: Metadata = (),
    ) -> Iterator[StreamAnswer]:
        """Classify images as they come: pairs of an id of the caller's and an image; answers keep their order.

        `images` is read in a thread of grpcio's.  What it raises (a file that is not there) ends the stream and is
        raised here.
        """
        broken: list[Exception] = []

        def requests() -> Iterator[pb.ClassifyStreamRequest]:
            try:
                for name, image in images:
                    yield pb.ClassifyStreamRequest(
                        id=name,
                        ensemble=ensemble,
                        image=to_message(image),
                        disclosure=pb.Disclosure.ValueType(disclosure),
                    )
            except Exception as error:
                broken.append(error)
                call.cancel()

        call = self._stub.ClassifyStream(requests(), timeout=timeout, metadata=self._metadata + metadata)
        try:
            for message in call:
                yield answers.stream_answer(message)
        except grpc.RpcError as error:
            raise (broken[0] if broken else errors.from_call(error)) from None
        finally:
            call.cancel()  # a caller who stops early leaves no stream behind; after the end this does nothing

    def list_ensembles(self, *, timeout: float | None = TIMEOUT) -> tuple[Ensemble, ...]:
        """Everything the server answers for; its default comes first."""
        response = self._call(self._stub.ListEnsembles, pb.ListEnsemblesRequest(), timeout)
        return tuple(answers.ensemble(message) for message in response.ensembles)

    def get_ensemble(self, ensemble: str = "", *, timeout: float | None = TIMEOUT) -> Ensemble:
        response = self._call(self._stub.GetEnsemble, pb.GetEnsembleRequest(ensemble=ensemble), timeout)
        return answers.ensemble(response.ensemble)

    def _call(self, method: Callable[..., Response], request: Request, timeout: float | None, metadata: Metadata = ()) -> Response:
        """One unary call; once more where a server that answered before is not available."""
        end = None if timeout is None else time.monotonic() + timeout
        try:
            answer = method(request, timeout=timeout, metadata=self._metadata + metadata)
        except grpc.RpcError as error:
            gone = error.code() is grpc.StatusCode.UNAVAILABLE
            if not gone or not self._reached:
                self._reached |= not gone
                raise errors.from_call(error) from None
            time.sleep(PAUSE)
            try:
                left = PATIENCE if end is None else min(PATIENCE, end - time.monotonic())
                grpc.channel_ready_future(self._channel).result(max(0.0, left))
                left_of_all = None if end is None else max(0.0, end - time.monotonic())
                answer = method(request, timeout=left_of_all, metadata=self._metadata + metadata)
            except grpc.FutureTimeoutError:  # nobody came back
                raise errors.from_call(error) from None
            except grpc.RpcError as again:
                raise errors.from_call(again) from None
        self._reached = True
        return answer

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
