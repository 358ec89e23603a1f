"""Incidents of other gateways, as tests of the guard and its door: each once cost somebody money or an outage."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Customer, Guard, GuardMiddleware, Usage
from respan_guard.backends import registry
from respan_guard.errors import GuardError, StorageFull, StorageReadOnly, StorageUnavailable
from respan_guard.testing import FakeClock, StandInProvider
from tests.guard.faulty import FaultyBackend
from tests.middleware.support import CHAT, QUESTION, Message, call, gateway, make_guard, provider, reply

ROOT = Path(__file__).parents[1]
PRICE = Decimal("0.0000045")  # of `support.USAGE`: 10 tokens in at 0.15, 5 out at 0.60 USD per million
STREAM = QUESTION | {"stream": True, "stream_options": {"include_usage": True}}


def body(**fields: Any) -> bytes:
    """A request for a chat completion."""
    return json.dumps(QUESTION | fields).encode()


def stand_in_gateway(stand_in: StandInProvider, guard: Guard) -> GuardMiddleware:
    """The provider behind a door; whoever asks has a key."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await stand_in({**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer k")]}, receive, send)

    return gateway(app, guard)


async def costs(guard: Guard, customer: str = "c1") -> list[Decimal | None]:
    """What is booked for a customer."""
    await guard.flush()
    return [record.cost async for record in guard.records(customer)]


async def live_holds(guard: Guard) -> int:
    """How many holds count."""
    now = guard.now_ms()
    return len(await guard.lane().call(lambda backend: backend.holds(state="live", now=now)))


@pytest.mark.parametrize("storage", ["memory://", "sqlite:///{}/guard.db"])
async def test_incident_1_concurrent_requests_pass_no_budget(storage: str, tmp_path: Path) -> None:
    """Check-then-increment let 28 of 10 through: 200 at once, a tenth of the budget each, and exactly 10 get in."""
    async with Guard(storage.format(tmp_path), default_limits={"total_budget": 1}, journal_dir=tmp_path) as guard:
        answers = await asyncio.gather(*[guard.try_admit("c1", estimate=Decimal("0.1")) for _ in range(200)])
        assert sum(map(bool, answers)) == 10


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyBackend]:
    """The store behind faulty://one."""
    monkeypatch.setitem(registry._BUILT_IN, "faulty", f"{FaultyBackend.__module__}:FaultyBackend")
    yield FaultyBackend("faulty://one")
    FaultyBackend.stores.clear()


def _broken(real: Callable[..., Awaitable[Any]], error: Exception | None, back: asyncio.Event) -> Any:
    """A call that fails, or that hangs until storage is back."""

    async def call(*arguments: Any, **options: Any) -> Any:
        if error is not None:
            raise error
        await back.wait()
        return await real(*arguments, **options)

    return call


@pytest.mark.parametrize("broken", ["get", "put", "apply"])
@pytest.mark.parametrize(
    "how",
    [StorageUnavailable("down"), StorageFull("full"), StorageReadOnly("read-only"), RuntimeError("a bug"), None],
    ids=["down", "full", "read-only", "bug", "hangs"],
)
async def test_incident_4_every_call_of_the_admission_path_fails_closed(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, how: Exception | None
) -> None:
    """The read failed closed but the reservation's write did not: whichever call fails, or hangs, it is a 503."""
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await provider(scope, receive, send)

    guard = Guard("faulty://one", journal_dir=tmp_path, trust_customer_params=True, storage_timeout=0.05)
    async with guard:
        door = GuardMiddleware(app, guard, identify="body", include=["/v1/*"])
        asked = body(customer_params={"customer_identifier": "c1", "total_budget": 1})
        with monkeypatch.context() as patched:
            back = asyncio.Event()
            patched.setattr(store, broken, _broken(getattr(store, broken), how, back))
            exchange = await call(door, body=asked)
            assert exchange.status == 503
            assert reached == []
        back.set()
        assert (await call(door, body=asked)).status == 200
        await guard.flush()
        assert await live_holds(guard) == 0
        assert await guard.verify() == []


def test_incident_9_shutdown_loses_no_spend(tmp_path: Path) -> None:
    """SIGTERM with 10 streams in flight on uvicorn: each call that the provider charged is in the ledger."""
    count = 10
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    storage = f"sqlite:///{tmp_path / 'guard.db'}"
    stand_in = StandInProvider()
    fault = stand_in.fault("stall-middle", times=None)
    with stand_in.serve() as url:
        flags = ["--port", str(port), "--log-level", "warning", "--timeout-graceful-shutdown", "1"]
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "examples.gateway:app", *flags],
            env=os.environ | {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "k", "RESPAN_GUARD_STORAGE": storage},
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        clients: list[socket.socket] = []
        try:
            asked = json.dumps(STREAM | {"customer_params": {"customer_identifier": "c1", "total_budget": 1}}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(asked)}"
            for _ in range(count):
                clients.append(_connect(port, server))
                clients[-1].sendall(head.encode() + b"\r\n\r\n" + asked)
            fault.gate.wait_for_arrival(count, timeout=20)
            server.send_signal(signal.SIGTERM)
            server.wait(20)
        finally:
            server.kill()
            server.wait()
            for client in clients:
                client.close()
            fault.gate.open()
    assert len(stand_in.meter.charged) == count
    with Guard(storage).sync as guard:
        records = list(guard.records("c1"))
        assert len(records) == count
        assert {record.kind for record in records} == {"presumed"}
        assert sum(record.cost or 0 for record in records) >= stand_in.meter.total_cost
        assert all(limit.held == 0 for limit in guard.status("c1").limits)
        assert guard.verify() == []


def _connect(port: int, server: subprocess.Popen[bytes]) -> socket.socket:
    for _ in range(2000):
        try:
            return socket.create_connection(("127.0.0.1", port), 0.05)
        except OSError:
            try:
                server.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            break
    raise AssertionError("the gateway did not start")


@pytest.mark.parametrize("at", ["start", "first byte", "middle", "before the last", "last"])
async def test_incident_12_a_client_that_leaves_pays(at: str) -> None:
    """Disconnecting in the middle of a stream was free usage: there is one record, and it covers what was charged."""
    stand_in = StandInProvider()
    guard, ledger = make_guard()
    door = stand_in_gateway(stand_in, guard)
    asked = json.dumps(STREAM).encode()
    whole = await call(door, body=asked, customer="c0")
    bodies = sum(message["type"] == "http.response.body" for message in whole.sent)
    assert bodies > 4
    after = {"start": 0, "first byte": 1, "middle": bodies // 2, "before the last": bodies - 1, "last": bodies}[at]
    gone = asyncio.Event()
    seen = -1

    async def watch(message: Message) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            gone.set()
            for _ in range(3):
                await asyncio.sleep(0)  # for the app to notice

    await call(door, body=asked, customer="c1", disconnect=gone, on_send=watch)
    [record] = [record async for record in guard.records("c1")]
    charged = stand_in.meter.charged[-1]
    assert record.cost is not None
    assert charged.cost is not None
    assert record.cost >= charged.cost > 0
    await ledger.settled(2)


@pytest.mark.parametrize("claim", [0, -1, 1e6, "NaN", "Infinity", "much", float("nan"), None, [1]])
async def test_incident_14_a_reply_cannot_claim_what_it_cost(claim: object) -> None:
    """`usage.cost` of a reply was taken on trust: an implausible one is set aside, and the price counts."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        whole = reply()
        whole["usage"] = whole["usage"] | {"cost": claim}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(whole).encode(), "more_body": False})

    guard, ledger = make_guard()
    await call(gateway(app, guard), customer="c1")
    assert await costs(guard) == [PRICE]
    await ledger.settled()


async def test_incident_15_an_unknown_model_is_not_free() -> None:
    """Taken as price 0 it skipped the budget: it is refused before it is paid for, or kept as unpriced, never as 0."""
    stand_in = StandInProvider()
    guard, _ = make_guard()
    exchange = await call(stand_in_gateway(stand_in, guard), body=body(model="nobody-knows-1"), customer="c1")
    assert exchange.status == 400
    assert "nobody-knows-1" in exchange.json()["error"]["message"]
    assert stand_in.meter.calls == []
    flagging, ledger = make_guard(unknown_price="flag")
    assert (
        await call(stand_in_gateway(stand_in, flagging), body=body(model="nobody-knows-1"), customer="c1")
    ).status == 200
    assert [record.unpriced async for record in flagging.records("c1")] == [True]
    await ledger.settled()


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ([(b"x-customer", b"victim")], {}),
        ([(b"x-data-respan-params", b'{"customer_identifier": "victim"}')], {}),
        ([], {"customer_identifier": "victim"}),
        ([], {"customer_params": {"customer_identifier": "victim", "total_budget": 1000, "name": "me"}}),
        ([], {"respan_params": {"customer_params": {"customer_identifier": "victim"}}}),
        ([], {"user": "victim", "safety_identifier": "victim", "metadata": {"user_id": "victim"}}),
    ],
    ids=["header", "params header", "identifier", "params", "respan_params", "user"],
)
@pytest.mark.parametrize("trusted", [False, True])
async def test_incident_17_a_client_cannot_be_somebody_else(
    headers: list[tuple[bytes, bytes]], fields: dict[str, Any], trusted: bool
) -> None:
    """Where the server says who it is, nothing that a client writes makes it another, or another's limits."""
    guard, ledger = make_guard(trust_customer_params=trusted)
    door = GuardMiddleware(provider, guard, identify="state:account", include=["/v1/*"])
    exchange = await call(door, body=body(**fields), headers=headers, state={"account": "c1"})
    assert exchange.status == 200
    assert await costs(guard) == [PRICE]
    assert [row.customer.customer_identifier for row in await guard.list_customers()] == ["c1"]
    assert [row.params for row in [await guard.lane().call(lambda backend: backend.get("c1"))] if row] == [None]
    await ledger.settled()


async def test_incident_18_session_blobs_do_not_become_customers() -> None:
    """`metadata.user_id` held a new JSON blob for each session, each a customer with a budget of its own."""
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await provider(scope, receive, send)

    guard, _ = make_guard(unknown_customers="refuse")
    await guard.put_customer(Customer(customer_identifier="known", total_budget=1))
    door = GuardMiddleware(app, guard, identify="anthropic-user", include=["/v1/*"])
    statuses = set()
    for number in range(500):
        blob = json.dumps({"device_id": "d", "account_uuid": "", "session_id": f"session-{number}"})
        statuses.add((await call(door, body=body(metadata={"user_id": blob}))).status)
    assert reached == []
    assert all(400 <= status < 500 for status in statuses)
    assert [row.customer.customer_identifier for row in await guard.list_customers()] == ["known"]
    assert (await call(door, body=body(metadata={"user_id": "known"}))).status == 200


@pytest.mark.parametrize("amount", [-1, "-0.01", "NaN", float("inf"), 10_000_000, "much", True])
async def test_incident_24_a_budget_is_an_amount_from_0(amount: Any) -> None:
    """Negative budgets were stored: no way in takes one, and what was stored before stays."""
    guard, _ = make_guard(trust_customer_params=True)
    await guard.put_customer(Customer(customer_identifier="c1", total_budget=1))
    with pytest.raises(ValueError, match="total_budget"):
        Customer(customer_identifier="c1", total_budget=amount)
    with pytest.raises(GuardError, match="total_budget"):
        await guard.update_customer("c1", total_budget=amount)
    with pytest.raises(GuardError, match="total_budget"):
        make_guard(default_limits={"total_budget": amount})
    door = GuardMiddleware(provider, guard, identify="body", include=["/v1/*"])
    asked = body(customer_params={"customer_identifier": "c1", "total_budget": amount})
    assert (await call(door, body=asked)).status == 400
    found = await guard.get_customer("c1")
    assert found is not None
    assert found.total_budget == 1


@pytest.mark.parametrize("order", ["before", "after"])
async def test_incident_26_one_call_that_two_doors_saw_is_one_record(order: str) -> None:
    """Rows of one call were added up twice: what the door read and what the app recorded by hand count once."""
    guard, ledger = make_guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        whole = reply()
        if order == "before":
            await guard.record(Usage.from_response(whole))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(whole).encode(), "more_body": False})
        if order == "after":
            guard.record_soon(Usage.from_response(whole))

    for _ in range(20):
        await call(gateway(app, guard), customer="c1")
    assert await costs(guard) == [PRICE] * 20
    # Even if it is recorded again when all is over, and without the admission.
    whole = reply()
    for _ in range(3):
        await guard.record(Usage.from_response(whole), "c1")
    assert len(await costs(guard)) == 21
    await ledger.settled(20)


async def test_incident_27_retries_are_not_calls() -> None:
    """Each attempt made a row: attempts that the provider did not charge are requests, not records."""
    stand_in = StandInProvider()
    guard, ledger = make_guard()
    door = stand_in_gateway(stand_in, guard)
    stand_in.fault("error", times=2, status=503)
    statuses = [(await call(door, customer="c1")).status for _ in range(3)]
    assert statuses == [503, 503, 200]
    assert len(await costs(guard)) == len(stand_in.meter.charged) == 1
    assert (await guard.status("c1")).total_requests == 3
    await ledger.settled(3)


@pytest.mark.parametrize("storage", ["memory://", "sqlite:///{}/guard.db"])
async def test_incident_28_balances_are_the_sum_of_the_log(storage: str, tmp_path: Path) -> None:
    """The balance said 0 while the log had spend: status, customers, rollups and records are one figure."""
    stand_in = StandInProvider()
    limits = {"budget_duration": "monthly", "period_budget": 1}
    guard = Guard(storage.format(tmp_path), default_limits=limits, clock=FakeClock(), journal_dir=tmp_path)
    async with guard:
        door = stand_in_gateway(stand_in, guard)
        for number in range(30):
            if number % 3 == 0:
                stand_in.fault(("no-usage", "drop-middle", "usage-negative")[number // 3 % 3])
            await call(door, body=json.dumps(STREAM if number % 2 else QUESTION).encode(), customer="c1", catch=True)
        booked = sum((cost for cost in await costs(guard) if cost is not None), Decimal(0))
        status = await guard.status("c1")
        [customer], [rollup] = await guard.list_customers(), await guard.usage()
        assert booked == status.total_spend == status.period_spend == customer.cost == rollup.cost
        assert booked >= stand_in.meter.total_cost > 0
        assert status.limits[0].used == booked
        assert await guard.verify() == []
        assert await live_holds(guard) == 0
