"""Rules of pages, reports, pruning and proof."""

from __future__ import annotations

from typing import Any

import pytest

from respan_guard.backends.base import (
    Amounts,
    Backend,
    CustomerQuery,
    CustomerRow,
    RecordQuery,
    RefusalRow,
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

    async def test_what_no_store_keeps_is_not_found(self, backend: Backend) -> None:
        """A line break, U+0000 or half of a surrogate pair in a question finds nothing, and is no error."""
        await recorded(backend, record("e1", customer="c1"))
        await backend.put("c1", {"name": "Ann", "email": "ann@example.com"}, now=NOW)
        for text in ("\n", "c1\nann", "\n\n", "c1\x00", "\ud800"):
            assert await backend.customers(CustomerQuery(search=text)) == []
        for text in ("m\x00", "m\ud800"):
            for field in ("customer", "model", "provider", "kind", "source", "status", "trace_id"):
                asked: dict[str, Any] = {field: text}
                assert await backend.entries(RecordQuery(**asked)) == []

    def test_a_refusal_counts_at_least_once(self) -> None:
        """On no backend is there a minute with none."""
        with pytest.raises(InvalidInput, match="at least 1"):
            RefusalRow("c1", "rate", 1, 0)

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

    async def test_an_entry_is_found_by_its_id(self, backend: Backend) -> None:
        """Of its customer only; revised ones as they are now, those of a deleted customer under its label."""
        await recorded(backend, record("e", 5))
        await recorded(backend, record("e", 7, customer="bob"))
        await recorded(backend, record("presumed:a", 9, kind="presumed", admission="a"))
        await recorded(backend, record("real", 4, admission="a"))
        stored = {(one.entry.customer, one.entry.id): one for one in await backend.entries(RecordQuery())}
        assert stored["ann", "presumed:a"].entry.cost == 5
        for (customer, entry_id), entry in stored.items():
            assert await backend.entry(customer, entry_id) == entry
        for customer, entry_id in (("bob", "real"), ("eve", "e"), ("ann", ""), ("", "e"), ("ann", "E")):
            assert await backend.entry(customer, entry_id) is None
        await backend.delete("ann", now=NOW)
        assert await backend.entry("ann", "e") is None
        label = next(row.customer for row in await backend.customers(CustomerQuery()) if row.customer != "bob")
        found = await backend.entry(label, "e")
        assert found is not None
        assert found.entry.cost == 5

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
