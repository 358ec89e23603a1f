"""Storage that fails behind the door: an answer of ours or the app's own, never a 500 and never something between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard, GuardMiddleware
from respan_guard.backends import registry
from respan_guard.errors import (
    ConfigurationError,
    SchemaMismatch,
    StorageCorrupt,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
    StoreReset,
)
from tests.guard.faulty import FaultyBackend, faulty_guard

from .support import CHAT, App, Exchange, Receive, Send, call, gateway, http_scope, provider

SECRET = "db.internal:6379 password=hunter2"
ERRORS: list[Exception] = [
    StorageUnavailable(SECRET),
    StorageReadOnly(SECRET),
    StorageFull(SECRET),
    StorageCorrupt(SECRET),
    SchemaMismatch(SECRET),
    StoreReset(SECRET),
    ConfigurationError(SECRET),  # a wrong password, a database that isn't there
    ConnectionRefusedError(SECRET),
    TimeoutError(SECRET),
    RuntimeError(SECRET),
    KeyError(SECRET),
]
LIMITS = {"default_limits": {"rate_limit": 1000, "total_budget": 100}}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyBackend]:
    """The store behind faulty://one."""
    monkeypatch.setitem(registry._BUILT_IN, "faulty", f"{FaultyBackend.__module__}:FaultyBackend")
    yield FaultyBackend("faulty://one")
    FaultyBackend.stores.clear()


def refused(exchange: Exchange) -> None:
    """Check that it is our 503, that says when to come back and nothing of what is wrong inside."""
    assert exchange.error is None
    assert exchange.status == 503
    headers = exchange.headers
    assert headers["content-type"] == "application/problem+json"
    assert 1 <= int(headers["retry-after"]) <= 3
    assert headers["cache-control"] == "no-store"
    assert exchange.json()["error"]["code"] == "storage_unavailable"
    assert b"hunter2" not in exchange.body
    assert "hunter2" not in str(headers)


def admitting(guard: Guard) -> App:
    """An app that says itself who the customer is."""

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await guard.admit("c1")
        await provider(scope, receive, send)

    return app


def doors(guard: Guard) -> list[App]:
    """The same service behind both kinds of door."""
    return [gateway(provider, guard), GuardMiddleware(admitting(guard), guard)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_limited_customer_is_answered_with_503(error: Exception, store: FaultyBackend, tmp_path: Path) -> None:
    """Whatever storage or its driver raises, at every place where it is asked, at both doors."""
    for options in (LIMITS, {"unknown_customers": "refuse"}):
        async with faulty_guard(tmp_path, **options) as guard:
            store.error = store.other_error = error
            for app in doors(guard):
                refused(await call(app, customer="c1"))
            store.error = store.other_error = None
            await guard.flush()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_guard_that_never_opened_answers_too(error: Exception, store: FaultyBackend, tmp_path: Path) -> None:
    """Storage fails while it is opened, on first use, on the guard's own thread."""
    guard = faulty_guard(tmp_path, **LIMITS)
    store.other_error = error
    try:
        for app in doors(guard):
            refused(await call(app, customer="c1"))
    finally:
        store.other_error = None
        await asyncio.to_thread(guard.sync.close)


async def test_what_is_wrong_for_good_is_said_in_the_log_once(
    store: FaultyBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A password that changed: each request to a guard that was never opened is a 503, and its text one line."""
    guard = faulty_guard(tmp_path, unknown_customers="refuse", budget_failure="open", rate_limit_failure="open")
    store.other_error = ConfigurationError("the password is wrong")
    try:
        for _ in range(3):
            refused(await call(gateway(provider, guard), customer="c1"))
    finally:
        store.other_error = None
        await asyncio.to_thread(guard.sync.close)
    assert caplog.text.count("the password is wrong") == 1


@pytest.mark.parametrize("error", ERRORS[::2], ids=lambda error: type(error).__name__)
async def test_trusted_params_that_cannot_be_stored_refuse(
    error: Exception, store: FaultyBackend, tmp_path: Path
) -> None:
    """The limits of this very request can't be put: 503, and with both kinds open the request goes on without."""
    body = json.dumps(
        {"model": "gpt-4o-mini", "messages": [], "customer_params": {"customer_identifier": "c1", "rate_limit": 5}}
    )
    async with faulty_guard(tmp_path, trust_customer_params=True) as guard:
        store.error = store.other_error = error
        refused(await call(gateway(provider, guard, identify="body"), body=body.encode()))
        store.error = store.other_error = None
    async with faulty_guard(
        tmp_path, trust_customer_params=True, budget_failure="open", rate_limit_failure="open"
    ) as guard:
        store.error = store.other_error = error
        assert (await call(gateway(provider, guard, identify="body"), body=body.encode())).status == 200
        store.error = store.other_error = None


@pytest.mark.parametrize("stream", [False, True])
async def test_who_is_let_in_gets_the_apps_own_bytes(stream: bool, store: FaultyBackend, tmp_path: Path) -> None:
    """Open, before, during and after: the response is the provider's, and each call is booked once."""
    question = json.dumps({"model": "gpt-4o-mini", "messages": [], "stream": stream}).encode()
    bare = await call(provider, body=question)
    async with faulty_guard(tmp_path, **LIMITS, budget_failure="open", rate_limit_failure="open") as guard:
        app = gateway(provider, guard)
        for error in (None, StorageUnavailable("down"), StorageUnavailable("down"), None):
            store.error = error
            exchange = await call(app, customer="c1", body=question)
            assert exchange.status == 200
            assert [m["type"] for m in exchange.sent] == [m["type"] for m in bare.sent]
            assert len(exchange.body) == len(bare.body)
        await guard.flush()
        assert (await guard.status("c1")).total_calls == 4


async def test_storage_that_dies_between_admission_and_end_changes_nothing_for_the_response(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """The customer was let in; the end of the request is an append, and waits in the inbox."""
    async with faulty_guard(tmp_path, **LIMITS) as guard:

        async def dying(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            store.error = StorageUnavailable("down")
            await provider(scope, receive, send)

        assert (await call(gateway(dying, guard), customer="c1")).status == 200
        await asyncio.sleep(0.05)
        store.error = None
        await guard.flush()
        assert (await guard.status("c1")).total_calls == 1
        assert await store.holds(now=guard.now_ms()) == []


async def test_a_websocket_is_closed_with_try_again_later(store: FaultyBackend, tmp_path: Path) -> None:
    """Before it is accepted, without an exception that the server would log."""
    async with faulty_guard(tmp_path, **LIMITS) as guard:
        store.error = StorageUnavailable(SECRET)
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        scope = http_scope(CHAT, headers=[(b"x-customer", b"c1")]) | {"type": "websocket"}
        del scope["method"]
        await gateway(provider, guard)(scope, receive, send)
        assert [message["type"] for message in sent] == ["websocket.close"]
        assert "hunter2" not in str(sent)


async def test_a_black_hole_behind_the_door_is_a_503_at_the_deadline(store: FaultyBackend, tmp_path: Path) -> None:
    """100 requests at once into a store that hangs: each has its answer, and then the door works again."""
    async with faulty_guard(tmp_path, **LIMITS, storage_timeout=0.1) as guard:
        app = gateway(provider, guard)
        store.gate = asyncio.Event()
        for exchange in await asyncio.gather(*[call(app, customer=f"c{n}") for n in range(100)]):
            refused(exchange)
        gate, store.gate = store.gate, None
        gate.set()
        await guard.flush()
        assert (await call(app, customer="c1")).status == 200
        await guard.flush()
        assert await store.holds(now=guard.now_ms()) == []
