"""How many customers are near a budget: the figure of the dashboard, now and when its range began."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from decimal import Decimal
from random import Random
from typing import Any

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.backends.base import Backend, UsageQuery
from respan_guard.console import near as near_module
from respan_guard.console.near import Near, NearCounter, near_budgets
from respan_guard.errors import BackendError, StorageUnavailable
from respan_guard.testing import FakeClock
from tests.console.support import client_of
from tests.guard.conftest import MakeGuard, clock, make_guard, storage

__all__ = ["clock", "make_guard", "storage"]

OWN: dict[int, dict[str, object]] = {
    0: {"budget_duration": "weekly", "period_budget": 10, "period_start": "2025-12-30"},
    1: {"total_budget": 30},
    2: {"budget_duration": "daily", "period_budget": 5, "total_budget": 60},
    3: {"rate_limit": 5, "period_budget": 0, "budget_duration": "monthly", "blocked": True},
}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pages of few customers, and all the time that a busy machine takes to count them."""
    monkeypatch.setattr(near_module, "_PAGE", 5)
    monkeypatch.setattr(near_module, "_PATIENCE", 30)


async def near(guard: Guard, then_ms: int) -> tuple[int, int]:
    """The figures of all customers."""
    found = await near_budgets(guard, then_ms)
    assert len(found.names) == found.now
    return found.now, found.then


async def test_near_is_what_status_says(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Of customers with budgets of all kinds, the figure is what their own statuses say, at both moments.

    Some share a calendar's period, some have one of their own, one has no budget, one is blocked, and some start a new
    period in between.
    """
    random = Random(7)
    async with make_guard(default_limits={"budget_duration": "monthly", "period_budget": 10}) as guard:
        names = [f"c{number}" for number in range(12)]
        for number, name in enumerate(names):
            if number in OWN:
                await guard.put_customer(Customer.model_validate({"customer_identifier": name} | OWN[number]))
        figures = []
        for _ in range(9):
            for name in names:
                cost = Decimal(random.randrange(2_500)) / 1000
                await guard.record(Usage(model="m", cost=cost), name)
            await guard.flush()

            expected = 0
            for name in names:
                limits = (await guard.status(name)).limits
                budgets = [one for one in limits if one.name in ("period_budget", "total_budget")]
                expected += any(one.used * 100 >= one.limit * 80 for one in budgets)
            figures.append((guard.now_ms(), expected))
            for at_ms, then in figures:
                assert await near(guard, at_ms) == (expected, then)
            clock.advance(timedelta(days=1).total_seconds())
        assert len({figure for _, figure in figures}) > 3


async def test_everybody_counts_by_few_statements(make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only who spends most; and a page of customers takes a statement for each run of days that budgets have."""
    async with make_guard(default_limits={"budget_duration": "monthly", "period_budget": 10}) as guard:
        for number in range(12):
            await guard.put_customer(Customer(customer_identifier=f"big{number}", period_budget=1000))
            await guard.record(Usage(model="m", cost=50), f"big{number}")
            await guard.record(Usage(model="m", cost=8 if number else 1), f"little{number:02}")
        asked: list[UsageQuery] = []

        async def spy(backend: Backend) -> None:
            usage = backend.usage

            async def counted(query: UsageQuery) -> object:
                asked.append(query)
                return await usage(query)

            monkeypatch.setattr(backend, "usage", counted)

        await guard.lane().call(spy)
        found = await near_budgets(guard, guard.now_ms() - 40 * 86_400_000)
        assert (found.now, found.then) == (11, 0)
        assert found.names == tuple(f"little{number:02}" for number in range(1, 12))
        assert len(asked) <= 4 * 5  # 24 customers are five pages, of two policies at two moments


class TestCounter:
    """A page waits a moment for a count, and shows the last one where it takes longer."""

    @pytest.fixture
    async def held(self, make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A guard, its counter, and what lets counts go on."""
        monkeypatch.setattr(near_module, "_PATIENCE", 0.02)
        go, counts = asyncio.Event(), []

        async def slow(guard: Guard, then_ms: int) -> Near:
            counts.append(then_ms)
            await go.wait()
            guard.clock.advance(3)  # type: ignore[attr-defined]
            return await near_budgets(guard, then_ms)

        monkeypatch.setattr(near_module, "near_budgets", slow)
        async with make_guard(default_limits={"period_budget": 10}) as guard:
            await guard.record(Usage(model="m", cost=9), "ann")
            yield guard, NearCounter(guard), go, counts

    async def test_one_count_at_a_time(self, held: Any) -> None:
        """However many pages ask; what they ask for is counted in turn, and known when it is done."""
        _, counter, go, counts = held
        assert await asyncio.gather(*(counter.last(name, 1) for name in ("30d", "7d", "30d"))) == [None] * 3
        assert counts == [1]
        go.set()
        first = await counter.last("30d", 1)
        assert first is not None
        assert first.now == 1
        assert await counter.last("7d", 1) is not None
        assert counts == [1, 1]

    async def test_a_count_is_good_for_a_while(self, held: Any, clock: FakeClock) -> None:
        """For twenty times as long as it took; then the old one is shown until the new one is there."""
        guard, counter, go, counts = held
        go.set()
        first = await counter.last("30d", 1)
        await guard.record(Usage(model="m", cost=9), "bob")
        clock.advance(59)
        assert await counter.last("30d", 1) is first
        clock.advance(2)
        go.clear()
        assert await counter.last("30d", 1) is first
        go.set()
        assert (await counter.last("30d", 1)).now == 2
        assert len(counts) == 2

    async def test_storage_that_is_down(self, held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is said, as by any other page, and the next one counts again."""
        _, counter, go, _ = held

        async def down(*args: object) -> Near:
            raise StorageUnavailable("down")

        go.set()
        with monkeypatch.context() as patched:
            patched.setattr(near_module, "near_budgets", down)
            with pytest.raises(BackendError):
                await counter.last("30d", 1)
        assert await counter.last("30d", 1) is not None


class TestPages:
    """The tile of the dashboard leads to the customers behind it."""

    async def fill(self, guard: Guard) -> None:
        """Three customers, one near and one over."""
        for name, cost in (("ann", 9), ("bob", 1), ("eve", 20)):
            await guard.record(Usage(model="m", cost=cost), name)

    async def test_who_is_near_is_listed(self, make_guard: MakeGuard) -> None:
        """On the page, with any other filter and order, and in both files."""
        async with make_guard(default_limits={"period_budget": 10}) as guard:
            await self.fill(guard)
            client = client_of(guard, open_to_all=True)
            page = client.get("/").text
            assert re.search(r'users\?state=near">Near a limit</a></h2>\s*<p class="value" title="2 of all', page)
            page = client.get("/users?state=near&sort=customer&dir=asc").text
            assert re.findall(r"user\?id=(\w+)", page) == ["ann", "eve"]
            assert "2 at 80 % of a budget or more, without holds, counted just now." in page
            assert re.findall(r"user\?id=(\w+)", client.get("/users?state=near&q=e").text) == ["eve"]
            lines = client.get("/users.csv?state=near").text.splitlines()
            assert [line.split(",")[0] for line in lines[1:]] == ["eve", "ann"]
            assert [row["customer_identifier"] for row in client.get("/users.json?state=near").json()] == ["eve", "ann"]

    async def test_while_it_is_counted(self, make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both pages say so, rather than a number that is not known."""
        monkeypatch.setattr(near_module, "_PATIENCE", 0.02)

        async def slow(guard: Guard, then_ms: int) -> Near:
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(near_module, "near_budgets", slow)
        async with make_guard(default_limits={"period_budget": 10}) as guard:
            await self.fill(guard)
            client = client_of(guard, open_to_all=True)
            assert "is being counted" in client.get("/").text
            assert "Who is near a budget is being counted" in client.get("/users?state=near").text

    async def test_of_very_many_the_first_are_listed(
        self, make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And the page says how many there are."""
        monkeypatch.setattr(near_module, "MOST_NAMES", 1)
        async with make_guard(default_limits={"period_budget": 10}) as guard:
            await self.fill(guard)
            page = client_of(guard, open_to_all=True).get("/users?state=near").text
            assert re.findall(r"user\?id=(\w+)", page) == ["ann"]
            assert "2 at 80 % of a budget" in page
            assert "The first 1 by identifier are here." in page
