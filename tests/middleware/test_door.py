"""The door: who gets in, what they are told, and what the app's own code may do inside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from respan_guard.customer import Customer
from respan_guard.errors import ConfigurationError, LimitExceeded, RateLimitExceeded, StorageUnavailable, Unidentified
from respan_guard.guard import Guard
from respan_guard.middleware import GuardMiddleware
from respan_guard.usage import Usage
from tests.middleware.support import CHAT, QUESTION, App, Exchange, call, gateway, make_guard, provider, reply


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers without reading."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]})
    await send({"type": "http.response.body", "body": b"hello"})


# -- with identify ---------------------------------------------------------------------------------


async def test_admitted_until_the_limit_then_refused() -> None:
    """Requests count down, the one over the limit is a 429 that never reaches the app, and time heals it."""
    guard, ledger = make_guard(default_limits={"rate_limit": 2})
    app = gateway(provider, guard)
    left = []
    for _ in range(2):
        exchange = await call(app, customer="org_1")
        assert exchange.status == 200
        left.append(exchange.headers["ratelimit"])
    assert [value.split(";")[1] for value in left] == ["r=1", "r=0"]
    refused = await call(app, customer="org_1")
    assert refused.status == 429
    assert refused.json()["error"]["code"] == "rate_limit"
    assert refused.headers["ratelimit"].startswith('"rate_limit";r=0;t=')
    assert refused.headers["ratelimit-policy"] == exchange.headers["ratelimit-policy"] == '"rate_limit";q=2;w=60'
    assert int(refused.headers["retry-after"]) >= int(refused.headers["ratelimit"].rpartition("t=")[2])
    assert (await call(app, customer="org_2")).status == 200, "somebody else's limit is untouched"
    clock: Any = guard.clock
    clock.advance(61)
    assert (await call(app, customer="org_1")).status == 200
    assert len(ledger.entries) == 4


async def test_a_spent_budget_is_a_402() -> None:
    """Usage read off the responses spends the budget; then the answer is 402."""
    guard, _ledger = make_guard(default_limits={"total_budget": "0.00002"}, hold="none")
    app = gateway(provider, guard)
    statuses = [(await call(app, customer="org_1")).status for _ in range(6)]
    assert statuses[0] == 200
    assert statuses[-1] == 402
    assert (await call(app, customer="org_1")).headers["x-should-retry"] == "false"


async def test_unidentified_is_401_before_the_body_is_read() -> None:
    """A request of nobody is refused without a look at its body; elsewhere the door is open."""
    guard, ledger = make_guard()
    app = gateway(hello, guard)
    refused = await call(app)
    assert refused.status == 401
    assert refused.received == 0
    assert refused.json()["error"]["code"] == "unidentified"
    assert (await call(app, "/health", method="GET")).status == 200
    assert ledger.ops == []


async def test_header_identity_refuses_without_reading_where_nothing_needs_the_body() -> None:
    """On requests without a body the door never calls receive."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})
    refused = await call(gateway(hello, guard), "/v1/models", method="GET", customer="org_1")
    assert (refused.status, refused.received) == (429, 0)


async def test_unusable_identity_is_400() -> None:
    """Ids that can't be, ids said twice, and bad params are 400 with the field that is wrong."""
    guard, ledger = make_guard()
    app = gateway(hello, guard)
    assert (await call(app, customer="a\u200bb")).json()["error"]["code"] == "invalid_customer_identifier"
    assert (await call(app, customer="x" * 300)).status == 400
    twice = await call(app, customer="a", headers=[(b"x-customer", b"b")])
    assert (twice.status, twice.json()["error"]["param"]) == (400, "x-customer")
    assert ledger.ops == []


async def test_variants_of_an_id_share_one_budget() -> None:
    """NFC and NFD, spaces around, int and string: one customer. Case makes another."""
    guard, ledger = make_guard()
    app = gateway(hello, guard)
    for name in ("é1", "e\u03011", " é1 ", "É1"):
        assert (await call(app, customer=name)).status == 200
    assert [op.customer for op in ledger.admits] == ["é1", "é1", "é1", "É1"]


async def test_anonymous_requests_share_a_customer() -> None:
    """With `unidentified="anonymous"` those without a name share one limit."""
    guard, ledger = make_guard(default_limits={"rate_limit": 2})
    app = gateway(hello, guard, unidentified="anonymous")
    assert [(await call(app)).status for _ in range(3)] == [200, 200, 429]
    assert {op.customer for op in ledger.admits} == {"anonymous"}
    assert (await call(app, customer="org_1")).status == 200


async def test_identity_from_the_body_in_trusted_mode() -> None:
    """Respan's own snippet: `customer_params` in the body names the customer and sets its limit."""
    guard, _ledger = make_guard(default_limits=None, trust_customer_params=True)
    app = gateway(provider, guard, identify="body")
    body = json.dumps(QUESTION | {"customer_params": {"customer_identifier": "customer_1", "rate_limit": 3}}).encode()
    assert [(await call(app, body=body)).status for _ in range(4)] == [200, 200, 200, 429]
    assert (await call(app)).status == 401


@pytest.mark.parametrize("raw", [b"{,}", b'{"customer_identifier": "a", "customer_identifier": "b"}', b"x" * 2_000])
async def test_a_body_that_should_name_the_customer_must_be_readable(raw: bytes) -> None:
    """Where the body says who it is, a body that can't be read is refused on every path, not taken for nobody's."""
    guard, ledger = make_guard()
    app = gateway(hello, guard, identify="body", unidentified="anonymous", max_body_bytes=1_000)
    assert (await call(app, "/v1/other", body=raw)).status == (413 if len(raw) > 1_000 else 400)
    assert ledger.ops == []


async def test_untrusted_limits_are_not_obeyed() -> None:
    """Without trust a client can't raise its own limit."""
    guard, _ = make_guard(default_limits={"rate_limit": 1})
    app = gateway(provider, guard, identify="body")
    body = json.dumps(QUESTION | {"customer_params": {"customer_identifier": "c", "rate_limit": 1000}}).encode()
    assert [(await call(app, body=body)).status for _ in range(2)] == [200, 429]


async def test_a_callable_may_bring_the_whole_customer() -> None:
    """A `Customer` that the app's callable returns is the server's word: its limits hold."""
    guard, _ = make_guard(default_limits=None)

    async def by_key(connection: HTTPConnection) -> Customer | None:
        key = connection.headers.get("x-customer")
        return None if key is None else Customer(customer_identifier=key, rate_limit=1)

    app = gateway(hello, guard, identify=by_key)
    assert [(await call(app, customer="org_1")).status for _ in range(2)] == [200, 429]
    assert (await call(app)).status == 401


async def test_unpriced_models_are_refused_where_a_budget_applies() -> None:
    """A client can't name a model without a price and spend freely."""
    guard, ledger = make_guard()
    body = json.dumps(QUESTION | {"model": "no-such-model-9"}).encode()
    refused = await call(gateway(provider, guard), customer="org_1", body=body)
    assert (refused.status, refused.json()["error"]["code"]) == (400, "unpriced_model")
    assert ledger.admits == []


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/v1/embeddings"])
@pytest.mark.parametrize("case", ["too large", "compressed", "malformed", "repeated"])
async def test_a_call_that_cannot_be_read_is_refused(path: str, case: str) -> None:
    """What the provider might understand and we can't would hold nothing, so it does not pass."""
    guard, ledger = make_guard()
    headers = [(b"content-encoding", b"gzip")] if case == "compressed" else []
    body = {"too large": b"x" * 2_000, "malformed": b"{,}", "repeated": b'{"model":"a","model":"b"}'}.get(case, b"\x1f")
    refused = await call(
        gateway(provider, guard, max_body_bytes=1_000), path, customer="org_1", body=body, headers=headers
    )
    assert refused.status == (413 if case == "too large" else 400)
    assert ledger.admits == []


async def test_bodies_that_are_no_calls_pass_unread() -> None:
    """An upload, a form, or text on another path is none of our business, whatever its size."""
    guard, ledger = make_guard(default_hold="0.5")
    received: list[bytes] = []

    async def upload(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            received.append(message["body"])
            more = message["more_body"]
        await hello(scope, receive, send)

    app = gateway(upload, guard, max_body_bytes=1_000)
    big = [b"x" * 700] * 3
    assert (await call(app, "/v1/files", customer="c", body=big)).status == 200
    assert received == big
    form = [(b"content-type", b"multipart/form-data; boundary=x")]
    assert (await call(app, "/v1/files", customer="c", body=big, headers=form)).status == 200
    assert [op.cost for op in ledger.admits] == [500_000_000] * 2
    await ledger.settled(2)
    unread = await call(gateway(hello, guard), "/v1/files", customer="c", body=big, headers=form)
    assert (unread.status, unread.received) == (200, 1), "its first bytes tell what it is"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"content-type", b"application/x-www-form-urlencoded")],
        [(b"content-type", b"multipart/form-data; boundary=x")],
        [(b"content-type", b"application/octet-stream")],
    ],
)
@pytest.mark.parametrize("blanks", [b"", b" \r\n\t" * 30, b"\xef\xbb\xbf"])
async def test_a_body_is_what_it_is_whatever_its_type_says(headers: Any, blanks: bytes) -> None:
    """JSON that is sent as a form is read by `Request.json()`, hence by us: it holds what the same JSON holds."""
    guard, ledger = make_guard()
    body = blanks + json.dumps(QUESTION).encode()
    exchange = await call(
        gateway(hello, guard), "/v1/ask", customer="org_1", body=[body[:40], body[40:]], headers=headers
    )
    assert exchange.status == 200
    honest, honest_ledger = make_guard()
    await call(gateway(hello, honest), "/v1/ask", customer="org_1")
    assert [op.cost for op in ledger.admits] == [op.cost for op in honest_ledger.admits]
    assert ledger.admits[0].cost > 0


@pytest.mark.parametrize(
    ("fields", "body", "status"),
    [
        ({"method": "QUERY"}, b"", 200),
        ({"method": "DELETE"}, b"", 200),
        ({"method": "query"}, b"", 200),
        ({"method": "GET", "headers": [(b"content-length", b"9")]}, b"", 200),
        ({"method": "OPTIONS", "headers": [(b"transfer-encoding", b"chunked")]}, b"", 200),
        ({"method": "GET", "http_version": "2"}, b"", 200),
        ({"headers": [(b"content-encoding", b"gzip")]}, b"", 400),
        ({}, b" " * 3_000, 413),
        ({"headers": [(b"content-length", b"3000")]}, b"", 413),
        ({}, b'{"model":"gpt-4o","max_tokens":5,"messages":[],"max_tokens":9}', 400),
        ({}, b'{"model":"gpt-4o","messages":[{"role":"user","content":"hi"}],"messages":[]}', 400),
        ({}, b'{"question":"hi","seed":' + b"1" * 4_500 + b"}", 400),
        ({}, b'{"model":"gpt-4o","messages":[],"x":"\xff"}', 400),
        ({}, b'{"model":"gpt-4o","messages":[],"x":"\x01"}', 400),
        ({}, b'{"custom_id":"1","body":{}}\n{"custom_id":"2","body":{}}', None),
    ],
)
async def test_no_request_switches_its_hold_off(fields: dict[str, Any], body: bytes, status: int | None) -> None:
    """Whatever the client does to the method, the headers or the body: it is held for, or it does not pass.

    What no parser takes for one object, lines of JSON that are uploaded as they are, is no call (None).
    """
    guard, ledger = make_guard(default_hold="0.5" if status is None else 0)
    fields = {"method": "POST"} | fields
    limit = 10_000 if len(body) > 4_000 else 2_000
    padded = body if b"{" in body else body + json.dumps(QUESTION).encode()
    answer = await call(gateway(hello, guard, max_body_bytes=limit), "/v1/ask", customer="org_1", body=padded, **fields)
    assert answer.status == (status or 200)
    assert [op.cost > 0 for op in ledger.admits] == [True] * (status in (200, None))


@pytest.mark.parametrize(
    "config",
    [
        b'{"maxOutputTokens":100000,"maxOutputTokens":1}',
        b'{"maxOutputTokens":100000},"generationConfig":{"maxOutputTokens":1}',
        b'{"candidateCount":8,"candidateCount":1}',
        b'{"maxOutputTokens":100000},"generationConfig":{"max\\u004futputTokens":1}',
    ],
)
async def test_geminis_caps_are_said_once(config: bytes) -> None:
    """What bounds the output of a Gemini call must not be said twice, as with the others."""
    guard, ledger = make_guard()
    body = b'{"contents":[{"parts":[{"text":"x"}]}],"generationConfig":' + config + b"}"
    path = "/v1/models/gemini-2.0-flash:generateContent"
    assert (await call(gateway(hello, guard), path, customer="org_1", body=body)).status == 400
    assert ledger.admits == []


async def test_deep_nesting_passes_nowhere() -> None:
    """What we can't follow another parser might."""
    guard, ledger = make_guard()
    body = b'{"model":"gpt-4o","messages":[],"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    assert (await call(gateway(hello, guard), "/v1/ask", customer="org_1", body=body)).status == 400
    assert ledger.admits == []


async def test_an_upload_reaches_the_app_as_it_comes() -> None:
    """Of an upload the door sees the first bytes; the rest streams to the app, byte for byte, however long it is."""
    guard, ledger = make_guard()
    parts = [
        b"\r\n",
        b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n',
        *[b'{"model":"m"}' * 99] * 9,
        b"--x--",
    ]
    seen: list[bytes] = []
    asked: list[int] = []

    async def upload(scope: Any, receive: Any, send: Any) -> None:
        asked.append(len(seen))
        more = True
        while more:
            message = await receive()
            seen.append(message["body"])
            more = message["more_body"]
        await hello(scope, receive, send)

    headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"content-length", b"9" * 9)]
    app = gateway(upload, guard, max_body_bytes=1_000)
    assert (await call(app, "/v1/audio", customer="org_1", body=parts, headers=headers)).status == 200
    assert seen == parts
    await ledger.settled(1)


async def test_preflights_pass() -> None:
    """A CORS preflight is nobody's and costs nothing; a plain OPTIONS is a request."""
    guard, ledger = make_guard()
    app = gateway(hello, guard)
    preflight = [(b"origin", b"https://x"), (b"access-control-request-method", b"POST")]
    assert (await call(app, method="OPTIONS", headers=preflight)).status == 200
    assert (await call(app, method="OPTIONS")).status == 401
    for name, value in ((b"content-length", b"9"), (b"transfer-encoding", b"chunked")):
        asks = await call(app, method="OPTIONS", headers=[*preflight, (name, value)])
        assert asks.status == 401, "a preflight has no body: an app that takes any method could read a call there"
    empty = [*preflight, (b"content-length", b"0")]
    assert (await call(app, method="OPTIONS", headers=empty)).status == 200
    assert ledger.ops == []


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_a_preflight_brings_no_body(version: str) -> None:
    """Over HTTP/2 no header tells that a body comes: what asks as a preflight gets nothing of it to the app."""
    guard, ledger = make_guard()
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.extend([await receive(), await receive()])
        await hello(scope, receive, send)

    preflight = [(b"origin", b"https://x"), (b"access-control-request-method", b"POST")]
    gone = asyncio.Event()
    gone.set()
    question = json.dumps(QUESTION).encode()
    for body in ([question], [question[:9], question[9:]], [b"", question], [b""]):
        received.clear()
        exchange = await call(
            gateway(app, guard), method="OPTIONS", headers=preflight, body=body, disconnect=gone, http_version=version
        )
        assert exchange.status == 200
        assert received == [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]
        assert exchange.received == len(body) + 1, "the server is asked when the app asks, no sooner"
    assert ledger.ops == []


def test_cors_outside_adds_its_headers_to_refusals() -> None:
    """With CORSMiddleware around the guard, a browser can read the refusal."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})
    app = Starlette(routes=[Route(CHAT, lambda request: PlainTextResponse("x"), methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard, identify="header:x-customer", include=["/v1/*"])
    app.add_middleware(CORSMiddleware, allow_origins=["https://x"])
    response = TestClient(app).post(CHAT, headers={"origin": "https://x", "x-customer": "c"}, json=QUESTION)
    assert response.status_code == 429
    assert response.headers["access-control-allow-origin"] == "https://x"


async def test_head_has_no_body() -> None:
    """The refusal of a HEAD request has headers only."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})
    refused = await call(gateway(hello, guard), method="HEAD", customer="c")
    assert refused.status == 429
    assert refused.body == b""
    assert int(refused.headers["content-length"]) > 0


def test_user_needs_the_right_order_and_says_so() -> None:
    """`identify="user"` works behind AuthenticationMiddleware, and names the order when it stands before it."""

    class Keys(AuthenticationBackend):
        async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
            return (AuthCredentials(), SimpleUser(conn.headers["x-key"])) if "x-key" in conn.headers else None

    def build(*, right: bool) -> TestClient:
        guard, _ = make_guard(default_limits={"rate_limit": 1})
        app = Starlette(routes=[Route(CHAT, lambda request: PlainTextResponse("x"), methods=["POST"])])
        layers: list[Any] = [
            lambda: app.add_middleware(GuardMiddleware, guard=guard, identify="user", include=["/v1/*"]),
            lambda: app.add_middleware(AuthenticationMiddleware, backend=Keys()),
        ]
        for add in layers if right else reversed(layers):
            add()
        return TestClient(app)

    client = build(right=True)
    assert client.post(CHAT, headers={"x-key": "org_1"}, json=QUESTION).status_code == 200
    assert client.post(CHAT, headers={"x-key": "org_1"}, json=QUESTION).status_code == 429
    assert client.post(CHAT, json=QUESTION).status_code == 401
    with pytest.raises(ConfigurationError, match="added last runs first"):
        build(right=False).post(CHAT, headers={"x-key": "org_1"}, json=QUESTION)


# -- modes -----------------------------------------------------------------------------------------


async def test_shadow_refuses_nobody() -> None:
    """In shadow mode everything passes, and the headers say what would be."""
    guard, _ledger = make_guard(default_limits={"rate_limit": 1}, mode="shadow")
    exchanges = [await call(gateway(provider, guard), customer="c") for _ in range(3)]
    assert [exchange.status for exchange in exchanges] == [200] * 3
    assert '"rate_limit";r=0' in exchanges[-1].headers["ratelimit"]


@pytest.mark.parametrize("problem", ["nobody", "bad id", "unpriced", "unreadable", "too large"])
async def test_shadow_lets_pass_what_could_not_even_be_admitted(problem: str) -> None:
    """Nobody's requests, impossible ids, models without a price, bodies that can't be read: all pass, whole."""
    guard, ledger = make_guard(mode="shadow")
    received: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        received.append(message["body"])
        await hello(scope, receive, send)

    body = {
        "unpriced": json.dumps(QUESTION | {"model": "no-such-model-9"}).encode(),
        "unreadable": b"{,}",
        "too large": b"x" * 2_000,
    }.get(problem, json.dumps(QUESTION).encode())
    customer = {"nobody": None, "bad id": "a\u200bb"}.get(problem, "org_1")
    exchange = await call(gateway(app, guard, max_body_bytes=1_000), customer=customer, body=body)
    assert (exchange.status, exchange.body, received) == (200, b"hello", [body])
    await ledger.settled(len(ledger.admits))


async def test_off_is_not_there() -> None:
    """With mode="off" the app is called with the server's own objects, and nothing is stored."""
    guard, ledger = make_guard(mode="off")
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend((receive, send))

    async def receive() -> dict[str, Any]:
        return {}

    async def send(message: Any) -> None: ...

    await gateway(app, guard)({"type": "http", "path": CHAT, "method": "POST", "headers": []}, receive, send)
    assert seen == [receive, send]
    assert ledger.ops == []


# -- the app's own code admits ---------------------------------------------------------------------


def fastapi_app(guard: Guard, style: str) -> FastAPI:
    """An app that admits in the endpoint or in one of FastAPI's kinds of dependencies."""
    app = FastAPI()

    async def in_async(request: Request) -> None:
        await guard.admit(request.headers["x-customer"])

    def in_thread(request: Request) -> None:
        guard.sync.admit(request.headers["x-customer"]).__enter__()

    async def in_async_yield(request: Request) -> AsyncIterator[None]:
        await guard.admit(request.headers["x-customer"])
        yield

    async def scoped_yield(request: Request) -> AsyncIterator[None]:
        async with guard.admit(request.headers["x-customer"]):
            yield

    def in_thread_yield(request: Request) -> Iterator[None]:
        with guard.sync.admit(request.headers["x-customer"]):
            yield

    async def nothing() -> None: ...

    dependency: Any = {
        "async": in_async,
        "thread": in_thread,
        "async yield": in_async_yield,
        "scoped yield": scoped_yield,
        "thread yield": in_thread_yield,
    }.get(style, nothing)

    @app.post("/ask", dependencies=[Depends(dependency)])
    async def ask(request: Request) -> dict[str, str | None]:
        if style == "endpoint":
            await guard.admit(request.headers["x-customer"])
        await guard.record(Usage(model="gpt-4o-mini", input_tokens=10, output_tokens=5))
        admission = guard.current()
        return {"customer": None if admission is None else admission.customer_identifier}

    @app.post("/ask-in-thread", dependencies=[Depends(dependency)])
    def ask_in_thread(request: Request) -> dict[str, str | None]:
        if style == "endpoint":
            guard.sync.admit(request.headers["x-customer"]).__enter__()
        guard.record_soon(Usage(model="gpt-4o-mini", input_tokens=10, output_tokens=5))
        admission = guard.current()
        return {"customer": None if admission is None else admission.customer_identifier}

    return app


STYLES = ["endpoint", "async", "thread", "async yield", "scoped yield", "thread yield"]


@pytest.mark.parametrize("base", ["none", "inside", "outside", "both"])
@pytest.mark.parametrize("path", ["/ask", "/ask-in-thread"])
@pytest.mark.parametrize("style", STYLES)
async def test_an_admission_in_the_app_belongs_to_the_request(style: str, path: str, base: str) -> None:
    """Wherever the app admits, records are charged to it, it ends with the request, and a refusal is the answer."""
    guard, ledger = make_guard(default_limits={"rate_limit": 1, "period_budget": 10})
    app = fastapi_app(guard, style)

    async def passing(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    if base in ("inside", "both"):
        app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    app.add_middleware(GuardMiddleware, guard=guard)
    if base in ("outside", "both"):
        app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    admitted = await call(app, path, customer="org_1")
    assert (admitted.status, admitted.json()) == (200, {"customer": "org_1"})
    assert admitted.headers["ratelimit"] == '"rate_limit";r=0;t=60'
    assert [entry.customer for entry in ledger.entries] == ["org_1"]
    assert ledger.entries[0].admission == ledger.admits[0].id
    await ledger.settled(1)
    refused = await call(app, path, customer="org_1")
    assert (refused.status, refused.json()["error"]["code"]) == (429, "rate_limit")
    assert refused.headers["ratelimit"].startswith('"rate_limit";r=0')
    assert len(ledger.entries) == 1


def test_a_test_client_without_with_works() -> None:
    """A bare TestClient runs no lifespan and gives each request a new loop."""
    guard, _ledger = make_guard(default_limits={"rate_limit": 2})
    app = fastapi_app(guard, "async")
    app.add_middleware(GuardMiddleware, guard=guard)
    client = TestClient(app)
    assert [client.post("/ask", headers={"x-customer": "c"}).status_code for _ in range(3)] == [200, 200, 429]


async def test_admitting_behind_the_door_again_is_the_same_request() -> None:
    """A dependency that admits the customer the door admitted gets that admission: the rate counts once."""
    guard, ledger = make_guard()
    app = fastapi_app(guard, "async")
    app.add_middleware(GuardMiddleware, guard=guard, identify="header:x-customer", include=["/*"])
    assert (await call(app, "/ask", customer="org_1")).json() == {"customer": "org_1"}
    assert len(ledger.admits) == 1
    await ledger.settled(1)


async def test_nothing_admitted_costs_nothing() -> None:
    """Behind a door without `identify`, a request that admits nobody never reaches storage and gains no header."""
    guard, ledger = make_guard()
    exchange = await call(GuardMiddleware(hello, guard), "/anything", method="GET")
    assert exchange.headers == {"x-app": "1"}
    assert ledger.ops == []


async def test_without_the_door_nothing_is_bound() -> None:
    """Outside of any request, and on paths left out, there is no current admission to charge."""
    guard, _ledger = make_guard()
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((guard.current(), scope.get("respan_guard")))
        await hello(scope, receive, send)

    await call(gateway(app, guard), "/other", customer="c")
    await call(GuardMiddleware(app, guard, exclude=["/other"]), "/other", customer="c")
    assert seen == [(None, None)] * 2


# -- refusals that leave the app -------------------------------------------------------------------


def refused_by(guard: Guard) -> Any:
    """An endpoint whose admission is refused."""

    async def endpoint(request: Any) -> Response:
        await guard.admit("org_1")
        return PlainTextResponse("never")

    return endpoint


async def test_refusals_become_answers() -> None:
    """Each error of ours that leaves the app is answered by its own status."""
    guard, _ = make_guard()
    for error, status in ((StorageUnavailable("x"), 503), (Unidentified("x"), 401)):

        async def app(scope: Any, receive: Any, send: Any, error: Exception = error) -> None:
            raise error

        assert (await call(GuardMiddleware(app, guard), "/ask")).status == status


@pytest.mark.parametrize("nested", [1, 3])
async def test_a_group_of_just_our_refusal_is_the_refusal(nested: int) -> None:
    """Task groups wrap what leaves them; a group with somebody else's error in it is the app's."""
    guard, _ = make_guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        error: Exception = StorageUnavailable("x")
        for _ in range(nested):
            error = ExceptionGroup("task group", [error])
        raise error

    async def mixed(scope: Any, receive: Any, send: Any) -> None:
        raise ExceptionGroup("task group", [StorageUnavailable("x"), ValueError("app's")])

    assert (await call(GuardMiddleware(app, guard), "/ask")).status == 503
    with pytest.raises(ExceptionGroup, match="task group"):
        await call(GuardMiddleware(mixed, guard), "/ask")


@pytest.mark.parametrize("handled", [False, True])
async def test_a_mounted_apps_error_page_does_not_replace_the_refusal(handled: bool) -> None:
    """A mounted Starlette or FastAPI app makes a 500 of every exception before the guard sees it; ours stay ours."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})

    async def oops(request: Any, error: Exception) -> Response:
        return PlainTextResponse("oops", status_code=500)

    handlers: Any = {Exception: oops} if handled else {}
    inner = Starlette(routes=[Route("/ask", refused_by(guard), methods=["POST"])], exception_handlers=handlers)
    app = Starlette(routes=[Mount("/inner", app=inner)])
    app.add_middleware(GuardMiddleware, guard=guard)
    exchange = await call(app, "/inner/ask")
    assert exchange.status == 429
    assert exchange.json()["error"]["code"] == "rate_limit"


async def test_a_mounted_apps_error_page_for_its_own_error_stays() -> None:
    """An error page for any other error passes as it is, and the error with it."""
    guard, _ = make_guard()

    async def broken(request: Any) -> Response:
        raise KeyError("app's")

    inner = Starlette(routes=[Route("/ask", broken, methods=["POST"])])
    app = Starlette(routes=[Mount("/inner", app=inner)])
    app.add_middleware(GuardMiddleware, guard=guard)
    exchange = await call(app, "/inner/ask", catch=True)
    assert (exchange.status, exchange.body) == (500, b"Internal Server Error")
    assert isinstance(exchange.error, KeyError)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("ends", ["returns", "raises another error", "raises it after all"])
async def test_a_500_that_the_app_means_is_the_answer(streamed: bool, ends: str) -> None:
    """An app that answers our refusal with a 500 of its own and does not raise it again is not talked over."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await guard.admit("c1")
        except RateLimitExceeded:
            await send({"type": "http.response.start", "status": 500, "headers": [(b"x-own", b"1")]})
            await send({"type": "http.response.body", "body": b"own ", "more_body": streamed})
            if streamed:
                await send({"type": "http.response.body", "body": b"words"})
            if ends == "raises another error":
                raise KeyError("app's") from None
            if ends == "raises it after all":
                raise

    exchange = await call(GuardMiddleware(app, guard), "/ask", catch=True)
    if ends == "raises it after all" and not streamed:
        assert exchange.status == 429
    else:
        assert (exchange.status, exchange.body) == (500, b"own words" if streamed else b"own ")
        assert exchange.headers["x-own"] == "1"
    assert isinstance(exchange.error, KeyError) == (ends == "raises another error")


async def test_the_apps_own_handler_comes_first() -> None:
    """An app that handles our error itself is not talked over; the fields still say where the customer stands."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})

    async def mine(request: Any, error: Exception) -> Response:
        return JSONResponse({"mine": True}, status_code=418)

    app = Starlette(
        routes=[Route("/ask", refused_by(guard), methods=["POST"])], exception_handlers={RateLimitExceeded: mine}
    )
    app.add_middleware(GuardMiddleware, guard=guard)
    exchange = await call(app, "/ask")
    assert (exchange.status, exchange.json()) == (418, {"mine": True})


async def test_a_refusal_after_the_response_began_is_the_apps_error() -> None:
    """Once bytes are out nothing can be answered: the error goes on as it is."""
    guard, _ = make_guard()
    error = StorageUnavailable("x")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    exchange = await call(GuardMiddleware(app, guard), "/ask", catch=True)
    assert exchange.error is error
    assert exchange.status == 200


async def test_refusal_replaces_the_answer() -> None:
    """`refusal=` makes the answer, at the door and for what leaves the app, with the body still readable."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})
    seen: list[Any] = []

    async def mine(request: Request, exc: Exception) -> Response:
        seen.append((await request.body(), exc))
        return JSONResponse({"over": True}, status_code=420)

    door = gateway(hello, guard, refusal=mine)
    exchange = await call(door, customer="c", body=[b'{"model": "gpt-4o-mini", ', b'"messages": []}'])
    assert (exchange.status, exchange.json()) == (420, {"over": True})
    assert exchange.headers["ratelimit"].startswith('"rate_limit";r=0')
    assert seen[0][0] == b'{"model": "gpt-4o-mini", "messages": []}'
    assert isinstance(seen[0][1], LimitExceeded)
    app = Starlette(routes=[Route("/ask", refused_by(guard), methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard, refusal=mine)
    assert (await call(app, "/ask", body=b"x")).status == 420


# -- several doors ---------------------------------------------------------------------------------


async def test_two_doors_of_one_guard_are_one() -> None:
    """A request that passes the same guard twice is admitted, counted, captured and ended once."""
    guard, ledger = make_guard()
    app = gateway(gateway(provider, guard), guard)
    exchange = await call(app, customer="org_1")
    assert exchange.status == 200
    assert exchange.headers["ratelimit"].startswith('"rate_limit";r=999')
    assert len(ledger.admits) == 1
    assert ledger.kinds == ["usage"]
    await ledger.settled(1)


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_gateway_mounted_in_a_guarded_app(wrapped: bool) -> None:
    """An outer door without identity and a mounted gateway with one: the inner admits, the outer ends and captures."""
    guard, ledger = make_guard(default_limits={"rate_limit": 1, "period_budget": 100})
    inner: App = gateway(provider, guard, include=["/*"])
    if wrapped:
        inner = GZipMiddleware(Starlette(routes=[Mount("/", app=inner)]), minimum_size=1)
    app = GuardMiddleware(Starlette(routes=[Mount("/gateway", app=inner)]), guard)
    path = "/gateway/v1/chat/completions"
    admitted = await call(app, path, customer="org_1", headers=[(b"accept-encoding", b"gzip")])
    assert admitted.status == 200
    assert ledger.kinds == ["usage"]
    await ledger.settled(1)
    refused = await call(app, path, customer="org_1")
    assert refused.status == 429
    assert refused.headers["ratelimit"].startswith('"rate_limit";r=0')
    assert (await call(app, path)).status == 401


async def test_two_guards_are_two() -> None:
    """Different guards don't know each other: each admits, each ends its own."""
    first, one = make_guard(default_limits=None)
    second, two = make_guard(default_limits=None)
    assert (await call(gateway(gateway(provider, first), second), customer="c")).status == 200
    await one.settled(1)
    await two.settled(1)


# -- set up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identify": "header:x"}, "identify needs include"),
        ({"identify": "users", "include": ["/*"]}, "no source"),
        ({"include": "/v1/*"}, "must be a list"),
        ({"include": ["v1"]}, "must have patterns"),
        ({"exclude": ["v1"]}, "must have patterns"),
        ({"unidentified": "allow"}, "unidentified must be"),
        ({"refusal": 7}, "refusal must be"),
        ({"max_body_bytes": 0}, "max_body_bytes must be"),
        ({"max_body_bytes": True}, "max_body_bytes must be"),
        ({"guard": "sqlite://"}, "guard must be a Guard"),
    ],
)
def test_bad_arguments_are_errors_at_once(options: dict[str, Any], message: str) -> None:
    """What can't work is refused when the middleware is made, and says what would."""
    guard, _ = make_guard()
    with pytest.raises(ConfigurationError, match=message):
        GuardMiddleware(hello, **({"guard": guard} | options))


async def test_the_start_up_line_names_everything_but_secrets(caplog: pytest.LogCaptureFixture) -> None:
    """One line at start: storage, mode, guarded paths, identity, defaults."""
    guard, _ = make_guard(default_limits={"rate_limit": 60})
    app = Starlette(routes=[])
    app.add_middleware(GuardMiddleware, guard=guard, identify="user", include=["/v1/*"], exclude=["/v1/models"])
    with caplog.at_level(logging.INFO, "respan_guard"), TestClient(app):
        pass
    (line,) = [record.getMessage() for record in caplog.records if "storage=" in record.getMessage()]
    for part in ("memory://", "enforce", "/v1/*, not /v1/models", "identify=user", "'rate_limit': 60"):
        assert part in line


@pytest.mark.parametrize("kind", ["", "htp", "mcp", "http.disconnect", "LIFESPAN", "\u00e9"])
async def test_unknown_scopes_pass(kind: str) -> None:
    """A scope of a kind we don't know is the app's alone, whatever it lacks."""
    guard, _ = make_guard()
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    nothing: Any = None
    await gateway(app, guard)({"type": kind}, nothing, nothing)
    assert seen == [({"type": kind}, None, None)]


async def test_amounts_in_headers_and_body_on_request() -> None:
    """With `show_amounts` the budget is in the fields, less what this request holds, and the refusal has amounts."""
    guard, _ = make_guard(default_limits={"total_budget": 1}, show_amounts=True, hold=Decimal("0.4"))
    app = gateway(provider, guard)
    exchange = await call(app, customer="c")
    assert exchange.headers["ratelimit"] == '"total_budget";r=600000;respan-unit="usd-micros"'
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(guard.admit("c", estimate=Decimal("0.4")))
        refused = await call(app, customer="c")
    assert refused.status == 429
    assert refused.json()["error"]["code"] == "budget_in_flight"
    assert refused.json()["limit_info"]["limits"][0]["limit_value"] == 1.0


async def test_the_apps_message_is_left_alone() -> None:
    """Headers go into a copy: an app may send the same message object again and again."""
    guard, _ = make_guard()
    start = {"type": "http.response.start", "status": 200, "headers": ((b"x-app", b"1"),)}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start)
        await send({"type": "http.response.body"})

    for _ in range(2):
        exchange: Exchange = await call(gateway(app, guard), "/v1/x", customer="c")
        assert exchange.headers["x-app"] == "1"
        assert "ratelimit" in exchange.headers
    assert start["headers"] == ((b"x-app", b"1"),)


@pytest.mark.parametrize("limits", [None, {"rate_limit": 5}])
async def test_headers_may_be_any_iterable(limits: Any) -> None:
    """Headers that can be read only once arrive whole, although the door reads them too."""
    guard, ledger = make_guard(default_limits=limits)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        names = [(b"content-type", b"application/json"), (b"x-app", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": (pair for pair in names)})
        await send({"type": "http.response.body", "body": json.dumps(reply()).encode()})

    exchange = await call(gateway(app, guard), customer="c")
    assert (exchange.headers["x-app"], exchange.headers["content-type"]) == ("1", "application/json")
    assert ledger.kinds == ["usage"]


async def test_a_scope_that_is_used_again_is_a_new_request() -> None:
    """A middleware outside that tries again with the same scope is admitted and counted again."""
    guard, ledger = make_guard(default_limits={"rate_limit": 1})
    door = gateway(provider, guard)
    statuses: list[int] = []

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()

        async def again() -> Any:
            return message

        async def note(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        for _ in range(2):
            await door(scope, again, note)

    await call(twice, customer="c")
    assert statuses == [200, 429]
    await ledger.settled(1)


async def test_amounts_of_the_apps_budgets_are_never_shown() -> None:
    """Neither fields nor refusals tell what all customers share, with `show_amounts` neither; they tell which it is."""
    guard, _ = make_guard(
        default_limits={"total_budget": 5},
        app_budgets={"total_budget": "77.5"},
        model_budgets={"total_budget": "66.5"},
        show_amounts=True,
    )
    app = gateway(provider, guard)
    answered = await call(app, customer="c")
    assert answered.status == 200
    await guard.record(Usage(model="other", cost=Decimal("77.5")), "somebody")
    refused = await call(app, customer="c")
    assert refused.status == 402
    found = refused.json()
    assert found["violated-policies"] == ["app_total_budget"]
    assert found["error"]["code"] == "app_total_budget"
    assert found["detail"] == "The app's own total budget is used up."
    assert [limit["name"] for limit in found["limit_info"]["limits"]] == ["total_budget"]
    assert b"77" not in refused.body
    assert b"66" not in refused.body
    for exchange in (answered, refused):
        for field in ("ratelimit", "ratelimit-policy"):
            assert exchange.headers[field].startswith('"total_budget";')
            assert "," not in exchange.headers[field], "no other limit"
