"""The dashboard: what all customers together use, and who uses most of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from respan_guard.backends.base import HOUR_MS, Amounts, Backend, UsageQuery, UsageRow
from respan_guard.console.charts import OTHERS, Chart, chart
from respan_guard.console.formats import change, compact, count, exact_usd, usd
from respan_guard.console.ranges import Range
from respan_guard.console.standing import NEAR, meters, profile, state_of

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Tile", "dashboard"]

_TOP = 10
_RECENT = 6
_LOOKED_AT = 200  # customers whose limits are looked at, those who spent most first
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


async def dashboard(guard: Guard, span: Range) -> dict[str, Any]:
    """What the page shows."""

    async def work(backend: Backend) -> dict[str, Any]:
        return await _Dashboard(guard, backend, span).page()

    return await guard.lane().call(work, 30.0)


class _Dashboard:
    def __init__(self, guard: Guard, backend: Backend, span: Range) -> None:
        self.guard = guard
        self.backend = backend
        self.span = span
        self.zone = ZoneInfo(guard.settings.time_zone)

    async def page(self) -> dict[str, Any]:
        span, before = self.span, self.span.before(self.zone)
        now_sums, then_sums = await self.sums(span), await self.sums(before)
        tops = [
            (title, metric, await self.top(metric))
            for title, metric in (("Cost", "cost"), ("Requests", "requests"), ("Tokens", "tokens"))
        ]
        refused, refused_before = await self.refusals(span), await self.refusals(before)
        near, looked_at = await self.near()
        return {
            "tiles": [
                *self.money_tiles(now_sums, then_sums),
                Tile("Refusals", compact(sum(refused.values())),
                     change(sum(refused.values()), sum(refused_before.values())), _reasons(refused),
                     f"logs?status=refused&{span.query}"),
                *await self.people_tiles(before),
                Tile("Near a limit", count(near), "",
                     f"At {NEAR} % of a budget or more, of the {looked_at} who spent most in this time",
                     "users?sort=cost&dir=desc", f"now, of the {looked_at} top spenders"),
                _latency_tile(now_sums, then_sums),
            ],
            "charts": [await self.by_model(), await self.by_customer(), await self.active()],
            "tops": tops,
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

    def money_tiles(self, now: Amounts, then: Amounts) -> list[Tile]:
        found = [
            Tile("Spend", usd(now.cost), change(now.cost, then.cost), exact_usd(now.cost)),
            Tile("Requests", compact(now.requests), change(now.requests, then.requests), count(now.requests)),
        ]
        for label, name in (("Tokens in", "input_tokens"), ("Tokens out", "output_tokens")):
            new, old = getattr(now, name), getattr(then, name)
            found.append(Tile(label, compact(new), change(new, old), count(new)))
        return found

    async def people_tiles(self, before: Range) -> list[Tile]:
        counts = []
        for span in (self.span, before):
            query = UsageQuery(by=(), first_day=span.first_day, end_day=span.end_day, distinct=True)
            rows = await self.backend.usage(query)
            counts.append(rows[0].customers or 0 if rows else 0)
        total = await self.backend.count_customers()
        return [
            Tile("Active customers", count(counts[0]), change(*counts), f"of {total:,} known",
                 f"users?seen={self.span.name if self.span.name in ('24h', '7d', '30d', '90d') else '30d'}")
        ]  # fmt: skip

    async def top(self, metric: str) -> list[UsageRow]:
        """Who used most of something."""
        span = self.span
        return await self.backend.usage(
            UsageQuery(by=("customer",), first_day=span.first_day, end_day=span.end_day, top=metric, limit=_TOP)
        )

    async def refusals(self, span: Range) -> dict[str, int]:
        return await self.backend.refusal_sums(
            since_minute=span.since_ms // 60_000, until_minute=-(-span.until_ms // 60_000)
        )

    async def latest_refusals(self) -> list[Any]:
        span = self.span
        return await self.backend.refusals(
            since_minute=span.since_ms // 60_000, until_minute=-(-span.until_ms // 60_000), limit=_RECENT
        )

    async def near(self) -> tuple[int, int]:
        """How many of those who spend most are near or over a budget, and how many were looked at."""
        span = self.span
        spenders = await self.backend.usage(
            UsageQuery(by=("customer",), first_day=span.first_day, end_day=span.end_day, top="cost", limit=_LOOKED_AT)
        )
        near = 0
        for spender in spenders:
            row = await self.backend.get(spender.customer or "")
            if row is not None:
                limits = await meters(self.guard, self.backend, row, row.customer)
                near += state_of(profile(row), limits) in ("near", "over")
        return near, len(spenders)

    async def by_model(self) -> Chart:
        points: dict[str, Counter[int]] = {}
        for row in await self.rows(self.span, "day", "model"):
            place = row.hour if self.span.hourly else row.day
            points.setdefault(row.model or "no model", Counter())[place or 0] += row.amounts.cost
        return chart("Spend by model", "usd", self.span, self.zone, points, limit=_SERIES)

    async def by_customer(self) -> Chart:
        """Those who spent most, each with a line of its own; what is left of the total is all others'."""
        span = self.span
        days = Range(span.name, span.first_day, span.end_day, span.since_ms, span.until_ms)
        left: Counter[int] = Counter()
        for row in await self.rows(days, "day"):
            left[row.day or 0] += row.amounts.cost
        points: dict[str, Counter[int]] = {}
        for top in (await self.top("cost"))[:_SERIES]:
            name = top.customer or ""
            rows = await self.backend.usage(
                UsageQuery(first_day=span.first_day, end_day=span.end_day, customer=name, by=("day",), limit=10_000)
            )
            points[name] = Counter({row.day or 0: row.amounts.cost for row in rows})
            left.subtract(points[name])
        found = chart("Spend by user", "usd", days, self.zone, points, limit=_SERIES)
        if any(left.values()):
            found.series.append((OTHERS, [left[day] for day in range(span.first_day, span.end_day)]))
        return found

    async def active(self) -> Chart:
        span = self.span
        days = Range(span.name, span.first_day, span.end_day, span.since_ms, span.until_ms)
        rows = await self.backend.usage(
            UsageQuery(first_day=span.first_day, end_day=span.end_day, by=("day",), distinct=True)
        )
        points = {"customers": {row.day or 0: row.customers or 0 for row in rows}}
        return chart("Active users by day", "count", days, self.zone, points)


def _latency_tile(now: Amounts, then: Amounts) -> Tile:
    if not now.timed:
        return Tile("Latency", "unknown", note="no call told how long it took")
    average = now.latency_ms // now.timed
    before = then.latency_ms // then.timed if then.timed else 0
    shown = f"{average:,} ms" if average < 10_000 else f"{average / 1000:.1f} s"
    return Tile("Latency", shown, change(average, before), f"average of {now.timed:,} calls")


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {number:,}" for reason, number in sorted(counts.items())) or "none"
