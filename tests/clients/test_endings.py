"""However a call ends, it ends by the rule: recorded, presumed, or nothing; and its hold is free again."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from decimal import Decimal
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from respan_guard import Guard
from respan_guard.testing import StandInProvider
from respan_guard.testing.provider import Answer, FaultKind, Gate

from .support import ASK, CHAT, CLAUDE, arecords, async_open_ai, claude, holds, open_ai, records, same

DROPS: list[FaultKind] = ["drop-before", "drop-after-start", "drop-middle", "drop-before-usage"]
CAP = 100


def ask(client: Any, *, stream: bool = False, **options: Any) -> Any:
    """A chat with a cap, so that what it holds is a bound."""
    return client.chat.completions.create(model=CHAT, messages=ASK, max_tokens=CAP, stream=stream, **options)


def presumed(guard: Guard, provider: StandInProvider, count: int = 1) -> None:
    """Calls whose usage stayed unknown are presumed, at no less than what the provider charges, and hold nothing."""
    found = records(guard)
    assert [record.kind for record in found] == ["presumed"] * count
    assert all(record.usage.estimated for record in found)
    booked = sum((record.cost or Decimal(0) for record in found), Decimal(0))
    assert booked >= provider.meter.total_cost > 0
    assert guard.sync.run(holds(guard, "c1")) == 0


# -- errors and retries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_the_providers_errors_cost_nothing(guard: Guard, provider: StandInProvider, url: str, status: int) -> None:
    """An error of the provider's reaches the caller as ever; nothing is recorded, nothing stays held."""
    provider.fault("error", status=status)
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client)
        assert caught.value.status_code == status
    assert records(guard) == []
    assert guard.sync.run(holds(guard, "c1")) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_retry_after_an_error_is_one_record(guard: Guard, provider: StandInProvider, url: str, stream: bool) -> None:
    """The attempt that failed is free, the one that worked is recorded."""
    provider.fault("error", status=500, retry_after=0.001)
    with guard.wrap(open_ai(url, max_retries=2)) as client, guard.on_behalf_of("c1"):
        reply = ask(client, stream=stream)
        if stream:
            list(reply)
    assert [call.attempt for call in provider.meter.calls] == [0, 1]
    same(records(guard), provider)


def test_a_retry_after_a_lost_answer_is_two_calls(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The provider made both answers and charges both; the lost one is presumed, the other is exact."""
    provider.fault("drop-before")
    with guard.wrap(open_ai(url, max_retries=2)) as client, guard.on_behalf_of("c1"):
        ask(client)
    lost, read = records(guard)
    assert len(provider.meter.charged) == 2
    assert (lost.kind, read.kind) == ("presumed", "usage")
    assert read.cost == provider.meter.charged[1].cost
    assert lost.cost >= provider.meter.charged[0].cost  # type: ignore[operator]  # both have prices


@pytest.mark.parametrize("fault", DROPS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_connection_is_presumed(
    guard: Guard, provider: StandInProvider, url: str, fault: FaultKind, stream: bool
) -> None:
    """Wherever the connection breaks before the usage came: the caller sees an error, the call is presumed."""
    provider.fault(fault)
    with (
        guard.wrap(open_ai(url)) as client,
        guard.on_behalf_of("c1"),
        pytest.raises((openai.APIConnectionError, httpx2.TransportError)),
    ):
        list(ask(client, stream=stream))
    presumed(guard, provider)


def test_a_broken_stream_of_anthropic_is_presumed(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Its first event tells usage, but not the bill."""
    provider.fault("drop-middle")
    broken = (anthropic.APIConnectionError, httpx2.TransportError)
    with guard.wrap(claude(url)) as client, guard.on_behalf_of("c1"), pytest.raises(broken):
        list(client.messages.create(model=CLAUDE, max_tokens=CAP, messages=ASK, stream=True))
    presumed(guard, provider)


def test_nobody_listens(guard: Guard) -> None:
    """A request that was never sent costs nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    nobody = f"http://127.0.0.1:{port}"
    with guard.wrap(open_ai(nobody)) as client, guard.on_behalf_of("c1"), pytest.raises(openai.APIConnectionError):
        ask(client)
    assert records(guard) == []
    assert guard.sync.run(holds(guard, "c1")) == 0


def test_a_timeout_after_sending_is_presumed(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The provider had the request and works on; the client's patience changes nothing about the bill."""
    provider.fault("stall-before")
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"), pytest.raises(openai.APITimeoutError):
        ask(client, timeout=0.2)
    presumed(guard, provider)


@pytest.mark.parametrize("fault", ["no-usage", "usage-negative", "usage-string", "usage-huge", "invalid-json"])
@pytest.mark.parametrize("stream", [False, True])
def test_usage_that_makes_no_sense_is_presumed(
    guard: Guard, provider: StandInProvider, url: str, fault: FaultKind, stream: bool
) -> None:
    """Missing or impossible counts are no usage; the reply reaches the caller as the bare client has it."""
    provider.fault(fault)
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
        try:
            reply = ask(client, stream=stream)
            if stream:
                list(reply)
        except ValueError:
            assert fault == "invalid-json"
    presumed(guard, provider)


@pytest.mark.parametrize("fault", ["usage-twice", "short-ids", "wrong-content-type"])
@pytest.mark.parametrize("stream", [False, True])
def test_odd_replies_are_recorded(
    guard: Guard, provider: StandInProvider, url: str, fault: FaultKind, stream: bool
) -> None:
    """Usage told twice counts once; replies of one server with one short id are two calls; a type may be wrong."""
    provider.fault(fault, times=2)
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
        for _ in range(2):
            reply = ask(client, stream=stream)
            if stream:
                list(reply)
    same(records(guard), provider)


# -- streams that nobody reads to the end ----------------------------------------------------------------------


def test_a_stream_closed_early_is_presumed(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The caller has enough after two chunks; the provider has made the whole answer."""
    provider.script(Answer(text="one two three four", gate=Gate()))
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"), ask(client, stream=True) as stream:
        next(stream)
    presumed(guard, provider)


def test_a_stream_thrown_away_is_presumed(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Nobody reads, closes or keeps the stream: its call ends when it is collected."""
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
        provider.script(Answer(text="one two three four", gate=Gate()))
        response = ask(client, stream=True)
        assert guard.sync.run(holds(guard, "c1")) > 0
        del response
        gc.collect()
        deadline = time.monotonic() + 10
        while guard.sync.run(holds(guard, "c1")) and time.monotonic() < deadline:
            guard.sync.flush()
    presumed(guard, provider)


def test_a_stream_read_to_its_end_but_not_closed_is_recorded(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The end of the stream is the end of the call."""
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
        stream = ask(client, stream=True)
        for _ in stream:
            pass
        same(records(guard), provider)


async def test_cancelled_work_is_presumed(guard: Guard, provider: StandInProvider, url: str) -> None:
    """A task cancelled while the provider is at it; the provider goes on and bills."""
    gate = Gate()
    provider.script(Answer(gate=gate))
    async with guard, guard.wrap(async_open_ai(url)) as client:
        with guard.on_behalf_of("c1"):
            task = asyncio.create_task(ask(client))
        await gate.arrival()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (record,) = await arecords(guard)
        assert record.kind == "presumed"
        assert await holds(guard, "c1") == 0


async def test_a_cancelled_stream_is_presumed(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The same in the middle of a stream."""
    gate = Gate()
    provider.script(Answer(text="one two three four", gate=gate))
    async with guard, guard.wrap(async_open_ai(url)) as client:

        async def read() -> None:
            async for _ in await ask(client, stream=True):
                pass

        with guard.on_behalf_of("c1"):
            task = asyncio.create_task(read())
        gate.release()
        await gate.arrival(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (record,) = await arecords(guard)
        assert record.kind == "presumed"
        assert await holds(guard, "c1") == 0


async def test_cancelled_before_a_connection_is_free_costs_nothing(
    guard: Guard, provider: StandInProvider, url: str
) -> None:
    """A call that still waited for its turn in the connection pool was never sent."""
    gate = Gate()
    provider.script(Answer(gate=gate))
    one = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=1))
    async with guard, guard.wrap(async_open_ai(url, http_client=one)) as client:
        with guard.on_behalf_of("c1"):
            first = asyncio.create_task(ask(client))
            await gate.arrival()
            second = asyncio.create_task(ask(client))
            while await holds(guard, "c1") == 0:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            gate.open()
            await first
        same(await arecords(guard), provider)
        assert len(provider.meter.calls) == 1
        assert await holds(guard, "c1") == 0


@pytest.mark.parametrize("missing", ["hold", "estimate", "flag"])
def test_missing_usage_is_a_setting(make_guard: Any, provider: StandInProvider, url: str, missing: str) -> None:
    """`missing_usage` says what a call without usage is presumed to cost: its hold, an estimate, or unknown."""
    guard = make_guard(default_limits={"total_budget": 10}, missing_usage=missing)
    provider.fault("no-usage")
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
        ask(client)
    (record,) = records(guard)
    assert record.kind == "presumed"
    assert record.unpriced is (missing == "flag")
    assert guard.sync.run(holds(guard, "c1")) == 0


def test_calls_from_many_threads_are_metered(guard: Guard, provider: StandInProvider, url: str) -> None:
    """One client in eight threads, each for a customer of its own."""
    with guard.wrap(open_ai(url)) as client:

        def work(customer: str) -> None:
            with guard.on_behalf_of(customer):
                for _ in range(3):
                    ask(client)

        threads = [threading.Thread(target=work, args=(f"c{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = records(guard)
    same(found, provider)
    assert {record.customer_identifier for record in found} == {f"c{n}" for n in range(8)}
    assert len(found) == 24


async def test_a_blocking_client_on_the_guards_own_loop(guard: Guard, provider: StandInProvider, url: str) -> None:
    """A sync client in an async handler blocks its loop as ever, but waits for no answer from it."""
    async with guard:
        with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
            ask(client)
        same(await arecords(guard), provider)
