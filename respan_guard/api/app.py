"""`RespanAPI`: Respan's HTTP API over a guard, as an ASGI app to mount."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from decimal import localcontext
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from respan_guard.api import dashboard, request_logs, summaries, users
from respan_guard.api.auth import Keys
from respan_guard.api.openapi import document
from respan_guard.api.operation import Call, Operation, validated
from respan_guard.api.pages import Pages
from respan_guard.api.wire import JSON, Unreadable, read_body
from respan_guard.errors import (
    BackendError,
    ConfigurationError,
    CustomerUnknown,
    InvalidInput,
    RevisionConflict,
)
from respan_guard.money import EXACT

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["RespanAPI"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES: Final = 20_000_000
_MAY_WRITE = "respan_guard.api.may_write"
_DOCUMENT = "/openapi.json"
OPERATIONS: Final[tuple[Operation, ...]] = (
    *request_logs.OPERATIONS,
    *summaries.OPERATIONS,
    request_logs.DETAIL,
    *users.OPERATIONS,
    *dashboard.OPERATIONS,
)


class RespanAPI:
    """Respan's HTTP API, answered by a guard: an ASGI app to mount, or to run by itself.

        app.mount("/respan", RespanAPI(guard, api_key=os.environ["GUARD_API_KEY"]))

    Args:
        guard: The guard.
        api_key: Who may read and change everything: a secret, or several. None lets everybody do so; that has to be
            spelled out.
        read_only_key: Who may only read.
        max_body_bytes: Larger requests are answered 413.

    Raises:
        ConfigurationError: A key is empty, or there is none.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        api_key: str | Sequence[str] | None,
        read_only_key: str | Sequence[str] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        if max_body_bytes < 1:
            raise ConfigurationError(f"max_body_bytes must be a number of bytes from 1, got {max_body_bytes}")
        self._guard = guard
        self._keys = Keys(api_key, read_only_key)
        self._pages = Pages()
        self._max_body_bytes = max_body_bytes
        self._app = Starlette(
            routes=[*_routes(self._handle), Route(_DOCUMENT, self._document, methods=["GET"])],
            exception_handlers={
                HTTPException: _http,
                InvalidInput: _invalid,
                CustomerUnknown: _unknown,
                RevisionConflict: _conflict,
                BackendError: _unavailable,
            },
            lifespan=self._lifespan,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI app."""
        if scope["type"] == "http":
            may_write = self._keys.may_write(scope["headers"])
            if may_write is None:
                answer = JSON(
                    {"detail": "a key is needed: send Authorization: Bearer KEY"}, 401, {"www-authenticate": "Bearer"}
                )
                await answer(scope, receive, send)
                return
            path = scope["path"]
            is_document = path.removeprefix(scope.get("root_path", "")) == _DOCUMENT
            # Django's paths end in a slash; ids in them may end in one of their own, so none is taken away.
            scope = {**scope, _MAY_WRITE: may_write, "path": path if path.endswith("/") or is_document else f"{path}/"}
        with localcontext(EXACT):  # the host app's own may have few digits
            await self._app(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self._guard:  # where it is run by itself; mounted, the guard's owner does so
            yield

    async def _document(self, request: Request) -> Response:
        return JSON(document(OPERATIONS, str(request.scope.get("root_path", "")) or "/"))

    def _handle(self, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            if operation.writes and not request.scope[_MAY_WRITE]:
                raise HTTPException(403, "this key may only read")
            query = validated(operation.query, _query(request))
            body = None if operation.takes is None else await read_body(request, self._max_body_bytes)
            if operation.takes is not None and body is None and not operation.optional:
                raise InvalidInput("a JSON body is needed")
            return await operation.handler(Call(self._guard, self._pages, request, query, body))

        return handle


def _routes(handle: Callable[[Operation], Callable[[Request], Awaitable[Response]]]) -> list[Route]:
    """One route per path, each with all of its methods, so that any other method is answered 405."""
    by_path: dict[str, dict[str, Callable[[Request], Awaitable[Response]]]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(operation.path, {})[operation.method] = handle(operation)

    def endpoint(handlers: dict[str, Callable[[Request], Awaitable[Response]]]) -> Callable[..., Awaitable[Response]]:
        async def dispatch(request: Request) -> Response:
            method = "GET" if request.method == "HEAD" else request.method
            return await handlers[method](request)

        return dispatch

    return [Route(path, endpoint(handlers), methods=list(handlers)) for path, handlers in by_path.items()]


def _query(request: Request) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in found:
            raise InvalidInput(f"{name[:80]} must be given once", field=name[:80])
        found[name] = value
    return found


def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSON({"detail": error.detail}, error.status_code, error.headers)


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidInput)
    status = error.status if isinstance(error, Unreadable) else 400
    return JSON({"detail": str(error), "field": error.field}, status)


def _unknown(_: Request, error: Exception) -> Response:
    return JSON({"detail": str(error)}, 404)


def _conflict(_: Request, error: Exception) -> Response:
    return JSON({"detail": str(error)}, 409)


def _unavailable(_: Request, error: Exception) -> Response:
    return JSON({"detail": "storage is unavailable; try again shortly"}, 503, {"retry-after": "1"})
