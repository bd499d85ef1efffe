"""`front_end: native`: messages are carried by a server in Rust (pygrpc-native), and a call that classifies has no thread.

One thread takes such calls in and queues their images, and whoever computes a run writes its answers. What takes time to read
(files, large messages) is read by a thread of the pool; one of these answers a caller who is alone, too, and computes in place. All
other methods are grpcio's, on a socket of ours behind the same port.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from pygrpc_native import EVENT_CALL, EVENT_CANCEL, NativeGrpcFront

from service.errors import Failure, rich_status
from service.servicers.inference import Inference
from service.servicers.malformed import Malformed, lenient

log = logging.getLogger(__name__)

Method = tuple[Callable[[bytes], Any], Inference[Any, Any]]  # how its messages are parsed, and what it does
Tell = Callable[[Message | Failure], None]
AT_ONCE = 64  # calls that are taken in together
QUICKLY_READ = 65_536  # bytes of a message
LOOK_SECONDS = 0.01  # how often an end looks whether the last calls are answered
NO_DEADLINE = float(2**63)  # seconds left, as grpcio says it
ENDING = Failure(grpc.StatusCode.UNAVAILABLE, "this server is shutting down", retry_seconds=1.0)
INTERNAL = Failure(grpc.StatusCode.INTERNAL, "internal error")


class NativeServer:
    """As much of grpc.Server as this service uses."""

    def __init__(self, pool: ThreadPoolExecutor, options: Sequence[tuple[str, int]]) -> None:
        self._pool, self._options = pool, dict(options)
        self._rest = grpc.server(pool, options=options)
        self._folder = Path(tempfile.mkdtemp(prefix="phalanx-"))  # of the socket
        self._front: NativeGrpcFront | None = None
        self._methods: dict[str, Method] = {}  # by path
        self._calls: dict[int, _Context] = {}
        self._ending = False

    def add_inference(self, service: str, parse: Callable[[bytes], Message], inference: Inference[Any, Any]) -> None:
        """A method of the service that is answered without grpcio."""
        self._methods[f"/{service}/{inference.method}"] = (lenient(parse), inference)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        self._rest.add_registered_method_handlers(service, dict(handlers))

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._rest.add_generic_rpc_handlers(tuple(handlers))

    def add_insecure_port(self, address: str) -> int:
        """The port it is; RuntimeError where it cannot be had."""
        try:
            self._front = NativeGrpcFront(
                address,
                [],
                io_threads=1,
                call_details=True,
                keepalive_time_ms=self._options["grpc.keepalive_time_ms"],
                keepalive_timeout_ms=self._options["grpc.keepalive_timeout_ms"],
                keepalive_permit_without_calls=False,
                reuse_port=bool(self._options["grpc.so_reuseport"]),
                metrics=True,  # an end asks them what is still to be sent
            )
        except OSError as error:
            raise RuntimeError(f"cannot have {address}: {error}") from error
        return self._front.bound_port

    def start(self) -> None:
        """Raises OSError where a socket cannot be had."""
        assert self._front is not None, "a server that is started has a port"
        socket = self._folder / "rest.sock"
        try:
            self._rest.add_insecure_port(f"unix:{socket}")
        except RuntimeError as error:
            raise OSError(f"{socket}: {error}") from error
        self._rest.start()
        self._front.set_fallback(str(socket))
        self._front.add_methods([(path, False) for path in self._methods])
        self._front.start()
        threading.Thread(target=self._take_in, args=(self._front,), name="native-front", daemon=True).start()

    def stop(self, grace: float | None) -> threading.Event:
        """Refuse calls from now on, wait so long for those that are under way, then cancel them; set when all that is done."""
        self._ending, done = True, threading.Event()
        rest, until = self._rest.stop(grace), time.monotonic() + (grace or 0.0)

        def end() -> None:
            rest.wait()
            under_way = True
            while under_way and time.monotonic() < until:
                under_way = bool(self._calls or self._unsent())
                time.sleep(LOOK_SECONDS)  # after the last one, too: it may be on its way to the socket
            if self._front is not None:
                self._front.close()
            for context in tuple(self._calls.values()):
                context.end()
            shutil.rmtree(self._folder, ignore_errors=True)
            done.set()

        threading.Thread(target=end, name="native-front-end", daemon=True).start()
        return done

    def _unsent(self) -> int:
        """Calls of which something is still to be sent, refused ones included: closing the front would cut answers off."""
        told = self._front.metrics() if self._front is not None else None
        methods = told["methods"].values() if told is not None else ()
        return sum(each["started"] - sum(ended["count"] for ended in each["status"].values()) for each in methods)

    def _take_in(self, front: NativeGrpcFront) -> None:
        methods = tuple(self._methods.values())
        while (events := front.recv_batch_details(AT_ONCE)) is not None:
            for kind, number, method, content, _, details in events:
                if kind == EVENT_CANCEL:
                    if (context := self._calls.get(number)) is not None:
                        context.end()
                elif kind == EVENT_CALL and content is not None and details is not None:
                    context = _Context(*details)
                    self._calls[number] = context
                    try:
                        self._begin(methods[method], content, context, partial(self._tell, front, number))
                    except Exception:
                        log.exception("a call that could not be begun")
                        self._tell(front, number, INTERNAL)

    def _begin(self, method: Method, content: bytes, context: _Context, tell: Tell) -> None:
        """Queue the call's images, or have a thread answer it."""
        parse, inference = method
        most = self._options["grpc.max_receive_message_length"]
        if self._ending:
            tell(ENDING)
        elif len(content) > most:
            said = f"received message larger than max ({len(content)} vs. {most})"  # as by grpcio
            tell(Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, said))
        elif len(content) > QUICKLY_READ:
            self._pool.submit(lambda: tell(_answered(inference, lambda: parse(content), context)))
        elif isinstance(request := parse(content), Malformed):
            tell(inference.refused(request.error, context))
        elif len(self._calls) > 1 and inference.quick(request):
            inference.later(request, context, tell)
        else:
            self._pool.submit(lambda: tell(_answered(inference, lambda: request, context)))

    def _tell(self, front: NativeGrpcFront, number: int, outcome: Message | Failure) -> None:
        """Write the answer; nobody may be there any more to read it. Called where nobody would hear of an error."""
        context = self._calls.pop(number, None)
        try:
            if isinstance(outcome, Failure):
                status = rich_status(outcome)
                front.fail(number, outcome.number, outcome.message, trailing_metadata=list(status.trailing_metadata))
            else:
                front.respond(number, outcome.SerializeToString())
        except Exception:
            log.exception("an answer that could not be written")
            front.fail(number, INTERNAL.number, INTERNAL.message)
        if context is not None:
            context.end()


def _answered(inference: Inference[Any, Any], read: Callable[[], Any], context: _Context) -> Message | Failure:
    """In a thread of the pool, which has nobody to raise to."""
    try:
        request = read()
        if isinstance(request, Malformed):
            return inference.refused(request.error, context)
        outcome: Message | Failure = inference.now(request, context)
    except Exception:  # with no memory for the message, say: a call that is not told anything would hold up the end, too
        log.exception("a call that could not be begun")
        return INTERNAL
    return outcome


class _Context:
    """Of one call, as service.context has it."""

    __slots__ = ("_callbacks", "_deadline", "_ended", "_lock", "_metadata", "_peer")

    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...], peer: str, time_remaining: float | None) -> None:
        self._metadata, self._peer = metadata, peer
        self._deadline = None if time_remaining is None else time.monotonic() + time_remaining
        self._lock, self._ended = threading.Lock(), False
        self._callbacks: list[Callable[[], None]] = []

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return self._metadata

    def auth_context(self) -> Mapping[str, Any]:
        return {}  # plain text has no certificates

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> float:
        return NO_DEADLINE if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def is_active(self) -> bool:
        return not self._ended

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if not self._ended:
                self._callbacks.append(callback)
            return not self._ended

    def end(self) -> None:
        """It is answered, or its caller is gone."""
        with self._lock:
            if self._ended:
                return
            self._ended, callbacks = True, self._callbacks
        for callback in callbacks:
            callback()
