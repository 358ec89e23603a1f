"""One exporter's way through the log: read behind its cursor, hand over, move the cursor.

The order is what makes it safe: a cursor moves only past records that were taken or are dead letters by then. Whatever
is cut off between two steps is done again, so a record may come twice and is never left out; and a process that lost
its lease without knowing can at worst set the cursor back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from respan_guard.backends.base import Backend, RecordQuery, StoredEntry
from respan_guard.dead_letters import DONE, DeadLetter, DeadLetters, redacted
from respan_guard.errors import GuardError
from respan_guard.exporters.base import BatchRefused, Exporter, ExportFailed, ExportResult
from respan_guard.lease import Lease
from respan_guard.markups import markups_of
from respan_guard.recorder import record_from_entry
from respan_guard.telemetry import telemetry
from respan_guard.tracing import untraced
from respan_guard.usage import UsageRecord

if TYPE_CHECKING:
    from decimal import Decimal

    from respan_guard.guard import Guard

__all__ = ["Delivery", "cursor_name"]

T = TypeVar("T")
EXPORT_TIMEOUT: Final = 20.0  # below the lease's time, so that nobody else begins meanwhile
IDLE: Final = 1.0
GATHERING: Final = 0.5  # until there is more to send than a few: each batch is a read and a write beside the requests
STANDBY: Final = 5.0
_FIRST_WAIT: Final = 1.0
_LONGEST_WAIT: Final = 300.0
_LONGEST_REST: Final = 0.5
_MARKUP_S: Final = 60.0
_MAX_MARKUPS: Final = 10_000
_FEW: Final = 100
_MOST_PUT_OFF: Final = 10
logger = logging.getLogger("respan_guard")


def cursor_name(exporter: str) -> str:
    """What an exporter's cursor is called in the store."""
    return f"exporter:{exporter}"


class _TookTooLong(ExportFailed):
    """An exporter did not come back."""


class Delivery:
    """Takes records to one exporter. Runs on one event loop, one `step` at a time.

    Args:
        guard: Whose records.
        exporter: Where they go.
        owner: A random name of this process.

    Attributes:
        error: What went wrong last; "" if nothing did since.
        lag_ms: How long the oldest record has waited that was not exported at the last step.
        leads: Whether this process is the one that exports under the name.
        stopping: Set when no further step shall be done.
    """

    def __init__(self, guard: Guard, exporter: Exporter, owner: str) -> None:
        self._guard = guard
        self._exporter = exporter
        self.name = exporter.name
        self.letters = DeadLetters(exporter.name)
        self._lease = Lease(exporter.name, owner, guard.now_ms)
        self._most = max(1, int(getattr(exporter, "batch_size", 100)))
        self._interval = float(getattr(exporter, "interval", 0.0))
        self._quiet = contextlib.nullcontext if getattr(exporter, "traced", False) else untraced
        self._size = self._most
        self._suspect = 0  # up to where lies what was refused, or took too long, in a batch of several
        self._failures = 0
        self._not_before = 0.0
        self._opened = False
        self._replayed = 0
        self._done: set[int] = set()  # rows behind the cursor that need not come again, as others of their batch do
        self._put_off: dict[int, int] = {}  # how often those were, while others were taken
        self._markups: dict[str, tuple[float, Decimal | None]] = {}
        self.error = ""
        self.lag_ms = 0
        self.leads = False
        self.stopping = asyncio.Event()

    async def step(self) -> float:
        """Do the next thing there is to do; returns after how many seconds to come again."""
        try:
            wait = self._not_before - self._guard.clock.monotonic()
            self._lease.error = self.error
            self.leads = await self._call(self._lease.take)
            if not self.leads:
                self._size, self._suspect, self._replayed = self._most, 0, 0
                return STANDBY
            if wait > 0.001:  # Retry-After, or as many batches a minute as the other side allows
                return min(wait, STANDBY)
            began = self._guard.clock.monotonic()
            delay = await self._work()
            self._failures = 0
            # At most half of the time: requests are served beside it.
            return max(delay, min(_LONGEST_REST, self._guard.clock.monotonic() - began))
        except ExportFailed as failed:
            return self._failed(str(failed), failed.retry_after)
        except GuardError as error:  # storage
            return self._failed(f"storage: {error}", None)

    async def close(self) -> None:
        """Let others lead, and let go of the exporter."""
        try:
            if self.leads:
                await self._call(self._lease.drop)
        except GuardError as error:
            logger.warning("exporter %s: its lease was not given back: %s", self.name, error)
        finally:
            self.leads = False
            if self._opened and (close := getattr(self._exporter, "close", None)) is not None:
                self._opened = False
                await close()

    async def pending(self) -> bool:
        """Whether there are records behind the cursor."""
        return bool(await self._page(await self._cursor(), 1))

    async def _work(self) -> float:
        if not self._opened:
            if (opening := getattr(self._exporter, "open", None)) is not None:
                await self._bounded(opening())
            self._opened = True
        owing = await self._bounded(catch_up()) if (catch_up := getattr(self._exporter, "catch_up", None)) else ""
        if (until := await self._call(self.letters.asked)) is not None and await self._replay(until):
            return self._interval
        cursor = await self._cursor()
        page = await self._page(cursor, self._size)
        full = len(page) >= self._size
        if not page:
            self.lag_ms, self.error = 0, owing
            return IDLE
        self.lag_ms = max(0, self._guard.now_ms() - page[0].entry.at_ms)
        self._done = {sequence for sequence in self._done if sequence > cursor}
        self._put_off = {sequence: times for sequence, times in self._put_off.items() if sequence > cursor}
        left = [record_from_entry(stored) for stored in page if stored.seq not in self._done]
        if not left:
            await self._advance(page[-1].seq)
            return 0.0
        records = await self._with_markup(left)
        try:
            result = await self._export(records)
        except BatchRefused as refused:
            if len(records) > 1:
                self._suspect = max(self._suspect, records[-1].sequence)
                self._size = len(records) // 2
                return self._interval
            result = ExportResult({0: str(refused)})
        again, rejected = self._sorted(records, result)
        await self._lay_aside(records, rejected)
        _count(self.name, len(records) - len(rejected) - len(again), len(rejected))
        if again:
            self._done.update(record.sequence for place, record in enumerate(records) if place not in again)
            raise ExportFailed(next(iter(again.values())))
        await self._advance(page[-1].seq)
        if records[-1].sequence >= self._suspect or (len(records) == 1 and rejected):
            self._size = min(self._most, self._size * 2)
        self.error = owing
        return self._interval if full else max(self._interval, GATHERING)

    def _sorted(self, records: Sequence[UsageRecord], result: ExportResult) -> tuple[dict[int, str], dict[int, str]]:
        """Which rows come again, and which are dead letters, and why."""
        again, rejected = dict(result.again), dict(result.rejected)
        if len(again) + len(rejected) < len(records):  # others were taken: these may be the ones that never will be
            for place, reason in result.again.items():
                sequence = records[place].sequence
                self._put_off[sequence] = self._put_off.get(sequence, 0) + 1
                if self._put_off[sequence] >= _MOST_PUT_OFF:
                    rejected[place] = again.pop(place, reason)
        return again, rejected

    async def _replay(self, until: int) -> bool:
        """Send dead letters again that somebody asked for; whether there were any left."""
        page = await self._call(lambda backend: self.letters.page(backend, self._replayed, min(self._size, 100)))
        page = [letter for letter in page if letter.sequence <= until]
        if not page:
            await self._call(self.letters.answered)
            self._replayed = 0
            return False
        found: list[tuple[DeadLetter, UsageRecord]] = []
        for letter in page:
            record = await self._call(partial(self.letters.record, letter=letter))
            if record is None:
                await self._call(partial(self.letters.remove, letter=letter))
            else:
                found.append((letter, record))
        if found:
            records = await self._with_markup([record for _, record in found])
            try:
                result = await self._export(records)
            except BatchRefused as refused:
                if len(records) > 1:
                    self._size = len(records) // 2
                    return True
                result = ExportResult({0: str(refused)})
            rejected = {**result.rejected, **result.again}  # they stay, and are sent again by whoever asks for it
            await self._lay_aside(records, rejected)
            for place, (letter, _) in enumerate(found):
                if place not in rejected:
                    await self._call(partial(self.letters.remove, letter=letter))
            _count(self.name, len(records) - len(rejected), 0)
            self._size = min(self._most, self._size * 2)
        self._replayed = page[-1].sequence
        return True

    async def _export(self, records: Sequence[UsageRecord]) -> ExportResult:
        self._not_before = self._guard.clock.monotonic() + self._interval
        try:
            result = await self._bounded(self._exporter.export(records)) or ExportResult()
        except _TookTooLong:  # it may only be slow, and the same again would take as long
            self._suspect = max(self._suspect, records[-1].sequence)
            self._size = max(1, len(records) // 2)
            raise
        named = sorted((*result.rejected, *result.again))
        if not all(0 <= place < len(records) for place in named):
            raise ExportFailed(f"it rejected rows that were not in the batch of {len(records)}: {named[:3]}")
        return result

    async def _bounded(self, work: Awaitable[T]) -> T:
        limit = asyncio.timeout(EXPORT_TIMEOUT)
        try:
            with self._quiet():
                async with limit:
                    return await work
        except (ExportFailed, BatchRefused):
            raise
        except Exception as error:
            if limit.expired():
                raise _TookTooLong(f"it took longer than {EXPORT_TIMEOUT:g} s") from None
            logger.debug("exporter %s failed", self.name, exc_info=True)
            raise ExportFailed(f"{type(error).__name__}: {str(error)[:200]}") from error

    async def _lay_aside(self, records: Sequence[UsageRecord], rejected: dict[int, str]) -> None:
        now = self._guard.now_ms()
        for place, why in sorted(rejected.items()):
            record = records[place]
            reason = redacted(why, record)
            logger.error("exporter %s: record %s is a dead letter: %s", self.name, record.sequence, reason)
            await self._call(partial(self.letters.bury, record=record, reason=reason, now_ms=now))

    async def _advance(self, sequence: int) -> None:
        if not self._lease.held:
            raise ExportFailed("its lease ended meanwhile; whoever leads now sends the batch again")
        await self._call(lambda backend: backend.set_cursor(cursor_name(self.name), sequence))

    async def _cursor(self) -> int:
        found = await self._call(lambda backend: backend.cursor(cursor_name(self.name)))
        if found is None or found >= DONE:  # new here: from now on nothing is pruned that it has not read
            found = 0
            if not getattr(self._exporter, "from_start", True):
                newest = await self._call(lambda backend: backend.entries(RecordQuery(descending=True, limit=1)))
                found = newest[0].seq if newest else 0
            await self._call(lambda backend: backend.set_cursor(cursor_name(self.name), found))
        return found

    async def _page(self, after: int, limit: int) -> list[StoredEntry]:
        return await self._call(lambda backend: backend.entries(RecordQuery(after=after, limit=limit)))

    async def _call(self, work: Callable[[Backend], Awaitable[T]]) -> T:
        return await self._guard.lane().call(work)

    async def _with_markup(self, records: list[UsageRecord]) -> list[UsageRecord]:
        now = self._guard.clock.monotonic()
        if len(self._markups) > _MAX_MARKUPS:
            self._markups.clear()
        customers = {record.customer_identifier for record in records}
        unknown = [name for name in customers if self._markups.get(name, (-_MARKUP_S, None))[0] <= now - _MARKUP_S]
        for start in range(0, len(unknown), _FEW):  # so few that the others are never read
            some = unknown[start : start + _FEW]
            found = await markups_of(self._guard, some)
            self._markups |= {name: (now, found.get(name)) for name in some}
        return [replace(record, markup_percentage=self._markups[record.customer_identifier][1]) for record in records]

    def _failed(self, reason: str, retry_after: float | None) -> float:
        self.error = reason
        self._failures += 1
        longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(self._failures, 20))
        wait = random.uniform(longest / 2, longest)
        if retry_after is not None:
            wait = max(wait, retry_after)
        # Not before the exporter's interval is over, either: what failed counts among the batches of a minute.
        self._not_before = max(self._not_before, self._guard.clock.monotonic() + wait)
        level = logging.WARNING if self._failures in (1, 10) else logging.DEBUG
        logger.log(level, "exporter %s: %s; again in %.0f s", self.name, reason, wait)
        return min(wait, STANDBY)  # comes by in between, to keep its lease


def _count(name: str, delivered: int, dead: int) -> None:
    """Count what became of records."""
    if telemetry.on:
        telemetry.exported(name, delivered, dead)
