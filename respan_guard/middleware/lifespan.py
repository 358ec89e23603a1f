"""Opening and closing the guard with the app."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from respan_guard.guard import Guard

__all__ = ["run_lifespan"]

logger = logging.getLogger("respan_guard")

Message = MutableMapping[str, Any]
_NO_LIFESPAN = re.compile(r"lifespan|\bscope\b", re.IGNORECASE)
# What an app looks for that takes any scope, or the first message in it, for a request's.
_OF_REQUESTS = frozenset({
    "body", "client", "headers", "http_version", "method", "more_body", "path", "query_string", "raw_path",
    "root_path", "scheme", "server",
})  # fmt: skip
_LAST = frozenset({"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"})


async def run_lifespan(
    app: Callable[..., Awaitable[None]],
    guard: Guard,
    opened: Callable[[], None],
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Open the guard before the app starts, and close it after the app has shut down, however that ends.

    The app's own messages pass as they are. An app without a lifespan, which by the ASGI specification raises or
    returns, gets one that does nothing but this. An app that fails at its start before it answers raises, too: that is
    logged and left to the server, which stops, or goes on without a lifespan; for requests that come then the guard
    stays open.

    Args:
        app: The app.
        guard: The guard.
        opened: Called once the guard is open.
        scope: The lifespan's scope.
        receive: The server's.
        send: The server's.
    """
    pending: Message | None = await receive()
    try:
        await guard.open()
    except Exception as error:
        await send({"type": "lifespan.startup.failed", "message": f"respan_guard could not start: {error}"})
        raise
    answered = closed = failed = False

    async def close() -> None:
        nonlocal closed
        if not closed:
            closed = True
            try:
                await guard.aclose()
            except Exception:
                logger.exception("closing the guard failed")

    async def replayed() -> Message:
        nonlocal pending
        if pending is not None:
            first, pending = pending, None
            return first
        return await receive()

    async def closing_send(message: Message) -> None:
        nonlocal answered
        answered = True
        if message["type"] in _LAST:
            await close()
        await send(message)

    try:
        opened()
        try:
            await app(scope, replayed, closing_send)
        except Exception as error:
            if answered:
                raise
            if not _knows_no_lifespan(error):
                failed = True
                logger.warning("the app raised at its start; the server decides whether it goes on", exc_info=True)
                raise
            logger.debug("the app has no lifespan", exc_info=True)
        if not answered:
            await send({"type": "lifespan.startup.complete"})
            while (await receive())["type"] != "lifespan.shutdown":
                pass
            await close()
            await send({"type": "lifespan.shutdown.complete"})
    finally:
        if not failed:
            await close()


def _knows_no_lifespan(error: Exception) -> bool:
    """Whether an app that was asked for its lifespan only says that it has none, as far as that can be told."""
    if isinstance(error, NotImplementedError):
        return True
    if isinstance(error, KeyError):
        return bool(error.args) and error.args[0] in _OF_REQUESTS
    told = str(error)
    return _NO_LIFESPAN.search(told) is not None or (isinstance(error, AssertionError) and not told)
