"""Rules of pages, reports, pruning and proof."""

from __future__ import annotations

from typing import Any

import pytest

from respan_guard.backends.base import (
    HOUR_MS,
    Amounts,
    Backend,
    CustomerQuery,
    CustomerRow,
    RecordQuery,
    RefusalRow,
    Release,
    UsageQuery,
    UsageRow,
)
from respan_guard.errors import InvalidInput
from respan_guard.testing.contract_support import (
    DAY,
    NOW,
    BackendFixture,
    admit,
    allowed,
    dump,
    one,
    record,
    recorded,
    total,
)
from respan_guard.usage import Usage

__all__ = ["ReadRules"]

STRANGE = [
    "'; DROP TABLE customers; --",
    '"quoted"',
    "%",
    "_",
    "a%b_c\\d",
    "${x} {0} %s",
    "deleted-0",
    "presumed:x",
    "line\u2028separator",
    "日本語 🙂 e\u0301",
    ":memory:",
    "x" * 254,
]


def sort_value(row: CustomerRow, sort: str) -> Any:
    """What a page is sorted by."""
    if sort in ("requests", "calls", "cost"):
        return getattr(row.totals, sort)
    return {
        "customer": row.customer,
        "name": str((row.params or {}).get("name") or ""),
        "first_seen": row.first_seen_ms,
        "last_seen": row.last_seen_ms,
        "tokens": row.totals.input_tokens + row.totals.output_tokens,
    }[sort]


class ReadRules(BackendFixture):
    """What pages and reports show."""

    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize(
        "sort", ["customer", "name", "first_seen", "last_seen", "requests", "calls", "cost", "tokens"]
    )
    async def test_pages_of_customers(self, backend: Backend, sort: str, descending: bool) -> None:
        """Every customer is on one page, in order, those with equal values by identifier."""
        for number in range(9):
            customer, at = f"c{number * 7 % 10}", NOW + number // 3
            await backend.put(customer, {"name": "NM"[number % 2]}, now=at)
            row = await backend.get(customer)
            assert row is not None
            if number % 3:
                await allowed(backend, admit("a", customer=customer, revision=row.revision), at)
                await recorded(backend, record("e", number % 2, customer=customer, output_tokens=number % 3), at)
        rows = await backend.customers(CustomerQuery(limit=100))
        expected = sorted(rows, key=lambda row: (sort_value(row, sort), row.customer), reverse=descending)
        seen: list[CustomerRow] = []
        after = None
        while page := await backend.customers(CustomerQuery(sort=sort, descending=descending, after=after, limit=2)):
            seen += page
            after = (sort_value(page[-1], sort), page[-1].customer)
        assert seen == expected
        assert len(seen) == 9

    async def test_search_is_literal_and_ignores_case(self, backend: Backend) -> None:
        """In identifier, name and email; no character has a meaning of its own."""
        await backend.put("a%b", {"name": "Ärger", "email": "X_Y@example.com"}, now=NOW)
        await backend.put("acb", {"name": "other", "email": "xzy@example.com"}, now=NOW)
        for search, found in (
            ("A%B", ["a%b"]), ("%", ["a%b"]), ("_", ["a%b"]), ("ärg", ["a%b"]), ("x_y", ["a%b"]), ("OTHER", ["acb"]),
            ("example", ["a%b", "acb"]), ("", ["a%b", "acb"]), ("*", []), ("\\", []), ("nobody", []),
        ):  # fmt: skip
            rows = await backend.customers(CustomerQuery(search=search))
            assert [row.customer for row in rows] == found, search

    async def test_what_can_not_be_asked_is_refused(self, backend: Backend) -> None:
        """Unknown sort keys, groups and states are named."""
        with pytest.raises(InvalidInput, match="sort"):
            await backend.customers(CustomerQuery(sort="cost; DROP TABLE customers"))
        with pytest.raises(InvalidInput, match="minute"):
            await backend.usage(UsageQuery(by=("minute",)))
        with pytest.raises(InvalidInput, match="state"):
            await backend.holds(state="dead")

    async def test_usage_is_grouped_and_filtered(self, backend: Backend) -> None:
        """By any of customer, model and day, in their order."""
        cost = 1
        for customer in ("ann", "bob"):
            for model in ("m", "n"):
                for day in (DAY, DAY + 1):
                    await recorded(backend, record(f"{model}{day}", cost, customer=customer, model=model, day=day))
                    cost *= 2

        async def costs(**query: Any) -> list[tuple[Any, ...]]:
            rows = await backend.usage(UsageQuery(**query))
            return [
                (*(getattr(row, name) for name in query.get("by", ("customer",))), row.amounts.cost) for row in rows
            ]

        assert await costs() == [("ann", 15), ("bob", 240)]
        assert await costs(by=("model",)) == [("m", 1 + 2 + 16 + 32), ("n", 4 + 8 + 64 + 128)]
        assert await costs(by=("day", "customer"), first_day=DAY + 1) == [(DAY + 1, "ann", 10), (DAY + 1, "bob", 160)]
        assert await costs(by=("day",), end_day=DAY + 1, customer="ann") == [(DAY, 5)]
        assert await costs(by=(), model="n") == [(204,)]
        assert await costs(by=("customer",), limit=1) == [("ann", 15)]
        assert await costs(customer="eve") == []
        assert await costs(by=(), first_day=DAY + 9) == []

    async def test_usage_rows_name_only_what_was_asked(self, backend: Backend) -> None:
        """What is not in `by` is None."""
        await recorded(backend, record("e", 3, model="m"))
        assert await backend.usage(UsageQuery(by=("model",))) == [UsageRow(Amounts(calls=1, cost=3), None, "m", None)]

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
        with pytest.raises(InvalidInput, match="top"):
            await who("cost; DROP TABLE days")

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

    async def test_entries_are_filtered(self, backend: Backend) -> None:
        """By every field there is a filter for, alone and together."""
        odd = Usage(provider="openai", status="error", trace_id="a" * 32)
        await recorded(backend, record("e1", 1, model="m", usage=odd, source="span", at_ms=NOW + 5))
        await recorded(backend, record("e2", None, customer="bob", model="n", at_ms=NOW + 9))
        await recorded(backend, record("e3", -1, kind="adjustment", at_ms=NOW))
        for query, found in (
            ({}, ["e1", "e2", "e3"]), ({"customer": "ann"}, ["e1", "e3"]), ({"customer": "eve"}, []),
            ({"model": "m"}, ["e1"]), ({"provider": "openai"}, ["e1"]), ({"kind": "adjustment"}, ["e3"]),
            ({"source": "span"}, ["e1"]), ({"status": "error"}, ["e1"]), ({"trace_id": "a" * 32}, ["e1"]),
            ({"unpriced": True}, ["e2"]), ({"unpriced": False}, ["e1", "e3"]), ({"since_ms": NOW + 5}, ["e1", "e2"]),
            ({"until_ms": NOW + 5}, ["e3"]), ({"since_ms": NOW, "until_ms": NOW + 9}, ["e1", "e3"]),
            ({"customer": "ann", "status": "ok"}, ["e3"]),
        ):  # fmt: skip
            stored = await backend.entries(RecordQuery(**query))
            assert [one.entry.id for one in stored] == found, query

    async def test_pages_of_entries_are_stable(self, backend: Backend) -> None:
        """In order of the log, both ways, while more come in; a page costs its size."""
        for number in range(7):
            await recorded(backend, record(f"e{number}", at_ms=NOW - number))
        first = await backend.entries(RecordQuery(limit=3))
        newest = await backend.entries(RecordQuery(descending=True, limit=3))
        await recorded(backend, record("late", at_ms=NOW - 99))
        rest = await backend.entries(RecordQuery(after=first[-1].seq))
        older = await backend.entries(RecordQuery(after=newest[-1].seq, descending=True))
        assert [stored.entry.id for stored in first + rest] == [*(f"e{n}" for n in range(7)), "late"]
        assert [stored.entry.id for stored in newest + older] == [f"e{n}" for n in reversed(range(7))]
        places = [stored.seq for stored in first + rest]
        assert places == sorted(set(places))

    async def test_holds_are_listed_by_expiry(self, backend: Backend) -> None:
        """With what they hold; of one customer or all, as many as asked for."""
        for number, (customer, ttl) in enumerate([("ann", 3000), ("bob", 1000), ("ann", 2000)]):
            op = admit(f"a{number}", customer=customer, model="m", cost=number, tokens=7, ttl_ms=ttl)
            await allowed(backend, op)
        rows = await backend.holds(now=NOW)
        assert [(row.customer, row.id, row.cost, row.tokens, row.expires_ms - NOW) for row in rows] == [
            ("bob", "a1", 1, 7, 1000), ("ann", "a2", 2, 7, 2000), ("ann", "a0", 0, 7, 3000),
        ]  # fmt: skip
        assert {(row.day, row.model, row.state) for row in rows} == {(DAY, "m", "live")}
        assert await backend.holds("ann", now=NOW) == rows[1:]
        assert await backend.holds(now=NOW, limit=1) == rows[:1]

    async def test_refusals_are_summed_by_minute(self, backend: Backend) -> None:
        """The same customer, reason and minute is one row; newest first."""
        await backend.add_refusals([RefusalRow("ann", "rate", 5, 2), RefusalRow("ann", "exhausted", 5, 1)])
        await backend.add_refusals([RefusalRow("ann", "rate", 5, 3), RefusalRow("bob", "rate", 6, 1)])
        rows = await backend.refusals()
        assert rows == [
            RefusalRow("bob", "rate", 6, 1), RefusalRow("ann", "exhausted", 5, 1), RefusalRow("ann", "rate", 5, 5)
        ]  # fmt: skip
        assert await backend.refusals(customer="ann") == rows[1:]
        assert await backend.refusals(since_minute=6) == rows[:1]
        assert await backend.refusals(until_minute=6, limit=1) == rows[1:2]

    async def test_readers_of_the_log_keep_their_place(self, backend: Backend) -> None:
        """Each under its name; None before the first time."""
        assert await backend.cursor("x") is None
        await backend.set_cursor("x", 0)
        await backend.set_cursor("y", 7)
        await backend.set_cursor("x", 5)
        assert (await backend.cursor("x"), await backend.cursor("y")) == (5, 7)

    async def test_pruning_keeps_sums_and_what_readers_need(self, backend: Backend) -> None:
        """In small steps, only days before, only what every reader has read."""
        for number in range(6):
            await recorded(backend, record(f"e{number}", 10**number, day=DAY - 60 + number % 2 * 60))
        places = [stored.seq for stored in await backend.entries(RecordQuery())]
        await backend.set_cursor("x", places[0])
        await backend.set_cursor("y", places[5])
        assert await backend.prune(DAY - 40) == 1
        assert await backend.prune(DAY - 40) == 0
        await backend.set_cursor("x", places[5])
        assert await backend.prune(DAY - 40, limit=1) == 1
        assert await backend.prune(DAY - 40, limit=9) == 1
        assert await backend.prune(DAY - 40) == 0
        assert [stored.entry.id for stored in await backend.entries(RecordQuery())] == ["e1", "e3", "e5"]
        assert [row.amounts.cost for row in await backend.usage(UsageQuery(by=("day",)))] == [10101, 101010]
        assert (await backend.standing("ann", [total(1)], now=NOW)).used == (111111,)
        assert await backend.verify() == []
        await recorded(backend, record("new"))
        assert (await backend.entries(RecordQuery()))[-1].seq > places[5]

    @pytest.mark.parametrize("name", STRANGE)
    async def test_ids_are_taken_literally(self, backend: Backend, name: str) -> None:
        """Whatever a customer, an admission, an entry, a model or a reader is called."""
        await backend.put(name, {"name": name}, actor=name, now=NOW)
        row = await backend.get(name)
        assert row is not None
        await allowed(backend, admit(name, customer=name, model=name, revision=row.revision, cost=5))
        await recorded(backend, record(name, 3, customer=name, model=name, admission=name, usage=Usage(model=name)))
        await backend.add_refusals([RefusalRow(name, name, 1, 1)])
        await backend.set_cursor(name, 1)
        assert [found.customer for found in await backend.customers(CustomerQuery(search=name))] == [name]
        assert [found.id for found in await backend.holds(name, now=NOW)] == [name]
        assert [stored.entry.id for stored in await backend.entries(RecordQuery(customer=name, model=name))] == [name]
        (used,) = await backend.usage(UsageQuery(customer=name, model=name, by=("customer", "model")))
        assert (used.customer, used.model, used.amounts.cost) == (name, name, 3)
        assert await backend.refusals(customer=name) == [RefusalRow(name, name, 1, 1)]
        assert await backend.cursor(name) == 1
        assert await backend.delete(name, now=NOW)
        assert await backend.get(name) is None
        assert await backend.verify() == []

    async def test_reading_changes_nothing(self, backend: Backend) -> None:
        """Not even what reading twice would show."""
        await allowed(backend, admit("a", total(9), cost=5))
        before = await dump(backend, NOW, total(9))
        await backend.standing("nobody", [total(9)], now=NOW)
        await backend.get("nobody")
        assert await dump(backend, NOW, total(9)) == before
        assert len(before[0]) == 1

    async def test_a_store_proves_itself(self, backend: Backend) -> None:
        """After some of everything, every sum is that of its entries, and the store says what it is."""
        for number in range(30):
            customer = "ab"[number % 2]
            await one(backend, admit(f"a{number}", total(200), customer=customer, cost=number, model="m"), NOW + number)
            op = record(f"e{number}", number, customer=customer, admission=f"a{number}", model="mn"[number % 3 % 2])
            await one(backend, op, NOW + number)
        assert await backend.verify() == []
        info = await backend.info()
        assert "://" in info.url
        assert isinstance(info.durable, bool)

    async def test_opening_and_closing_twice_is_harmless(self, backend: Backend) -> None:
        """Both are idempotent, and what was written is there after a close and an open."""
        await recorded(backend, record("e", 3))
        await backend.open()
        await backend.close()
        await backend.close()
        await backend.open()
        assert (await backend.standing("ann", [total(9)], now=NOW)).used == (3,)
