"""Serving an ASGI app by uvicorn on a free port of the loopback interface, for tests and the demo."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, Literal

from respan_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from uvicorn import Server

__all__ = ["CONNECTION", "abort_connection", "serve", "serve_async"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

CONNECTION = "respan_guard.testing.connection"
"""Where an app served here finds its connection, in `scope["state"]`."""

_HOST = "127.0.0.1"


@contextlib.contextmanager
def serve(app: App, *, port: int = 0, lifespan: Literal["on", "off"] = "on", grace: int = 1) -> Iterator[str]:
    """Serve an app from a thread of its own; gives its URL.

    Args:
        app: The app.
        port: Where; any free port if left out.
        lifespan: Whether the app is told about start and end.
        grace: Seconds that requests get to finish at the end.

    Raises:
        ConfigurationError: uvicorn is not installed, or the app did not start.
    """
    listener = _listen(port)
    server = _server(app, lifespan, grace)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="respan_guard-testing", daemon=True
    )
    thread.start()
    try:
        _wait_for_start(server, thread)
        yield f"http://{_HOST}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.asynccontextmanager
async def serve_async(
    app: App, *, port: int = 0, lifespan: Literal["on", "off"] = "on", grace: int = 1
) -> AsyncIterator[str]:
    """Serve an app on the running loop; otherwise as `serve`."""
    listener = _listen(port)
    server = _server(app, lifespan, grace)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not task.done():  # noqa: ASYNC110  # uvicorn offers no event
            await asyncio.sleep(0.001)
        if not server.started:
            raise ConfigurationError("the app did not start; its log says why")
        yield f"http://{_HOST}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


def abort_connection(scope: Scope) -> bool:
    """Cut the connection of a request at once, without ending the response. False where no server of ours runs it."""
    connection = (scope.get("state") or {}).get(CONNECTION)
    if connection is None:
        return False
    connection.transport.abort()
    return True


def _listen(port: int) -> socket.socket:
    # asyncio turns Nagle's algorithm off only for sockets whose protocol is named; with it on, answers that are written
    # in two parts come 40 ms late.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        listener.listen(512)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _wait_for_start(server: Server, thread: threading.Thread) -> None:
    while not server.started:
        thread.join(0.002)
        if not thread.is_alive():
            raise ConfigurationError("the app did not start; its log says why")


def _server(app: App, lifespan: Literal["on", "off"], grace: int) -> Server:
    try:
        import uvicorn
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ModuleNotFoundError as error:
        raise ConfigurationError("serving needs uvicorn: pip install uvicorn") from error

    class Connection(H11Protocol):
        """Puts itself where the app can find it."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.app_state = {**self.app_state, CONNECTION: self}

    class Quiet(uvicorn.Server):
        """Leaves the process alone: its signals, and its life if the app does not start."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            try:
                await super().startup(sockets)
            except SystemExit:
                self.should_exit = True

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            yield

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=grace,
    )
    return Quiet(config)
