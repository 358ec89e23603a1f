"""The console shows costs with markup beside costs, where there is a markup."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.console import dashboard, remembered
from respan_guard.console.marked import Marked, marked_costs
from respan_guard.console.ranges import Range
from respan_guard.markups import Reads
from respan_guard.testing import FakeClock

from .support import asking, client_of


@pytest.fixture(params=["memory", "sqlite"])
async def guard(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A guard over each embedded store."""
    storage = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}?synchronous=normal"
    async with Guard(storage, clock=FakeClock(), journal_dir=tmp_path / "journal") as made:
        yield made


async def fill(guard: Guard, **markups: int) -> None:
    """Yesterday and today: ann, bob and nobody, 5.05 each."""
    assert isinstance(guard.clock, FakeClock)
    for customer, markup in markups.items():
        await guard.put_customer(Customer(customer_identifier=customer, markup_percentage=markup))
    for _ in range(2):
        guard.clock.advance(86_400)
        for name in ("ann", "bob", None):
            await guard.record(Usage(model="big", cost=5, provider="openai", input_tokens=9), name)
            await guard.record(Usage(model="small", cost=Decimal("0.05")), name)


def told(page: str) -> list[str]:
    """What a page says in exact words where it shows an amount with markup."""
    return re.findall(r'title="([^"]*) USD with markup"', page)


@pytest.mark.parametrize("path", ["/", "/?range=24h", "/users", "/user?id=ann", "/logs", "/record?seq=1"])
async def test_without_any_markup_there_is_none_to_see(guard: Guard, path: str) -> None:
    """Pages are as calm as before."""
    await fill(guard)
    page = client_of(guard, open_to_all=True).get(path)
    assert page.status_code == 200
    assert "ith markup" not in page.text


async def test_the_dashboard(guard: Guard) -> None:
    """Spend, top users and the numbers of both charts of spend."""
    await fill(guard, ann=20, bob=0)
    page = client_of(guard, open_to_all=True).get("/").text
    assert told(page) == ["32.32", "12.12"]  # the tile, and ann among the top users
    assert ">$32.32 with markup<" in page
    by_model, by_user = re.findall(r"<th scope=\"col\" class=\"num\">With markup</th>.*?</table>", page, re.DOTALL)
    for table in (by_model, by_user):
        assert re.findall(r'title="([0-9.]+) USD">', table)[:3] == ["16.16", "16.16", "0"]


async def test_the_dashboard_by_hour(guard: Guard) -> None:
    """The last 24 hours, too: the spend, and each hour under "Numbers"; top users are of the days these lie in."""
    await fill(guard, ann=20)
    assert isinstance(guard.clock, FakeClock)
    guard.clock.advance(3 * 3600)
    await guard.record(Usage(model="big", cost=1, provider="openai"), "ann")
    page = client_of(guard, open_to_all=True).get("/?range=24h").text
    assert told(page) == ["17.36", "13.32"]
    assert ">$17.36 with markup<" in page
    table, *_ = re.findall(r"<th scope=\"col\" class=\"num\">With markup</th>.*?</table>", page, re.DOTALL)
    assert re.findall(r'title="([0-9.]+) USD">', table)[:5] == ["1.2", "0", "0", "16.16", "0"]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Sums with markup take three seconds, and go on when this is set; no page waits for them."""
    monkeypatch.setattr(remembered, "_PATIENCE", 0.02)
    go = asyncio.Event()

    async def slow(guard: Guard, span: Range, reads: Reads) -> Marked | None:
        await go.wait()
        assert isinstance(guard.clock, FakeClock)
        guard.clock.advance(3)
        return await marked_costs(guard, span, reads)

    monkeypatch.setattr(dashboard, "marked_costs", slow)
    return go


async def test_while_sums_with_markup_are_counted(guard: Guard, held: asyncio.Event) -> None:
    """The dashboard says so, and what was paid; tops, of few, are there. Without any markup nothing is said of it."""
    async with asking(guard) as page_of:
        await fill(guard)
        assert "ith markup" not in await page_of("/")
        await guard.update_customer("ann", markup_percentage=20)
        page = await page_of("/")
        assert ">with markup is being counted<" in page
        assert ">$30.30<" in page
        assert told(page) == ["12.12"]
        assert "With markup" not in page


async def test_sums_with_markup_of_a_while_ago_say_so(guard: Guard, held: asyncio.Event) -> None:
    """The tile and both tables, beside what was paid until now; of a day that there was not yet, nothing is known."""
    async with asking(guard) as page_of:
        await fill(guard, ann=20)
        held.set()
        while "is being counted" in await page_of("/"):
            pass
        held.clear()
        assert isinstance(guard.clock, FakeClock)
        guard.clock.advance(86_400)
        await guard.record(Usage(model="big", cost=5, provider="openai"), "ann")
        page = await page_of("/")
        assert ">$35.30<" in page
        assert ">$32.32 with markup, as of 1 d ago<" in page
        head = r'<th scope="col" class="num">With markup<span class="small block">as of 1 d ago</span></th>.*?</table>'
        tables = re.findall(head, page, re.DOTALL)
        assert len(tables) == 2
        for table in tables:
            marked = re.findall(r'<th scope="row">[^<]*</th><td[^>]*>[^<]*</td><td[^>]*>([^<]*)</td>', table)
            assert marked[:4] == ["\N{EN DASH}", "$16.16", "$16.16", "$0.00"]


async def test_the_default_markup(tmp_path: Path) -> None:
    """It counts for whoever has none of his own, by day and by hour, on every page."""
    limits = {"markup_percentage": 50}
    async with Guard("memory://", clock=FakeClock(), default_limits=limits, journal_dir=tmp_path) as guard:
        await fill(guard)
        client = client_of(guard, open_to_all=True)
        assert told(client.get("/?range=24h").text)[0] == "22.725"
        assert told(client.get("/").text) == ["45.45", "15.15", "15.15", "15.15"]
        assert told(client.get("/users").text) == ["15.15"] * 3
        assert told(client.get("/logs").text) == ["0.075", "7.5"] * 6


async def test_logs(guard: Guard) -> None:
    """Rows, the record's page, and both files, which have the column for everybody."""
    await fill(guard, ann=20)
    await guard.record(Usage(model="unheard-of"), "ann")
    client = client_of(guard, open_to_all=True)
    assert told(client.get("/logs").text) == ["0.06", "6"] * 2
    assert told(client.get("/record?seq=1").text) == ["6"]
    assert told(client.get("/record?seq=3").text) == []
    rows = list(csv.DictReader(io.StringIO(client.get("/logs.csv").text)))
    lines = [json.loads(line) for line in client.get("/logs.jsonl").text.splitlines()]
    for found in (rows, lines):
        costs = [(row["customer_identifier"], row["cost_usd"], row["cost_with_markup_usd"]) for row in found]
        assert costs[:-4:-1] == [("ann", "5", "6"), ("ann", "0.05", "0.06"), ("bob", "5", "5")]
    assert (rows[0]["cost_with_markup_usd"], lines[0]["cost_with_markup_usd"]) == ("", None)


async def test_one_user(guard: Guard) -> None:
    """The total, each model, each day, and the latest calls."""
    await fill(guard, ann=20)
    page = client_of(guard, open_to_all=True).get("/user?id=ann").text
    assert '<span title="12.12 USD">$12.12</span> with markup' in page
    assert told(page) == ["12", "0.12", "0.06", "6", "0.06", "6"]
    assert re.findall(r'<td class="num" title="([0-9.]+) USD">', page)[:2] == ["6.06", "6.06"]
