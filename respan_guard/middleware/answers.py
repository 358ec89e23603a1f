"""Finding our refusals among what an app raises, and sending them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from respan_guard.errors import GuardError
from respan_guard.refusal import RefusalAnswer, is_refusal

__all__ = ["can_respond", "refusal_in", "send_http", "send_websocket"]

_POLICY_VIOLATION = 1008
_TRY_AGAIN_LATER = 1013
_MAX_CAUSES = 8
_MAX_REASON = 123  # bytes, RFC 6455

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def refusal_in(error: BaseException | None) -> GuardError | None:
    """The refusal that an error is, or that a group of one error wraps, as task groups do; else None.

    A refusal by a wrapped LLM client is the client's own exception, whose response carries ours, and frameworks for
    agents raise exceptions of their own from that.
    """
    for _ in range(_MAX_CAUSES):
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, GuardError):
            return error if is_refusal(error) else None
        extensions = getattr(getattr(error, "response", None), "extensions", None)
        refusal = extensions.get("respan_guard") if isinstance(extensions, Mapping) else None
        if isinstance(refusal, GuardError):
            return refusal
        error = error.__cause__ if error is not None else None
        if error is None or isinstance(error, GuardError):
            return None  # an app that makes an error of its own from our exception means it
    return None


def can_respond(scope: MutableMapping[str, Any]) -> bool:
    """Whether the server can send a response: to a WebSocket that was not accepted only by an ASGI extension."""
    return scope["type"] == "http" or "websocket.http.response" in (scope.get("extensions") or {})


async def send_http(answer: RefusalAnswer, scope: MutableMapping[str, Any], send: Send) -> None:
    """Send a refusal as the response of an HTTP request."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    body = b"" if scope["method"] == "HEAD" else answer.body
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_websocket(answer: RefusalAnswer, scope: MutableMapping[str, Any], send: Send) -> None:
    """Send a refusal instead of accepting a WebSocket: as an HTTP response if the server can, else by closing.

    Servers turn a close before the accept into a bare 403.
    """
    if can_respond(scope):
        start = {"type": "websocket.http.response.start", "status": answer.status, "headers": answer.headers}
        await send(start)
        await send({"type": "websocket.http.response.body", "body": answer.body, "more_body": False})
        return
    code = _TRY_AGAIN_LATER if answer.status == 503 else _POLICY_VIOLATION
    await send({"type": "websocket.close", "code": code, "reason": answer.title[:_MAX_REASON]})
