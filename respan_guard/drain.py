"""The drain: what waits in an inbox goes to storage in batches, and nothing of it is lost.

Nobody but the drain's task awaits the backend, so a caller that is cancelled, times out or
whose loop closes can't leave a transaction open or a reply unread. The drain takes everything that
arrived while the last batch ran: batches grow with the load and a lone operation never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from respan_guard.backends.base import Admit, Backend, Entry, Op, Outcome, Record, Release, Renew, TooLate
from respan_guard.breaker import Breaker
from respan_guard.clock import Clock
from respan_guard.errors import BackendError, CounterOverflow, StorageUnavailable
from respan_guard.journal import Journal
from respan_guard.observing import observe_entry
from respan_guard.telemetry import telemetry

__all__ = ["BATCH", "Drain", "Item", "Unstorable", "Waits"]

BATCH = 512
"""The most ops that travel together."""
_BACKLOG = 10_000
_LOG_EVERY = 10.0
_STUCK = 8  # deadlines after which a batch without an answer is sent again: ids make that safe
_LEAST_STUCK = 2.0  # seconds
_OPENING = 30.0  # seconds that opening may take: it may migrate
_PROBE = Release("", "respan-guard-probe")  # nobody's: every store answers that it is gone, and changes nothing
_POISON = (CounterOverflow, TypeError, ValueError, OverflowError)  # of the data of one op: trying again won't help
logger = logging.getLogger("respan_guard")


class Unstorable(BackendError):
    """An op that storage can't take, ever."""


class Waits:
    """What came of a record that storage was sent and did not answer for: it is kept, and sent until it is stored."""


class Item:
    """An op that waits, and who waits for it."""

    __slots__ = ("future", "on_disk", "op", "taken")

    def __init__(self, op: Op | None, future: asyncio.Future[Outcome] | None, *, on_disk: bool = False) -> None:
        self.op = op  # None is a marker: its future tells when all before it is stored
        self.future = future
        self.on_disk = on_disk  # a record that lies in the journal, too
        self.taken = on_disk  # storage was asked, or the journal or another home has it

    def withdraw(self) -> bool:
        """Have the op never be done; False if somebody took it, so that it is or will be."""
        # In this order: others, on threads of their own, say that they take it before they look at what it is.
        op, self.op = self.op, None
        if self.taken:
            self.op = op
            return False
        return True


class Drain(ABC):
    """The sending half of a home.

    Args:
        backend: The store; this home's own.
        clock: The guard's clock.
        journal: Where records go that storage won't take.
        timeout: Seconds that storage may take.
        server_clock: Whether the store's own clock counts.
    """

    def __init__(
        self, backend: Backend, clock: Clock, journal: Journal, *, timeout: float, server_clock: bool = False
    ) -> None:
        self.backend = backend
        self.loop = asyncio.get_running_loop()
        self.timeout = timeout
        self._clock = clock
        self._server_clock = server_clock
        self._journal = journal
        self._inbox: deque[Item] = deque()
        self._batch: list[Item] = []  # what was taken out of the inbox and is not answered
        self._aside: list[Item] = []  # what was taken out of it and is being written to the journal
        self._draining = False
        self._drain_task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._opened = False
        self._gone = False
        self.breaker = Breaker()
        self._sent_at = 0.0
        self._logged_at = float("-inf")

    @abstractmethod
    async def open(self) -> None:
        """Open the backend, if it is not open."""

    @abstractmethod
    def _works(self) -> None:
        """Storage took a batch."""

    def spill(self) -> None:
        """Move the records that wait to the journal; other ops that wait are forgotten, holds expire.

        Raises:
            OSError: The disk won't take them; they still wait.
        """
        items = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for item in items:
            item.taken = True
        ops = [item.op for item in items]
        try:
            fresh = (op for item, op in zip(items, ops, strict=True) if not item.on_disk)
            self._journal.write([op.entry for op in fresh if isinstance(op, Record)])
        except BaseException:
            self._inbox.extendleft(reversed(items))
            raise
        self._inbox.extend(item for item, op in zip(items, ops, strict=True) if op is None or isinstance(op, Admit))

    def _call_threadsafe(self, function: Callable[[], object]) -> None:
        try:
            self.loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: whoever finds this home dead adopts its inbox
            logger.debug("a home's loop is closed; its inbox waits to be adopted")

    def _start(self) -> None:
        if not self._draining:
            self._draining = True
            self._drain_task = self.loop.create_task(self._drain())
        elif self.breaker.failures and not self.breaker.is_open:
            self._wake.set()

    async def _drain(self) -> None:
        while not self._gone:
            if self.breaker.failures:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self.breaker.pause)
                self._wake.clear()
            if self.breaker.is_open:
                await self._secure()
                await self._probe()
                continue
            self._take_batch()
            if not self._batch:
                # Tell posters first, look again after: a poster appends first and looks at the flag after.
                self._draining = False
                if not self._inbox:
                    return
                self._draining = True
                continue
            try:
                await self._apply()
            except BaseException:
                # The loop is ending under us. Whoever adopts this inbox sends the batch again; ids make that safe.
                self._unsend()
                self._draining = False
                raise

    def _take_batch(self) -> None:
        batch: list[Item] = []
        while self._inbox and len(batch) < BATCH:
            item = self._inbox.popleft()
            if item.future is not None and item.future.done() and not isinstance(item.op, Record):
                continue  # withdrawn: its caller gave up while it waited
            batch.append(item)
        self._batch = batch

    def _unsend(self) -> None:
        """Put what was not answered, or not written yet, back to where it came from."""
        batch, self._batch, self._aside = self._batch + self._aside, [], []
        self._inbox.extendleft(reversed(batch))

    async def _apply(self) -> None:
        await self._try(self._batch, max(_STUCK * self.timeout, _LEAST_STUCK))

    async def _probe(self) -> None:
        """Find out whether storage is back, at nobody's expense."""
        await self._try([Item(_PROBE, None)], self.timeout)

    async def _secure(self) -> None:
        """Copy records that wait to the journal: this process may die before storage is back.

        They stay here, in front of their releases. Both will be sent: the store knows the ids.
        """
        fresh = [item for item in list(self._inbox) if item.op.__class__ is Record and not item.on_disk]
        if not fresh:
            return
        entries = [item.op.entry for item in fresh if isinstance(item.op, Record)]
        waited = [item for item in fresh if not item.taken]
        for item in waited:  # nobody withdraws what is being written
            item.taken = True
        try:
            await asyncio.to_thread(self._journal.write, entries)
        except OSError as disk:
            for item in waited:
                item.taken = False
            logger.error("neither storage nor the journal takes usage records: %s", disk)
        else:
            for item in fresh:
                item.on_disk = True

    async def _try(self, batch: list[Item], patience: float) -> None:
        self._sent_at = self.loop.time()
        fault: Exception | None = None
        try:
            if not self._opened:
                async with asyncio.timeout(_OPENING):
                    await self.open()
            async with asyncio.timeout(patience):
                await self._send(batch)
        except BackendError as error:
            fault = error
            await self._failed(error)
        except Exception as error:  # a fault of ours or of the driver must not end the drain
            fault = error
            await self._failed(StorageUnavailable(f"the storage backend failed: {error!r}"), error)
        else:
            self._batch = []
            if self.breaker.worked():
                logger.warning("storage is available again")
            self._works()
        if telemetry.on:
            telemetry.stored("apply", self.loop.time() - self._sent_at, fault)

    async def _send(self, batch: list[Item]) -> None:
        ops = [item.op for item in batch if item.op is not None]
        for item in batch:
            item.taken = True
        try:
            outcomes = await self.backend.apply(ops, None if self._server_clock else self._clock.now_ms())
        except _POISON as error:
            if len(batch) == 1:
                self._refuse(batch[0], error)
                return
            while self._batch:  # one op of the batch is the poison; find it, and let the others through in order
                await self._send(self._batch[:1])
                del self._batch[:1]
        else:
            answers = iter(outcomes)
            for item in batch:
                self._answer(item, None if item.op is None else next(answers))

    def _answer(self, item: Item, outcome: Outcome | None) -> None:
        if isinstance(outcome, TooLate) and isinstance(item.op, Record):
            self._bury(item.op.entry, "its day is pruned")
        elif telemetry.on and isinstance(item.op, Record):
            observe_entry(item.op.entry, outcome)
        if item.future is not None and not item.future.done():
            item.future.set_result(outcome)  # type: ignore[arg-type]  # a marker's result is not read

    def _refuse(self, item: Item, error: Exception) -> None:
        if isinstance(item.op, Record):
            self._bury(item.op.entry, str(error))
        if item.future is not None and not item.future.done():
            unstorable = error if isinstance(error, BackendError) else Unstorable(f"it can't be stored: {error}")
            item.future.set_exception(unstorable)

    def _bury(self, entry: Entry, why: str) -> None:
        logger.error("a usage record can't be stored and is kept as a dead letter: %s", why)
        try:
            self._journal.bury(entry, why)
        except OSError as disk:
            logger.error("the dead letter can't be written either (%s), this is it: %r", disk, entry)

    async def _failed(self, error: BackendError, fault: Exception | None = None) -> None:
        """Answer those who wait, and keep what must not be lost."""
        was_open = self.breaker.is_open
        self.breaker.failed(str(error))
        now = self._clock.monotonic()
        if now - self._logged_at >= _LOG_EVERY:
            self._logged_at = now
            logger.warning("storage is unavailable: %s", error, exc_info=fault)
        kept: list[Item] = []
        batch, self._batch = self._batch, []
        if self.breaker.is_open and not was_open:  # nobody else waits for what is taken for dead
            batch += [self._inbox.popleft() for _ in range(len(self._inbox))]
        for item in batch:
            if item.op is None:
                kept.append(item)
                continue
            if item.future is not None and not item.future.done():
                item.future.set_exception(error)
            if not isinstance(item.op, (Admit, Renew)):
                item.future = None
                kept.append(item)
        self._inbox.extendleft(reversed(kept))
        if len(self._inbox) > _BACKLOG:
            try:
                await asyncio.to_thread(self.spill)
            except OSError as disk:
                logger.error("neither storage nor the journal takes usage records: %s", disk)
