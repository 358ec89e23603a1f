"""Recording through the guard: once, priced, attributed, safe."""

from __future__ import annotations

import asyncio
import json
import math
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum

import pytest

from respan_guard import BudgetExceeded, Customer, Guard, Usage
from respan_guard.errors import InvalidInput
from respan_guard.testing import FakeClock

from .conftest import MakeGuard


async def everything(guard: Guard) -> list[tuple[str, str, Decimal | None]]:
    """Id, customer and cost of every record."""
    await guard.flush()
    return [(record.id, record.customer_identifier, record.cost) async for record in guard.records()]


def days_ago(clock: FakeClock, days: int) -> date:
    """The date so many days before the clock's."""
    return clock.now.date() - timedelta(days=days)


async def test_a_call_is_priced_when_it_has_no_cost(make_guard: MakeGuard) -> None:
    """The cost is the price list's, to the nano-dollar."""
    async with make_guard() as guard:
        await guard.record(Usage("gpt-4o-mini", input_tokens=1000, output_tokens=100, provider="openai"), "c1")
        assert [cost for _, _, cost in await everything(guard)] == [Decimal("0.00021")]


async def test_the_same_reply_recorded_twice_counts_once(make_guard: MakeGuard) -> None:
    """The provider's response id is the record's id where it is long enough to be unique."""
    async with make_guard() as guard:
        usage = Usage("gpt-4o-mini", 10, 10, provider="openai", response_id="chatcmpl-ABCDEFGHIJKLMNOPQRSTUVWX")
        await guard.record(usage, "c1")
        await guard.record(usage, "c1")
        async with guard.admit("c1") as admission:
            await admission.record(usage)
        assert len(await everything(guard)) == 1


async def test_short_response_ids_of_local_servers_do_not_swallow_calls(make_guard: MakeGuard) -> None:
    """Ollama numbers its replies chatcmpl-0 to chatcmpl-998: equal ids are different calls."""
    async with make_guard() as guard:
        for _ in range(3):
            await guard.record(Usage("llama", 10, 10, cost=0, response_id="chatcmpl-123"), "c1")
        assert len(await everything(guard)) == 3


async def test_an_own_entry_id_makes_a_record_idempotent_and_the_first_wins(make_guard: MakeGuard) -> None:
    """Recording the same id again changes nothing, whatever it says."""
    async with make_guard() as guard:
        await guard.record(Usage(cost=1), "c1", entry_id="invoice-7")
        await guard.record(Usage(cost=2), "c1", entry_id="invoice-7")
        assert [cost for _, _, cost in await everything(guard)] == [Decimal(1)]


async def test_texts_that_no_store_can_keep_are_mended(make_guard: MakeGuard) -> None:
    """Half of a surrogate pair or U+0000, in any text of a usage: the call counts, and reads back with a mark there."""
    bad = "a\ud800b\0c" + "x" * 16
    texts = ("model", "provider", "response_id", "response_model", "operation", "service_tier", "status", "trace_id",
             "span_id")  # fmt: skip
    async with make_guard(default_limits={"total_budget": 100}) as guard:
        for name in texts:
            await guard.record(Usage(**{"cost": 1, name: bad}), "c1")  # type: ignore[arg-type]
        await guard.record(Usage(cost=1, metadata={bad: [bad, {"é\\u0000": (bad, 1)}], "ok": "é😀"}), "c1")
        await guard.record(Usage(cost=1), "c1", entry_id=bad)
        await guard.flush()
        records = [record async for record in guard.records()]
        assert (await guard.status("c1")).total_spend == len(records) == len(texts) + 2
        mended = {record.id for record in records} | {
            getattr(record.usage, name) for record in records for name in texts
        }
        json.dumps([record.usage.to_dict() for record in records], ensure_ascii=False).encode()
        assert not any("\0" in str(text) or "\ud800" in str(text) for text in mended)
        good = "a?b\ufffdc" + "x" * 16
        assert [getattr(record.usage, name) for record, name in zip(records, texts, strict=False)] == [good] * len(
            texts
        )
        assert records[-2].usage.metadata == {good: [good, {"é\\u0000": [good, 1]}], "ok": "é😀"}


class Tier(str, Enum):  # noqa: UP042  # whose str() is not its text
    """As a provider's SDK may have it."""

    FLEX = "flex"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("latency_ms", -1, "latency_ms must be milliseconds"),
        ("latency_ms", math.nan, "latency_ms must be milliseconds"),
        ("latency_ms", 1 << 62, "latency_ms must be milliseconds"),
        ("latency_ms", "12", "latency_ms must be milliseconds"),
        ("ttft_ms", math.inf, "ttft_ms must be milliseconds"),
        ("ttft_ms", True, "ttft_ms must be milliseconds"),
        ("status", None, "status must be a string"),
        ("model", None, "model must be a string"),
        ("provider", {"a": 1}, "provider must be a string"),
        ("trace_id", b"ab", "trace_id must be a string"),
        ("operation", 5, "operation must be a string"),
        ("input_tokens", 3.5, "input_tokens must be an integer"),
        ("cache_read_tokens", True, "cache_read_tokens must be an integer"),
        ("time", datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))), "time must be when the call ended"),
        ("metadata", {"a": [math.nan]}, "metadata must hold JSON values only"),
        ("metadata", {"a": object()}, "metadata must hold JSON values only"),
    ],
)
async def test_what_no_store_can_keep_is_refused_and_stops_nobody(
    make_guard: MakeGuard, name: str, value: object, says: str
) -> None:
    """A field of the wrong type is the caller's error at once, however it got there; everybody else goes on."""
    usage = Usage(cost=1)
    setattr(usage, name, value)
    async with make_guard(default_limits={"total_budget": 5}) as guard:
        with pytest.raises(InvalidInput, match=says):
            await guard.record(usage, "c1")
        async with guard.admit("c1") as admission:
            with pytest.raises(InvalidInput, match=says):
                admission.record_soon(usage)
        await guard.record(Usage(cost=1), "c1")
        assert [cost for _, _, cost in await everything(guard)] == [Decimal(1)]
        assert guard.journal.waiting().dead == 0
        assert await guard.verify() == []
        assert await guard.delete_customer("c1")


async def test_what_can_be_read_in_one_way_only_is_recorded(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Times in floats are rounded, members of an enum are their text, a clock that is ahead is cut to now."""
    async with make_guard() as guard:
        usage = Usage("gpt-5-mini", 10, 10, provider="openai", service_tier=Tier.FLEX)
        usage.latency_ms, usage.ttft_ms = 12.5, 3.6  # type: ignore[assignment]
        usage.time = datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone(-timedelta(hours=14)))
        await guard.record(usage, "c1")
        await guard.flush()
        (record,) = [record async for record in guard.records()]
        assert (record.usage.latency_ms, record.usage.ttft_ms, record.usage.service_tier) == (12, 4, "flex")
        assert type(record.usage.service_tier) is str
        assert record.time == clock.now
        assert record.cost is not None
        assert await guard.verify() == []


async def test_what_is_presumed_is_mended_like_any_other(make_guard: MakeGuard) -> None:
    """A call of unknown usage whose texts no store can keep is stored and readable, not a dead letter."""
    async with make_guard() as guard:
        usage = Usage(model="m\ud800", service_tier="\ud800", response_id="\0", metadata={"linked": "\ud800x"})
        day = guard.policies.get("c1").policy.day_of(guard.now_ms())
        await guard.lane().record(guard.recorder.presumed("a1", None, "c1", day, guard.now_ms(), 1, usage))
        await guard.flush()
        [record] = [record async for record in guard.records()]
        assert (record.kind, record.model, record.usage.service_tier) == ("presumed", "m?", "?")
        assert record.usage.metadata == {"linked": "?x"}
        assert record.usage.response_id == "\N{REPLACEMENT CHARACTER}"


async def test_inside_an_admission_a_record_is_charged_to_it(make_guard: MakeGuard) -> None:
    """guard.record without a customer takes the one in force and draws from its hold."""
    async with make_guard(default_limits={"total_budget": 1}) as guard, guard.admit("c1", estimate=Decimal("0.5")):
        await guard.record(Usage(cost=Decimal("0.5")))
        limit = (await guard.status("c1")).limit("total_budget")
        assert limit is not None
        assert (limit.used, limit.held) == (Decimal("0.5"), Decimal(0))


async def test_on_behalf_of_names_the_customer_and_nesting_ends_with_the_block(make_guard: MakeGuard) -> None:
    """Code inside works for the customer named innermost; outside nobody is charged by accident."""
    async with make_guard() as guard:
        with guard.on_behalf_of("a"):
            await guard.record(Usage(cost=1))
            with guard.on_behalf_of("b"):
                await guard.record(Usage(cost=2))
            await guard.record(Usage(cost=3))
        await guard.record(Usage(cost=4))
        assert [(who, int(cost or 0)) for _, who, cost in await everything(guard)] == [
            ("a", 1),
            ("b", 2),
            ("a", 3),
            ("", 4),
        ]


async def test_a_task_that_outlives_the_admission_bills_nobody_else(make_guard: MakeGuard) -> None:
    """A worker task started in alice's request is not alice's once her admission has ended."""
    async with make_guard() as guard:
        go = asyncio.Event()

        async def lazily_started_worker() -> None:
            await go.wait()
            await guard.record(Usage(cost=1))

        async with guard.admit("alice"):
            worker = asyncio.create_task(lazily_started_worker())
            await asyncio.sleep(0)
        go.set()
        await worker
        assert [who for _, who, _ in await everything(guard)] == [""]


async def test_record_soon_from_a_thread_is_stored_by_flush(make_guard: MakeGuard) -> None:
    """record_soon never waits and may be called anywhere; flush tells when it is stored."""
    async with make_guard() as guard:

        def work() -> None:
            for _ in range(50):
                guard.record_soon(Usage(cost=1), "c1")

        await asyncio.to_thread(work)
        assert len(await everything(guard)) == 50


async def test_an_unknown_price_is_recorded_as_unknown_and_not_as_zero(
    make_guard: MakeGuard, caplog: pytest.LogCaptureFixture
) -> None:
    """The record's cost is None, the customer shows one unpriced call, and the log says so once per model."""
    async with make_guard() as guard:
        for _ in range(2):
            await guard.record(Usage("no-such-model-xyz", 10, 10), "c1")
        assert [cost for _, _, cost in await everything(guard)] == [None, None]
        assert [row.unpriced for row in await guard.usage()] == [2]
        assert sum("no price is known" in message for message in caplog.messages) == 1


async def test_usage_falls_into_the_period_in_which_it_ended(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A late record is booked on its own day, and one from the future on today's."""
    async with make_guard() as guard:
        now = datetime.fromtimestamp(clock.now_ms() / 1000, UTC)
        await guard.record(Usage(cost=1, time=now - timedelta(days=40)), "c1")
        await guard.record(Usage(cost=2, time=now + timedelta(days=40)), "c1")
        days = [row.day for row in await guard.usage("day")]
        assert days == [(now - timedelta(days=40)).date(), now.date()]


async def test_money_held_in_a_period_is_booked_in_that_period(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A call admitted at 23:59:59 with a hold and answered after midnight is yesterday's."""
    clock.set(datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC))
    async with make_guard(default_limits={"budget_duration": "daily", "period_budget": 1}) as guard:
        async with guard.admit("c1", estimate=Decimal(1)) as admission:
            clock.advance(2)
            await admission.record(Usage(cost=1))
        assert [str(record.day) async for record in guard.records()] == ["2026-01-31"]
        async with guard.admit("c1", estimate=Decimal(1)):
            pass


async def test_an_adjustment_gives_budget_back_and_is_audited(make_guard: MakeGuard) -> None:
    """A credit is an entry of its own, with who and why; the spend it corrects stays."""
    async with make_guard(default_limits={"total_budget": 1}) as guard:
        await guard.record(Usage(cost=1), "c1")
        with pytest.raises(BudgetExceeded):
            await guard.admit("c1")
        await guard.adjust("c1", Decimal("-0.5"), "outage on Monday", actor="ops")
        async with guard.admit("c1"):
            pass
        audit = await guard.lane().call(lambda backend: backend.audit(customer="c1"))
        assert [(row.action, row.actor) for row in audit] == [("adjust", "ops")]
        assert [kind async for kind in (record.kind async for record in guard.records())] == ["usage", "adjustment"]
        assert await guard.verify() == []
        with pytest.raises(InvalidInput):
            await guard.adjust("c1", Decimal(0), "nothing")
        with pytest.raises(InvalidInput):
            await guard.adjust("c1", Decimal(1), " ")


async def test_deleting_a_customer_keeps_the_sums_and_forgets_the_person(make_guard: MakeGuard) -> None:
    """Delete removes who it was; the money stays under a random label, and the id starts afresh."""
    async with make_guard(default_limits={"total_budget": 1}) as guard:
        await guard.put_customer(Customer(customer_identifier="c1", email="it@acme.example"))
        await guard.record(Usage(cost=1), "c1")
        assert await guard.delete_customer("c1")
        assert await guard.get_customer("c1") is None
        rows = await guard.usage()
        assert [row.cost for row in rows] == [Decimal(1)]
        assert rows[0].customer_identifier is not None
        assert rows[0].customer_identifier.startswith("deleted-")
        async with guard.admit("c1"):
            pass
        assert await guard.verify() == []


@pytest.mark.parametrize("cost", [Decimal("NaN"), Decimal("Infinity"), -1, "free", True, 10**30])
def test_an_unusable_cost_is_refused_where_it_is_made(cost: object) -> None:
    """NaN, infinite, negative and non-numeric costs never become a usage."""
    with pytest.raises(InvalidInput):
        Usage(cost=cost)  # type: ignore[arg-type]  # what callers do at run time


@pytest.mark.parametrize("tokens", [-1, 1.5, None, 10**13, "12", []])
def test_unusable_token_counts_are_refused_where_they_are_made(tokens: object) -> None:
    """Counts are integers from 0 to 10^12."""
    with pytest.raises(InvalidInput):
        Usage(input_tokens=tokens)  # type: ignore[arg-type]  # what callers do at run time


async def test_pruning_deletes_old_records_and_keeps_sums(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Old records go and the customer's spend stays."""
    async with make_guard() as guard:
        for _ in range(5):
            await guard.record(Usage(cost=1), "c1")
        clock.advance(timedelta(days=50))
        await guard.record(Usage(cost=1), "c1")
        assert await guard.prune(days_ago(clock, 40)) == 5
        assert len(await everything(guard)) == 1
        assert (await guard.status("c1")).total_spend == 6
        assert await guard.verify() == []


@pytest.mark.parametrize("days", [39, 1, 0, -1])
async def test_recent_days_are_not_pruned(make_guard: MakeGuard, clock: FakeClock, days: int) -> None:
    """A pruned day takes no more usage, and today is still yesterday somewhere: that usage must count for budgets."""
    clock.set(datetime(2026, 3, 10, 5, tzinfo=UTC))
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", time_zone="Pacific/Honolulu", total_budget=10))
        with pytest.raises(InvalidInput, match="a day up to 2026-01-29, as records of 40 days are kept"):
            await guard.prune(days_ago(clock, days))
        for _ in range(2):
            async with guard.admit("c1", estimate=Decimal(4)) as admission:
                await admission.record(Usage(cost=4))
        with pytest.raises(BudgetExceeded):
            await guard.admit("c1", estimate=Decimal(4))
        assert (await guard.status("c1")).total_spend == 8


async def test_usage_of_a_pruned_day_is_a_dead_letter(
    make_guard: MakeGuard, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever way it comes, it is not stored and not lost: it lies on disk, and the log says so."""
    old = clock.now - timedelta(days=50)
    async with make_guard() as guard:
        await guard.prune(days_ago(clock, 40))
        await guard.record(Usage(cost=1, time=old), "c1")
        guard.record_soon(Usage(cost=2, time=old), "c1")
        with pytest.raises(InvalidInput, match="records of that day are pruned"):
            await guard.bookings.book(Usage(cost=3, time=old), "c1")
        assert await everything(guard) == []
        assert guard.journal.waiting().dead == 3
    assert caplog.text.count("kept as a dead letter: its day is pruned") == 3


async def test_retention_prunes_by_itself(make_guard: MakeGuard, clock: FakeClock) -> None:
    """With retention set, records older than that are gone soon after the guard is opened."""
    async with make_guard(retention=45) as guard:
        await guard.record(Usage(cost=1), "c1")
        clock.advance(timedelta(days=50))
        await guard.record(Usage(cost=1), "c1")
    async with guard if guard.settings.storage == "memory://" else make_guard(retention=45) as guard:
        for _ in range(100):
            if len(await everything(guard)) == 1:
                break
            await asyncio.sleep(0.02)
        assert len(await everything(guard)) == 1
        assert (await guard.status("c1")).total_spend == 2
