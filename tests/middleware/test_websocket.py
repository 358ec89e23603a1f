"""WebSockets: identified and admitted at connect, denied before the accept, ended with the connection."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from respan_guard.errors import LimitExceeded, StorageUnavailable
from respan_guard.guard import Guard
from respan_guard.middleware import GuardMiddleware
from respan_guard.usage import Usage
from tests.middleware.support import gateway, make_guard


def echo(guard: Guard, *, admits: bool = False, **options: Any) -> Starlette:
    """An app that echoes one text and records a call for it."""

    async def endpoint(socket: WebSocket) -> None:
        if admits:
            await guard.admit(socket.headers["x-customer"])
        await socket.accept()
        text = await socket.receive_text()
        await guard.record(Usage(model="gpt-4o-mini", input_tokens=3))
        await socket.send_text(text)
        await socket.close()

    app = Starlette(routes=[WebSocketRoute("/v1/realtime", endpoint)])
    app.add_middleware(GuardMiddleware, guard=guard, **options)
    return app


DOOR: dict[str, Any] = {"identify": "header:x-customer", "include": ["/v1/*"]}


@pytest.mark.parametrize("admits", [False, True])
async def test_admitted_at_connect_and_ended_with_it(admits: bool) -> None:
    """A connection is one admission, at the door or in the app; what it records is charged, then it ends."""
    guard, ledger = make_guard(default_limits={"rate_limit": 1})
    client = TestClient(echo(guard, admits=admits, **({} if admits else DOOR)))
    with client.websocket_connect("/v1/realtime", headers={"x-customer": "org_1"}) as socket:
        accepted: Any = socket.extra_headers
        assert (b"ratelimit", b'"rate_limit";r=0;t=60') in accepted
        socket.send_text("hi")
        assert socket.receive_text() == "hi"
    assert [entry.admission for entry in ledger.entries] == [ledger.admits[0].id]
    await ledger.settled(1)


@pytest.mark.parametrize("admits", [False, True])
@pytest.mark.parametrize(("customer", "status"), [("org_1", 429), ("x" * 300, 400)])
def test_denied_with_a_response_where_the_server_can(admits: bool, customer: str, status: int) -> None:
    """With the extension the refusal is a whole HTTP response."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})
    client = TestClient(echo(guard, admits=admits, **({} if admits else DOOR)))
    with pytest.raises(WebSocketDenialResponse) as denied:
        client.websocket_connect("/v1/realtime", headers={"x-customer": customer}).__enter__()
    assert denied.value.status_code == status
    assert denied.value.json()["status"] == status
    assert ("ratelimit" in denied.value.headers) == (status == 429)


@pytest.mark.parametrize("admits", [False, True])
async def test_a_refusal_of_the_apps_own_denies_websockets_too(admits: bool) -> None:
    """It is given the WebSocket and its response is sent as it is; where the server can't, the connection is closed."""
    guard, ledger = make_guard(default_limits={"rate_limit": 0})
    asked: list[Any] = []

    async def refusal(connection: HTTPConnection, error: LimitExceeded) -> JSONResponse:
        asked.append(connection)
        return JSONResponse({"sorry": connection.headers["x-customer"]}, 418, {"x-own": "yes"})

    app = echo(guard, admits=admits, refusal=refusal, **({} if admits else DOOR))
    with pytest.raises(WebSocketDenialResponse) as denied:
        TestClient(app).websocket_connect("/v1/realtime", headers={"x-customer": "org_1"}).__enter__()
    assert (denied.value.status_code, denied.value.json()) == (418, {"sorry": "org_1"})
    assert denied.value.headers["x-own"] == "yes"
    assert "ratelimit" in denied.value.headers
    assert isinstance(asked[0], WebSocket)
    sent = await converse(app)
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert len(asked) == 1
    await ledger.settled(0)


async def converse(app: Any, *, extensions: Any = None, first: str = "websocket.connect") -> list[dict[str, Any]]:
    """Connect without the extension, and give what the server was told."""
    sent: list[dict[str, Any]] = []
    inbox = [{"type": first}]

    async def receive() -> dict[str, Any]:
        if not inbox:
            await asyncio.sleep(3600)
        return inbox.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [(b"x-customer", b"org_1")], "state": {}}
    if extensions is not None:
        scope["extensions"] = extensions
    await app(scope, receive, send)
    return sent


async def test_denied_by_closing_where_the_server_cannot() -> None:
    """Without the extension the connection is closed before it is accepted, with a code that says whether to retry."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})

    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the app must not run")

    assert await converse(gateway(never, guard)) == [
        {"type": "websocket.close", "code": 1008, "reason": "Too many requests"}
    ]

    async def down(scope: Any, receive: Any, send: Any) -> None:
        raise StorageUnavailable("x")

    assert [message["code"] for message in await converse(GuardMiddleware(down, guard))] == [1013]


async def test_a_client_that_left_is_told_nothing() -> None:
    """A disconnect instead of a connect is not answered."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})
    assert await converse(gateway(lambda *_: None, guard), first="websocket.disconnect") == []  # type: ignore[arg-type]


async def test_a_refusal_after_the_accept_is_the_apps_error() -> None:
    """Once accepted, the connection is the app's: its exception goes on as it is, and the admission ends."""
    guard, ledger = make_guard()
    error = StorageUnavailable("x")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        raise error

    with pytest.raises(StorageUnavailable) as raised:
        await converse(gateway(app, guard))
    assert raised.value is error
    await ledger.settled(1)


async def test_a_dropped_connection_ends_the_admission() -> None:
    """A client that vanishes ends it too."""
    guard, ledger = make_guard()

    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        with pytest.raises(WebSocketDisconnect):
            await socket.receive_text()

    app = Starlette(routes=[WebSocketRoute("/v1/realtime", endpoint)])
    app.add_middleware(GuardMiddleware, guard=guard, **DOOR)
    with TestClient(app).websocket_connect("/v1/realtime", headers={"x-customer": "org_1"}) as socket:
        socket.close()
    await ledger.settled(1)


async def test_two_doors_are_one_for_websockets_too() -> None:
    """A connection through two doors of one guard is one admission."""
    guard, ledger = make_guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 1000})

    await converse(gateway(gateway(app, guard), guard))
    await ledger.settled(1)
    await converse(GuardMiddleware(gateway(app, guard), guard))
    await ledger.settled(2)


def test_unidentified_connections_are_denied() -> None:
    """Nobody's connection is a 401, and sources in the body find nothing there."""
    guard, _ = make_guard()
    for identify in ("header:x-customer", "body"):
        client = TestClient(echo(guard, identify=identify, include=["/v1/*"]))
        with pytest.raises(WebSocketDenialResponse) as denied:
            client.websocket_connect("/v1/realtime").__enter__()
        assert denied.value.status_code == 401
