"""What only a package beyond the base dependencies can do: asked for here, so that all who miss one are told alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.config import ServiceConfig

if TYPE_CHECKING:
    from service.native_front import NativeServer
    from service.tracing import Tracing


class MissingExtra(RuntimeError):
    """The configuration asks for an extra that is not installed."""

    def __init__(self, asked: str, extra: str) -> None:
        super().__init__(f"{asked} needs another package: pip install 'phalanx-ensemble[{extra}]'")


def native_server() -> type[NativeServer]:
    """Raises MissingExtra."""
    try:
        from service.native_front import NativeServer
    except ImportError:
        raise MissingExtra("front_end: native", "native") from None
    return NativeServer


def tracing() -> type[Tracing]:
    """Raises MissingExtra."""
    try:
        from service.tracing import Tracing
    except ImportError:
        raise MissingExtra("tracing", "tracing") from None
    return Tracing


def check(config: ServiceConfig) -> None:
    """Raises MissingExtra where serving this configuration would."""
    if config.front_end == "native":
        native_server()
    if config.tracing is not None:
        tracing()
