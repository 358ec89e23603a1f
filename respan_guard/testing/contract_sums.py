"""Rules of what pages show without reading customers or entries: totals, the largest, counts."""

from __future__ import annotations

from typing import Any

import pytest

from respan_guard.backends.base import (
    HOUR_MS,
    Amounts,
    Backend,
    CustomerQuery,
    RecordQuery,
    RefusalRow,
    Release,
    UsageQuery,
)
from respan_guard.backends.cells import amounts_of
from respan_guard.errors import InvalidInput
from respan_guard.testing.contract_support import DAY, NOW, BackendFixture, admit, allowed, one, record, recorded
from respan_guard.usage import Usage

__all__ = ["SumRules"]


class SumRules(BackendFixture):
    """What sums, filters and counts answer."""

    async def test_totals_of_all_customers(self, backend: Backend) -> None:
        """By day and model they are the customers' sums, revised, deleted and pruned ones included."""
        for number, (customer, model, day) in enumerate(
            [("ann", "m", DAY), ("ann", "n", DAY), ("bob", "m", DAY), ("bob", "m", DAY + 1), ("eve", "m", DAY - 60)]
        ):
            await allowed(backend, admit(f"a{number}", customer=customer, model=model, day=day, cost=9))
            usage = Usage(status="error" if number == 1 else "ok", latency_ms=10 * number, ttft_ms=number or None)
            tokens = {"input_tokens": 1, "output_tokens": number}
            entry = record(f"e{number}", 10**number, customer=customer, model=model, day=day, usage=usage, **tokens)
            await recorded(backend, entry)
        await recorded(backend, record("presumed:a3", 9, customer="bob", day=DAY, admission="a3", kind="presumed"))
        await one(backend, Release("bob", "a3"))
        await recorded(backend, record("real", 4, customer="bob", model="n", day=DAY + 1, admission="a3"))
        await backend.delete("ann", now=NOW)
        await backend.prune(DAY - 40)
        for query in (
            {"by": ("day",)},
            {"by": ("model",)},
            {"by": ("model", "day")},
            {"by": ()},
            {"by": ("day",), "model": "m"},
        ):
            right: dict[Any, Amounts] = {}
            by = query["by"]
            for row in await backend.usage(UsageQuery(by=("customer", "model", "day"))):
                if query.get("model") in (None, row.model):
                    right.setdefault(tuple(getattr(row, name) for name in by), Amounts()).add(row.amounts)
            rows = await backend.usage(UsageQuery(**query))
            assert {tuple(getattr(row, name) for name in by): row.amounts for row in rows} == right, query
        (whole,) = await backend.usage(UsageQuery(by=()))
        assert whole.amounts == Amounts(5, 7, 11111 + 5 + 4, 5, 10, 0, 0, 1, 100, 5, 10, 4)
        assert await backend.verify() == []

    async def test_totals_of_hours(self, backend: Backend) -> None:
        """An entry is in the hour it ended in, whatever its day; requests in the hour they were admitted in."""
        hour = NOW // HOUR_MS
        await allowed(backend, admit("a", model="m", cost=7), NOW)
        await allowed(backend, admit("b", model="m", requests=3, customer="bob"), NOW + HOUR_MS)
        await recorded(backend, record("presumed:a", 7, model="m", admission="a", kind="presumed"))
        await one(backend, Release("ann", "a"), NOW + HOUR_MS)
        await recorded(backend, record("real", 2, model="m", admission="a", at_ms=NOW + HOUR_MS), NOW + HOUR_MS)
        await recorded(backend, record("x", 1, model="n", day=DAY - 9, at_ms=NOW + HOUR_MS - 1), NOW + HOUR_MS)

        async def found(**query: Any) -> list[tuple[Any, ...]]:
            rows = await backend.usage(UsageQuery(**query))
            return [(row.hour, row.model, row.amounts.requests, row.amounts.calls, row.amounts.cost) for row in rows]

        assert await found(by=("hour",)) == [(hour, None, 1, 2, 6), (hour + 1, None, 3, 1, 2)]
        assert await found(by=("hour", "model")) == [
            (hour, "m", 1, 1, 5),
            (hour, "n", 0, 1, 1),
            (hour + 1, "m", 3, 1, 2),
        ]
        assert await found(by=("hour",), first_hour=hour + 1) == [(hour + 1, None, 3, 1, 2)]
        assert await found(by=("hour",), end_hour=hour + 1, model="n") == [(hour, None, 0, 1, 1)]
        for wrong in (
            {"by": ("hour", "day")},
            {"by": ("hour",), "customer": "ann"},
            {"by": ("hour",), "distinct": True},
        ):
            with pytest.raises(InvalidInput, match="hour"):
                await backend.usage(UsageQuery(**wrong))

    async def test_sums_of_some_customers(self, backend: Backend) -> None:
        """`among` leaves the others out of any sum, count and order; of hours, sums are those of the entries."""
        for number, (customer, model) in enumerate([("ann", "m"), ("bob", "m"), ("bob", "n"), ("eve", "n"), ("", "m")]):
            for later in range(2):
                more: dict[str, Any] = {
                    "model": model,
                    "day": DAY + later,
                    "at_ms": NOW + later * HOUR_MS,
                    "input_tokens": later,
                }
                entry = record(f"e{number}{later}", 10**number, customer=customer, **more)
                await recorded(backend, entry, NOW + HOUR_MS)
        await allowed(backend, admit("a", customer="bob", model="m", day=DAY, cost=7), NOW + HOUR_MS)
        presumed = record("presumed:a", 7, customer="bob", model="m", admission="a", kind="presumed")
        await recorded(backend, presumed, NOW + HOUR_MS)
        for among in ((), ("ann",), ("bob", "", "nobody", "x\0", "\ud800", "bob")):
            query: dict[str, Any]
            for query in ({}, {"model": "m"}, {"customer": "bob"}, {"first_day": DAY + 1}, {"end_day": DAY + 1}):
                for by in ((), ("customer",), ("day",), ("model", "customer"), ("day", "model")):
                    right: dict[Any, Amounts] = {}
                    asked = query | {"by": ("customer", "model", "day")}
                    for row in await backend.usage(UsageQuery(**asked)):
                        if row.customer in among:
                            key = tuple(getattr(row, name) for name in by)
                            right.setdefault(key, Amounts()).add(row.amounts)
                    rows = await backend.usage(UsageQuery(**query, by=by, among=among, top="cost"))
                    assert {tuple(getattr(row, name) for name in by): row.amounts for row in rows} == right
                    assert [row.amounts.cost for row in rows] == sorted((a.cost for a in right.values()), reverse=True)
            hours: dict[Any, Amounts] = {}
            entries = [stored.entry for stored in await backend.entries(RecordQuery())]
            for one_of in entries:
                if one_of.customer in among and one_of.model == "m":
                    hours.setdefault((one_of.at_ms // HOUR_MS, one_of.customer), Amounts()).add(amounts_of(one_of))
            first = NOW // HOUR_MS
            bounds: dict[str, Any] = {"model": "m", "among": among, "first_hour": first, "end_hour": first + 2}
            rows = await backend.usage(UsageQuery(by=("hour", "customer"), **bounds))
            assert {(row.hour, row.customer): row.amounts for row in rows} == hours
            rows = await backend.usage(UsageQuery(by=("hour",), **(bounds | {"first_hour": first + 1})))
            costs = [amounts.cost for (hour, _), amounts in hours.items() if hour == first + 1]
            assert sum(row.amounts.cost for row in rows) == sum(costs)
        (all_hours,) = await backend.usage(UsageQuery(by=("hour",), among=("ann",), first_hour=first + 1))
        assert (all_hours.hour, all_hours.amounts.cost) == (first + 1, 1)
        some = await backend.usage(UsageQuery(by=(), among=("ann", "bob"), distinct=True))
        assert [row.customers for row in some] == [2]
        with pytest.raises(InvalidInput, match="hour"):
            await backend.usage(UsageQuery(by=("hour", "customer")))
        rows_of = await backend.customers(CustomerQuery(sort="cost", descending=True, among=("bob", "ann", "nobody")))
        assert [row.customer for row in rows_of] == ["bob", "ann"]
        rows_of = await backend.customers(CustomerQuery(among=("bob", "ann", "bob"), limit=1))
        assert [row.customer for row in rows_of] == ["ann"]
        rows_of = await backend.customers(CustomerQuery(among=("bob", "ann"), after=("ann", "ann"), search="b"))
        assert [row.customer for row in rows_of] == ["bob"]
        assert await backend.customers(CustomerQuery(among=())) == []
        assert await backend.verify() == []

    async def test_the_largest_come_first(self, backend: Backend) -> None:
        """Of any amount, within days; equal ones in order of `by`."""
        for customer, cost, tokens in (("ann", 3, 0), ("bob", 5, 9), ("eve", 5, 1), ("ida", 99, 99)):
            day = DAY if customer != "ida" else DAY - 1
            await recorded(backend, record("e", cost, customer=customer, output_tokens=tokens, day=day))

        async def who(top: str, **query: Any) -> list[str | None]:
            return [row.customer for row in await backend.usage(UsageQuery(top=top, first_day=DAY, **query))]

        assert await who("cost") == ["bob", "eve", "ann"]
        assert await who("tokens", limit=2) == ["bob", "eve"]
        assert await who("requests") == ["ann", "bob", "eve"]
        assert await who("cost", least=4) == ["bob", "eve"]
        assert await who("tokens", least=1, limit=1) == ["bob"]
        assert await who("errors", least=1) == []
        assert await who("cost", least=4, among=("eve", "ann")) == ["eve"]
        assert await who("cost", least=4, customer="eve") == ["eve"]
        assert await who("cost", least=4, model="m") == []
        await recorded(backend, record("back", -90, customer="ida", day=DAY - 2, kind="adjustment"))
        await recorded(backend, record("now", 20, customer="ida", day=DAY))
        assert await who("cost", least=20) == ["ida"]
        days = await backend.usage(UsageQuery(by=("day",), top="cost", least=33))
        assert [(row.day, row.amounts.cost) for row in days] == [(DAY - 1, 99), (DAY, 33)]
        assert await backend.usage(UsageQuery(by=(), top="cost", least=43)) == []
        for wrong in ({"top": "cost; DROP TABLE days"}, {"least": 1}):
            with pytest.raises(InvalidInput, match="top"):
                await backend.usage(UsageQuery(**wrong))

    async def test_different_customers_are_counted(self, backend: Backend) -> None:
        """Of each day, each model, all days together; admitted counts as well as booked on."""
        await allowed(backend, admit("a", customer="ann", model="m"))
        for customer, model, day in (("ann", "m", DAY), ("bob", "m", DAY), ("bob", "n", DAY), ("bob", "m", DAY + 1)):
            await recorded(backend, record(f"{model}{day}", customer=customer, model=model, day=day))

        async def count(*by: str, **query: Any) -> list[int | None]:
            return [row.customers for row in await backend.usage(UsageQuery(by=by, distinct=True, **query))]

        assert await count("day") == [2, 1]
        assert await count("model") == [2, 1]
        assert await count() == [2]
        assert await count(first_day=DAY + 1) == [1]
        assert await count("day", model="n") == [1]
        assert await count("customer") == [1, 1]
        assert [row.customers for row in await backend.usage(UsageQuery(by=("day",)))] == [None, None]
        await backend.delete("bob", now=NOW)
        assert await count("day") == [2, 1]

    async def test_customers_are_filtered_and_counted(self, backend: Backend) -> None:
        """Blocked or not, seen since; together with a search and in any order."""
        await backend.put("ann", {"blocked": True}, now=NOW)
        await backend.put("bob", {"name": "x"}, now=NOW + 5)
        await recorded(backend, record("e", 7, customer="eve"), NOW + 9)
        for query, found in (
            ({}, ["ann", "bob", "eve"]), ({"blocked": True}, ["ann"]), ({"blocked": False}, ["bob", "eve"]),
            ({"seen_since_ms": NOW + 5}, ["bob", "eve"]), ({"seen_since_ms": NOW + 6}, ["eve"]),
            ({"blocked": True, "seen_since_ms": NOW + 5}, []), ({"blocked": False, "seen_since_ms": NOW + 6}, ["eve"]),
        ):  # fmt: skip
            for sort in ("customer", "cost", "last_seen"):
                rows = await backend.customers(CustomerQuery(sort=sort, **query))
                assert sorted(row.customer for row in rows) == found, query
            assert await backend.count_customers(**query) == len(found), query
        assert [row.customer for row in await backend.customers(CustomerQuery(search="E", blocked=False))] == ["eve"]
        await backend.put("ann", {}, now=NOW)
        assert await backend.count_customers(blocked=True) == 0

    async def test_a_search_of_the_log_can_be_bounded(self, backend: Backend) -> None:
        """`stop` is the last place that is looked at, both ways."""
        for number in range(5):
            await recorded(backend, record(f"e{number}"))
        places = [stored.seq for stored in await backend.entries(RecordQuery())]

        async def found(**query: Any) -> list[str]:
            return [stored.entry.id for stored in await backend.entries(RecordQuery(**query))]

        assert await found(stop=places[1]) == ["e0", "e1"]
        assert await found(after=places[0], stop=places[2]) == ["e1", "e2"]
        assert await found(descending=True, stop=places[3]) == ["e4", "e3"]
        assert await found(descending=True, after=places[4], stop=places[3]) == ["e3"]
        assert await found(after=places[3], stop=places[1]) == []

    async def test_refusals_are_summed_by_reason(self, backend: Backend) -> None:
        """Of one customer or all, within minutes that need not be the bounds of hours."""
        rows = [
            ("ann", "rate_limit", 59),
            ("bob", "rate_limit", 60),
            ("bob", "rate_limit", 185),
            ("bob", "blocked", 186),
        ]
        await backend.add_refusals([RefusalRow(customer, reason, at, 10) for customer, reason, at in rows])
        await backend.add_refusals([RefusalRow("bob", "blocked", 186, 1)])
        assert await backend.refusal_sums() == {"rate_limit": 30, "blocked": 11}
        assert await backend.refusal_sums(customer="bob") == {"rate_limit": 20, "blocked": 11}
        for since, until, rate_limit in (
            (59, 60, 10),
            (59, 61, 20),
            (60, 185, 10),
            (59, 186, 30),
            (61, 62, 0),
            (61, 185, 0),
        ):
            for customer in (None, "ann", "bob"):
                expected = sum(10 for who, reason, at in rows if customer in (None, who) and since <= at < until)
                sums = await backend.refusal_sums(customer=customer, since_minute=since, until_minute=until)
                assert sum(sums.values()) == expected, (customer, since, until)
            assert (await backend.refusal_sums(since_minute=since, until_minute=until)).get(
                "rate_limit", 0
            ) == rate_limit
