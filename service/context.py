"""What is asked of a call, whoever carries it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol


class Context(Protocol):
    """As grpcio has it in grpc.ServicerContext."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]: ...

    def auth_context(self) -> Mapping[str, Any]: ...

    def peer(self) -> str: ...

    def time_remaining(self) -> float: ...

    def is_active(self) -> bool: ...

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """To be called when the call ends; False where it has ended."""
