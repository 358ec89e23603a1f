"""Records reach an exporter at least once, whatever it answers: delivered + pending + dead letters = committed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from respan_guard import Customer, Usage, UsageRecord
from respan_guard.delivery import cursor_name
from respan_guard.errors import BackendError, ConfigurationError
from respan_guard.exporters import BatchRefused, Exporter, ExportFailed, ExportResult
from respan_guard.testing import FakeClock
from tests.guard.faulty import FaultyBackend, faulty_guard
from tests.guard.test_telemetry import Metrics

from .conftest import MakeGuard
from .sink import Keeper, book, check_nothing_is_lost, dead, delivery, pending


async def test_each_record_arrives_once_and_in_order(make_guard: MakeGuard) -> None:
    """Without faults every record comes once, in the order of the log, in batches of what the exporter takes."""
    keeper = Keeper()
    async with make_guard() as guard:
        ids = await book(guard, 25)
        way = delivery(guard, keeper)
        for _ in range(4):
            await way.step()
        assert [record.id for record in keeper.kept] == ids
        assert keeper.batches == [10, 10, 5]
        await check_nothing_is_lost(guard, "keeper", keeper.ids)


async def test_a_guard_exports_while_it_is_open_and_before_it_closes(make_guard: MakeGuard) -> None:
    """A record is taken on its own while the guard is open; what was booked last is handed over when it closes."""
    keeper = Keeper()
    guard = make_guard()
    guard.add_exporter(keeper)
    async with guard:
        first = await book(guard, 1)
        async with asyncio.timeout(20):
            while not keeper.kept:
                await asyncio.sleep(0.02)
        last = await book(guard, 30, start=1)
    assert [record.id for record in keeper.kept] == first + last


async def test_an_exporter_added_later_begins_with_the_oldest_record(make_guard: MakeGuard) -> None:
    """A name that is new reads the whole log; one that is known goes on where it was, in a new process too."""
    async with make_guard() as guard:
        ids = await book(guard, 5)
        guard.add_exporter(keeper := Keeper())
    assert [record.id for record in keeper.kept] == ids
    if "sqlite" in repr(guard):
        guard = make_guard()
        guard.add_exporter(again := Keeper())
        async with guard:
            ids = await book(guard, 3, start=5)
        assert [record.id for record in again.kept] == ids


FAULTS = [
    ExportFailed("HTTP 503"),
    ExportFailed("HTTP 429", 7.0),
    TimeoutError(),
    ConnectionResetError(),
    ValueError("?"),
]


@pytest.mark.parametrize("before", [True, False], ids=["not-taken", "taken"])
@pytest.mark.parametrize("error", FAULTS, ids=lambda error: str(error) or type(error).__name__)
async def test_what_fails_is_sent_again(
    make_guard: MakeGuard, clock: FakeClock, error: Exception, before: bool
) -> None:
    """Whether a batch that failed was taken or not, it comes again under the same ids, and nothing is given up."""
    keeper = Keeper()
    failures = 3

    def fault(batch: Sequence[UsageRecord]) -> ExportResult | None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            if not before:
                keeper.kept += batch
            raise error
        return None

    keeper.fault = fault
    async with make_guard() as guard:
        ids = await book(guard, 15)
        way = delivery(guard, keeper)
        for _ in range(40):
            clock.advance(max(0.01, await way.step()))
            await check_nothing_is_lost(guard, "keeper", keeper.ids)
        assert keeper.ids == set(ids)
        assert await dead(guard, "keeper") == {}
        assert len(keeper.kept) == 15 + (0 if before else 30)


async def test_retry_after_is_honoured(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Nothing is sent before the time that the other side named."""
    keeper = Keeper()

    def fault(batch: Sequence[UsageRecord]) -> ExportResult | None:
        if clock.monotonic() < 100:
            raise ExportFailed("HTTP 429", 100.0)
        return None

    keeper.fault = fault
    async with make_guard() as guard:
        await book(guard, 1)
        way = delivery(guard, keeper)
        while not keeper.kept:
            clock.advance(await way.step())
        assert keeper.batches == [1, 1]
        assert 100 <= clock.monotonic() < 110


@pytest.mark.parametrize("storage", ["memory://"])
@pytest.mark.parametrize("every", [1, 2, 3, 7])
async def test_no_more_batches_a_minute_than_the_interval_says(
    make_guard: MakeGuard, clock: FakeClock, every: int
) -> None:
    """Those that fail count, however soon they would be tried again."""
    sent: list[float] = []
    keeper = Keeper(batch_size=1)

    def fault(batch: Sequence[UsageRecord]) -> ExportResult | None:
        sent.append(clock.monotonic())
        if len(sent) % every:
            return None
        raise ExportFailed("HTTP 503") if len(sent) % 2 else BatchRefused("HTTP 400")

    keeper.fault = fault
    keeper.interval = 2.0  # type: ignore[attr-defined]  # optional, of exporters
    async with make_guard() as guard:
        await book(guard, 120)
        way = delivery(guard, keeper)
        while clock.monotonic() < 300:
            clock.advance(max(await way.step(), 0.001))
    assert len(sent) > 5
    assert min(later - sooner for sooner, later in pairwise(sent)) > 1.998


@pytest.mark.parametrize("poisoned", [{0}, {9}, {3, 4}, set(range(10)), {7, 23, 24}], ids=str)
async def test_a_row_that_no_one_takes_becomes_a_dead_letter(make_guard: MakeGuard, poisoned: set[int]) -> None:
    """A batch that is refused is halved until the rows that are the reason stand alone; the others are delivered."""
    keeper = Keeper(batch_size=16)
    bad = {f"own:r{number}" for number in poisoned}

    def fault(batch: Sequence[UsageRecord]) -> ExportResult | None:
        if any(record.id in bad for record in batch):
            raise BatchRefused("HTTP 400")
        return None

    keeper.fault = fault
    async with make_guard() as guard:
        ids = await book(guard, 30)
        way = delivery(guard, keeper)
        for _ in range(100):
            await way.step()
            await check_nothing_is_lost(guard, "keeper", keeper.ids)
        assert await dead(guard, "keeper") == dict.fromkeys(bad, "HTTP 400")
        assert [record.id for record in keeper.kept] == [name for name in ids if name not in bad]
        assert len(keeper.batches) <= 8 + 12 * len(bad)


async def test_rows_that_were_rejected_become_dead_letters(make_guard: MakeGuard) -> None:
    """Of a batch that was taken in part, the rest is kept with its reasons, and the batch is not sent again."""
    keeper = Keeper(batch_size=5)
    keeper.fault = lambda batch: ExportResult({1: "no model", 3: "of customer c1: bad"})
    async with make_guard() as guard:
        await book(guard, 5)
        await delivery(guard, keeper).step()
        assert await dead(guard, "keeper") == {"own:r1": "no model", "own:r3": "of customer ...: bad"}
        assert len(keeper.kept) == 3
        await check_nothing_is_lost(guard, "keeper", keeper.ids)


@pytest.mark.parametrize("storage", ["memory://"])
async def test_a_reason_says_nothing_of_the_customer(make_guard: MakeGuard, caplog: pytest.LogCaptureFixture) -> None:
    """An answer that quotes the row, cut off or not, is noted and logged without what the row says of anybody."""
    noted = {"mail": "Zoë@example.com", "of": [{"phone": 4930123456}], "text": "I am Zoe\nand 'ill'", "code": 400}
    noted["ok"] = "ab"
    reasons = {
        0: "row for zoe-1 (Zoe-1) is bad",
        1: f"ab: {noted!r}",
        2: 'bad: {"mail": "Zo\\u00eb@example.com", "phone": 4930123456, "text": "I am Zoe\\nand \'ill\'"}',
        3: "HTTP 400: bad value Zoë@exam",
    }
    keeper = Keeper(batch_size=4)
    keeper.fault = lambda batch: ExportResult(reasons)
    async with make_guard() as guard:
        await book(guard, 4, customer="zoe-1", metadata=noted)
        await delivery(guard, keeper).step()
        found = await dead(guard, "keeper")
        assert found["own:r0"] == "row for ... (...) is bad"
        assert found["own:r1"].startswith("ab: {'mail'")
        assert found["own:r3"] == "HTTP 400: bad value ..."
        for text in (*found.values(), caplog.text):
            lowered = text.lower()
            assert not [hint for hint in ("zo", "example", "4930", "ill") if hint in lowered], text


async def test_an_exporter_that_rejects_rows_it_was_not_given_is_not_believed(make_guard: MakeGuard) -> None:
    """Nothing is a dead letter then, and the batch stays pending."""
    keeper = Keeper()
    keeper.fault = lambda batch: ExportResult({7: "?"})
    async with make_guard() as guard:
        ids = await book(guard, 2)
        await delivery(guard, keeper).step()
        assert await dead(guard, "keeper") == {}
        assert await pending(guard, "keeper") == set(ids)


async def test_dead_letters_can_be_replayed(make_guard: MakeGuard) -> None:
    """Who asks for it has them sent again; those that are refused again stay, and others go on meanwhile."""
    keeper = Keeper(batch_size=4)
    bad = {"own:r1", "own:r2", "own:r5"}

    def fault(batch: Sequence[UsageRecord]) -> ExportResult | None:
        if any(record.id in bad for record in batch):
            raise BatchRefused("HTTP 400")
        return None

    keeper.fault = fault
    async with make_guard() as guard:
        await book(guard, 8)
        way = delivery(guard, keeper)
        for _ in range(30):
            await way.step()
        assert set(await dead(guard, "keeper")) == bad
        bad.remove("own:r2")
        assert await guard.lane().call(way.letters.replay) == 3
        await book(guard, 2, start=8)
        for _ in range(30):
            await way.step()
        assert set(await dead(guard, "keeper")) == bad
        assert len(keeper.kept) == len(keeper.ids) == 8
        assert await guard.lane().call(way.letters.asked) is None
        await check_nothing_is_lost(guard, "keeper", keeper.ids)


@pytest.mark.parametrize("storage", ["memory://"])
async def test_an_outage_of_three_days_loses_nothing(make_guard: MakeGuard, clock: FakeClock) -> None:
    """The sink is down for three days while calls go on: it is tried a bounded number of times, and then all arrive."""
    keeper = Keeper(batch_size=50)
    end = timedelta(days=3).total_seconds()

    def fault(batch: Sequence[UsageRecord]) -> ExportResult | None:
        if clock.monotonic() < end:
            raise ConnectionRefusedError("down")
        return None

    keeper.fault = fault
    async with make_guard() as guard:
        ids: list[str] = []
        way = delivery(guard, keeper)
        steps = 0
        while clock.monotonic() < end + 600:
            if clock.monotonic() >= len(ids) * 2000:
                ids += await book(guard, 1, start=len(ids))
            wait = await way.step()
            # Between two attempts it only comes by to keep its lease; in simulated time it need not.
            ready = way._not_before - clock.monotonic()
            clock.advance(max(wait, ready, 0.5))
            steps += 1
        attempts = len(keeper.batches)
        assert keeper.ids == set(ids)
        assert len(keeper.kept) == len(ids) == 130
        assert 800 < attempts < 1900, "a wait of up to five minutes, with jitter"
        assert await dead(guard, "keeper") == {}
        await check_nothing_is_lost(guard, "keeper", keeper.ids)


async def test_one_process_at_a_time_exports(make_guard: MakeGuard, clock: FakeClock) -> None:
    """The second stands by; when the first falls silent, it takes over within the lease's time."""
    async with make_guard() as guard:
        await book(guard, 1)
        one, two = Keeper(), Keeper()
        first, second = delivery(guard, one, "one"), delivery(guard, two, "two")
        await first.step()
        await second.step()
        assert (len(one.kept), len(two.kept)) == (1, 0)
        await book(guard, 1, start=1)
        clock.advance(25)
        await second.step()
        assert two.kept == []
        clock.advance(6)
        await second.step()
        assert [record.id for record in two.kept] == ["own:r1"]
        await book(guard, 1, start=2)
        await first.step()
        assert not first.leads
        assert len(one.kept) == 1


async def test_who_closes_lets_others_lead_at_once(make_guard: MakeGuard) -> None:
    """A lease is given back at shutdown, so that nobody waits for its end."""
    async with make_guard() as guard:
        first, second = delivery(guard, Keeper(), "one"), delivery(guard, Keeper(), "two")
        await first.step()
        await first.close()
        await second.step()
        assert second.leads


async def test_a_lease_that_ended_meanwhile_moves_no_cursor(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Who was asleep with a batch in its hands leaves the cursor to whoever leads by now."""
    keeper = Keeper()

    def sleep(batch: Sequence[UsageRecord]) -> ExportResult | None:
        clock.advance(60)
        return None

    keeper.fault = sleep
    async with make_guard() as guard:
        ids = await book(guard, 3)
        await delivery(guard, keeper).step()
        assert await pending(guard, "keeper") == set(ids)
        await check_nothing_is_lost(guard, "keeper", keeper.ids)


async def test_a_presumed_record_that_real_usage_shrank_comes_again(make_guard: MakeGuard) -> None:
    """A revised record comes once more under its id, with a higher revision and its new cost."""
    keeper = Keeper()
    async with make_guard(default_limits={"total_budget": 5}) as guard:
        way = delivery(guard, keeper)
        policy = guard.policies.get("c1").policy
        now = guard.now_ms()
        entry = guard.recorder.presumed("a1", "a1", "c1", policy.day_of(now), now, 3_000_000_000, Usage(model="m"))
        await guard.lane().record(entry)
        await way.step()
        real = guard.make_entry(Usage(model="m", cost=1), "c1", source="manual", admission="a1")
        await guard.lane().record(real)
        await way.step()
        seen = [(record.kind, record.revision, str(record.cost)) for record in keeper.kept]
        assert seen[0] == ("presumed", 1, "3")
        assert sorted(seen[1:]) == [("presumed", 2, "2"), ("usage", 1, "1")]


async def test_nothing_is_pruned_that_was_not_delivered(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Pruning stops at the cursor, and at the oldest dead letter, until both are through."""
    keeper = Keeper(batch_size=2)
    keeper.fault = lambda batch: ExportResult({0: "no"}) if batch[0].id == "own:r2" else None
    async with make_guard() as guard:
        ids = await book(guard, 6)
        way = delivery(guard, keeper)
        await way.step()
        await way.step()
        clock.advance(timedelta(days=50))
        day = clock.now.date() - timedelta(days=40)
        assert await guard.prune(day) == 2
        left = {record.id async for record in guard.records()}
        assert left == set(ids[2:])
        for _ in range(3):
            await way.step()
        assert await guard.prune(day) == 0
        keeper.fault = lambda batch: None
        await guard.lane().call(way.letters.replay)
        for _ in range(3):
            await way.step()
        assert await guard.prune(day) == 4
        assert keeper.ids == set(ids)


async def test_an_older_dead_letter_is_kept_from_pruning_too(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A row that is put off until it is given up on, behind the back of a later one, can be replayed as well."""
    keeper = Keeper(batch_size=100)

    def fault(batch: Sequence[UsageRecord]) -> ExportResult:
        place = {record.id: place for place, record in enumerate(batch)}
        rejected = {place["own:r1"]: "never"} if "own:r1" in place else {}
        return ExportResult(rejected, {place["own:r0"]: "later"} if "own:r0" in place else {})

    keeper.fault = fault
    async with make_guard() as guard:
        await book(guard, 3)
        way = delivery(guard, keeper)
        for number in range(3, 20):
            await way.step()
            await book(guard, 1, start=number)  # others are taken meanwhile
            clock.advance(400)
        assert await dead(guard, "keeper") == {"own:r0": "later", "own:r1": "never"}
        clock.advance(timedelta(days=50))
        assert await guard.prune(clock.now.date() - timedelta(days=40)) == 0
        assert set(await dead(guard, "keeper")) == {"own:r0", "own:r1"}  # their records are there


async def test_a_slow_exporter_is_given_fewer(make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that takes too long comes again in halves, so that whoever takes one record in time takes all."""

    class Slow(Keeper):
        async def export(self, batch: Sequence[UsageRecord]) -> ExportResult | None:
            if len(batch) > 3:
                await asyncio.sleep(600)
            return await super().export(batch)

    slow = Slow()
    monkeypatch.setattr("respan_guard.delivery.EXPORT_TIMEOUT", 0.1)
    clock = FakeClock()
    async with make_guard(clock=clock) as guard:
        ids = await book(guard, 6)
        way = delivery(guard, slow)
        for _ in range(12):
            clock.advance(await way.step() + 300)
        assert [record.id for record in slow.kept] == ids


async def test_a_forgotten_exporter_holds_nothing_back(make_guard: MakeGuard, clock: FakeClock) -> None:
    """What it has not read can be pruned once it was forgotten; an exporter of its name starts anew."""
    keeper = Keeper()
    keeper.fault = lambda batch: ExportResult({0: "no"})
    async with make_guard() as guard:
        await book(guard, 1)
        way = delivery(guard, keeper)
        await way.step()
        await way.close()
        await book(guard, 1, start=1)
        await guard.outbox.forget_exporter("keeper")
        assert await guard.exporters() == []
        clock.advance(timedelta(days=50))
        assert await guard.prune(clock.now.date() - timedelta(days=40)) == 2
        await book(guard, 1, start=2)
        await delivery(guard, keeper, "two").step()
        assert keeper.batches[-1] == 1


async def test_costs_come_with_and_without_markup(make_guard: MakeGuard) -> None:
    """Each record tells what was paid and what the customer is shown."""
    keeper = Keeper()
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", markup_percentage=20))
        await guard.record(Usage(model="m", cost="0.1"), "c1")
        await guard.record(Usage(model="m", cost="0.1"), "c2")
        await guard.record(Usage(model="nobody-knows-it"), "c1")
        await delivery(guard, keeper).step()
        costs = [(record.cost, record.cost_with_markup) for record in keeper.kept]
        assert [tuple(map(str, pair)) for pair in costs] == [("0.1", "0.12"), ("0.1", "0.1"), ("None", "None")]


async def test_where_exporters_stand_is_told(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Name, cursor, what waits and for how long, dead letters, who leads and what went wrong last."""
    keeper = Keeper(batch_size=2)
    async with make_guard() as guard:
        await book(guard, 2)
        way = delivery(guard, keeper)
        await way.step()
        [status] = await guard.exporters()
        assert (status.name, status.behind, status.lag_seconds, status.dead_letters) == ("keeper", 0, 0.0, 0)
        assert status.leader is not None
        assert status.error is None
        await book(guard, 3, start=2)

        def down(batch: Sequence[UsageRecord]) -> ExportResult | None:
            raise ExportFailed("HTTP 503")

        keeper.fault = down
        await way.step()
        clock.advance(4)
        await way.step()
        [status] = await guard.exporters()
        assert (status.behind, status.lag_seconds, status.error) == (3, 4.0, "HTTP 503")
        cursor = await guard.lane().call(lambda backend: backend.cursor(cursor_name("keeper")))
        assert status.cursor == cursor
        clock.advance(31)
        [status] = await guard.exporters()
        assert status.leader is None


def test_what_is_no_exporter_is_refused(make_guard: MakeGuard) -> None:
    """A class without the method, a name that can't name a cursor, and a name that is taken are errors at once."""
    guard = make_guard()
    with pytest.raises(ConfigurationError, match="async method export"):
        guard.add_exporter(object())  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigurationError, match="letters, digits"):
        guard.add_exporter(Keeper(name="a/b"))
    guard.add_exporter(Keeper())
    with pytest.raises(ConfigurationError, match="already"):
        guard.add_exporter(Keeper())
    assert isinstance(Keeper(), Exporter)


async def test_a_store_that_is_down_is_waited_for(
    store: FaultyBackend, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While storage fails nothing is sent and nothing is given up; afterwards it goes on where it was."""
    keeper = Keeper()
    async with faulty_guard(tmp_path, clock=clock) as guard:
        way = delivery(guard, keeper)
        ids = await book(guard, 1)
        await way.step()
        ids += await book(guard, 2, start=1)

        async def down(self: FaultyBackend, *_: object) -> None:
            raise BackendError("down")

        with monkeypatch.context() as patched:
            patched.setattr(FaultyBackend, "set_cursor", down)
            for _ in range(3):
                clock.advance(await way.step())
            assert "down" in way.error
        assert len(keeper.kept) > 1, "they were taken, and could not be noted"
        for _ in range(20):
            clock.advance(await way.step())
        assert keeper.ids == set(ids)
        assert await pending(guard, "keeper") == set()
        assert way.error == ""


async def test_a_lease_that_cannot_be_read_is_taken(make_guard: MakeGuard) -> None:
    """A fact that somebody damaged stops nobody."""
    async with make_guard() as guard:
        ids = await book(guard, 1)
        await guard.lane().call(lambda backend: backend.set_fact("outbox", "lease:keeper", "{nonsense"))
        keeper = Keeper()
        await delivery(guard, keeper).step()
        assert keeper.ids == set(ids)


async def test_lag_and_records_are_measured(make_guard: MakeGuard, clock: FakeClock, measured: Metrics) -> None:
    """`respan_guard.export.lag` and `respan_guard.export.records`, by exporter and outcome."""
    keeper = Keeper(batch_size=2)
    keeper.fault = lambda batch: ExportResult({0: "no"})
    async with make_guard() as guard:
        way = delivery(guard, keeper)
        guard.outbox._tasks["keeper"] = way, asyncio.ensure_future(asyncio.sleep(0))
        await book(guard, 4)
        clock.advance(3)
        await way.step()
        for outcome in ("delivered", "dead_letter"):
            assert measured.value("respan_guard.export.records", exporter="keeper", outcome=outcome) == 1
        assert measured.read()["respan_guard.export.lag"] == [({"respan_guard.exporter": "keeper"}, 3)]
