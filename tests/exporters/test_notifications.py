"""Budgets that are nearly or wholly used are told of: once a customer, limit, threshold and period."""

from __future__ import annotations

import asyncio
import decimal
import json
import subprocess
import sys
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from respan_guard import Customer, Guard, Usage, notifications
from respan_guard.backends.base import CustomerRow
from respan_guard.backends.memory import MemoryBackend
from respan_guard.clock import SystemClock
from respan_guard.errors import ConfigurationError
from respan_guard.exporters import BatchRefused
from respan_guard.notifications import OWED, SPACE, BudgetEvent, BudgetNotifier, BudgetWebhook
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .sink import Sink, dead, delivery
from .test_webhook import SECRET, VALID

LIMITS: dict[str, Any] = {"default_limits": {"budget_duration": "monthly", "period_budget": 10}}


async def spend(guard: Guard, amount: str, customer: str = "c1", name: str | None = None) -> None:
    """Have a customer use some money."""
    await guard.record(Usage(model="m", cost=amount), customer, entry_id=name)
    await guard.flush()


def notifier(guard: Guard, told: list[BudgetEvent], *thresholds: int) -> BudgetNotifier:
    """One that appends to a list."""
    return BudgetNotifier(guard, told.append, thresholds or (80,), "budgets")


async def test_each_threshold_is_told_once_a_period(make_guard: MakeGuard, clock: FakeClock) -> None:
    """At 80 %, then at 100 %, then nothing more until the next period, where it begins anew."""
    told: list[BudgetEvent] = []
    async with make_guard(**LIMITS) as guard:
        way = delivery(guard, notifier(guard, told))
        await way.step()
        await spend(guard, "7.999999999")
        await way.step()
        assert told == []
        await spend(guard, "0.000000001")
        await way.step()
        [event] = told
        assert (event.type, event.limit) == ("customer_budget_share_reached", "period_budget")
        assert event.threshold == 80
        assert (event.used, event.budget) == (Decimal(8), Decimal(10))
        assert (event.period_start, event.period_end) == ("2026-01-01", "2026-02-01")
        await spend(guard, "2")
        await spend(guard, "2")
        await way.step()
        assert [event.type for event in told[1:]] == ["customer_budget_limit_reached"]
        for _ in range(3):
            await spend(guard, "1")
            await way.step()
        assert len(told) == 2
        clock.advance(timedelta(days=20))
        await spend(guard, "10")
        await way.step()
        assert [event.threshold for event in told[2:]] == [80, 100]
        assert len({event.id for event in told}) == 4


async def test_period_and_total_budgets_are_told_apart(make_guard: MakeGuard) -> None:
    """Each limit and each customer is told on its own, with thresholds of one's own."""
    told: list[BudgetEvent] = []
    async with make_guard() as guard:
        await guard.put_customer(
            Customer(customer_identifier="c1", budget_duration="daily", period_budget=1, total_budget=4)
        )
        way = delivery(guard, notifier(guard, told, 25, 50))
        await way.step()
        await spend(guard, "1")
        await spend(guard, "100", "c2")
        await way.step()
        assert [(event.limit, int(event.threshold)) for event in told] == [
            ("period_budget", 25),
            ("period_budget", 50),
            ("period_budget", 100),
            ("total_budget", 25),
        ]
        assert {event.customer_identifier for event in told} == {"c1"}


async def test_what_was_told_survives_a_restart_and_names_nobody(make_guard: MakeGuard) -> None:
    """A new notifier does not tell it again; the marker holds the customer's hash, not its name."""
    told: list[BudgetEvent] = []
    async with make_guard(**LIMITS) as guard:
        way = delivery(guard, notifier(guard, told))
        await way.step()
        await spend(guard, "9", "someone@example.com")
        await way.step()
        await way.close()
        again = delivery(guard, notifier(guard, told), "two")
        await spend(guard, "0.1", "someone@example.com")
        await again.step()
        assert len(told) == 1
        facts = await guard.lane().call(lambda backend: backend.facts(SPACE))
        assert len(facts) == 1
        assert "someone" not in json.dumps(facts)
        assert told[0].id == f"budget_{facts[0][0].removeprefix('budgets/')}"


async def test_who_fails_is_told_again(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A target that raises gets the same event again, under the same id, until it takes it."""
    seen: list[str] = []

    async def flaky(event: BudgetEvent) -> None:
        seen.append(event.id)
        if len(seen) < 3:
            raise ConnectionError("down")

    async with make_guard(**LIMITS) as guard:
        way = delivery(guard, BudgetNotifier(guard, flaky, (80,), "budgets"))
        await way.step()
        await spend(guard, "9")
        for _ in range(20):
            clock.advance(await way.step())
        assert len(seen) == 3
        assert len(set(seen)) == 1


async def test_what_was_reached_before_midnight_is_told_after_it(make_guard: MakeGuard, clock: FakeClock) -> None:
    """The period of the call counts, not that of the look, however long nobody looked; long after it is no news."""
    told: list[BudgetEvent] = []
    daily: dict[str, Any] = {"default_limits": {"budget_duration": "daily", "period_budget": 1}}
    async with make_guard(**daily) as guard:
        way = delivery(guard, notifier(guard, told))
        await way.step()
        clock.advance(timedelta(hours=11, minutes=59, seconds=59.5))
        await spend(guard, "0.9")
        await spend(guard, "2", "c2")
        clock.advance(1)
        await spend(guard, "0.1")
        await way.step()
        said = [(event.customer_identifier, int(event.threshold), event.period_start) for event in told]
        assert said == [("c1", 80, "2026-01-15"), ("c2", 80, "2026-01-15"), ("c2", 100, "2026-01-15")]
        assert (told[0].used, str(told[0].resets_at)) == (Decimal("0.9"), "2026-01-16 00:00:00+00:00")
        clock.advance(timedelta(days=3))
        for day in (0, 1, 1, 2, 45):
            await guard.record(Usage(model="m", cost="0.5", time=clock.now - timedelta(days=day)), "c3")
        await guard.flush()
        await way.step()
        assert [(event.customer_identifier, event.period_start) for event in told[3:]] == [("c3", "2026-01-18")] * 2


async def test_one_that_cannot_be_told_holds_up_nobody(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Others are told at once; the one is told again, less and less often, and by whoever leads next."""
    told: list[str] = []
    tried: list[str] = []

    def target(event: BudgetEvent) -> None:
        if event.customer_identifier == "bad@example.com" and down:
            tried.append(event.id)
            raise RuntimeError("no bad@example.com here")
        told.append(event.customer_identifier)

    down = True
    async with make_guard(**LIMITS) as guard:
        way = delivery(guard, BudgetNotifier(guard, target, (80,), "budgets"))
        await way.step()
        for number in range(60):
            await spend(guard, "9", "bad@example.com" if number % 2 else "a1")
            await spend(guard, "9", f"good{number}")
            await way.step()
            assert told[-1] == f"good{number}"
            clock.advance(1)
        assert 8 <= len(tried) <= 16, "two events, with waits of 1, 2, 4, ... seconds in between"
        assert way.error == "RuntimeError: no ... here"
        kept = await guard.lane().call(lambda backend: backend.facts(OWED))
        assert len(kept) == 2
        assert "bad@" not in repr(kept)
        await way.close()
        down = False
        again = delivery(guard, BudgetNotifier(guard, target, (80,), "budgets"), "two")
        clock.advance(300)
        await again.step()
        assert told[-2:] == ["bad@example.com"] * 2
        assert await guard.lane().call(lambda backend: backend.facts(OWED)) == []
        count = len(told)
        for _ in range(5):
            clock.advance(await again.step() + 300)
        assert (len(told), again.error) == (count, "")


async def test_one_that_hangs_holds_up_nobody_for_long(
    make_guard: MakeGuard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that does not come back for one customer is cut off, and the next is told."""
    told: list[str] = []

    async def target(event: BudgetEvent) -> None:
        if event.customer_identifier == "slow":
            await asyncio.sleep(600)
        told.append(event.customer_identifier)

    monkeypatch.setattr(notifications, "_TELLING", 0.05)
    async with make_guard(**LIMITS) as guard:
        way = delivery(guard, BudgetNotifier(guard, target, (80,), "budgets"))
        await way.step()
        await spend(guard, "9", "slow")
        await spend(guard, "9", "next")
        await way.step()
        assert told == ["next"]
        assert "TimeoutError" in str(await guard.lane().call(lambda backend: backend.facts(OWED)))


async def test_a_refusal_is_told_again_for_a_day(make_guard: MakeGuard, clock: FakeClock) -> None:
    """What a webhook answers 400 to may be taken later; after a day it is a dead letter, that can be replayed."""
    seen: list[str] = []
    refusing = True

    def target(event: BudgetEvent) -> None:
        seen.append(event.id)
        if refusing or len(seen) == 1:
            raise BatchRefused("HTTP 400")

    async with make_guard(**LIMITS) as guard:
        way = delivery(guard, BudgetNotifier(guard, target, (80,), "budgets"))
        await way.step()
        refusing = False
        await spend(guard, "9", "once")
        for _ in range(6):
            clock.advance(await way.step())
        assert len(seen) == 2
        assert await dead(guard, "budgets") == {}
        seen.clear()
        refusing = True
        await spend(guard, "9", "always", "a")
        start = clock.monotonic()
        while not await dead(guard, "budgets"):
            await way.step()
            clock.advance(100)
            assert clock.monotonic() < start + 90_000
        assert clock.monotonic() > start + 86_400
        assert 150 < len(seen) < 900
        assert await dead(guard, "budgets") == {"own:a": "BatchRefused: HTTP 400"}
        refusing = False
        await guard.lane().call(way.letters.replay)
        seen.clear()
        seen.append("?")
        for _ in range(5):
            clock.advance(await way.step())
        assert len(seen) == 2
        assert await dead(guard, "budgets") == {}


async def test_who_has_the_name_of_a_deleted_customer_is_told_of(make_guard: MakeGuard, clock: FakeClock) -> None:
    """The id is another customer's after a deletion, in the same period too."""
    told: list[BudgetEvent] = []
    async with make_guard(**LIMITS) as guard:
        way = delivery(guard, notifier(guard, told))
        await way.step()
        await spend(guard, "10")
        await way.step()
        clock.advance(1)
        await guard.delete_customer("c1")
        clock.advance(1)
        await spend(guard, "10")
        await way.step()
        assert [(event.customer_identifier, int(event.threshold)) for event in told] == [("c1", 80), ("c1", 100)] * 2
        assert len({event.id for event in told}) == 4


async def test_a_total_budget_that_was_raised_is_a_new_one(make_guard: MakeGuard) -> None:
    """Credit that is bought and used up again is told of again; a period's budget once a period."""
    told: list[BudgetEvent] = []
    async with make_guard() as guard:
        both: dict[str, Any] = {"budget_duration": "monthly", "period_budget": 1}
        await guard.put_customer(Customer(customer_identifier="c1", total_budget=1, **both))
        way = delivery(guard, notifier(guard, told))
        await way.step()
        await spend(guard, "1")
        await way.step()
        assert len(told) == 4
        await guard.update_customer("c1", total_budget=2, period_budget=2)
        await spend(guard, "0.1")
        await way.step()
        assert len(told) == 4
        await spend(guard, "0.9")
        await way.step()
        await way.step()
        assert [(event.limit, int(event.threshold)) for event in told[4:]] == [
            ("total_budget", 80),
            ("total_budget", 100),
        ]
        assert told[-1].budget == 2


async def test_a_period_of_another_length_is_told_of(make_guard: MakeGuard) -> None:
    """A budget that becomes a month's on the day it began as a day's is another: its thresholds are told."""
    told: list[BudgetEvent] = []
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", budget_duration="daily", period_budget=1))
        way = delivery(guard, notifier(guard, told))
        await way.step()
        await spend(guard, "1")
        await way.step()
        assert [event.period_end for event in told] == ["2026-01-16"] * 2
        await guard.update_customer("c1", budget_duration="monthly", period_budget=30)
        await spend(guard, "29")
        await way.step()
        assert [(event.period_start, event.period_end) for event in told[2:]] == [("2026-01-15", "2026-02-15")] * 2
        assert len({event.id for event in told}) == 4


async def test_a_store_that_is_slow_is_gone_through(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a batch has more customers than can be looked at in time, fewer come at a time: all are told, once."""
    told: list[BudgetEvent] = []
    real, left = MemoryBackend.get, 0

    async def get(self: MemoryBackend, customer: str) -> CustomerRow | None:
        nonlocal left
        left -= 1
        if left < 0:
            await asyncio.sleep(600)
        return await real(self, customer)

    monkeypatch.setattr(MemoryBackend, "get", get)
    monkeypatch.setattr("respan_guard.delivery.EXPORT_TIMEOUT", 0.3)
    async with Guard("memory://", clock=clock, journal_dir=tmp_path, **LIMITS) as guard:
        way = delivery(guard, notifier(guard, told))
        await way.step()
        for number in range(7):
            await spend(guard, "9", f"c{number}")
        for _ in range(12):
            left = 2
            clock.advance(await way.step() + 300)
        assert [event.customer_identifier for event in told] == [f"c{number}" for number in range(7)]
        assert way.error == ""


async def test_what_was_told_is_not_owed_any_more(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A process that is killed after it noted that it told, and before it struck out what it owed, leaves nothing."""
    told: list[BudgetEvent] = []

    def down(event: BudgetEvent) -> None:
        raise ConnectionError("it is down")

    async with make_guard(**LIMITS) as guard:
        way = delivery(guard, BudgetNotifier(guard, down, (80,), "budgets"))
        await way.step()
        await spend(guard, "9")
        await way.step()
        [(key, _)] = await guard.lane().call(lambda backend: backend.facts(OWED))
        noted = json.dumps({"told_ms": guard.now_ms(), "until_ms": 0})
        await guard.lane().call(lambda backend: backend.set_fact(SPACE, key, noted))
        await way.close()
        again = delivery(guard, notifier(guard, told), "two")
        clock.advance(400)
        for _ in range(2):
            clock.advance(await again.step())
        assert await guard.lane().call(lambda backend: backend.facts(OWED)) == []
        assert (told, again.error) == ([], "")


async def test_the_apps_own_decimal_context_plays_no_part(make_guard: MakeGuard) -> None:
    """A context of six digits, or one that traps what is inexact, neither rounds a threshold nor stops anything."""
    told: list[BudgetEvent] = []
    budget = {"default_limits": {"budget_duration": "monthly", "period_budget": "1234.567895"}}
    async with make_guard(**budget) as guard:
        way = delivery(guard, notifier(guard, told))
        await way.step()
        await spend(guard, "1234.567895")
        with decimal.localcontext() as context:
            context.prec, context.traps[decimal.Inexact] = 6, True
            await way.step()
        assert (way.error, [int(event.threshold) for event in told]) == ("", [80, 100])


async def test_what_was_used_before_is_no_news(make_guard: MakeGuard) -> None:
    """A notifier begins with what is booked next; who is over already is told of at its next call."""
    told: list[BudgetEvent] = []
    async with make_guard(**LIMITS) as guard:
        await spend(guard, "9")
        way = delivery(guard, notifier(guard, told))
        await way.step()
        assert told == []
        await spend(guard, "0.1")
        await way.step()
        assert len(told) == 1


async def test_old_markers_are_forgotten(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Long after a period nothing is kept of it; what has no end is."""
    told: list[BudgetEvent] = []
    async with make_guard() as guard:
        await guard.put_customer(
            Customer(customer_identifier="c1", budget_duration="daily", period_budget=1, total_budget=1)
        )
        way = delivery(guard, notifier(guard, told))
        await way.step()
        await spend(guard, "1")
        await way.step()
        assert len(await guard.lane().call(lambda backend: backend.facts(SPACE))) == 4
        clock.advance(timedelta(days=42))
        await notifier(guard, told).open()
        assert len(await guard.lane().call(lambda backend: backend.facts(SPACE))) == 2


async def test_a_webhook_is_signed_and_described(make_guard: MakeGuard, sink: Sink) -> None:
    """The official library verifies an event, the schema validates it, its id is the event's; through the guard."""
    async with make_guard(**LIMITS, clock=SystemClock()) as guard:
        guard.on_budget(BudgetWebhook(sink.url, SECRET, allow_private=True), thresholds=(50, 75))
        async with asyncio.timeout(20):
            while (await guard.exporters())[0].cursor is None:
                await asyncio.sleep(0.05)
        await spend(guard, "8")
        async with asyncio.timeout(20):
            while len(sink.posted) < 2:
                await asyncio.sleep(0.05)
    for posted, share in zip(sink.posted, ("50", "75"), strict=True):
        assert Webhook(SECRET).verify(posted.body, posted.headers) == posted.json
        VALID.validate(posted.json)
        assert posted.json["type"] == "customer_budget_share_reached"
        assert posted.json["data"]["threshold_percent"] == share
        assert posted.json["data"]["used"] == "8"
        assert posted.headers["webhook-id"] == posted.json["data"]["id"]


@pytest.mark.parametrize("threshold", [0, 100, -1, 101, float("nan"), float("inf"), True, "x"])
def test_a_threshold_that_is_none_is_refused(make_guard: MakeGuard, threshold: Any) -> None:
    """A share in percent lies between 0 and 100."""
    with pytest.raises(ConfigurationError, match="share in percent"):
        make_guard().on_budget(print, thresholds=(threshold,))


def test_a_target_that_cannot_be_called_is_refused(make_guard: MakeGuard) -> None:
    """It says what would be right."""
    with pytest.raises(ConfigurationError, match="a function or a BudgetWebhook"):
        make_guard().on_budget("https://example.com/")  # type: ignore[arg-type]  # that is the point


PROCESS = """
import asyncio, sys
from respan_guard import Guard, Usage

async def main():
    url, out, name = sys.argv[1:]
    guard = Guard(url, default_limits={"budget_duration": "monthly", "period_budget": 10})
    def told(event):
        with open(out, "a") as file:
            file.write(f"{event.customer_identifier} {event.threshold}\\n")
    guard.on_budget(told)
    async with guard:
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for number in range(20):
            for customer in ("c1", "c2", "c3"):
                await guard.record(Usage(model="m", cost="0.5"), customer)
            await asyncio.sleep(0.05)
        await guard.flush()
        print("done", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


def test_two_processes_tell_exactly_once(tmp_path: Path) -> None:
    """Two processes of one store spend side by side: each threshold of each customer is told once in all."""
    out = tmp_path / "told"
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, url, str(out), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
        for word in ("go", "end"):
            for process in running:
                assert process.stdin is not None
                process.stdin.write(f"{word}\n")
                process.stdin.flush()
            if word == "go":
                for process in running:
                    assert process.stdout is not None
                    assert process.stdout.readline() == "done\n"
        for process in running:
            assert process.wait(30) == 0
    finally:
        for process in running:
            process.kill()
            process.communicate()
    told = sorted(out.read_text().split("\n")[:-1])
    assert told == sorted(f"{customer} {share}" for customer in ("c1", "c2", "c3") for share in (80, 100))


async def test_only_budgets_of_the_customers_own_are_told(make_guard: MakeGuard) -> None:
    """What all customers share is not any one's: its thresholds are nobody's."""
    told: list[BudgetEvent] = []
    async with make_guard(**LIMITS, app_budgets={"total_budget": 1}) as guard:
        way = delivery(guard, notifier(guard, told))
        await way.step()
        await spend(guard, "9")
        await way.step()
        assert [event.limit for event in told] == ["period_budget"]
