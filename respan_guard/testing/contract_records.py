"""Rules of entries, params and deletion."""

from __future__ import annotations

from decimal import Decimal

import pytest

from respan_guard.backends.base import (
    Amounts,
    AuditRow,
    Backend,
    Conflict,
    CustomerQuery,
    CustomerRow,
    Ended,
    Entry,
    Put,
    Record,
    Recorded,
    RecordQuery,
    RefusalRow,
    Release,
    Renew,
    TooLate,
    UsageQuery,
)
from respan_guard.errors import CounterOverflow
from respan_guard.testing.contract_support import (
    DAY,
    MAX,
    NOW,
    BackendFixture,
    admit,
    allowed,
    budget,
    dump,
    one,
    rate,
    record,
    recorded,
    total,
)
from respan_guard.usage import Usage

__all__ = ["CustomerRules", "RecordRules"]


class RecordRules(BackendFixture):
    """What was spent is booked once, whatever happens."""

    async def test_an_entry_is_kept_as_it_was_sent(self, backend: Backend) -> None:
        """Every field comes back."""
        usage = Usage(
            "m", 10, 20, 5, 2, 3, provider="openai", response_id="r" * 20, status="error", trace_id="a" * 32,
            metadata={"k": ["é", 1, None]}, latency_ms=7, cost=Decimal("0.000000012"),
        )  # fmt: skip
        entry = Entry("e", "ann", DAY, NOW - 5, 12, 10, 20, "m", "adm", "usage", "transport", usage)
        await recorded(backend, Record(entry))
        (stored,) = await backend.entries(RecordQuery())
        assert (stored.rev, stored.late) == (1, True)
        assert stored.entry == entry

    async def test_an_entry_grows_the_sums(self, backend: Backend) -> None:
        """Cost, tokens, calls, errors and unpriced calls; an adjustment is no call and may take away."""
        failed = Usage(status="error", cache_read_tokens=3)
        await recorded(backend, record("e1", 12, input_tokens=4, output_tokens=5, usage=failed))
        await recorded(backend, record("e2", None, input_tokens=1))
        await recorded(backend, record("e3", -2, kind="adjustment"))
        (row,) = await backend.usage(UsageQuery())
        assert row.amounts == Amounts(0, 2, 10, 5, 5, 3, 1, 1)
        assert (await backend.standing("ann", [total(99), total(99, "tokens")], now=NOW)).used == (10, 10)

    async def test_an_entry_counts_once(self, backend: Backend) -> None:
        """Sent again it gets the first answer and draws nothing; other figures are a conflict, and the first win."""
        await allowed(backend, admit("a", total(50), cost=50))
        await recorded(backend, record("e", 10, admission="a", input_tokens=5))
        before = await dump(backend, NOW, total(50))
        assert await one(backend, record("e", 10, admission="a", input_tokens=5)) == Recorded(False, 10, DAY)
        for other in ({"cost": 11, "input_tokens": 5}, {"cost": None, "input_tokens": 5}, {"cost": 10}):
            again = await recorded(backend, record("e", other["cost"], input_tokens=other.get("input_tokens") or 0))
            assert again == Recorded(False, 10, DAY, conflict=True)
        assert await dump(backend, NOW, total(50)) == before

    async def test_entries_are_told_apart_per_customer(self, backend: Backend) -> None:
        """The same id of two customers is two entries."""
        assert (await recorded(backend, record("e"))).new
        assert (await recorded(backend, record("e", customer="bob"))).new

    async def test_spending_is_never_refused(self, backend: Backend) -> None:
        """Not by a limit, a block or a revision, nor for a customer nobody heard of."""
        await backend.put("ann", {"blocked": True}, now=NOW)
        await allowed(backend, admit("a", total(5), customer="bob", cost=5))
        for customer in ("ann", "bob", "eve"):
            assert (await recorded(backend, record("e", 99, customer=customer, admission="a"))).new
        assert (await backend.standing("bob", [total(5)], now=NOW)).used == (99,)

    async def test_a_record_draws_from_its_hold(self, backend: Backend) -> None:
        """Down to nothing, never below; what it does not use still holds until the end."""
        limits = [total(99), total(99, "tokens")]
        await allowed(backend, admit("a", *limits, cost=10, tokens=10))
        for cost, tokens, held in ((4, 3, (6, 7)), (0, 0, (6, 7)), (None, 9, (6, 0)), (-3, 0, (6, 0)), (9, 0, (0, 0))):
            entry = record(f"e{cost}", cost, input_tokens=tokens, admission="a")
            assert not (await recorded(backend, entry)).late
            assert (await backend.standing("ann", limits, now=NOW)).held == held
        assert await one(backend, Release("ann", "a")) == Ended("released")

    @pytest.mark.parametrize("end", ["released", "expired", "unknown"])
    async def test_what_comes_after_the_end_is_late(self, backend: Backend, end: str) -> None:
        """It is booked in full, draws nothing, and says that it was late, then and later."""
        at = NOW + 1000
        if end != "unknown":
            await allowed(backend, admit("a", total(50), cost=9, ttl_ms=1000))
        if end == "released":
            await one(backend, Release("ann", "a"))
        assert (await recorded(backend, record("e", 9, admission="a"), at)).late
        assert (await recorded(backend, record("e", 9, admission="a"), at)).late
        assert (await backend.standing("ann", [total(50)], now=at)).used == (9,)
        assert [stored.late for stored in await backend.entries(RecordQuery())] == [True]

    async def test_what_was_presumed_gives_way_to_what_was_real(self, backend: Backend) -> None:
        """Together they are the greater of both, on the presumed one's day, at a new place of the log."""
        await allowed(backend, admit("a", total(99), cost=10))
        presumed = record("presumed:a", 10, admission="a", kind="presumed", day=DAY - 1)
        assert not (await recorded(backend, presumed)).late
        await one(backend, Release("ann", "a"))
        for number, (cost, left) in enumerate(((None, 10), (4, 6), (0, 6), (20, 0), (1, 0))):
            assert (await recorded(backend, record(f"e{number}", cost, admission="a"))).late
            assert (await recorded(backend, record(f"e{number}", cost, admission="a"))).new is False
            (yesterday,) = await backend.usage(UsageQuery(end_day=DAY))
            assert (yesterday.amounts.cost, yesterday.amounts.calls) == (left, 1)
        log = await backend.entries(RecordQuery())
        assert [s.entry.id for s in log if s.entry.kind != "presumed"] == ["e0", "e1", "e2", "e3", "e4"]
        assert [(s.rev, s.entry.cost, s.entry.day) for s in log if s.entry.kind == "presumed"] == [(3, 0, DAY - 1)]
        again = await recorded(backend, presumed)
        assert (again.new, again.cost, again.conflict) == (False, 0, False)

    async def test_pruned_days_are_closed(self, backend: Backend) -> None:
        """An entry for one is too late, since it could not be told from a new one; the next day is open."""
        await recorded(backend, record("e", day=DAY - 50))
        assert await backend.prune(DAY - 40) == 1
        assert await one(backend, record("e", day=DAY - 50)) == TooLate(DAY - 41)
        assert await one(backend, record("f", day=DAY - 41)) == TooLate(DAY - 41)
        assert (await recorded(backend, record("g", day=DAY - 40))).new

    async def test_a_sum_beyond_the_range_changes_nothing(self, backend: Backend) -> None:
        """A batch with one is refused as a whole; a smaller sum, and what is known already, still pass."""
        await recorded(backend, record("e", MAX))
        before = await dump(backend, NOW, rate(9), total(MAX))
        with pytest.raises(CounterOverflow):
            await backend.apply([admit("a", rate(9)), record("f", 1), Release("ann", "a")], NOW)
        with pytest.raises(CounterOverflow):
            await backend.apply([record("f", 1)], NOW)
        assert await dump(backend, NOW, rate(9), total(MAX)) == before
        outcomes = await backend.apply([record("f", 0), record("e", MAX), record("g", -1, kind="adjustment")], NOW)
        assert [outcome.new for outcome in outcomes if isinstance(outcome, Recorded)] == [True, False, True]
        assert (await backend.standing("ann", [total(MAX)], now=NOW)).used == (MAX - 1,)


class CustomerRules(BackendFixture):
    """What is stored about a customer, and how it is forgotten."""

    async def test_params_come_with_a_new_revision(self, backend: Backend) -> None:
        """Equal ones change and write nothing; others do, and are audited."""
        first = await backend.put("ann", {"name": "Ann", "metadata": {"a": [1]}}, actor="x", now=NOW)
        assert isinstance(first, Put)
        assert first.changed
        before = await dump(backend)
        assert await backend.put("ann", {"metadata": {"a": [1]}, "name": "Ann"}, now=NOW) == Put(first.revision, False)
        assert await dump(backend) == before
        second = await backend.put("ann", {"name": "Anna"}, actor="y", now=NOW + 9)
        assert isinstance(second, Put)
        assert second.revision not in ("", first.revision)
        back = await backend.put("ann", {"name": "Ann", "metadata": {"a": [1]}}, now=NOW + 9)
        assert isinstance(back, Put)
        assert back.revision not in ("", first.revision, second.revision)  # a revision never comes back
        audit = await backend.audit(customer="ann")
        assert [(row.at_ms, row.action, row.actor) for row in audit[1:]] == [(NOW + 9, "put", "y"), (NOW, "put", "x")]
        assert (audit[1].before, audit[1].after) == ({"name": "Ann", "metadata": {"a": [1]}}, {"name": "Anna"})

    async def test_params_that_were_given_stay_the_callers(self, backend: Backend) -> None:
        """Changing the dict that was put changes nothing that is stored."""
        params = {"metadata": {"a": 1}}
        await backend.put("ann", params, now=NOW)
        params["metadata"]["a"] = 2
        row = await backend.get("ann")
        assert row is not None
        assert row.params == {"metadata": {"a": 1}}

    async def test_the_first_to_change_params_wins(self, backend: Backend) -> None:
        """With a revision that is not the stored one, what is stored comes back."""
        first = await backend.put("ann", {"name": "Ann"}, if_revision="", now=NOW)
        assert isinstance(first, Put)
        conflict = Conflict(first.revision, {"name": "Ann"})
        for revision in ("", "other"):
            assert await backend.put("ann", {"name": "X"}, if_revision=revision, now=NOW) == conflict
        assert isinstance(await backend.put("ann", {"name": "X"}, if_revision=first.revision, now=NOW), Put)
        assert await backend.put("bob", {}, if_revision="x", now=NOW) == Conflict("", None)
        assert await backend.get("bob") is None

    async def test_params_leave_sums_and_holds_alone(self, backend: Backend) -> None:
        """Counters, holds and rates go on under any params."""
        limits = [rate(9), budget(50), total(50)]
        await allowed(backend, admit("a", *limits, cost=5))
        await recorded(backend, record("e", 3))
        before = await backend.standing("ann", limits, now=NOW)
        await backend.put("ann", {"total_budget": "1"}, now=NOW)
        assert await backend.standing("ann", limits, now=NOW) == before
        assert await one(backend, Release("ann", "a")) == Ended("released")

    async def test_a_customer_is_known_from_its_first_trace(self, backend: Backend) -> None:
        """Put, admitted or booked on; with the sums of all time and the days it was active on."""
        assert await backend.get("ann") is None
        await allowed(backend, admit("a"), NOW)
        await recorded(backend, record("e", 5, day=DAY + 1, model="m"), NOW + 7)
        await recorded(backend, record("f", 5, day=DAY + 1, model="n"), NOW + 7)
        totals = Amounts(requests=1, calls=2, cost=10)
        assert await backend.get("ann") == CustomerRow("ann", "", None, NOW, NOW + 7, totals, 2)
        await backend.put("bob", {}, now=NOW + 8)
        row = await backend.get("bob")
        assert row is not None
        assert (row.params, row.first_seen_ms, row.totals, row.active_days) == ({}, NOW + 8, Amounts(), 0)

    async def test_a_deleted_customer_is_forgotten(self, backend: Backend) -> None:
        """Params, rates and holds go; sums and entries stay under a label that names nobody."""
        limits = [rate(9), total(50)]
        await backend.put("ann", {"email": "ann@example.com"}, actor="x", now=NOW)
        revision = (await backend.audit())[0].after
        assert revision == {"email": "ann@example.com"}
        row = await backend.get("ann")
        assert row is not None
        await allowed(backend, admit("a", *limits, cost=5, revision=row.revision))
        await recorded(backend, record("e", 7, usage=Usage(metadata={"user": "ann@example.com"})))
        await backend.add_refusals([RefusalRow("ann", "rate", 5, 2)])
        assert await backend.delete("ann", actor="y", now=NOW + 1)

        assert await backend.get("ann") is None
        at = await backend.standing("ann", limits, now=NOW + 1)
        assert (at.used, at.held, at.windows) == ((0, 0), (0, 0), ((NOW + 1, 0, 0),))
        assert await backend.holds(now=NOW + 1) == []
        (left,) = await backend.usage(UsageQuery())
        assert left.customer is not None
        assert left.customer.startswith("deleted-")
        assert left.amounts.cost == 7
        assert "ann" not in repr(await dump(backend, NOW + 1)).replace("channel", "")
        assert [(r.customer, r.action, r.actor) for r in await backend.audit()] == [(left.customer, "delete", "y")]
        assert not await backend.delete("ann", now=NOW + 2)
        assert await one(backend, Release("ann", "a"), NOW + 2) == Ended("gone")
        assert await one(backend, Renew("ann", "a", 5), NOW + 2) == Ended("gone")
        await allowed(backend, admit("a", *limits), NOW + 2)  # the id as a customer never seen

    async def test_usage_of_before_the_deletion_goes_to_the_label(self, backend: Backend) -> None:
        """By the time the call ended; what ended later is the new customer's, and each still counts once."""
        await allowed(backend, admit("a", cost=9))
        await recorded(backend, record("e", 7))
        await backend.delete("ann", now=NOW + 1)
        assert await one(backend, record("e", 7), NOW + 2) == Recorded(False, 7, DAY)
        before = await recorded(backend, record("f", 1, admission="a", at_ms=NOW + 1), NOW + 2)
        assert (before.new, before.late) == (True, True)
        assert await backend.get("ann") is None
        assert (await recorded(backend, record("e", 30, at_ms=NOW + 2), NOW + 2)).new
        rows = {row.customer: row.amounts.cost for row in await backend.usage(UsageQuery())}
        label = next(name for name in rows if name != "ann")
        assert rows == {"ann": 30, label: 8}
        assert [await backend.booked_on("ann", NOW + at) for at in (-1, 0, 1, 2)] == [label, label, label, "ann"]
        assert await backend.booked_on("bob", NOW) == "bob"
        await backend.delete("ann", now=NOW + 9)
        assert [await backend.booked_on("ann", NOW + at) for at in (1, 10)] == [label, "ann"]
        assert await backend.booked_on("ann", NOW + 2) not in (label, "ann")
        assert await backend.verify() == []

    async def test_usage_that_goes_to_the_label_says_nothing_of_who_it_was(self, backend: Backend) -> None:
        """What an app noted on a call that is booked after the deletion is dropped in that step; again, too."""
        await allowed(backend, admit("a", cost=9))
        early = record("e", 7, usage=Usage(metadata={"user": "ann@example.com"}))
        await recorded(backend, early)
        await backend.delete("ann", now=NOW + 1)
        noted = {"user": "ann@example.com", "request": "I am ann"}
        late = [
            record(f"f{number}", 1, admission="a", at_ms=NOW + 1, usage=Usage(metadata=noted, latency_ms=5))
            for number in range(2)
        ]
        other = record("o", 1, customer="bob", usage=Usage(metadata={"kept": "yes"}))
        outcomes = await backend.apply([late[0], other, late[1]], NOW + 2)
        assert [isinstance(outcome, Recorded) and outcome.new for outcome in outcomes] == [True, True, True]
        await backend.apply([early, late[0]], NOW + 2)
        assert "ann" not in repr(await dump(backend, NOW + 2)).replace("channel", "")
        found = {stored.entry.id: stored.entry for stored in await backend.entries(RecordQuery())}
        assert found["f0"].usage.latency_ms == 5
        assert found["o"].usage.metadata == {"kept": "yes"}
        assert late[0].entry.usage.metadata == noted, "what the caller has is the caller's"
        assert await backend.verify() == []

    async def test_refusals_of_before_the_deletion_go_to_the_label(self, backend: Backend) -> None:
        """What a process counted and had not written yet brings no identifier back; a minute is not divided."""
        minute = NOW // 60_000
        await allowed(backend, admit("a"))
        await backend.add_refusals([RefusalRow("ann", "rate", minute, 1)])
        await backend.delete("ann", now=NOW + 1)
        rows = [RefusalRow(who, "rate", at, 2) for who in ("ann", "bob") for at in (minute - 1, minute)]
        for _ in range(2):
            await backend.add_refusals(rows)
        found = {(row.customer, row.minute - minute): row.count for row in await backend.refusals()}
        label = next(row.customer for row in await backend.customers(CustomerQuery()))
        assert label.startswith("deleted-")
        assert found == {(label, -1): 4, (label, 0): 5, ("bob", -1): 4, ("bob", 0): 4}
        assert await backend.refusal_sums(customer=label) == {"rate": 9}
        assert await backend.refusal_sums() == {"rate": 17}
        await backend.add_refusals([RefusalRow("ann", "rate", minute + 1, 1)])
        assert await backend.refusal_sums(customer="ann") == {"rate": 1}, "the id is somebody else's by then"

    async def test_the_audit_takes_rows_of_others(self, backend: Backend) -> None:
        """Newest first, by customer and by page, numbered by the store."""
        for number in range(5):
            await backend.add_audit(AuditRow(NOW + number, "ab"[number % 2], "adjust", "x", None, {"n": number}))
        rows = await backend.audit()
        assert [row.at_ms - NOW for row in rows] == [4, 3, 2, 1, 0]
        assert rows[0].after == {"n": 4}
        assert len({row.seq for row in rows}) == 5
        assert await backend.audit(limit=2) == rows[:2]
        assert await backend.audit(before=rows[1].seq, limit=2) == rows[2:4]
        assert await backend.audit(customer="b") == [rows[1], rows[3]]
