"""Those who wait for what becomes of an operation: how long, and what is true of it when they are told."""

from __future__ import annotations

import asyncio
from abc import abstractmethod

from respan_guard.backends.base import Admit, Entry, Op, Outcome, Record, Recorded, Release, TooLate
from respan_guard.drain import Drain
from respan_guard.errors import BackendError, CounterOverflow, StorageUnavailable
from respan_guard.items import Item, Unstorable, Waits
from respan_guard.threads import in_thread

__all__ = ["Submitting"]


class Submitting(Drain):
    """The half of a home that is waited for."""

    @abstractmethod
    def post(self, *ops: Op) -> None:
        """Apply `ops` in this order, some time soon."""

    async def submit(self, op: Op) -> Outcome:
        """Apply `op` with the next batch and return its outcome.

        Raises:
            StorageUnavailable: No answer within the timeout. An admit that still waited is withdrawn; everything
                else stays in the inbox.
            BackendError: The store can't do it.
        """
        return await self._submit(Item(op, None), op)

    async def _submit(self, item: Item, op: Op) -> Outcome:
        if self._gone:
            raise StorageUnavailable("the guard was closed meanwhile")
        if self.breaker.is_open:
            if not isinstance(op, Admit):
                self._inbox.append(item)
            raise StorageUnavailable(f"storage is down: {self.breaker.cause}")
        future: asyncio.Future[Outcome] = self.loop.create_future()
        item.future = future
        self._inbox.append(item)
        self._start()
        timer = self.loop.call_later(self.timeout, self._give_up, future)
        try:
            return await future
        except BaseException:
            if isinstance(op, Admit):
                # Whoever waited is gone and won't end it. It may have run, and its answer may even be here
                # already. Behind it in the inbox, a release is right in each case: of an unknown id it is nothing.
                self.post(Release(op.customer, op.id))
            raise
        finally:
            timer.cancel()

    async def record(self, entry: Entry) -> Recorded | TooLate | None:
        """Book `entry`. Once this returns the record is safe: stored, or (None) in the journal on disk.

        Raises:
            StorageUnavailable: Neither storage nor the journal took it; it stays in the inbox.
        """
        try:
            return await self._record(Item(op := Record(entry), None), op)
        except (CounterOverflow, Unstorable):
            return None  # kept as a dead letter, and logged

    async def book(self, entry: Entry) -> Recorded | TooLate | Waits | None:
        """As `record`, for somebody who reports it again if this raises: then it is not stored after all.

        Raises:
            StorageUnavailable: Neither storage nor the journal took it, and it is not kept.
            CounterOverflow: A sum would pass what can be counted; it is a dead letter.
            Unstorable: Storage can't take it, ever; it is a dead letter.
        """
        item = Item(op := Record(entry), None)
        try:
            return await self._record(item, op)
        except StorageUnavailable:
            # What storage was sent may be there, so it can't be taken back: it is sent again under its id.
            if self._gone or item.withdraw():
                raise
            return Waits()

    async def _record(self, item: Item, op: Record) -> Recorded | TooLate | None:
        try:
            outcome = await self._submit(item, op)
        except (CounterOverflow, Unstorable):
            raise
        except BackendError as error:
            try:
                await in_thread(lambda: self._journal.write([op.entry]))
            except OSError as disk:
                raise StorageUnavailable(f"{error}; the journal can't be written either: {disk}") from error
            return None
        return outcome if isinstance(outcome, (Recorded, TooLate)) else None

    def _give_up(self, future: asyncio.Future[Outcome]) -> None:
        if not future.done():
            error = StorageUnavailable(f"storage gave no answer within {self.timeout:g} s")
            future.set_exception(error)
            if self._batch:
                self.breaker.stalled((self.loop.time() - self._sent_at) / self.timeout, str(error))
