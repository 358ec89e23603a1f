"""From a client to the same client, guarded."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import TYPE_CHECKING, Any, TypeVar

from respan_guard.clients.door import Door
from respan_guard.clients.transports import Kinds, Passage, kinds_of
from respan_guard.customer import normalise_identifier
from respan_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["make_transport", "wrap"]

C = TypeVar("C")
_LIBRARIES = ("httpx2", "httpx")
_SDKS = ("openai", "anthropic")
_UNREADABLE = ("Bedrock", "Vertex", "AWS", "GoogleCloud")
_SUPPORTED = (
    "guard.wrap takes clients of openai and anthropic: OpenAI, AsyncOpenAI, AzureOpenAI, AsyncAzureOpenAI, "
    "Anthropic, AsyncAnthropic and classes derived from them. For a client of httpx2 or httpx of your own, use "
    "transport=guard.transport() or guard.async_transport(); for anything else, guard.admit(...) and guard.record(...)"
)


def wrap(guard: Guard, client: C, customer: str | int | None, *, include_usage: bool) -> C:
    """See `Guard.wrap`."""
    http_client = getattr(client, "_client", None)
    if isinstance(client, type) or not _is_from(_SDKS, client) or not callable(getattr(client, "copy", None)):
        kind = client.__name__ if isinstance(client, type) else type(client).__name__
        word = "the class" if isinstance(client, type) else "an object of type"
        raise ConfigurationError(f"{word} {kind} can't be wrapped. {_SUPPORTED}")
    if any(word in kind.__name__ for kind in type(client).__mro__ for word in _UNREADABLE):
        raise ConfigurationError(
            f"{type(client).__name__} can't be wrapped: its requests name the model and its stream's events in "
            f"formats that are not read. {_SUPPORTED}"
        )
    library = _library(http_client)
    if library is None or not hasattr(http_client, "_transport"):
        raise ConfigurationError(
            f"this {type(client).__name__} has an HTTP client that is none of httpx2 or httpx. {_SUPPORTED}"
        )
    door = _door(guard, customer, include_usage=include_usage)
    wrapped: C = _copied(client, _guarded(http_client, door, kinds_of(library)))
    return wrapped


def _copied(client: Any, http_client: Any) -> Any:
    """The client over another HTTP client, as the SDK copies it.

    The SDK would make a new object of a derived class, whose `__init__` may want what only the app knows, and would
    lose what was set on the client since. So it copies what is its own, and the rest goes along.
    """
    kind = type(client)
    sdks = next(base for base in kind.__mro__ if base.__module__.partition(".")[0] in _SDKS)
    if kind is sdks:
        shell = client
    else:
        shell = copy.copy(client)
        shell.__class__ = sdks
    wrapped = shell.copy(http_client=http_client)
    wrapped._strict_response_validation = client._strict_response_validation  # the SDKs' `copy` forgets it
    for name, value in vars(client).items():
        # What the classes compute once, as `client.chat`, is bound to the first client.
        if name not in vars(wrapped) and not isinstance(getattr(kind, name, None), functools.cached_property):
            setattr(wrapped, name, value)
    wrapped.__class__ = kind
    return wrapped


def make_transport(
    guard: Guard, inner: Any, *, sync: bool, customer: str | int | None = None, include_usage: bool = True
) -> Any:
    """See `Guard.transport`."""
    library = _installed() if inner is None else _library(inner)
    kinds = None if library is None else kinds_of(library)
    if kinds is not None and inner is None:
        inner = (kinds.default if sync else kinds.async_default)()
    if kinds is None or not isinstance(inner, kinds.base if sync else kinds.async_base):
        raise ConfigurationError(
            f"{type(inner).__name__} is no {'BaseTransport' if sync else 'AsyncBaseTransport'} of httpx2 or httpx; "
            "guard.transport takes those that block, guard.async_transport those of event loops"
        )
    return _around(inner, _door(guard, customer, include_usage=include_usage), kinds, sync=sync)


def _door(guard: Guard, customer: str | int | None, *, include_usage: bool) -> Door:
    return Door(guard, None if customer is None else normalise_identifier(customer), include_usage=include_usage)


def _guarded(http_client: Any, door: Door, kinds: Kinds) -> Any:
    """A client over the same connections, proxies, cookies and hooks, whose calls go through the door."""
    sync = isinstance(http_client, kinds.sync_client)
    guarded = copy.copy(http_client)
    kind: Any = type(http_client)
    guarded.__class__ = _without_finalizer(kind)
    # The SDKs' own HTTP clients close their connections when they are collected. These connections are the first
    # client's, so it lives as long as this one.
    guarded._respan_guard_first = http_client
    guarded._transport = _around(http_client._transport, door, kinds, sync=sync)
    guarded._mounts = {
        pattern: None if transport is None else _around(transport, door, kinds, sync=sync)
        for pattern, transport in http_client._mounts.items()
    }
    return guarded


def _around(inner: Any, door: Door, kinds: Kinds, *, sync: bool) -> Any:
    if isinstance(inner, Passage) and inner.door.guard is door.guard:
        # Wrapped twice by the same guard: one door is enough, and the later word on the customer counts.
        if door.customer is None:
            return inner
        inner = inner.inner
    return (kinds.transport if sync else kinds.async_transport)(door, inner)


@functools.cache
def _without_finalizer(kind: Any) -> Any:
    if getattr(kind, "_respan_guard_kept", False):
        return kind
    return type(kind.__name__, (kind,), {"__del__": lambda self: None, "_respan_guard_kept": True})


def _is_from(packages: tuple[str, ...], thing: object) -> bool:
    return any(kind.__module__.partition(".")[0] in packages for kind in type(thing).__mro__)


def _library(thing: object) -> str | None:
    """The HTTP library that a client or transport is made of."""
    for kind in type(thing).__mro__:
        name = kind.__module__.partition(".")[0]
        if name in _LIBRARIES:
            return name
    return None


def _installed() -> str:
    for name in _LIBRARIES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return name
    raise ConfigurationError("a transport needs httpx2 or httpx: pip install httpx2")
