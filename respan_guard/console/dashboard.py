"""The dashboard: what all customers together use, and who uses most of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from respan_guard.backends.base import HOUR_MS, Amounts, Backend, UsageQuery, UsageRow
from respan_guard.console.charts import OTHERS, Chart, chart
from respan_guard.console.formats import ago, change, compact, count, exact_usd, usd
from respan_guard.console.near import Near, NearCounter
from respan_guard.console.ranges import Range
from respan_guard.console.standing import NEAR
from respan_guard.markups import MarkedSums, Markups, all_markups, marked_sums, markups_in, with_markup
from respan_guard.money import from_nano

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Tile", "dashboard"]

_TOP = 10
_RECENT = 6
_SERIES = 6
_OLD_MS = 5_000  # a count that is older says so


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


async def dashboard(guard: Guard, span: Range, counter: NearCounter) -> dict[str, Any]:
    """What the page shows.

    Args:
        guard: Whose customers.
        span: Of which time.
        counter: Who is near a limit; it outlives the page.
    """
    name = span.name if span.name != "custom" else str(span.first_day)
    near = await counter.last(name, span.since_ms - 1)

    async def work(backend: Backend) -> dict[str, Any]:
        return await _Dashboard(guard, backend, span).page(near)

    return await guard.lane().call(work, 30.0)


class _Dashboard:
    def __init__(self, guard: Guard, backend: Backend, span: Range) -> None:
        self.guard = guard
        self.backend = backend
        self.span = span
        self.zone = ZoneInfo(guard.settings.time_zone)
        self.markups: Markups | None = None
        self.by_day: MarkedSums | None = None
        self.by_hour: MarkedSums | None = None
        # What customers used is kept by day: of the last 24 hours, the days they lie in are shown.
        self.of_days = ", yesterday and today" if span.hourly else ""

    async def page(self, near: Near | None) -> dict[str, Any]:
        span, before = self.span, self.span.before(self.zone)
        self.markups = await all_markups(self.guard, self.backend)
        now_sums, then_sums = await self.sums(span), await self.sums(before)
        self.by_day = await self.marked("day")
        self.by_hour = await self.marked("hour") if span.hourly else None
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
                await self.people_tile(daily, daily_before),
                self.near_tile(near),
                _latency_tile(now_sums, then_sums),
            ],
            "charts": [await self.by_model(), await self.by_customer(tops["cost"]), self.active_chart(daily)],
            "marked_tops": await self.marked_tops(tops["cost"]),
            "tops": [(metric.capitalize(), metric, rows) for metric, rows in tops.items()],
            "of_days": self.of_days,
            "refusals": await self.latest_refusals(),
            "unpriced": now_sums.unpriced,
        }  # fmt: skip

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

    async def marked(self, by: str) -> MarkedSums | None:
        """Sums over all customers with markup; None where nobody has one."""
        if not self.markups:
            return None
        span = self.span
        query = UsageQuery(
            by=(by,),
            first_day=span.first_day,
            end_day=span.end_day,
            first_hour=span.since_ms // HOUR_MS,
            end_hour=span.until_ms // HOUR_MS,
        )
        return await marked_sums(self.guard, self.backend, query, self.markups)

    def spend_tile(self, now: Amounts, then: Amounts) -> Tile:
        """What was spent; and with markup, if anybody has one."""
        more = more_exact = ""
        sums = self.by_hour if self.span.hourly else self.by_day
        if sums is not None:
            cost = sums.cost(now.cost)
            more, more_exact = f"{usd(cost)} with markup", f"{exact_usd(cost)} with markup"
        spend, changed = usd(now.cost), change(now.cost, then.cost)
        return Tile("Spend", spend, changed, exact_usd(now.cost), more=more, more_exact=more_exact)

    def amount_tiles(self, now: Amounts, then: Amounts) -> list[Tile]:
        found = [Tile("Requests", compact(now.requests), change(now.requests, then.requests), count(now.requests))]
        for label, name in (("Tokens in", "input_tokens"), ("Tokens out", "output_tokens")):
            new, old = getattr(now, name), getattr(then, name)
            found.append(Tile(label, compact(new), change(new, old), count(new)))
        return found

    async def people_tile(self, daily: dict[int, int], before: dict[int, int]) -> Tile:
        """Who was active in the time: counted by when they were last seen, so that it costs nobody's days."""
        span = self.span
        number = await self.backend.count_customers(seen_since_ms=span.since_ms)
        total = await self.backend.count_customers()
        averages = [sum(days.values()) // (span.end_day - span.first_day) for days in (daily, before)]
        exact = f"{averages[0]:,} a day on average, {averages[1]:,} before; {total:,} known"
        seen = span.name if span.name in ("24h", "7d", "30d", "90d") else "30d"
        label = "Active customers" if span.until_ms > self.guard.now_ms() else "Active since then"
        return Tile(label, count(number), change(*averages), exact, f"users?seen={seen}", f"of {total:,} known")

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

    def near_tile(self, near: Near | None) -> Tile:
        """How many are near or over a budget, and when that was counted if it is a while ago."""
        if near is None:
            return Tile("Near a limit", "\N{EN DASH}", note="is being counted", link="users?state=near")
        of_old = self.guard.now_ms() - near.at_ms > _OLD_MS
        more = f"counted {ago(near.at_ms, self.guard.now_ms())}" if of_old else ""
        exact = f"{near.now:,} of all customers at {NEAR} % of a budget or more"
        return Tile("Near a limit", count(near.now), change(near.now, near.then), exact, "users?state=near", more=more)

    async def by_model(self) -> Chart:
        points: dict[str, Counter[int]] = {}
        for row in await self.rows(self.span, "day", "model"):
            place = row.hour if self.span.hourly else row.day
            points.setdefault(row.model or "no model", Counter())[place or 0] += row.amounts.cost
        found = chart("Spend by model", "usd", self.span, self.zone, points, limit=_SERIES)
        sums = self.by_hour if self.span.hourly else self.by_day
        if sums is not None:
            found.mark_up(lambda place, cost: sums.cost(cost, when=place))
        return found

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
        if (sums := self.by_day) is not None:
            found.mark_up(lambda day, cost: sums.cost(cost, when=day))
        return found

    async def active(self, span: Range) -> dict[int, int]:
        """How many customers were active on each day."""
        query = UsageQuery(first_day=span.first_day, end_day=span.end_day, by=("day",), distinct=True)
        return {row.day or 0: row.customers or 0 for row in await self.backend.usage(query)}

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
