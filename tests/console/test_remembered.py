"""Counts that pages wait a moment for, and what is known of them where they take longer."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import pytest

from respan_guard import Guard
from respan_guard.backends.base import Backend
from respan_guard.console import remembered as module
from respan_guard.console.remembered import Answer, Remembered
from respan_guard.errors import StorageUnavailable
from respan_guard.markups import Reads
from respan_guard.testing import FakeClock
from tests.guard.conftest import MakeGuard, clock, make_guard, storage

__all__ = ["clock", "make_guard", "storage"]


@pytest.fixture
async def guard(make_guard: MakeGuard) -> Any:
    """A guard over each embedded store."""
    async with make_guard() as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages wait for next to nothing."""
    monkeypatch.setattr(module, "_PATIENCE", 0.02)


class Count:
    """A count of two statements that take so many seconds each; before the second it may be held up."""

    def __init__(self, clock: FakeClock, seconds: float = 0) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.begun = self.steps = 0
        self._clock, self._seconds = clock, seconds

    async def __call__(self, reads: Reads) -> int:
        """Which count it is."""
        self.begun += 1
        number = self.begun
        await reads.call(self._step, 1.0)
        await self.go.wait()
        await reads.call(self._step, 1.0)
        return number

    async def _step(self, backend: Backend) -> None:
        self._clock.advance(self._seconds)
        self.steps += 1

    async def reached(self, steps: int) -> None:
        """Wait until so many statements were sent, and a moment longer."""
        while self.steps < steps:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)


async def go_on(count: Count, remembered: Remembered) -> None:
    """Let a count that is held up come to its end; the next one is held up, too."""
    count.go.set()
    await settled(remembered)
    count.go.clear()


async def settled(remembered: Remembered) -> None:
    """Wait for what goes on behind the pages."""
    while tasks := list(remembered._tasks.values()):
        await asyncio.wait(tasks)
        await asyncio.sleep(0)


async def test_what_is_quickly_done_is_never_an_old_one(guard: Guard, clock: FakeClock) -> None:
    """Each page gets a count that began after it asked, however little time went by since the last."""
    count, remembered = Count(clock, seconds=0.1), Remembered(guard)
    for number in (1, 2, 3):
        assert await remembered.last("a", count, anew=True) == Answer(number, guard.now_ms() - 200, fresh=True)


async def test_what_need_not_be_that_new_is_good_for_a_moment(guard: Guard, clock: FakeClock) -> None:
    """For twenty times as long as it took, too."""
    count, remembered = Count(clock, seconds=0.1), Remembered(guard)
    first = await remembered.last("a", count, anew=False)
    clock.advance(3.9)
    assert await remembered.last("a", count, anew=False) == Answer(1, first.at_ms if first else 0, fresh=False)
    clock.advance(0.2)
    assert await remembered.last("a", count, anew=False) == Answer(2, guard.now_ms() - 200, fresh=True)


async def test_pages_that_ask_meanwhile_share_the_next_count(guard: Guard, clock: FakeClock) -> None:
    """Not the one that began before they asked; and of each name there is one at a time."""
    count, remembered = Count(clock), Remembered(guard)
    count.go.clear()
    first = asyncio.create_task(remembered.last("a", count, anew=True))
    await count.reached(1)
    others = [asyncio.create_task(remembered.last("a", count, anew=True)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert count.begun == 1
    count.go.set()
    assert [answer and answer.value for answer in await asyncio.gather(first, *others)] == [1, 2, 2, 2]


async def test_who_asks_while_a_count_ends_gets_the_next(guard: Guard) -> None:
    """It is as old as if it had ended before."""
    remembered, pages, numbers = Remembered(guard), list[asyncio.Task[Answer[int] | None]](), itertools.count(1)

    async def work(reads: Reads) -> int:
        number = next(numbers)
        if number == 1:  # the page's first step comes after this one's last, and before who waits for this is told
            pages.append(asyncio.create_task(remembered.last("a", work, anew=True)))
        return number

    assert await remembered.last("a", work, anew=True) == Answer(1, guard.now_ms(), fresh=True)
    assert await pages[0] == Answer(2, guard.now_ms(), fresh=True)


@pytest.mark.usefixtures("impatient")
async def test_a_long_one_is_good_for_a_while(guard: Guard, clock: FakeClock) -> None:
    """For twenty times as long as it took; then the old one is told, with its time, until the new one is there."""
    count, remembered = Count(clock, seconds=1.5), Remembered(guard)
    count.go.clear()
    began = guard.now_ms()
    assert await remembered.last("a", count, anew=True) is None
    await go_on(count, remembered)
    old = Answer(1, began, fresh=False)
    clock.advance(59)
    assert await remembered.last("a", count, anew=True) == old
    assert count.begun == 1
    clock.advance(2)
    for _ in range(2):
        assert await remembered.last("a", count, anew=True) == old
        assert count.begun == 2
    await go_on(count, remembered)
    assert await remembered.last("a", count, anew=True) == Answer(2, began + 64_000, fresh=False)


@pytest.mark.usefixtures("impatient")
async def test_long_ones_take_turns_and_quick_ones_pass_by(
    guard: Guard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of counts that take long one goes on at a time, to its end; nobody waits for it whose count does not."""
    one, other, quick = Count(clock, 1), Count(clock, 1), Count(clock)
    one.go.clear()
    monkeypatch.setattr(module, "_REST", 0)
    remembered = Remembered(guard)
    await remembered.last("one", one, anew=True)
    await one.reached(1)
    await remembered.last("other", other, anew=True)
    await other.reached(1)  # before that it is not known to take long
    assert other.steps == 1
    monkeypatch.setattr(module, "_PATIENCE", 30)
    assert await remembered.last("quick", quick, anew=True) == Answer(1, guard.now_ms(), fresh=True)
    assert (one.steps, other.steps) == (1, 1)
    one.go.set()
    await settled(remembered)
    assert (one.steps, other.steps) == (2, 2)


@pytest.mark.usefixtures("impatient")
async def test_between_statements_others_have_the_storage(
    guard: Guard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as the statement took, a tenth of a second at most; that is not time that counting takes."""
    count, remembered, rests = Count(clock, 0.05), Remembered(guard), list[float]()
    sleep = asyncio.sleep

    async def slept(seconds: float) -> None:
        rests.append(seconds)
        clock.advance(seconds)
        await sleep(0)

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "sleep", slept)
        await remembered.last("a", count, anew=True)
        await settled(remembered)
    assert [rest for rest in rests if rest] == [pytest.approx(0.05)] * 2
    clock.advance(20 * 0.1 - 0.05 - 0.001)  # since it was done, there was the last rest
    await remembered.last("a", count, anew=True)
    assert count.begun == 1
    clock.advance(0.002 + 0.05)
    await remembered.last("a", count, anew=True)
    assert count.begun == 2
    await settled(remembered)


async def test_what_fails_is_said(
    guard: Guard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the page that waits, and in the log, where nobody waits, too; who asks next has it counted again."""

    async def down(reads: Reads) -> int:
        await go.wait()
        raise StorageUnavailable("down")

    go, count, remembered = asyncio.Event(), Count(clock), Remembered(guard)
    go.set()
    with pytest.raises(StorageUnavailable):
        await remembered.last("a", down, anew=True)
    assert await remembered.last("a", count, anew=True) == Answer(1, guard.now_ms(), fresh=True)
    caplog.clear()
    go.clear()
    with monkeypatch.context() as patched:
        patched.setattr(module, "_PATIENCE", 0.02)
        assert await remembered.last("a", down, anew=True) == Answer(1, guard.now_ms(), fresh=False)
    go.set()
    await settled(remembered)
    assert "the console can't count a: down" in caplog.text
    assert await remembered.last("a", count, anew=True) == Answer(2, guard.now_ms(), fresh=True)


async def test_memory_is_bounded(guard: Guard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten; and of what goes on behind pages there is no more than that."""
    monkeypatch.setattr(module, "_KEPT", 3)
    remembered = Remembered(guard)
    for name in range(4):
        await remembered.last(str(name), Count(clock), anew=True)
    held = [Count(clock) for _ in range(4)]
    for count in held:
        count.go.clear()
    monkeypatch.setattr(module, "_PATIENCE", 0.02)
    found = [await remembered.last(str(name), count, anew=True) for name, count in enumerate(held)]
    assert [answer is not None for answer in found] == [False, True, True, True]
    assert [count.begun for count in held] == [1, 1, 1, 0]
    for count in held:
        count.go.set()
    await settled(remembered)


@pytest.mark.usefixtures("impatient")
def test_another_loop_counts_anew(make_guard: MakeGuard, clock: FakeClock) -> None:
    """What a loop had begun that stands still keeps nobody waiting, and what came out before is known there."""
    remembered = Remembered(make_guard())

    async def begin(*, held: bool) -> tuple[Answer[int] | None, int]:
        count = Count(clock, 1)
        if held:
            count.go.clear()
        before = await remembered.last("a", count, anew=True)
        await count.reached(1)
        if not held:
            await settled(remembered)
        return before, count.begun

    first = asyncio.new_event_loop()
    assert first.run_until_complete(begin(held=True)) == (None, 1)
    assert asyncio.run(begin(held=False)) == (None, 1)
    clock.advance(60)
    answer, begun = asyncio.run(begin(held=True))
    assert answer is not None
    assert (answer.value, begun) == (1, 1)
    (left,) = asyncio.all_tasks(first)
    left.cancel()
    first.run_until_complete(asyncio.wait([left]))
    first.close()


@pytest.mark.parametrize("storage", ["sqlite"], indirect=True)
@pytest.mark.usefixtures("impatient")
async def test_a_count_ends_with_the_guard(
    make_guard: MakeGuard, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Storage that was closed is not opened again for it, on whichever thread."""
    count = Count(clock)
    count.go.clear()
    async with make_guard() as guard:
        remembered = Remembered(guard)
        assert await remembered.last("a", count, anew=True) is None
        await count.reached(1)
    threads = set(threading.enumerate())
    count.go.set()
    await settled(remembered)
    assert "the console can't count a: the guard was closed meanwhile" in caplog.text
    assert count.steps == 1
    assert set(threading.enumerate()) <= threads
