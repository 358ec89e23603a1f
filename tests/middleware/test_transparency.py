"""The door changes nothing of a request it admits but to add its own fields."""

from __future__ import annotations

import asyncio
import copy
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import StreamingResponse

from respan_guard.middleware import GuardMiddleware, capture, gate
from respan_guard.middleware.headers import RateLimitFields
from respan_guard.providers import StreamReader
from tests.middleware.support import CHAT, call, gateway, http_scope, make_guard
from tests.middleware.test_terminal import completes

OURS = {b"ratelimit", b"ratelimit-policy"}
EARLY: dict[str, Any] = {"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]}
PUSH: dict[str, Any] = {"type": "http.response.push", "path": "/a.css", "headers": []}
DEBUG: dict[str, Any] = {"type": "http.response.debug", "info": {"template": object(), "context": {}}}
TRAILERS: dict[str, Any] = {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": False}


def without_ours(message: dict[str, Any]) -> dict[str, Any]:
    """A message as it would be without the guard."""
    if message["type"] != "http.response.start" or "headers" not in message:
        return message
    return message | {"headers": [pair for pair in message["headers"] if pair[0] not in OURS]}


class Silent:
    """A client that sends one empty body and stays."""

    async def __call__(self) -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}


headers = st.lists(st.tuples(st.sampled_from([b"x-a", b"x-b", b"content-length"]), st.binary(max_size=8)), max_size=4)
starts = st.fixed_dictionaries(
    {"type": st.just("http.response.start"), "status": st.integers(200, 599), "headers": headers},
    optional={"trailers": st.booleans(), "x-unknown": st.integers()},
)
bodies = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("http.response.body")}, optional={"body": st.binary(max_size=50), "more_body": st.booleans()}
    ),
    st.fixed_dictionaries({"type": st.just("http.response.pathsend"), "path": st.just("/tmp/x")}),
    st.fixed_dictionaries(
        {"type": st.just("http.response.zerocopysend"), "file": st.integers(), "count": st.integers(0, 9)}
    ),
)


@st.composite
def sequences(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Legal sequences of messages: extensions may come before the start and between, trailers at the end."""
    extras: st.SearchStrategy[list[dict[str, Any]]] = st.lists(st.sampled_from([EARLY, PUSH, DEBUG]), max_size=2)
    found: list[dict[str, Any]] = [*draw(extras), draw(starts)]
    for message in draw(st.lists(bodies, max_size=6)):
        found += [message, *draw(extras)]
    return found + draw(st.lists(st.just(TRAILERS), max_size=1))


@settings(max_examples=300, deadline=None)
@given(messages=sequences(), admitted=st.booleans(), path=st.sampled_from([CHAT, "/v1/other", "/health"]))
def test_what_the_app_sends_is_what_goes_out(messages: list[dict[str, Any]], admitted: bool, path: str) -> None:
    """Every legal sequence passes message by message: same types, same order, same objects but the start."""
    guard, _ = make_guard()
    out: list[Any] = []
    original = [copy.copy(message) for message in messages]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def send(message: Any) -> None:
        out.append(message)

    door = gateway(app, guard) if admitted else GuardMiddleware(app, guard)
    scope = http_scope(path, "GET", headers=[(b"x-customer", b"org_1")])
    asyncio.run(door(scope, Silent(), send))
    assert [without_ours(message) for message in out] == original
    assert messages == original, "the app's own messages are not written to"
    for before, after in zip(messages, out, strict=True):
        assert before is after or before["type"] == "http.response.start"
    added = [name for name, _ in next(m for m in out if m["type"] == "http.response.start")["headers"] if name in OURS]
    assert len(added) == (2 if admitted and path != "/health" else 0)


async def test_nothing_is_held_back() -> None:
    """Each send of the app is done only when the server's is done: a slow client slows the app, not our memory."""
    guard, _ = make_guard()
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(5):
            events.append(f"app sends {number}")
            await send({"type": "http.response.body", "body": b"x", "more_body": number < 4})
            events.append(f"app goes on {number}")

    async def on_send(message: Any) -> None:
        if message["type"] == "http.response.body":
            events.append("server takes")
            await asyncio.sleep(0)
            events.append("server is done")

    await call(gateway(app, guard), customer="org_1", on_send=on_send)
    assert events == [
        event
        for number in range(5)
        for event in (f"app sends {number}", "server takes", "server is done", f"app goes on {number}")
    ]


@pytest.mark.parametrize("content_type", [b"text/event-stream", b"application/json", b"text/plain"])
async def test_a_gigabyte_passes_through_without_growing(content_type: bytes) -> None:
    """A long response costs no memory, whether its usage is looked for or not."""
    guard, ledger = make_guard()
    chunk = b"data: " + b"x" * (1 << 20) + b"\n\n"
    sizes: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})
        for number in range(1024):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if number in (64, 1023):
                sizes.append(tracemalloc.get_traced_memory()[0])
        await send({"type": "http.response.body"})

    async def nowhere(message: Any) -> None: ...

    pending = [{"type": "http.request", "body": json.dumps({"model": "gpt-4o-mini", "messages": []}).encode()}]

    async def receive() -> Any:
        return pending.pop()

    tracemalloc.start()
    try:
        await gateway(app, guard)(http_scope(headers=[(b"x-customer", b"org_1")]), receive, nowhere)
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 8 << 20
    await ledger.settled(1)


async def test_the_apps_exception_is_the_apps() -> None:
    """An exception passes by identity, without ours in its chain."""
    guard, _ = make_guard()
    error = RuntimeError("mine")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    exchange = await call(gateway(app, guard), customer="org_1", catch=True)
    assert exchange.error is error
    assert error.__cause__ is None
    assert error.__context__ is None


async def test_a_streaming_response_listening_for_the_disconnect_is_not_cut() -> None:
    """With the body replayed, the app's wait for a disconnect waits for the real one: no fake one ends a stream."""
    guard, _ = make_guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def parts() -> Any:
            for _ in range(20):
                yield b"x"
                await asyncio.sleep(0)

        await receive()
        await StreamingResponse(parts())(scope, receive, send)

    exchange = await call(gateway(app, guard), customer="org_1")
    assert exchange.body == b"x" * 20


@pytest.mark.parametrize("broken", ["headers", "capture", "read", "end of capture", "call"])
async def test_a_fault_of_ours_never_shows(broken: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A bug at any of our points behind the admission leaves the app's response as it is, and is logged once."""

    def bug(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("ours")

    places: dict[str, tuple[Any, str]] = {
        "headers": (RateLimitFields, "of"),
        "capture": (capture, "reader_for"),
        "read": (StreamReader, "feed"),
        "end of capture": (StreamReader, "usage"),
        "call": (gate, "call_from_request"),
    }
    monkeypatch.setattr(*places[broken], bug)
    guard, ledger = make_guard()
    door = gateway(completes, guard)
    for _ in range(3):
        exchange = await call(door, customer="org_1")
        assert exchange.status == 200
        assert exchange.body.endswith(b"[DONE]\n\n")
    await ledger.settled(3)
    faults = [record for record in caplog.records if record.exc_info]
    assert len(faults) == 1, "at most one line every ten seconds"


async def test_a_guard_that_cannot_decide_answers_503(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A bug in the decision itself is no 500 and lets nobody in."""
    guard, ledger = make_guard()

    def bug(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(guard.estimator, "of_call", bug)
    ran: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ran.append(True)

    exchange = await call(gateway(app, guard), customer="org_1")
    assert exchange.status == 503
    assert ran == []
    assert ledger.ops == []
    assert [bool(record.exc_info) for record in caplog.records] == [True]
