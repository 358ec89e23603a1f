"""The users page: customers, searched, sorted and filtered, with where they stand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from respan_guard.backends.base import Backend, CustomerQuery, CustomerRow
from respan_guard.console.near import near_budgets, who_is_near
from respan_guard.console.ranges import range_from
from respan_guard.console.remembered import Remembered
from respan_guard.console.standing import NEAR, Line, Meter, lines
from respan_guard.money import from_nano

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["UsersView", "csv_line", "users", "users_csv", "users_json"]

SORTS = {"customer": "Customer", "name": "Name", "last_seen": "Last active", "requests": "Requests",
         "tokens": "Tokens", "cost": "Cost"}  # fmt: skip
SEEN = ("24h", "7d", "30d", "90d")
STATES = {"open": "not blocked", "near": "near a budget", "over": "over a budget",
          "near-or-over": "near or over", "blocked": "blocked"}  # fmt: skip
_BUDGET = {"near": ("near",), "over": ("over",), "near-or-over": ("near", "over")}
"""The states that have to be counted: which of them a filter lets through."""
_MEANING = {"near": f"at {NEAR} % of a budget or more and not over one", "over": "over a budget",
            "near-or-over": f"at {NEAR} % of a budget or more"}  # fmt: skip
_SIZES = (25, 50, 100)
_EXPORT_PAGE = 200


@dataclass(frozen=True, slots=True)
class UsersView:
    """What the URL asks for."""

    search: str = ""
    sort: str = "cost"
    descending: bool = True
    seen: str = ""
    state: str = ""
    size: int = 25
    after: str = ""

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> UsersView:
        """Read a URL; what makes no sense is the default."""
        sort = query.get("sort", "cost")
        sort = sort if sort in SORTS else "cost"
        down = query.get("dir", "desc" if sort not in ("customer", "name") else "asc")
        size = query.get("size", "")
        return cls(
            search=query.get("q", "").replace("\0", "").strip()[:200],
            sort=sort,
            descending=down != "asc",
            seen=query.get("seen", "") if query.get("seen", "") in SEEN else "",
            state=query.get("state", "") if query.get("state", "") in STATES else "",
            size=int(size) if size in map(str, _SIZES) else 25,
            after=query.get("after", ""),
        )

    def link(self, **changes: Any) -> str:
        """The query of a link that asks for the same but for some changes; the first page unless it says which."""
        view = replace(self, **{"after": "", **changes})
        pairs = {
            "q": view.search, "sort": view.sort, "dir": "desc" if view.descending else "asc",
            "seen": view.seen, "state": view.state, "size": "" if view.size == 25 else str(view.size),
            "after": view.after,
        }  # fmt: skip
        return urlencode({name: value for name, value in pairs.items() if value})

    def sorted_by(self, name: str) -> str:
        """The query of a column's head: by it, or the other way round if it is already."""
        if name == self.sort:
            return self.link(descending=not self.descending)
        return self.link(sort=name, descending=name not in ("customer", "name"))

    @property
    def budget(self) -> tuple[str, ...]:
        """The states that have to be counted before anybody can be shown."""
        return _BUDGET.get(self.state, ())

    def to_query(self, guard: Guard, limit: int, among: tuple[str, ...] | None) -> CustomerQuery:
        """What to ask the store; times begin where the dashboard's do.

        `among` is who is in the states that have to be counted, if that is asked for.
        """
        return CustomerQuery(
            search=self.search,
            sort=self.sort,
            descending=self.descending,
            after=_after(self.after, str if self.sort in ("customer", "name") else int),
            limit=limit,
            blocked=self.state == "blocked" if self.state else None,
            seen_since_ms=range_from({"range": self.seen}, guard).since_ms if self.seen else None,
            among=among,
        )


def _place(row: CustomerRow, sort: str) -> str:
    """Where the page after a row begins."""
    value: str | int
    if sort == "customer":
        value = row.customer
    elif sort == "name":
        value = str((row.params or {}).get("name") or "")
    elif sort == "last_seen":
        value = row.last_seen_ms
    elif sort == "tokens":
        value = row.totals.input_tokens + row.totals.output_tokens
    else:
        value = getattr(row.totals, sort)
    return json.dumps([value, row.customer], ensure_ascii=False)


def _after(text: str, kind: type[str | int]) -> tuple[str | int, str] | None:
    """What `_place` wrote; None for what no store could have told."""
    try:
        value, customer = json.loads(text)
        "".join((customer, value if kind is str else "")).encode()  # fails on halves of surrogate pairs
    except (ValueError, TypeError, RecursionError):
        return None
    if type(value) is not kind or (isinstance(value, int) and not -(1 << 53) <= value <= 1 << 53):
        return None
    return None if "\0" in f"{value}{customer}" else (value, customer)


async def users(guard: Guard, view: UsersView, remembered: Remembered) -> dict[str, Any]:
    """What the page shows."""
    counted = await who_is_near(guard, remembered) if view.budget else None
    among = None
    if view.budget:
        among = () if counted is None else counted.value.of(*view.budget)

    async def work(backend: Backend) -> dict[str, Any]:
        rows = await backend.customers(view.to_query(guard, view.size + 1, among))
        more = len(rows) > view.size
        rows = rows[: view.size]
        return {
            "sorts": SORTS,
            "seen": SEEN,
            "states": STATES,
            "lines": await lines(guard, backend, rows),
            "total": await backend.count_customers(),
            "blocked": await backend.count_customers(blocked=True),
            "near": counted and {"count": counted.value.count(*view.budget), "at_ms": counted.at_ms},
            "named": len(among or ()),
            "meaning": _MEANING.get(view.state, ""),
            "counting": bool(view.budget) and counted is None,
            "next": view.link(after=_place(rows[-1], view.sort)) if more else "",
        }

    return await guard.lane().call(work, 30.0)


async def _all(guard: Guard, view: UsersView) -> AsyncIterator[Line]:
    """All customers that the view's filters let through, page by page."""
    among = None
    if view.budget:
        among = (await near_budgets(guard, guard.lane(), guard.now_ms())).of(*view.budget)
    while True:
        page = view

        async def work(backend: Backend, page: UsersView = page) -> list[Line]:
            rows = await backend.customers(page.to_query(guard, _EXPORT_PAGE, among))
            return await lines(guard, backend, rows)

        found = await guard.lane().call(work, 60.0)
        for line in found:
            yield line
        if len(found) < _EXPORT_PAGE:
            return
        view = replace(view, after=_place(found[-1].row, view.sort))


def _facts(line: Line) -> dict[str, Any]:
    row, customer, totals = line.row, line.customer, line.row.totals

    def of(meter: Meter | None, name: str) -> Any:
        return None if meter is None else str(getattr(meter.status, name))

    period, total = line.limit("period_budget"), line.limit("total_budget")
    resets = period.resets_at if period is not None else None
    return {
        "customer_identifier": row.customer, "name": customer.name, "email": customer.email, "state": line.state,
        "group_identifier": customer.group_identifier,
        "last_active_ms": row.last_seen_ms, "active_days": row.active_days, "requests": totals.requests,
        "calls": totals.calls, "input_tokens": totals.input_tokens, "output_tokens": totals.output_tokens,
        "cost_usd": f"{from_nano(totals.cost):f}", "cost_with_markup_usd": f"{line.cost_with_markup:f}",
        "unpriced_calls": totals.unpriced, "rate_limit": line.rate_limit,
        "period_used_usd": of(period, "used"), "period_budget_usd": of(period, "limit"),
        "period_resets_at": None if resets is None else resets.isoformat(),
        "total_used_usd": of(total, "used"), "total_budget_usd": of(total, "limit"),
    }  # fmt: skip


async def users_csv(guard: Guard, view: UsersView) -> AsyncIterator[str]:
    """The customers as CSV."""
    head = True
    async for line in _all(guard, view):
        facts = _facts(line)
        if head:
            yield csv_line(list(facts))
            head = False
        yield csv_line(list(facts.values()))
    if head:
        yield csv_line(["customer_identifier"])


async def users_json(guard: Guard, view: UsersView) -> AsyncIterator[str]:
    """The customers as JSON."""
    first = True
    async for line in _all(guard, view):
        yield ("[\n" if first else ",\n") + json.dumps(_facts(line), ensure_ascii=False)
        first = False
    yield "[]\n" if first else "\n]\n"


def csv_line(values: list[Any]) -> str:
    """A line of CSV that a spreadsheet takes for data: text that begins like a formula gets a quote before it."""
    out = io.StringIO()
    csv.writer(out).writerow([_inert(value) for value in values])
    return out.getvalue()


def _inert(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") and not _is_number(value):
        return f"'{value}"
    return "" if value is None else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
