"""Figures of the dashboard: what they are compared with, what they lead to, and money below zero."""

from __future__ import annotations

import re
from decimal import Decimal
from html import unescape
from typing import Any
from zoneinfo import ZoneInfo

from respan_guard import Customer, Guard, Usage
from respan_guard.console.charts import chart
from respan_guard.console.ranges import range_from
from respan_guard.testing import FakeClock
from tests.guard.conftest import MakeGuard, clock, make_guard, storage

from .support import client_of

__all__ = ["clock", "make_guard", "storage"]


def tile(page: str, label: str) -> tuple[str, str]:
    """What a tile shows, and how it changed."""
    found = re.search(
        rf'>{label}(?:</a>)?</h2>\s*<p class="value"[^>]*>([^<]*)</p>\s*<p class="change">(.*?)</p>', page
    )
    assert found is not None
    return found[1], unescape(re.sub(r"<[^>]*>", "", found[2]))


async def test_how_many_were_active_is_compared_exactly(make_guard: MakeGuard, clock: FakeClock) -> None:
    """One customer on 29 days of 30 is a little fewer than on all of them, and not none. Nobody's calls are nobody."""
    async with make_guard() as guard:
        for day in range(60):
            if day:
                clock.advance(86_400)
            await guard.record(Usage(model="m", cost=1), None)
            if day != 45:
                await guard.record(Usage(model="m", cost=1), "only")
            await guard.flush()
        page = client_of(guard, open_to_all=True).get("/?range=30d").text
    assert tile(page, "Active customers") == ("1", "-3% vs before")
    assert "1.0 a day on average, 1.0 before; 1 known" in page


async def test_who_is_counted_is_who_is_listed(make_guard: MakeGuard, clock: FakeClock) -> None:
    """The figure of a time leads to a list of that time, to the minute."""
    async with make_guard() as guard:
        for minute in range(0, 26 * 60, 20):
            await guard.record(Usage(model="m", cost=1), f"c{minute}")
            await guard.flush()
            clock.advance(1200)
        client = client_of(guard, open_to_all=True)
        for name in ("24h", "7d"):
            number, _ = tile(client.get(f"/?range={name}").text, "Active customers")
            rows: list[dict[str, Any]] = client.get(f"/users.json?seen={name}").json()
            assert len(rows) == int(number)


async def test_what_is_nobodys_has_a_name(guard: Guard) -> None:
    """In charts, too."""
    await guard.record(Usage(model="m", cost=1), None)
    page = client_of(guard, open_to_all=True).get("/").text
    assert "[[&#34;(nobody)&#34;," in page
    span = range_from({}, guard)
    found = chart("Spend", "usd", span, ZoneInfo(guard.settings.time_zone), {"": {span.first_day: 1}})
    assert [name for name, _ in found.series] == ["(nobody)"]


async def test_bars_are_never_shorter_than_nothing(guard: Guard) -> None:
    """Of who was given money back."""
    await guard.put_customer(Customer(customer_identifier="ann"))
    await guard.record(Usage(model="m", cost=1), "bob")
    await guard.adjust("ann", Decimal(-5), reason="a gift")
    page = client_of(guard, open_to_all=True).get("/").text
    assert "-$5.00" in page
    assert not re.search(r'width="-', page)


async def test_files_have_the_rate_limit_that_holds(guard: Guard) -> None:
    """The customer's own, or else the default one."""
    await guard.put_customer(Customer(customer_identifier="ann", rate_limit="100/minute; 2000/hour"))
    await guard.record(Usage(model="m", cost=1), "bob")
    rows = client_of(guard, open_to_all=True).get("/users.json").json()
    limits = {row["customer_identifier"]: row["rate_limit"] for row in rows}
    assert limits == {"ann": "100/minute; 2000/hour", "bob": 60}
