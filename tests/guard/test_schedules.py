"""Random interleavings of everything a guard does, by many tasks: no budget is overspent and nothing is left over."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Admission, Guard, Usage
from respan_guard.context import Slot
from respan_guard.money import from_nano, to_nano
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .faulty import live_holds

BUDGET = to_nano(Decimal(1), "budget")
CUSTOMERS = ("a", "b", "c")
LIMITS = {"budget_duration": "daily", "period_budget": 1}


class Schedule:
    """One run: tasks that live the lives of requests, at every step interrupted by the others.

    Args:
        guard: Under test.
        clock: Its clock.
        seed: Makes the run reproducible.
    """

    def __init__(self, guard: Guard, clock: FakeClock, seed: int) -> None:
        self.guard = guard
        self.clock = clock
        self.rng = random.Random(seed)
        self.made: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()
        self.refused = self.cancelled = 0
        self.days: set[str] = set()

    async def pause(self) -> None:
        """Let others go on, for a while that nobody can foretell."""
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    async def call_llm(self, admission: Admission, bound: int) -> None:
        """Make calls that cost at most `bound` together, and record each; some twice, as after a lost answer."""
        left = bound
        for _ in range(self.rng.randrange(1, 3)):
            cost = self.rng.randrange(left + 1)
            left -= cost
            number = f"{self.made.total()}"
            customer = admission.customer_identifier
            self.made[customer] += 1
            self.spent[customer] += cost
            usage = Usage("m", 1, 1, cost=from_nano(cost), provider="p", response_id=f"resp_{number:0>24}")
            how = self.rng.randrange(3)
            if how == 0:
                await admission.record(usage)
            elif how == 1:
                admission.record_soon(usage)
            else:
                admission.record_soon(usage)
                admission.record_soon(
                    Usage("m", 1, 1, cost=from_nano(cost), provider="p", response_id=usage.response_id)
                )
            await self.pause()

    async def live(self, customer: str) -> None:
        """One request's life: admitted in one of three ways, or not."""
        bound = self.rng.randrange(1, BUDGET // 3)
        estimate = from_nano(bound)
        for _ in range(self.rng.randrange(200)):
            await asyncio.sleep(0)
        how = self.rng.randrange(3)
        if how == 0:
            answer = await self.guard.try_admit(customer, estimate=estimate)
            if not isinstance(answer, Admission):
                self.refused += 1
                return
            try:
                await self.pause()
                await self.call_llm(answer, bound)
            finally:
                answer.end()
        elif how == 1:
            async with self.guard.admit(customer, estimate=estimate) as admission:
                await self.call_llm(admission, bound)
        else:
            slot = Slot(self.guard, is_request=True)
            try:
                admission = await self.guard.admissions.ask(customer, self.guard.estimator.given(estimate))
                self.guard.admissions.bind(slot, admission)
                await self.call_llm(admission, bound)
            finally:
                self.guard.admissions.end(slot)

    async def run(self, count: int) -> None:
        """Many lives, some cut short, while midnight passes."""
        hours = [self.rng.randrange(5_000, 20_000) for _ in range(4)]
        tasks = [asyncio.create_task(self.live(self.rng.choice(CUSTOMERS))) for _ in range(count)]
        left = count // 2  # a slow disk lets this loop turn so often that it would cancel all, and nobody were refused
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            event = self.rng.random()
            if event < 0.05 and left:
                left -= 1
                self.rng.choice(tasks).cancel()
            elif event < 0.08 and hours:
                self.clock.advance(hours.pop())
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(answer, asyncio.CancelledError):
                self.cancelled += 1
            elif isinstance(answer, Exception):
                assert type(answer).__name__ == "BudgetExceeded", answer
                self.refused += 1
        await self.guard.flush()

    async def check(self) -> None:
        """What may never happen did not."""
        guard = self.guard
        records = [record async for record in guard.records()]
        assert Counter(record.customer_identifier for record in records) == self.made
        assert len({record.id for record in records}) == len(records)
        periods: Counter[tuple[str, str]] = Counter()
        for record in records:
            assert record.cost is not None
            periods[record.customer_identifier, record.day] += to_nano(record.cost, "cost")
        assert max(periods.values()) <= BUDGET
        self.days = {day for _, day in periods}
        for customer in self.spent:
            assert (await guard.status(customer)).total_spend == from_nano(self.spent[customer])
        for report in await guard.usage("customer", "day"):
            assert isinstance(report.day, date)
            assert to_nano(report.cost, "cost") == periods[report.customer_identifier or "", report.day.isoformat()]
        assert await live_holds(guard) == 0
        assert guard.renewer._live == {}
        assert await guard.verify() == []


@pytest.mark.parametrize("seed", range(12))
async def test_no_interleaving_overspends(make_guard: MakeGuard, storage: str, seed: int) -> None:
    """Upper-bound holds: at most the budget in every period, one record a call, no hold left, sums that agree."""
    clock = FakeClock(datetime(2026, 3, 28, 20, tzinfo=UTC))
    # No hold expires within the hours that pass here: expiry frees what a call may still spend.
    async with make_guard(clock=clock, default_limits=LIMITS, hold_ttl=86_400) as guard:
        schedule = Schedule(guard, clock, seed)
        await schedule.live("a")  # threads make SQLite's runs differ: both days are to have been used in each
        await schedule.run(200)
        clock.advance(14_400)
        await schedule.live("d")
        await guard.flush()
        await schedule.check()
        assert schedule.refused > 0
        assert schedule.cancelled > 0
        assert len(schedule.days) >= 2


async def test_no_interleaving_of_loops_and_threads_overspends(tmp_path: Path) -> None:
    """The same from the opening loop, another loop and plain threads at once, over one file."""
    clock = FakeClock()
    options: dict[str, Any] = {"default_limits": LIMITS, "clock": clock, "journal_dir": tmp_path, "hold_ttl": 86_400}
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}", storage_timeout=20, **options) as guard:
        schedules = [Schedule(guard, clock, seed) for seed in (101, 102, 103)]
        for number, schedule in enumerate(schedules):  # response ids of their own
            schedule.made[f"-{number}"] = number * 100_000

        def blocking(schedule: Schedule) -> None:
            for _ in range(30):
                customer = schedule.rng.choice(CUSTOMERS)
                bound = schedule.rng.randrange(1, BUDGET // 3)
                admission = guard.sync.try_admit(customer, estimate=from_nano(bound))
                if not admission:
                    continue
                with admission:  # type: ignore[union-attr]  # a Refusal is false
                    schedule.made[customer] += 1
                    schedule.spent[customer] += bound
                    guard.record_soon(Usage(cost=from_nano(bound)))

        await asyncio.gather(
            schedules[0].run(60),
            asyncio.to_thread(lambda: asyncio.run(schedules[1].run(60))),
            asyncio.to_thread(blocking, schedules[2]),
        )
        total = Schedule(guard, clock, 0)
        for schedule in schedules:
            total.made += Counter({name: count for name, count in schedule.made.items() if name in CUSTOMERS})
            total.spent += schedule.spent
        await guard.flush()
        await total.check()
