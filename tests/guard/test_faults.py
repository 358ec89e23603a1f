"""Storage that fails, hangs or loses its answers: a defined outcome, nothing lost, nothing counted twice."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import pytest

from respan_guard import Guard, StorageUnavailable, Usage
from respan_guard.backends import registry
from respan_guard.backends.base import Entry, Op, Outcome, Record
from respan_guard.errors import CounterOverflow, StorageFull
from respan_guard.items import Item
from respan_guard.journal import Journal, JournalFile
from respan_guard.testing import FakeClock

from .faulty import FaultyBackend

LIMITS = {"default_limits": {"total_budget": 1}}
DIME = Decimal("0.1")


@pytest.fixture(autouse=True, params=[1, 2], ids=["one at a time", "two at a time"])
def scheme(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Make faulty:// known, as a store that takes so many batches at a time."""
    monkeypatch.setitem(registry._BUILT_IN, "faulty", f"{FaultyBackend.__module__}:FaultyBackend")
    monkeypatch.setattr(FaultyBackend, "at_once", request.param)
    yield
    FaultyBackend.stores.clear()


@pytest.fixture
def store() -> FaultyBackend:
    """The store behind faulty://one."""
    return FaultyBackend("faulty://one")


def make(tmp_path: Path, **options: object) -> Guard:
    """A guard over the faulty store."""
    return Guard("faulty://one", journal_dir=tmp_path, clock=FakeClock(), **options)  # type: ignore[arg-type]


@pytest.fixture
async def guard(store: FaultyBackend, tmp_path: Path) -> AsyncIterator[Guard]:
    """An opened guard with a budget."""
    async with make(tmp_path, **LIMITS) as guard:
        yield guard


async def test_a_customer_with_limits_is_refused_while_storage_fails(store: FaultyBackend, guard: Guard) -> None:
    """Hard limits fail closed: StorageUnavailable, at once where the store says so itself."""
    store.error = StorageFull("no space left")
    with pytest.raises(StorageUnavailable):
        await guard.admit("c1")
    store.error = None
    async with guard.admit("c1"):
        pass


async def test_a_customer_without_limits_goes_on_while_storage_fails(store: FaultyBackend, tmp_path: Path) -> None:
    """Where there is nothing to enforce the work goes on, and its record is stored once storage is back."""
    async with make(tmp_path) as guard:
        store.error = StorageUnavailable("down")
        async with guard.admit("c1") as admission:
            await admission.record(Usage(cost=1))
        assert len(list(tmp_path.glob("*.journal"))) == 1  # acknowledged, so it is on disk
        store.error = None
        await guard.flush()
        await asyncio.sleep(0.05)
        assert [record.cost async for record in guard.records()] == [1]
    assert list(tmp_path.glob("*.journal")) == []


async def test_a_hanging_store_costs_a_request_its_deadline_and_no_more(store: FaultyBackend, guard: Guard) -> None:
    """No answer within storage_timeout is StorageUnavailable, and what still waited is withdrawn."""
    store.gate = asyncio.Event()
    running = asyncio.create_task(_refused(guard))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(_refused(guard))
    await asyncio.gather(running, waiting)
    gate, store.gate = store.gate, None
    gate.set()
    await guard.flush()
    # The one that ran was applied after all and released behind; the one that waited never was.
    assert (await guard.status("c1")).total_requests == 1
    assert await store.holds(state="live") == []


async def _refused(guard: Guard) -> None:
    with pytest.raises(StorageUnavailable):
        await guard.admit("c1", estimate=Decimal("0.1"))


async def test_lost_answers_are_neither_lost_records_nor_double_ones(store: FaultyBackend, guard: Guard) -> None:
    """Every batch is applied but its answer lost: the records are sent again and count once."""
    store.error, store.applied_anyway = StorageUnavailable("lost answer"), True
    for number in range(50):
        await guard.record(Usage(cost=Decimal("0.001")), "c1", entry_id=str(number))
    store.error = None
    await guard.flush()
    await asyncio.sleep(0.05)
    assert (await guard.status("c1")).total_spend == Decimal("0.05")
    assert await guard.verify() == []


async def test_a_cancelled_caller_leaves_no_hold_behind(store: FaultyBackend, guard: Guard) -> None:
    """20 callers give up at random moments; whatever was let in for them is released by the home."""
    rng = random.Random(1)
    for _ in range(20):
        task = asyncio.create_task(guard.try_admit("c1", estimate=Decimal("0.2")))
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        task.cancel()
        answer = (await asyncio.gather(task, return_exceptions=True))[0]
        if not isinstance(answer, BaseException) and answer:
            await answer.release()  # type: ignore[union-attr]  # a Refusal is false
    await guard.flush()
    assert await store.holds(state="live") == []
    assert await guard.verify() == []


async def test_the_release_never_overtakes_its_records(store: FaultyBackend, guard: Guard) -> None:
    """Records and release travel in one inbox, so no moment exists in which the money is neither held nor spent."""
    admitted = 0
    for _ in range(30):
        answer = await guard.try_admit("c1", estimate=Decimal("0.1"))
        if answer:
            admitted += 1
            answer.record_soon(Usage(cost=Decimal("0.1")))  # type: ignore[union-attr]
            await answer.release()  # type: ignore[union-attr]
    assert admitted == 10
    assert (await guard.status("c1")).total_spend == 1


async def test_one_op_that_would_overflow_does_not_fail_its_batch(store: FaultyBackend, guard: Guard) -> None:
    """The poison is found, kept as a dead letter, and everything else of the batch is stored."""
    for _ in range(2):
        await guard.record(Usage(cost=4_000_000), "whale")
    guard.record_soon(Usage(cost=4_000_000), "whale")
    guard.record_soon(Usage(cost=1), "c1")
    await guard.flush()
    assert (await guard.status("c1")).total_spend == 1
    assert (await guard.status("whale")).total_spend == 8_000_000
    assert '"whale"' in guard._homes._journal.dead_letters.read_text()
    assert await guard.verify() == []


async def test_a_fault_of_the_driver_does_not_end_the_home(store: FaultyBackend, guard: Guard) -> None:
    """Even an error that no backend should raise is an outage, not the end of the drain."""
    store.error = RuntimeError("a bug")
    with pytest.raises(StorageUnavailable):
        await guard.admit("c1")
    store.error = None
    async with guard.admit("c1"):
        pass


async def test_records_of_an_outage_are_journalled_at_close_and_stored_by_the_next_process(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """A guard that closes while storage is down leaves its records on disk, and the next one stores them."""
    async with make(tmp_path, storage_timeout=0.05) as guard:
        store.error = StorageUnavailable("down")
        for number in range(100):
            guard.record_soon(Usage(cost=Decimal("0.01")), "c1", entry_id=str(number))
    store.error = None
    assert (await store.get("c1")) is None
    async with make(tmp_path) as guard:
        await asyncio.sleep(0.05)
        await guard.flush()
        assert (await guard.status("c1")).total_spend == 1
    assert list(tmp_path.glob("*.journal")) == []


async def test_records_nobody_waits_for_are_on_disk_while_storage_is_down(
    store: FaultyBackend, guard: Guard, tmp_path: Path
) -> None:
    """A process that is killed in an outage loses none of what was posted; one that lives on stores each once."""
    async with guard.admit("c1", estimate=Decimal(1)) as admission:
        store.error = StorageUnavailable("down")
        for number in range(5):
            admission.record_soon(Usage(cost=DIME, response_id=f"resp_{number:0>24}", provider="p", model="m"))
        guard.record_soon(Usage(cost=DIME), "c1")
    home = guard.lane().home
    assert home is not None
    async with asyncio.timeout(20):
        while guard.journal.pending < 6:
            await asyncio.sleep(0.01)
    (file,) = tmp_path.glob("*.journal")
    assert len(file.read_bytes().splitlines()) == 6
    guard.record_soon(Usage(cost=DIME), "c1")
    async with asyncio.timeout(20):
        while guard.journal.pending < 7:
            await asyncio.sleep(0.01)
    assert len(file.read_bytes().splitlines()) == 7  # each once
    store.error = None
    async with asyncio.timeout(20):
        while home.waiting or guard.journal.pending or file.exists():
            await asyncio.sleep(0.01)
    status = await guard.status("c1")
    assert (status.total_spend, status.limits[-1].held) == (7 * DIME, 0)
    assert not any([record.late async for record in guard.records()])
    assert await guard.verify() == []


async def test_concurrent_operations_travel_together(store: FaultyBackend, guard: Guard) -> None:
    """What arrives while a batch runs is the next batch: 100 concurrent admissions take a few trips, not 100."""
    answers = await asyncio.gather(*[guard.try_admit("c1") for _ in range(100)])
    assert all(answers)
    assert len(store.batches) <= 5
    assert sum(store.batches) == 100


async def test_what_is_answered_before_a_failure_in_front_of_it_is_sent_again(
    store: FaultyBackend, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch is stored while the first fails: nobody hears that all is stored before it is."""
    monkeypatch.setattr(FaultyBackend, "at_once", 2)
    await guard.record(Usage(cost=DIME), "c1")
    apply, sizes = store.apply, list[int]()

    async def first_fails(ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        sizes.append(len(ops))
        if len(sizes) == 1:
            await asyncio.sleep(0.05)
            raise StorageFull("no room")
        return await apply(ops, now)

    monkeypatch.setattr(store, "apply", first_fails)
    for at in range(20):
        guard.record_soon(Usage(cost=DIME), f"c{at}")
    await guard.flush()
    assert sizes[:2] == [11, 9]  # the marker waits for both
    assert sum(sizes) >= 40
    monkeypatch.setattr(store, "apply", apply)
    assert (await guard.status("c1")).total_spend == 2 * DIME
    assert await guard.verify() == []


async def test_a_batch_that_is_sent_op_by_op_is_not_overtaken(store: FaultyBackend, guard: Guard) -> None:
    """One op spoils its batch, which is stored again in pieces: the release behind its record stays behind it."""
    await guard.record(Usage(cost=9_000_000), "whale")
    first = await guard.admit("ann", estimate=9 * DIME)
    guard.record_soon(Usage(cost=1), "whale")
    first.record_soon(Usage(cost=9 * DIME))
    for at in range(6):
        guard.record_soon(Usage(cost=DIME), f"c{at}")
    first.end()  # in another part than its record, if parts were cut by number alone
    assert not await guard.try_admit("ann", estimate=9 * DIME)
    assert not any([record.late async for record in guard.records("ann")])


@pytest.mark.parametrize("seed", range(8))
async def test_batches_that_overtake_each_other_keep_the_order_of_each_customer(
    store: FaultyBackend, guard: Guard, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Storage applies what is under way in any order: what a customer did stays in order, and a flush means stored."""
    rng, apply, applied = random.Random(seed), store.apply, list[tuple[str, int | None]]()

    async def some_time(ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        for _ in range(rng.randrange(30)):
            await asyncio.sleep(0)
        applied.extend((op.entry.customer, op.entry.cost) for op in ops if isinstance(op, Record))
        return await apply(ops, now)

    monkeypatch.setattr(store, "apply", some_time)
    posted = 0
    for _ in range(40):
        for _ in range(rng.choice([1, 5, 30, 700])):  # more than travel together, too
            posted += 1
            guard.record_soon(
                Usage(cost=Decimal(posted).scaleb(-9)), rng.choice(["ann", "ann", "bob", f"c{rng.randrange(99)}"])
            )
        if rng.random() < 0.3:
            await guard.flush()
            assert len(applied) == posted
        for _ in range(rng.randrange(40)):
            await asyncio.sleep(0)
    await guard.flush()
    assert len(applied) == posted
    costs: dict[str, list[int | None]] = {}
    for customer, cost in applied:
        costs.setdefault(customer, []).append(cost)
    assert all(each == sorted(each, key=int) for each in costs.values())  # type: ignore[arg-type]


async def test_an_overflow_is_refused_before_anything_is_written(guard: Guard) -> None:
    """A record beyond 9,000,000 USD in all is kept as a dead letter and never becomes wrong money."""
    await guard.record(Usage(cost=9_000_000), "whale")
    lane = guard.lane()
    entry = guard.make_entry(Usage(cost=Decimal("0.000000001")), "whale", source="manual")
    with pytest.raises(CounterOverflow):
        await lane.submit(Record(entry))
    assert (await guard.status("whale")).total_spend == 9_000_000


@pytest.mark.parametrize("disk", ["takes them", "is full"])
async def test_records_that_outrun_storage_wait_on_disk(
    store: FaultyBackend, guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    """More is posted than storage takes: memory holds a bounded part of it, and each is stored once all the same."""
    monkeypatch.setattr("respan_guard.overflow._MOST_WAITING", 3_000)
    if disk == "is full":
        (tmp_path / "none").write_text("")
        guard.journal.directory = tmp_path / "none"
    async with guard.admit("c1", estimate=Decimal(1)) as admission:
        store.delay = 0.3
        most = aside = 0
        for number in range(400):
            for _ in range(50):
                guard.record_soon(Usage(cost=Decimal("0.000001")), "c2")
            if number % 40 == 0:
                admission.record_soon(Usage(cost=Decimal("0.01")))
            await asyncio.sleep(0)
            home = guard.lane().home
            assert home is not None
            if number % 20 == 0:
                await asyncio.sleep(0.03)
            most, aside = max(most, home.waiting), max(aside, guard.journal.pending)
    if disk == "takes them":
        assert aside > 3_000
        assert most < 16_000
    else:
        assert aside == 0
        assert most > 10_000
    store.delay = 0
    async with asyncio.timeout(60):
        while True:
            try:
                await guard.flush()
                break
            except StorageUnavailable:
                await asyncio.sleep(0.01)
    assert guard.journal.pending == 0
    assert (await guard.status("c2")).total_spend == Decimal("0.02")
    assert (await guard.status("c1")).total_spend == Decimal("0.1")
    assert (await guard.status("c1")).limits[-1].held == 0
    assert await guard.verify() == []


async def test_a_flush_waits_for_what_is_set_aside_after_it_began(
    store: FaultyBackend, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that wait before the flush go to disk while it waits: it returns when those are stored, too."""
    monkeypatch.setattr("respan_guard.overflow._MOST_WAITING", 1_000)
    write = guard.journal.write

    def slowly(entries: Sequence[Entry]) -> None:
        time.sleep(0.3)
        write(entries)

    monkeypatch.setattr(guard.journal, "write", slowly)
    await guard.record(Usage(cost=Decimal("0.000001")), "c2")
    for _ in range(5_000):
        guard.record_soon(Usage(cost=Decimal("0.000001")), "c2")
    await guard.flush()
    assert (await guard.status("c2")).total_spend == Decimal("0.005001")
    assert store.batches


async def test_a_flush_waits_for_what_could_not_be_set_aside(
    store: FaultyBackend, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disk refused waits in memory again, behind the flush's marker maybe: it returns when that is stored."""
    monkeypatch.setattr("respan_guard.overflow._MOST_WAITING", 1_000)
    home = guard.lane().home
    assert home is not None

    def refuse(entries: Sequence[Entry]) -> None:
        marked = [item for item in home._inbox if item.op is None]
        while marked and not all(item.future is None or item.future.done() for item in marked):
            time.sleep(0.001)  # the marker passes
        raise OSError("no room")

    monkeypatch.setattr(guard.journal, "write", refuse)
    for _ in range(5_000):
        guard.record_soon(Usage(cost=Decimal("0.000001")), "c2")
    await guard.flush()
    assert home._came_back
    assert (await guard.status("c2")).total_spend == Decimal("0.005")


async def test_a_flush_waits_for_what_one_home_set_aside_and_the_other_stores(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Homes share a journal: what the thread's home sets aside is stored once a flush returns, whichever stores it."""
    await guard.record(Usage(cost=DIME), "c2")
    app, other = guard.lane().home, (await asyncio.to_thread(guard.lane)).home
    assert app is not None
    assert other is not None
    assert other is not app
    replay, flush, taken = app._replay, other.flush, threading.Event()

    async def slowly(file: JournalFile) -> None:
        taken.set()
        await asyncio.sleep(0.3)
        await replay(file)

    async def leave_it() -> None:
        """The other home comes first."""

    async def sets_aside() -> None:
        other._inbox.append(Item(Record(guard.make_entry(Usage(cost=DIME), "c2", source="manual")), None))
        await other._set_aside()
        app.loop.call_soon_threadsafe(app._make_room)
        assert await asyncio.to_thread(taken.wait, 5)
        await flush()

    monkeypatch.setattr(app, "_replay", slowly)
    monkeypatch.setattr(other, "_catch_up", leave_it)
    monkeypatch.setattr(other, "flush", sets_aside)
    await guard.flush()
    assert guard.journal.pending == 0
    assert (await guard.status("c2")).total_spend == 2 * DIME


async def test_what_draws_from_a_hold_is_never_set_aside(
    store: FaultyBackend, guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release must not overtake a record: those of an admission wait in memory, and are looked through once."""
    monkeypatch.setattr("respan_guard.overflow._MOST_WAITING", 500)
    async with guard.admit("c1", estimate=Decimal(1)) as admission:
        store.delay = 0.02
        for _ in range(3_000):
            admission.record_soon(Usage(cost=Decimal("0.0001")))
        home = guard.lane().home
        assert home is not None
        async with asyncio.timeout(10):
            while not home._no_room:
                await asyncio.sleep(0.001)
        assert home._no_room > home.waiting > 500
    assert not list(tmp_path.glob("*.journal"))
    store.delay = 0
    await guard.flush()
    status = await guard.status("c1")
    assert (status.total_spend, status.limits[-1].held) == (Decimal("0.3"), 0)


@pytest.mark.parametrize("anyway", [False, True], ids=["not written", "written, unanswered"])
async def test_a_correction_that_is_booked_raises_nothing_and_is_audited_later(
    store: FaultyBackend, guard: Guard, monkeypatch: pytest.MonkeyPatch, anyway: bool
) -> None:
    """Whoever is told of an error tries again, and would credit twice; the audit is written once storage is back."""
    monkeypatch.setattr("respan_guard.customers._AUDIT_AGAIN", 0.01)
    store.audit_error, store.applied_anyway = StorageUnavailable("down"), anyway
    await guard.adjust("c1", -DIME, "outage", actor="ann")
    await asyncio.sleep(0.05)
    assert (await guard.status("c1")).total_spend == -DIME
    store.audit_error = None
    async with asyncio.timeout(5):
        while not (rows := await store.audit(customer="c1")):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    rows = await store.audit(customer="c1")
    assert [(row.action, row.actor) for row in rows] == [("adjust", "ann")]


async def test_an_audit_that_waited_does_not_name_who_was_deleted(
    store: FaultyBackend, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion takes the audit, also what of it comes after."""
    monkeypatch.setattr("respan_guard.customers._AUDIT_AGAIN", 0.05)
    store.audit_error = StorageUnavailable("down")
    await guard.adjust("c1", DIME, "outage", actor="ann")
    await guard.delete_customer("c1")
    store.audit_error = None
    await asyncio.sleep(0.2)
    assert await store.audit(customer="c1") == []


async def test_a_correction_that_will_be_booked_raises_nothing(
    store: FaultyBackend, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage was sent it and fails, the disk is full: it is sent until storage has it, so nobody is to try again."""

    def full(entries: Sequence[Entry]) -> None:
        raise OSError("no room")

    monkeypatch.setattr(guard.journal, "write", full)
    store.error = StorageUnavailable("down")
    await guard.adjust("c1", DIME, "outage")
    store.error = None
    await guard.flush()
    assert (await guard.status("c1")).total_spend == DIME
    assert await guard.verify() == []


def test_the_loop_does_not_wait_for_a_journal_that_is_written_to(tmp_path: Path) -> None:
    """A file is taken once the disk has it; until then there is none to take."""
    journal = Journal(tmp_path, "store")
    with journal._lock:  # as while it is synced
        assert journal.rotate(wait=False) is None
    assert journal.rotate() is None


def test_a_relative_file_is_another_store_in_each_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two apps with the same settings in two directories don't share a journal; an absolute path changes nothing."""
    stems = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        stems.add(Guard("sqlite:///guard.db", journal_dir=tmp_path).journal._stem)
    stems.add(Guard(f"sqlite:///{tmp_path / 'a' / 'guard.db'}", journal_dir=tmp_path).journal._stem)
    assert len(stems) == 2
