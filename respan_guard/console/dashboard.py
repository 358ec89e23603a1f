"""The dashboard: what all customers together use, and who uses most of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from respan_guard.backends.base import HOUR_MS, Amounts, Backend, UsageQuery, UsageRow
from respan_guard.console.charts import OTHERS, Chart, chart
from respan_guard.console.formats import ago, change, compact, count, exact_usd, usd
from respan_guard.console.marked import Marked, marked_costs
from respan_guard.console.near import Near, near_budgets, who_is_near
from respan_guard.console.ranges import Range
from respan_guard.console.remembered import Answer, Remembered
from respan_guard.console.standing import NEAR
from respan_guard.markups import Reads, any_markup, markups_in, with_markup
from respan_guard.money import from_nano

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Tile", "dashboard"]

_TOP = 10
_RECENT = 6
_SERIES = 6


@dataclass(frozen=True, slots=True)
class Tile:
    """A number with what it is, how it changed, and all its digits."""

    label: str
    value: str
    change: str = ""
    exact: str = ""
    link: str = ""
    note: str = "nothing before"
    more: str = ""
    more_exact: str = ""


async def dashboard(guard: Guard, span: Range, remembered: Remembered) -> dict[str, Any]:
    """What the page shows.

    Args:
        guard: Whose customers.
        span: Of which time.
        remembered: What is counted of all customers; it outlives the page.
    """
    name = span.name if span.name != "custom" else f"{span.first} to {span.last}"
    now, then, marked = await asyncio.gather(
        who_is_near(guard, remembered),
        _near_before(guard, remembered, name, span),
        _marked(guard, remembered, name, span),
    )

    async def work(backend: Backend) -> dict[str, Any]:
        return await _Dashboard(guard, backend, span, marked).page(now, then)

    return await guard.lane().call(work, 30.0)


async def _near_before(guard: Guard, remembered: Remembered, name: str, span: Range) -> Answer[int] | None:
    async def work(reads: Reads) -> int:
        return (await near_budgets(guard, reads, span.since_ms - 1)).count("near", "over")

    return await remembered.last(f"who was near before {name}", work, anew=False)


async def _marked(guard: Guard, remembered: Remembered, name: str, span: Range) -> Answer[Marked | None] | None:
    if not await guard.lane().call(lambda backend: any_markup(guard, backend)):
        return Answer(None, guard.now_ms(), fresh=True)
    return await remembered.last(
        f"costs with markup of {name}", lambda reads: marked_costs(guard, span, reads), anew=True
    )


class _Dashboard:
    def __init__(self, guard: Guard, backend: Backend, span: Range, marked: Answer[Marked | None] | None) -> None:
        self.guard = guard
        self.backend = backend
        self.span = span
        self.zone = ZoneInfo(guard.settings.time_zone)
        self.marked = marked
        # What customers used is kept by day: of the last 24 hours, the days they lie in are shown.
        self.of_days = ", yesterday and today" if span.hourly else ""

    async def page(self, near: Answer[Near] | None, near_then: Answer[int] | None) -> dict[str, Any]:
        span, before = self.span, self.span.before(self.zone)
        now_sums, then_sums = await self.sums(span), await self.sums(before)
        tops = {metric: await self.top(metric) for metric in ("cost", "requests", "tokens")}
        daily, daily_before = await self.active(span), await self.active(before)
        refused, refused_before = await self.refusals(span), await self.refusals(before)
        return {
            "tiles": [
                self.spend_tile(now_sums, then_sums),
                *self.amount_tiles(now_sums, then_sums),
                Tile("Refusals", compact(sum(refused.values())),
                     change(sum(refused.values()), sum(refused_before.values())), _reasons(refused),
                     f"logs?status=refused&{span.query}"),
                await self.people_tile(daily, daily_before, near),
                self.near_tile(near, near_then),
                _latency_tile(now_sums, then_sums),
            ],
            "charts": [await self.by_model(), await self.by_customer(tops["cost"]), self.active_chart(daily)],
            "marked_tops": await self.marked_tops(tops["cost"]),
            "tops": [(metric.capitalize(), metric, rows) for metric, rows in tops.items()],
            "of_days": self.of_days,
            "refusals": await self.latest_refusals(),
            "unpriced": now_sums.unpriced,
        }  # fmt: skip

    def ago(self, answer: Answer[Any]) -> str:
        """When something was counted, if that is not now."""
        return "" if answer.fresh else ago(answer.at_ms, self.guard.now_ms())

    async def rows(self, span: Range, *by: str) -> list[UsageRow]:
        """Rollups of the range, by hour if it is of hours."""
        if span.hourly:
            hours = (span.since_ms // HOUR_MS, span.until_ms // HOUR_MS)
            names = ("hour", *(name for name in by if name != "day"))
            return await self.backend.usage(UsageQuery(by=names, first_hour=hours[0], end_hour=hours[1], limit=100_000))
        return await self.backend.usage(
            UsageQuery(by=by, first_day=span.first_day, end_day=span.end_day, limit=100_000)
        )

    async def sums(self, span: Range) -> Amounts:
        found = Amounts()
        for row in await self.rows(span):
            found.add(row.amounts)
        return found

    def spend_tile(self, now: Amounts, then: Amounts) -> Tile:
        """What was spent; and with markup, if anybody has one."""
        more = more_exact = ""
        if self.marked is None:
            more = "with markup is being counted"
        elif (found := self.marked.value) is not None:
            of_old = f", as of {old}" if (old := self.ago(self.marked)) else ""
            more, more_exact = f"{usd(found.total)} with markup{of_old}", f"{exact_usd(found.total)} with markup"
        spend, changed = usd(now.cost), change(now.cost, then.cost)
        return Tile("Spend", spend, changed, exact_usd(now.cost), more=more, more_exact=more_exact)

    def marked_up(self, found: Chart, *, hourly: bool = False) -> Chart:
        """A chart with each bar's sum with markup, if it is known."""
        if self.marked is None or self.marked.value is None:
            return found
        costs = self.marked.value.by_hour if hourly else self.marked.value.by_day
        return found.marked_up(costs, self.ago(self.marked))

    def amount_tiles(self, now: Amounts, then: Amounts) -> list[Tile]:
        found = [Tile("Requests", compact(now.requests), change(now.requests, then.requests), count(now.requests))]
        for label, name in (("Tokens in", "input_tokens"), ("Tokens out", "output_tokens")):
            new, old = getattr(now, name), getattr(then, name)
            found.append(Tile(label, compact(new), change(new, old), count(new)))
        return found

    async def people_tile(self, daily: dict[int, int], before: dict[int, int], near: Answer[Near] | None) -> Tile:
        """Who was active in the time: counted by when they were last seen, so that it costs nobody's days."""
        span = self.span
        number = await self.backend.count_customers(seen_since_ms=span.since_ms)
        total = await self.backend.count_customers()
        nobody = await self.backend.get("")  # is seen like a customer, and so are those who were deleted
        unshown = [nobody.last_seen_ms] if nobody is not None else []
        unshown += near.value.deleted if near is not None else ()
        number -= sum(seen >= span.since_ms for seen in unshown)
        total -= len(unshown)
        sums = [sum(days.values()) for days in (daily, before)]
        averages = [found / (span.end_day - span.first_day) for found in sums]
        exact = f"{averages[0]:,.1f} a day on average, {averages[1]:,.1f} before; {total:,} known"
        seen = span.name if span.name in ("24h", "7d", "30d", "90d") else "30d"
        label = "Active customers" if span.until_ms > self.guard.now_ms() else "Active since then"
        return Tile(label, count(number), change(*sums), exact, f"users?seen={seen}", f"of {total:,} known")

    async def top(self, metric: str) -> list[UsageRow]:
        """Who used most of something."""
        span = self.span
        return await self.backend.usage(
            UsageQuery(by=("customer",), first_day=span.first_day, end_day=span.end_day, top=metric, limit=_TOP)
        )

    async def marked_tops(self, tops: list[UsageRow]) -> dict[str, Decimal]:
        """What those who spent most are shown, where they have a markup."""
        markups = await markups_in(self.guard, self.backend, {row.customer or "" for row in tops})
        return {
            row.customer or "": with_markup(from_nano(row.amounts.cost), markups[row.customer or ""])
            for row in tops
            if (row.customer or "") in markups
        }

    async def refusals(self, span: Range) -> dict[str, int]:
        return await self.backend.refusal_sums(
            since_minute=span.since_ms // 60_000, until_minute=-(-span.until_ms // 60_000)
        )

    async def latest_refusals(self) -> list[Any]:
        span = self.span
        return await self.backend.refusals(
            since_minute=span.since_ms // 60_000, until_minute=-(-span.until_ms // 60_000), limit=_RECENT
        )

    def near_tile(self, near: Answer[Near] | None, then: Answer[int] | None) -> Tile:
        """How many are near or over a budget, and when that was counted if it is not now."""
        label, link = "Near or over budget", "users?state=near-or-over"
        if near is None:
            return Tile(label, "\N{EN DASH}", note="is being counted", link=link)
        number = near.value.count("near", "over")
        changed = "" if then is None else change(number, then.value)
        note = "before is being counted" if then is None else "nothing before"
        exact = f"{number:,} of all customers at {NEAR} % of a budget or more, and not blocked"
        old = self.ago(near)
        more = f"counted {old}" if old not in ("", "just now") else ""
        return Tile(label, count(number), changed, exact, link, note, more)

    async def by_model(self) -> Chart:
        points: dict[str, Counter[int]] = {}
        for row in await self.rows(self.span, "day", "model"):
            place = row.hour if self.span.hourly else row.day
            points.setdefault(row.model or "no model", Counter())[place or 0] += row.amounts.cost
        found = chart("Spend by model", "usd", self.span, self.zone, points, limit=_SERIES)
        return self.marked_up(found, hourly=self.span.hourly)

    async def by_customer(self, tops: list[UsageRow]) -> Chart:
        """Those who spent most, each with a line of its own; what is left of the total is all others'."""
        span = self.span
        days = Range(span.name, span.first_day, span.end_day, span.since_ms, span.until_ms)
        left: Counter[int] = Counter()
        for row in await self.rows(days, "day"):
            left[row.day or 0] += row.amounts.cost
        points: dict[str, Counter[int]] = {}
        for top in tops[:_SERIES]:
            name = top.customer or ""
            rows = await self.backend.usage(
                UsageQuery(first_day=span.first_day, end_day=span.end_day, customer=name, by=("day",), limit=10_000)
            )
            points[name] = Counter({row.day or 0: row.amounts.cost for row in rows})
            left.subtract(points[name])
        found = chart(f"Spend by user{self.of_days}", "usd", days, self.zone, points, limit=_SERIES)
        if any(left.values()):
            found.series.append((OTHERS, [left[day] for day in range(span.first_day, span.end_day)]))
        return self.marked_up(found)

    async def active(self, span: Range) -> dict[int, int]:
        """How many customers were active on each day. Nobody is none."""
        query = UsageQuery(first_day=span.first_day, end_day=span.end_day, by=("day",), distinct=True)
        found = Counter({row.day or 0: row.customers or 0 for row in await self.backend.usage(query)})
        for row in await self.backend.usage(replace(query, customer="", distinct=False)):
            found[row.day or 0] -= 1
        return found

    def active_chart(self, daily: dict[int, int]) -> Chart:
        """The same as bars."""
        span = self.span
        days = Range(span.name, span.first_day, span.end_day, span.since_ms, span.until_ms)
        return chart(f"Active users by day{self.of_days}", "count", days, self.zone, {"customers": daily})


def _latency_tile(now: Amounts, then: Amounts) -> Tile:
    if not now.timed:
        return Tile("Latency", "unknown", note="no call told how long it took")
    average = now.latency_ms // now.timed
    before = then.latency_ms // then.timed if then.timed else 0
    shown = f"{average:,} ms" if average < 10_000 else f"{average / 1000:.1f} s"
    return Tile("Latency", shown, change(average, before), f"average of {now.timed:,} calls")


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {number:,}" for reason, number in sorted(counts.items())) or "none"
