"""Who is near a budget or over one: the figure of the dashboard, now and when its range began, and who they are."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from decimal import Decimal
from random import Random

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.backends.base import Backend, UsageQuery
from respan_guard.console import dashboard as dashboard_module
from respan_guard.console import near as near_module
from respan_guard.console import remembered as remembered_module
from respan_guard.console.near import Near, near_budgets
from respan_guard.markups import Reads
from respan_guard.testing import FakeClock
from tests.console.support import asking, client_of
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
    """Several pages of few customers."""
    monkeypatch.setattr(near_module, "_PAGE", 5)


async def near(guard: Guard, at_ms: int) -> dict[str, set[str]]:
    """Who is in which state."""
    found = await near_budgets(guard, guard.lane(), at_ms)
    states = {state: set(found.of(state)) for state in ("near", "over")}
    assert {state: found.count(state) for state in states} == {state: len(who) for state, who in states.items()}
    assert found.of("near", "over") == tuple(sorted(states["near"] | states["over"]))
    return states


async def test_near_is_what_status_says(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Of customers with budgets of all kinds, it is what their own statuses say, at both moments.

    Some share a calendar's period, some have one of their own, one has no budget, one may spend nothing, one is blocked
    and hence neither, and some start a new period in between.
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

            expected: dict[str, set[str]] = {"near": set(), "over": set()}
            for name in names:
                limits = (await guard.status(name)).limits
                budgets = [one for one in limits if one.name in ("period_budget", "total_budget")]
                if OWN.get(names.index(name), {}).get("blocked"):
                    continue
                if any(one.used >= one.limit for one in budgets):
                    expected["over"].add(name)
                elif any(one.used * 100 >= one.limit * 80 for one in budgets):
                    expected["near"].add(name)
            figures.append((guard.now_ms(), expected))
            for at_ms, then in figures:
                assert await near(guard, at_ms) == then
            clock.advance(timedelta(days=1).total_seconds())
        assert len({len(figure[state]) for _, figure in figures for state in figure}) > 3
        assert all(any(figure[state] for _, figure in figures) for state in ("near", "over"))


async def test_what_is_used_up_is_over(make_guard: MakeGuard) -> None:
    """Exactly used up, too; and who may spend nothing is over also with money to its credit. As on the users page."""
    async with make_guard(default_limits={"budget_duration": "monthly", "period_budget": 10}) as guard:
        await guard.put_customer(Customer(customer_identifier="none", period_budget=0))
        await guard.adjust("none", Decimal(-1), reason="a gift")
        for name, cost in (("all", "10"), ("less", "9.999999999"), ("little", "7.999999999")):
            await guard.record(Usage(model="m", cost=cost), name)
        await guard.flush()
        assert await near(guard, guard.now_ms()) == {"near": {"less"}, "over": {"all", "none"}}
        rows = client_of(guard, open_to_all=True).get("/users.json").json()
        states = {row["customer_identifier"]: row["state"] for row in rows}
        assert states == {"all": "over", "none": "over", "less": "near", "little": "ok"}


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
        assert await near(guard, guard.now_ms()) == {
            "near": {f"little{number:02}" for number in range(1, 12)},
            "over": set(),
        }
        assert len(asked) <= 2 * 5  # 24 customers are five pages, of two policies
        assert await near(guard, guard.now_ms() - 40 * 86_400_000) == {"near": set(), "over": set()}


class TestPages:
    """The tile of the dashboard leads to the customers behind it."""

    async def fill(self, guard: Guard) -> None:
        """Three customers, one near and one over."""
        for name, cost in (("ann", 9), ("bob", 1), ("eve", 20)):
            await guard.record(Usage(model="m", cost=cost), name)

    async def test_who_is_near_is_listed(self, make_guard: MakeGuard) -> None:
        """On the page, with any other filter and order, and in both files: exactly those that the tile counts."""
        async with make_guard(default_limits={"period_budget": 10}) as guard:
            await self.fill(guard)
            client = client_of(guard, open_to_all=True)
            page = client.get("/").text
            tile = r'users\?state=near-or-over">Near or over budget</a></h2>\s*<p class="value" title="2 of all'
            assert re.search(tile, page)
            page = client.get("/users?state=near-or-over&sort=customer&dir=asc").text
            assert re.findall(r"user\?id=(\w+)", page) == ["ann", "eve"]
            assert re.search(r'<option value="near-or-over" selected>near or over</option>', page)
            assert "2 at 80 % of a budget or more, counted just now, without holds and without who is blocked." in page
            assert re.findall(r"user\?id=(\w+)", client.get("/users?state=near-or-over&q=e").text) == ["eve"]
            lines = client.get("/users.csv?state=near-or-over").text.splitlines()
            assert [line.split(",")[0] for line in lines[1:]] == ["eve", "ann"]
            found = client.get("/users.json?state=near-or-over").json()
            assert [row["customer_identifier"] for row in found] == ["eve", "ann"]

    @pytest.mark.parametrize(
        ("state", "who"),
        [
            ("near", {"ann"}), ("over", {"eve"}), ("near-or-over", {"ann", "eve"}), ("blocked", {"joe"}),
            ("open", {"ann", "bob", "eve"}), ("", {"ann", "bob", "eve", "joe"}), ("far", {"ann", "bob", "eve", "joe"}),
        ],
    )  # fmt: skip
    async def test_each_state_can_be_asked_for(self, make_guard: MakeGuard, state: str, who: set[str]) -> None:
        """Who is listed is in the state that the list shows; who is blocked is nothing else. Files follow."""
        async with make_guard(default_limits={"period_budget": 10}) as guard:
            await self.fill(guard)
            await guard.record(Usage(model="m", cost=30), "joe")
            await guard.update_customer("joe", blocked=True)
            client = client_of(guard, open_to_all=True)
            page = client.get(f"/users?state={state}").text
            assert set(re.findall(r"user\?id=(\w+)", page)) == who
            badges = dict(re.findall(r'user\?id=(\w+).*?<span class="badge (\w+)">', page, re.DOTALL))
            right = {"ann": "near", "bob": "ok", "eve": "over", "joe": "blocked"}
            assert badges == {name: right[name] for name in who}
            rows = client.get(f"/users.json?state={state}").json()
            assert {row["customer_identifier"]: row["state"] for row in rows} == badges
            lines = client.get(f"/users.csv?state={state}").text.splitlines()
            assert {line.split(",")[0] for line in lines[1:]} == who

    async def test_who_is_blocked_is_not_counted(self, make_guard: MakeGuard) -> None:
        """By the tile neither: it counts who is in its list."""
        async with make_guard(default_limits={"period_budget": 10}) as guard:
            await self.fill(guard)
            await guard.update_customer("eve", blocked=True)
            client = client_of(guard, open_to_all=True)
            assert 'title="1 of all customers at 80 % of a budget or more, and not blocked"' in client.get("/").text

    async def test_while_it_is_counted(self, make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both pages say so, rather than a number that is not known; later, how old the number is."""
        monkeypatch.setattr(remembered_module, "_PATIENCE", 0.02)
        held = asyncio.Event()

        async def slow(guard: Guard, reads: Reads, at_ms: int) -> Near:
            await held.wait()
            assert isinstance(guard.clock, FakeClock)
            guard.clock.advance(3)
            return await near_budgets(guard, reads, at_ms)

        for module in (near_module, dashboard_module):
            monkeypatch.setattr(module, "near_budgets", slow)
        async with make_guard(default_limits={"period_budget": 10}) as guard, asking(guard) as page_of:
            await self.fill(guard)
            assert "is being counted" in await page_of("/")
            page = await page_of("/users?state=over")
            assert "Who is in this state is being counted. Come back in a moment." in page
            assert "user?id=" not in page
            held.set()
            while "is being counted" in await page_of("/"):
                pass
            assert isinstance(guard.clock, FakeClock)
            guard.clock.advance(40)
            page = await page_of("/")
            assert re.search(r'title="2 of all[^>]*>2</p>.*?counted 4[36] s ago', page, re.DOTALL)  # of two counts
            page = await page_of("/users?state=over")
            assert re.search(r"1 over a budget, counted 4[36] s ago", page)
            assert re.findall(r"user\?id=(\w+)", page) == ["eve"]

    async def test_of_very_many_the_first_are_listed(
        self, make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And the page says how many there are."""
        monkeypatch.setattr(near_module, "MOST_NAMES", 1)
        async with make_guard(default_limits={"period_budget": 10}) as guard:
            await self.fill(guard)
            page = client_of(guard, open_to_all=True).get("/users?state=near-or-over").text
            assert re.findall(r"user\?id=(\w+)", page) == ["ann"]
            assert "2 at 80 % of a budget or more" in page
            assert "The first 1 by identifier are here." in page
