"""The kill switch: every process of a store, within a second, whatever it was set to, and back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Customer, Guard, RateLimitExceeded, StorageUnavailable, Usage
from respan_guard.backends.base import Backend
from respan_guard.errors import InvalidInput
from respan_guard.switch import SPACE
from respan_guard.testing import FakeClock
from tests.middleware.support import call, gateway, provider

from .conftest import MakeGuard
from .faulty import FaultyBackend, faulty_guard

REFUSING: dict[str, Any] = {"default_limits": {"rate_limit": 0}}


async def until(condition: Any, within: float = 10.0) -> None:
    """Wait until it is so; generous, since the machine may be busy."""
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.02)


async def admits(guard: Guard) -> bool:
    """Whether the guard lets in whom it should refuse."""
    answer = await guard.try_admit("c1")
    if answer:
        await answer.release()  # type: ignore[union-attr]  # a Refusal is false
    return bool(answer)


async def test_it_holds_at_once_where_it_was_thrown(make_guard: MakeGuard) -> None:
    """Off lets everybody in and records nothing, shadow lets in and reports, enforce refuses, None is as configured."""
    async with make_guard(**REFUSING) as guard:
        assert not await admits(guard)
        await guard.switch.set("off", reason="it refuses everybody", actor="me")
        async with guard.admit("c1") as admission:
            await admission.record(Usage(cost=1))
            await guard.record(Usage(cost=1), "c1")
            assert admission.decision.limits == ()
        await guard.switch.set("shadow")
        async with guard.admit("c1") as admission:
            assert admission.decision.shadow
            await admission.record(Usage(cost=2))
        await guard.switch.set("enforce")
        assert not await admits(guard)
        await guard.switch.set(None)
        assert not await admits(guard)
        assert (await guard.status("c1")).total_spend == 2


async def test_it_is_audited(make_guard: MakeGuard) -> None:
    """Who, when, why, from what to what."""
    async with make_guard() as guard:
        await guard.switch.set("off", reason="too slow", actor="ann")
        await guard.switch.set(None, actor="bob")
        rows = await guard.lane().call(lambda backend: backend.audit())
        assert [(row.action, row.actor, row.before, row.after) for row in rows] == [
            ("switch", "bob", {"mode": "off", "reason": "too slow"}, {"mode": "as configured"}),
            ("switch", "ann", {"mode": "as configured"}, {"mode": "off", "reason": "too slow"}),
        ]


async def test_a_word_that_is_no_mode_changes_nothing(make_guard: MakeGuard) -> None:
    """An error that says which there are."""
    async with make_guard(**REFUSING) as guard:
        with pytest.raises(InvalidInput, match="enforce, shadow, off"):
            await guard.switch.set("on")  # type: ignore[arg-type]
        assert not await admits(guard)


async def test_it_reaches_other_processes_and_other_loops(tmp_path: Path) -> None:
    """Another guard on the same file, on this loop and on its own thread, without being touched."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    unopened = Guard(url, **REFUSING)
    async with Guard(url, **REFUSING) as one, Guard(url, **REFUSING) as other:
        assert not await admits(other)
        assert not await admits(unopened)
        await one.switch.set("off")
        await until(lambda: admits(other))
        await until(lambda: admits(unopened))
        await one.switch.set("enforce")

        async def refused() -> bool:
            return not await admits(other) and not await admits(unopened)

        await until(refused)
    await asyncio.to_thread(unopened.sync.close)


def test_it_reaches_a_running_process_from_the_command_line(tmp_path: Path) -> None:
    """A service that refuses is switched off and on again by two commands, while it runs."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    service = """
        import asyncio, sys
        from respan_guard import Guard

        async def main():
            async with Guard(sys.argv[1], default_limits={"rate_limit": 0}) as guard:
                last = None
                while last != "done":
                    now = "in" if await guard.try_admit("c1") else "out"
                    if now != last:
                        print(now, flush=True)
                    last = now
                    await asyncio.sleep(0.02)

        asyncio.run(main())
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(service), url], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            assert process.stdout.readline() == "out\n"
            for mode, expected in (("off", "in"), ("configured", "out")):
                command = [sys.executable, "-m", "respan_guard", "switch", mode, "--storage", url]
                subprocess.run(command, check=True, capture_output=True)
                assert process.stdout.readline() == f"{expected}\n"
        finally:
            watchdog.cancel()
            process.kill()


async def test_a_new_process_that_only_records_goes_by_it(tmp_path: Path) -> None:
    """It looks before its first record, on the loop that opened the guard and from a script; and back."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    async with Guard(url) as guard:
        await guard.switch.set("off")
        script = Guard(url)
        await asyncio.to_thread(script.sync.record, Usage(cost=1), "c1")
        await asyncio.to_thread(script.sync.close)
        other = Guard(url)
        await other.record(Usage(cost=1), "c1")
        await guard.switch.set(None)
        await asyncio.to_thread(other.sync.close)
        assert [record async for record in guard.records()] == []
        third = Guard(url)
        await third.record(Usage(cost=1), "c1")
        await asyncio.to_thread(third.sync.close)
        assert len([record async for record in guard.records()]) == 1


async def test_it_survives_a_restart(tmp_path: Path) -> None:
    """The very first request of a new process goes by it, opened or not."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    async with Guard(url) as guard:
        await guard.switch.set("off")
    async with Guard(url, **REFUSING) as guard:
        assert await admits(guard)
    guard = Guard(url, **REFUSING)
    assert await asyncio.to_thread(guard.sync.try_admit, "c1")
    await asyncio.to_thread(guard.sync.close)


async def test_a_process_that_was_set_to_off_stays_off(tmp_path: Path) -> None:
    """It has no store to look into."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    async with Guard(url) as guard:
        await guard.switch.set("enforce")
    async with Guard(url, mode="off", **REFUSING) as guard:
        assert await admits(guard)


async def test_the_door_and_wrapped_clients_go_by_it(make_guard: MakeGuard) -> None:
    """Off is as if the middleware weren't there: no headers of ours, no admission."""
    async with make_guard(**REFUSING) as guard:
        app = gateway(provider, guard)
        assert (await call(app, customer="c1")).status == 429
        await guard.switch.set("off")
        exchange = await call(app)
        assert exchange.status == 200
        assert "ratelimit" not in exchange.headers
        await guard.switch.set("shadow")
        assert (await call(app, customer="c1")).status == 200
        await guard.switch.set(None)
        assert (await call(app, customer="c1")).status == 429
        await guard.flush()
        assert (await guard.status("c1")).total_calls == 1


async def test_what_was_admitted_before_ends_as_ever(make_guard: MakeGuard) -> None:
    """Switched off in the middle of work: its record is booked, its hold given back."""
    async with make_guard(default_limits={"total_budget": 5}) as guard:
        async with guard.admit("c1", estimate=Decimal(1)) as admission:
            await guard.switch.set("off")
            await admission.record(Usage(cost=Decimal("0.5")))
        await guard.switch.set(None)
        await guard.flush()
        status = await guard.status("c1")
        assert status.total_spend == Decimal("0.5")
        assert status.limits[0].held == 0


async def test_looking_is_cheap_and_ends_with_use(store: FaultyBackend, tmp_path: Path, monkeypatch: Any) -> None:
    """No look for a request that follows another; none at all in an idle process, unless it is switched."""
    monkeypatch.setattr("respan_guard.switch._EVERY", 0.01)
    looks = 0
    facts = store.facts

    async def counted(*args: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return await facts(*args, **options)

    store.facts = counted  # type: ignore[method-assign]
    async with faulty_guard(tmp_path, **REFUSING) as guard:
        home = guard._homes._app
        assert home is not None
        assert looks == 1
        for _ in range(100):
            await guard.try_admit("c1")
        assert looks < 50

        async def asleep() -> bool:
            return home.asleep

        await until(asleep)
        before = looks
        await asyncio.sleep(0.1)
        assert looks == before
        await store.set_fact(SPACE, "mode", '{"mode": "off", "at_ms": 1, "actor": "", "reason": ""}')
        assert await admits(guard)  # whoever wakes it looks first
        await asyncio.sleep(0.5)
        assert not home.asleep


async def test_who_wakes_it_while_storage_hangs_goes_on(store: FaultyBackend, tmp_path: Path, monkeypatch: Any) -> None:
    """The first request after a pause goes by what was last seen; and giving up on it doesn't end the looking."""
    monkeypatch.setattr("respan_guard.switch._EVERY", 0.02)
    async with faulty_guard(tmp_path, **REFUSING, storage_timeout=30) as guard:
        home = guard._homes._app
        assert home is not None

        async def asleep() -> bool:
            return home.asleep

        await until(asleep)
        facts, hanging = store.facts, asyncio.Event()

        async def hangs(*args: Any, **options: Any) -> Any:
            await hanging.wait()
            return await facts(*args, **options)

        store.facts = hangs  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            assert not await admits(guard)
        hanging.set()
        await store.set_fact(SPACE, "mode", '{"mode": "off", "at_ms": 1, "actor": "", "reason": ""}')
        await until(lambda: admits(guard))


async def test_an_outage_keeps_the_last_word(store: FaultyBackend, tmp_path: Path, monkeypatch: Any) -> None:
    """While storage is down the switch is where it was last seen, and nothing is logged twice a second."""
    monkeypatch.setattr("respan_guard.switch._EVERY", 0.01)
    async with faulty_guard(tmp_path, **REFUSING, rate_limit_failure="closed") as guard:
        await guard.switch.set("off")
        store.error = store.other_error = StorageUnavailable("down")
        await asyncio.sleep(0.1)
        assert await admits(guard)
        store.error = store.other_error = None
        await guard.switch.set(None)
        with pytest.raises(RateLimitExceeded):
            await guard.admit("c1")


async def test_a_switch_that_cannot_be_read_is_left_aside(
    make_guard: MakeGuard, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever lies there, nobody's enforcement goes off by accident."""
    async with make_guard(**REFUSING) as guard:
        for text in ("", "off", "{}", "[]", '{"mode": "on", "at_ms": 1, "actor": "", "reason": ""}'):

            async def write(backend: Backend, text: str = text) -> bool:
                return await backend.set_fact(SPACE, "mode", text)

            await guard.lane().call(write)
            assert await guard.switch.look(guard.lane()) is None
            assert not await admits(guard)
    assert caplog.text.count("can't be read") == 5


async def test_recording_alone_wakes_it(tmp_path: Path) -> None:
    """A guard that only records, never opened: it is switched off like any other, and on again."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    meter = Guard(url)
    async with Guard(url) as guard:

        async def is_off() -> bool:
            meter.record_soon(Usage(cost=1), "c1")
            return meter.switch.off

        async def is_on() -> bool:
            return not await is_off()

        await guard.switch.set("off")
        await until(is_off)
        await meter.flush()
        before = (await guard.status("c1")).total_calls
        for _ in range(10):
            meter.record_soon(Usage(cost=1), "c1")
        await meter.flush()
        assert (await guard.status("c1")).total_calls == before
        await guard.switch.set(None)
        await until(is_on)
    await asyncio.to_thread(meter.sync.close)


def test_the_blocking_twin_throws_it(make_guard: MakeGuard) -> None:
    """From a script."""
    with make_guard(**REFUSING).sync as guard:
        guard.switch("off", reason="maintenance")
        assert guard.try_admit("c1")
        guard.switch(None)
        assert not guard.try_admit("c1")


async def test_a_fresh_process_knows_that_there_are_limits_it_has_not_met(store: FaultyBackend, tmp_path: Path) -> None:
    """Some customer has a budget, says the store; so a stranger is refused while storage is down, not let in free."""
    async with faulty_guard(tmp_path) as guard:
        await guard.put_customer(Customer(customer_identifier="paid", total_budget=5))
    async with faulty_guard(tmp_path, clock=FakeClock()) as guard:
        store.error = StorageUnavailable("down")
        with pytest.raises(StorageUnavailable):
            await guard.admit("paid")


UNSTORABLE = ["half \udcff of a pair", "a \0", "x" * 5000]


@pytest.mark.parametrize("text", UNSTORABLE)
async def test_a_text_that_no_store_takes_switches_nothing(make_guard: MakeGuard, text: str) -> None:
    """It is said before anything is written, so that no switch takes effect that reports a failure."""
    async with make_guard() as guard:
        for given in ({"reason": text}, {"actor": text}):
            with pytest.raises(InvalidInput, match=next(iter(given))):
                await guard.switch.set("off", **given)
        assert await guard.switch.look(guard.lane()) is None
        assert guard.switch.mode == "enforce"


async def test_what_stands_there_stops_no_later_switch(make_guard: MakeGuard) -> None:
    """A store may hold a reason, escaped as JSON, that its audit can't: the next switch is made and audited."""
    async with make_guard() as guard:
        stood = '{"mode": "off", "at_ms": 1, "actor": "cli:\\udcff", "reason": "\\u0000 \\udcff"}'
        await guard.lane().call(lambda backend: backend.set_fact(SPACE, "mode", stood))
        switched = await guard.switch.look(guard.lane())
        assert switched is not None
        assert (switched.actor, switched.reason) == ("cli:?", "? ?")
        await guard.switch.set(None, reason="again")
        assert await guard.switch.look(guard.lane()) is None
        rows = await guard.lane().call(lambda backend: backend.audit())
        assert [row.before for row in rows if row.action == "switch"] == [{"mode": "off", "reason": "? ?"}]


async def test_no_change_and_no_read_begins_with_such_a_text(make_guard: MakeGuard) -> None:
    """Who adjusts, changes or deletes, why, and what is asked for: it is wrong input, not a failure of storage."""
    bad = "\udcff"
    async with make_guard() as guard:
        for doing in (
            guard.adjust("c1", Decimal(1), bad),
            guard.adjust("c1", Decimal(1), "why", actor=bad),
            guard.put_customer(Customer(customer_identifier="c1"), actor=bad),
            guard.update_customer("c1", actor=bad, name="n"),
            guard.delete_customer("c1", actor=bad),
            guard.usage(model=bad),
            guard.list_customers(search=bad),
            anext(guard.records(model=bad)),
        ):
            with pytest.raises(InvalidInput, match="half of a surrogate pair"):
                await doing
        assert await guard.get_customer("c1") is None
        assert [record async for record in guard.records("c1")] == []


async def test_a_look_under_way_does_not_take_a_switch_back(make_guard: MakeGuard) -> None:
    """What it reads was so before this process threw the switch; the next look sees that."""
    async with make_guard() as guard:
        lane = guard.lane()

        class Late:
            """Answers after the switch was thrown, with what was there before."""

            async def call(self, work: Any, *patience: Any) -> Any:
                found = await lane.call(work, *patience)
                await guard.switch.set("shadow")
                return found

        await guard.switch.look(Late())  # type: ignore[arg-type]
        assert guard.switch.mode == "shadow"
        await guard.switch.look(lane)
        assert guard.switch.mode == "shadow"
