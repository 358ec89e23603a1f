"""Opening and closing the guard with the app."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from respan_guard.guard import Guard

__all__ = ["run_lifespan"]

logger = logging.getLogger("respan_guard")

Message = MutableMapping[str, Any]
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
    returns, gets one that does nothing but this.

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
    answered = closed = False

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
        except Exception:
            if answered:
                raise
            logger.debug("the app has no lifespan", exc_info=True)
        if not answered:
            await send({"type": "lifespan.startup.complete"})
            while (await receive())["type"] != "lifespan.shutdown":
                pass
            await close()
            await send({"type": "lifespan.shutdown.complete"})
    finally:
        await close()
