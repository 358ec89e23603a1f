"""Storage that is down, strings that attack, hosts that are none: every answer is one of ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from respan_guard import Guard, Usage
from respan_guard.api import RespanAPI
from respan_guard.backends import registry
from respan_guard.errors import StorageUnavailable
from respan_guard.testing import FakeClock
from tests.guard.faulty import FaultyBackend

from .support import KEY, MOUNT, Client, mounted

ATTACKS = [
    "'; DROP TABLE entries; --", "' OR '1'='1", '"); --', "%", "_", "*", "\\", "{{7*7}}", "${jndi:ldap://x}",
    "../../etc", "<script>alert(1)</script>", "=1+1", "@SUM(A1)", "\u202e", "a\u0000b", "\ud800", "line\nbreak",
    "\u2028", "🙂" * 50, "null", "true", "NaN", "-0", "[]", "{}", "metadata__x", "__class__", "constructor",
]  # fmt: skip


async def test_attacks_are_plain_values(api: Client, guard: Guard) -> None:
    """In every place where a string goes in: they match themselves, nothing else, and break nothing."""
    await api.log(customer_identifier="ann", cost=1, metadata={"k": "v"})
    for text in ATTACKS:
        body = {
            "model": text, "customer_identifier": "bob", "cost": 1, "metadata": {text: text},
            "properties": {text: [text]},
            "custom_identifier": f"{text}", "thread_identifier": text, "trace_unique_id": text, "log_type": text,
            "error_message": text, "provider_id": text, "span_name": text, "warnings": {text: text},
        }  # fmt: skip
        logged = await api.log(body)
        row = await api("GET", f"/api/request-logs/{logged['unique_id']}/")
        plain = text.encode("utf-8", "replace").decode().replace("\0", "")
        assert (row["model"], row["custom_identifier"], row["thread_identifier"]) == (plain,) * 3
        for field in ("model", "custom_identifier", "trace_unique_id", "provider_id", "thread_identifier"):
            if text == plain:
                assert (await api.logs({field: {"value": [text]}}))["count"] == 1, (field, text)
        status = 200 if text == plain else 400  # what no text can hold
        found = await api.logs({"customer_identifier": {"value": [text]}}, status)
        assert found.get("count", 0) == 0
        found = await api.users({"name": {"operator": "contains", "value": [text]}}, status)
        assert found.get("count", 0) == 0
        for name in ("sort_by", "cursor", "group_by", "summary_type", "page", "start_time", "environment"):
            if text.isprintable() or text.isascii():
                answer = await api.http.get(
                    "/api/request-logs/groups/", params={name: text}, headers={"authorization": f"Bearer {KEY}"}
                )
                assert answer.status_code == 400, (name, text)
        for path in (f"/api/request-logs/{text}/", f"/api/users/{text}x/"):
            if text.isprintable() and text.isascii() and "?" not in text:
                answer = await api.http.get(path, headers={"authorization": f"Bearer {KEY}"})
                assert answer.status_code == 404, path
    summary = await api("POST", "/api/request-logs/summary/", {})
    assert summary["number_of_requests"] == len(ATTACKS) + 1
    assert (await api.users())["count"] == 2


async def test_a_body_that_names_two_customers(api: Client, guard: Guard) -> None:
    """What says twice whose a log is, what it cost or which logs there are means two things, so nothing is booked."""
    for name, first, last in (
        ("customer_identifier", '"a"', '"b"'), ("customer_params", '{"customer_identifier": "a"}', "{}"),
        ("respan_params", "{}", '{"customer_identifier": "a"}'), ("cost", "1", "5"),
        (r"\u0063ustomer_identifier", '"a"', '"a"'),
    ):  # fmt: skip
        log = f'{{"model": "m", "{name}": {first}, "{name}": {last}}}'
        for path, body in (("", log), ("bulk/", f'{{"logs": [{log}, {{"model": "m"}}]}}')):
            refused = await api("POST", f"/api/request-logs/{path}", body, 400)
            assert refused["field"] == name.replace(r"\u0063", "c")
    await api("POST", "/api/request-logs/bulk/", '{"logs": [{"model": "m"}], "logs": [{"model": "m"}]}', 400)
    await api("POST", "/api/users/create/", '{"customer_identifier": "a", "customer_identifier": "b"}', 400)
    assert (await api.logs())["count"] == (await api.users())["count"] == 0
    await api("POST", "/api/request-logs/", '{"model": "m", "other": 1, "other": 2}', 201)


async def test_an_abyss(api: Client, guard: Guard) -> None:
    """JSON as deep as a parser takes it: refused where it would be kept, passed over where it is not."""
    deep = "[" * 900 + "]" * 900
    for path, body, status in (
        ("/api/request-logs/", f'{{"model": "m", "cost": 1, "properties": {{"a": {deep}}}}}', 400),
        ("/api/request-logs/", f'{{"model": "m", "cost": 1, "metadata": {{"a": {deep}}}}}', 201),
        ("/api/request-logs/", f'{{"model": "m", "input": {deep}, "other": {deep}, "full_response": {deep}}}', 201),
        ("/api/request-logs/list/", f'{{"filters": {{"cost": {{"value": [1], "more": {deep}}}}}}}', 200),
        ("/api/request-logs/list/", f'{{"filters": {{"cost": {{"value": [{deep}]}}}}}}', 400),
        ("/api/request-logs/groups/", f'{{"filters": {{"model": {{"value": ["m"], "more": {deep}}}}}}}', 200),
        ("/api/users/create/", f'{{"customer_identifier": "ann", "metadata": {{"a": {deep}}}}}', 400),
        ("/api/dashboard/time-series/breakdown/", f'{{"metrics_to_aggregate": {deep}}}', 400),
    ):
        await api("POST", path, body, status)
    assert (await api.users())["count"] == 0


async def test_a_host_that_is_none(api: Client, guard: Guard) -> None:
    """A `Host` that makes no URL is answered, not stumbled over."""
    for _ in range(3):
        await api.log(cost=1)
    for host in ("[", "a b", "[::1", "x:y", "\\", ""):
        answer = await api.http.get(
            "/api/request-logs/list/?page_size=1", headers={"authorization": f"Bearer {KEY}", "host": host}
        )
        assert answer.status_code in (200, 400), host


async def test_behind_a_proxy_the_links_lead_back(guard: Guard) -> None:
    """`next` is made of the host, scheme and mount that the request came by."""
    for _ in range(3):
        await guard.record(Usage(model="m", cost=1), "ann")
    app = mounted(guard)
    transport = httpx2.ASGITransport(app, root_path="/v2")
    async with httpx2.AsyncClient(transport=transport, base_url="https://guard.example/v2") as http:
        answer = await http.get(
            f"{MOUNT}/api/request-logs/list/?page_size=2", headers={"authorization": f"Bearer {KEY}"}
        )
        assert answer.json()["next"].startswith(
            f"https://guard.example/v2{MOUNT}/api/request-logs/list/?page_size=2&page=2"
        )


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that fails on demand."""
    monkeypatch.setitem(registry._BUILT_IN, "faulty", f"{FaultyBackend.__module__}:FaultyBackend")
    yield FaultyBackend("faulty://one")
    FaultyBackend.stores.clear()


async def test_storage_that_is_down(store: FaultyBackend, tmp_path: Path) -> None:
    """Usage is taken, journalled, and booked once when storage is back."""
    async with Guard("faulty://one", journal_dir=tmp_path, clock=FakeClock()) as guard:
        transport = httpx2.ASGITransport(mounted(guard))
        async with httpx2.AsyncClient(transport=transport, base_url=f"http://x{MOUNT}") as http:
            api = Client(http)
            await api.log(customer_identifier="ann", cost=1)
            store.error = StorageUnavailable("postgres://user:secret@10.0.0.1/db is down")
            logged = await api.log(customer_identifier="ann", cost=2, custom_identifier="x")
            assert logged["cost"] == 2
            bulk = await api("POST", "/api/request-logs/bulk/", {"logs": [{"model": "m", "cost": 4}]}, 201)
            assert bulk["success_count"] == 1
            store.error = None
            await guard.flush()
            again = await api.log(customer_identifier="ann", cost=2, custom_identifier="x")
            assert again["unique_id"] == logged["unique_id"]
            for _ in range(100):
                if (await guard.status("ann")).total_spend == 3:
                    break
                await asyncio.sleep(0.05)
            assert (await guard.status("ann")).total_spend == 3


@pytest.fixture
async def stuck(store: FaultyBackend, tmp_path: Path) -> AsyncIterator[tuple[Client, Guard]]:
    """An API whose guard can't write a journal."""
    (tmp_path / "file").write_text("no directory")
    async with Guard("faulty://one", journal_dir=tmp_path / "file", clock=FakeClock()) as guard:
        transport = httpx2.ASGITransport(mounted(guard))
        async with httpx2.AsyncClient(transport=transport, base_url=f"http://x{MOUNT}") as http:
            yield Client(http), guard
        store.error, store.gate = None, None


async def spent(guard: Guard, customer: str, wanted: int) -> bool:
    """Whether so much was spent, once all that waited is stored."""
    for _ in range(100):
        with contextlib.suppress(StorageUnavailable):
            if (await guard.status(customer)).total_spend == wanted:
                break
        await asyncio.sleep(0.05)
    await guard.flush()
    return (await guard.status(customer)).total_spend == wanted


async def test_what_is_asked_for_again_is_not_stored(store: FaultyBackend, stuck: tuple[Client, Guard]) -> None:
    """Without storage and without a journal: a 503 keeps nothing, and a row that storage may have is a 202."""
    api, guard = stuck
    await api.log(customer_identifier="ann", cost=0)
    store.gate = asyncio.Event()
    row = {"customer_identifier": "ann", "cost": 1}
    kept = await api.log(row, 202)  # it was sent, so nobody can take it back
    assert kept["status"] == "warning"
    assert "do not send it again" in kept["warnings"]
    for _ in range(3):  # these still waited
        await api.log(row, 503)
        assert api.last.headers["retry-after"] == "1"
    store.gate.set()
    store.gate = None
    assert await spent(guard, "ann", 1)
    await api.log(row)
    assert await spent(guard, "ann", 2)


async def test_an_answer_that_was_lost(store: FaultyBackend, stuck: tuple[Client, Guard]) -> None:
    """Storage took the row and failed all the same: it is sent again under its id, and counts once."""
    api, guard = stuck
    await api.log(customer_identifier="ann", cost=0)
    store.error, store.applied_anyway = StorageUnavailable("gone"), True
    await api.log({"customer_identifier": "ann", "cost": 1}, 202)
    store.error = None
    assert await spent(guard, "ann", 1)


async def test_a_bulk_in_an_outage(store: FaultyBackend, stuck: tuple[Client, Guard]) -> None:
    """Where no row was taken it is a 503, whatever is wrong with some of them; else each row says whether to retry."""
    api, guard = stuck
    await api.log(customer_identifier="ann", cost=0)
    store.error = StorageUnavailable("gone")
    for _ in range(20):  # until storage is taken for dead and is not asked any more
        status = 503 if getattr(guard.lane(), "breaker").is_open else 202  # noqa: B009  # of no public name
        await api.log({"customer_identifier": "ann", "cost": 0}, status)
        if status == 503:
            break
    rows = [{"model": "m", "customer_identifier": "ann", "cost": 1}, {"model": ""}]
    await api("POST", "/api/request-logs/bulk/", {"logs": rows}, 503)
    assert api.last.headers["retry-after"] == "1"
    await api("POST", "/api/request-logs/bulk/", {"logs": rows[1:]}, 400)
    store.error = None
    await guard.flush()
    bulk = await api("POST", "/api/request-logs/bulk/", {"logs": rows}, 201)
    assert [(error["index"], error["retryable"]) for error in bulk["errors"]] == [(1, False)]
    assert await spent(guard, "ann", 1)


async def test_a_bulk_that_was_taken_in_part(guard: Guard, api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that storage did not take is told apart from one that is wrong."""
    book = guard.bookings.book

    async def half(usage: Usage, customer: str, **more: Any) -> Any:
        if customer == "bob":
            raise StorageUnavailable("postgres://user:secret@10.0.0.1/db is down")
        return await book(usage, customer, **more)

    monkeypatch.setattr(guard.bookings, "book", half)
    rows = [{"model": "m", "customer_identifier": name, "cost": 1} for name in ("ann", "bob")]
    bulk = await api("POST", "/api/request-logs/bulk/", {"logs": [*rows, {"model": ""}]}, 201)
    assert [(error["index"], error["retryable"]) for error in bulk["errors"]] == [(1, True), (2, False)]
    assert "secret" not in api.last.text


async def test_what_can_never_be_stored_is_no_success(api: Client, guard: Guard) -> None:
    """A sum that would pass what can be counted: a 400, by itself and in a bulk."""
    full = {"customer_identifier": "ann", "cost": 9_000_000}
    await api.log(full)
    refused = await api.log(full, 400)
    assert "9,000,000 USD" in refused["detail"]
    bulk = await api("POST", "/api/request-logs/bulk/", {"logs": [{"model": "m", **full}]}, 400)
    assert (bulk["success_count"], bulk["errors"][0]["retryable"]) == (0, False)
    assert (await guard.status("ann")).total_spend == 9_000_000


@pytest.mark.parametrize("path", ["/api/users/list/", "/api/users/ann/", "/api/request-logs/list/", "/openapi.json"])
async def test_reads_without_storage(guard: Guard, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """They are a 503 that says when to come again, and nothing of what the store said."""

    async def down(*_: object, **__: object) -> None:
        raise StorageUnavailable("postgres://user:secret@10.0.0.1/db is down")

    lane = guard.lane()
    backend = getattr(lane, "backend")  # noqa: B009  # of no public name
    for name in ("customers", "get", "entries"):
        monkeypatch.setattr(backend, name, down)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(mounted(guard)), base_url=f"http://x{MOUNT}") as http:
        answer = await http.get(path, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == (200 if path == "/openapi.json" else 503)
        assert "secret" not in answer.text


async def test_a_guard_that_is_switched_off_says_so(guard: Guard) -> None:
    """What is not recorded is not acknowledged."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(mounted(guard)), base_url=f"http://x{MOUNT}") as http:
        off = Guard("memory://", mode="off")
        other = httpx2.ASGITransport(mounted(off))
        async with httpx2.AsyncClient(transport=other, base_url=f"http://x{MOUNT}") as idle:
            headers = {"authorization": f"Bearer {KEY}"}
            body = {"model": "m", "cost": 1}
            assert (await idle.post("/api/request-logs/", json=body, headers=headers)).status_code == 503
            assert (await http.post("/api/request-logs/", json=body, headers=headers)).status_code == 201


async def test_a_client_that_leaves(guard: Guard) -> None:
    """In the middle of its body: nothing is booked, nothing is raised."""
    app = RespanAPI(guard, api_key=KEY)
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": b'{"mod', "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/api/request-logs/", "raw_path": b"/api/request-logs/",
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("x", 80), "client": ("y", 1),
        "headers": [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")],
        "http_version": "1.1",
    }  # fmt: skip
    await app(scope, receive, send)
    assert sent[0]["status"] == 400
    assert Request(scope).method == "POST"
    assert [record async for record in guard.records()] == []


def test_by_itself_it_opens_the_guard() -> None:
    """Run without an app around it, its lifespan is the guard's."""
    guard = Guard("memory://")
    with TestClient(RespanAPI(guard, api_key=KEY)) as client:
        answer = client.post(
            "/api/request-logs/", content=json.dumps({"model": "m", "cost": 1}),
            headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
        )  # fmt: skip
        assert answer.status_code == 201
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/api/users/list/"):
            pass
