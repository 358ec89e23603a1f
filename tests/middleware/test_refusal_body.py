"""Who answers a refusal reads the request's body, and never waits for what will not come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from respan_guard import Guard
from respan_guard.middleware import GuardMiddleware
from tests.middleware.support import call, gateway, make_guard

PARTS = [b'{"model": "gpt-4o-mini", ', b'"messages": []}']
WHOLE = b"".join(PARTS)


async def mine(request: Request, exc: Exception) -> Response:
    """Tell what the body was."""
    try:
        return JSONResponse({"body": (await request.body()).decode()}, 420)
    except ClientDisconnect:
        return JSONResponse({"body": None}, 420)


def refusing(guard: Guard, read: Any) -> Any:
    """An app that reads, and is refused then."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read(receive)
        async with guard.admit("refused"):
            raise AssertionError

    return app


async def nothing(receive: Any) -> None:
    """The app does not read."""


async def a_part(receive: Any) -> None:
    """The app reads the beginning."""
    await receive()


async def all_of_it(receive: Any) -> None:
    """The app reads to the end."""
    while (await receive()).get("more_body"):
        pass


async def more_than_all(receive: Any) -> None:
    """The app reads until its client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def asked(door: Any, parts: list[bytes], **options: Any) -> Any:
    """The answer, which comes at once or never."""
    async with asyncio.timeout(5):
        return await call(door, body=parts, customer="c", **options)


@pytest.mark.parametrize("read", [nothing, a_part, all_of_it, more_than_all])
@pytest.mark.parametrize("identified", [False, True])
async def test_the_body_is_read_from_its_beginning(read: Any, identified: bool) -> None:
    """However much of it the app took, and whether the door had looked at it."""
    guard, _ = make_guard()
    await guard.update_customer("refused", rate_limit=0)
    options: dict[str, Any] = {"identify": "header:x-customer", "include": ["/*"]} if identified else {}
    door = GuardMiddleware(refusing(guard, read), guard, refusal=mine, **options)
    gone = asyncio.Event()
    if read is more_than_all:
        gone.set()
    exchange = await asked(door, PARTS, disconnect=gone)
    assert (exchange.status, exchange.json()) == (420, {"body": WHOLE.decode()})


@pytest.mark.parametrize("inside", [False, True])
async def test_an_endpoint_that_is_refused_after_it_read(inside: bool) -> None:
    """As apps are written: the endpoint parses the body, then asks the guard."""
    guard, _ = make_guard()
    await guard.update_customer("refused", rate_limit=0)

    async def endpoint(request: Request) -> Response:
        await request.json()
        await guard.admit("refused")
        return Response()

    app: Any = Starlette(routes=[Route("/ask", endpoint, methods=["POST"])])
    if inside:

        async def passing(request: Any, call_next: Any) -> Any:
            await request.body()
            return await call_next(request)

        app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    app.add_middleware(GuardMiddleware, guard=guard, refusal=mine)
    assert (await asked(app, PARTS, path="/ask")).json() == {"body": WHOLE.decode()}


async def test_of_a_long_upload_nothing_is_kept() -> None:
    """More than a MiB that nobody looked at is empty to who answers, once the app has begun to take it."""
    guard, _ = make_guard()
    await guard.update_customer("refused", rate_limit=0)
    parts = [b"x" * 700_000] * 3
    for read, left in ((all_of_it, ""), (nothing, "x" * 2_100_000)):
        door = GuardMiddleware(refusing(guard, read), guard, refusal=mine)
        assert (await asked(door, parts)).json() == {"body": left}


async def test_json_that_was_looked_at_is_kept_up_to_its_cap() -> None:
    """The door has read it whole, so nothing more of memory is at stake."""
    guard, _ = make_guard()
    await guard.update_customer("refused", rate_limit=0)
    large = b'{"model": "gpt-4o-mini", "messages": [], "user": "' + b"x" * 1_500_000 + b'"}'
    door = gateway(refusing(guard, all_of_it), guard, refusal=mine)
    assert (await asked(door, [large[:99], large[99:]])).json() == {"body": large.decode()}


async def test_an_answer_that_streams_is_not_cut() -> None:
    """Starlette's streams end when a disconnect is received: behind the body comes none that did not happen."""
    guard, _ = make_guard()
    await guard.update_customer("refused", rate_limit=0)

    async def streamed(request: Request, exc: Exception) -> Response:
        body = await request.body()

        async def parts() -> Any:
            for at in range(len(body)):
                await asyncio.sleep(0)
                yield body[at : at + 1]

        return StreamingResponse(parts(), 420)

    door = GuardMiddleware(refusing(guard, all_of_it), guard, refusal=streamed)
    assert (await asked(door, PARTS)).body == WHOLE
