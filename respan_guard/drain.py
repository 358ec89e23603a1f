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
from collections.abc import Awaitable, Callable

from respan_guard.backends.base import Admit, Backend, Outcome, Record, Release, Renew, TooLate
from respan_guard.breaker import Breaker, Notices
from respan_guard.clock import Clock
from respan_guard.errors import BackendError, ConfigurationError, CounterOverflow, StorageUnavailable
from respan_guard.items import Item, Part, Unstorable
from respan_guard.journal import PRUNED, Journal
from respan_guard.observing import observe_entry
from respan_guard.telemetry import telemetry
from respan_guard.threads import in_thread

__all__ = ["BATCH", "Drain"]

BATCH = 512
"""The most ops that travel together."""
_LEAST = 8  # ops that are not worth parting
_BACKLOG = 10_000
_STUCK = 8  # deadlines after which a batch without an answer is sent again: ids make that safe
_LEAST_STUCK = 2.0  # seconds
_PROBE = Release("", "respan-guard-probe")  # nobody's: every store answers that it is gone, and changes nothing
_PROBED = ("probe", "written")  # space and key of a fact that nobody reads
_POISON = (CounterOverflow, TypeError, ValueError, OverflowError, AttributeError)  # of one op: trying again won't help
logger = logging.getLogger("respan_guard")


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
        self._parts: deque[Part] = deque()  # the same, as it travels
        self._aside: list[Item] = []  # what was taken out of it and is being written to the journal
        self._draining = False
        self._drain_task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._opened = False
        self._gone = False
        self.breaker = Breaker()
        self._notices = Notices("storage")
        self._sent_at = 0.0

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
        try:
            while not self._gone:
                try:
                    if not await self._turn():
                        return
                except Exception as fault:  # of ours; without a drain nothing would ever be sent again
                    await self._recall()
                    self._unsend()
                    self.breaker.failed(f"a fault of the guard: {fault!r}")
                    self._notices.failed(self.breaker.cause, self._clock.monotonic(), fault)
        except BaseException as end:
            # The loop is ending under us. Whoever adopts this inbox sends the batch again; ids make that safe.
            if not isinstance(end, GeneratorExit):  # else it has ended, and nothing can be awaited any more
                await self._recall()
            self._unsend()
            self._draining = False
            raise

    async def _turn(self) -> bool:
        """Send what waits, or see whether storage is back; whether to go on."""
        if self.breaker.failures:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.breaker.pause)
            self._wake.clear()
        if self.breaker.is_open:
            await self._secure()
            await self._probe()
            return True
        self._take()
        if not self._parts:
            # Tell posters first, look again after: a poster appends first and looks at the flag after.
            self._draining = False
            if not self._inbox:
                return False
            self._draining = True
            return True
        await self._try(self._advance, max(_STUCK * self.timeout, _LEAST_STUCK))
        if self._parts:
            await asyncio.sleep(0)  # those who were answered ask again, to travel beside what is under way
        return True

    def _take(self) -> None:
        """Take what waits, in as many parts as may be under way at a time; they get alike in size.

        A part may have to be sent again when the next one is applied already. So no customer's ops are in two parts:
        those that came later wait with all that follow them, and a marker waits for all parts.
        """
        at_once = 1 if self.breaker.failures else self.backend.at_once
        while self._inbox and len(self._parts) < at_once:
            share = max(-(-(len(self._inbox) + len(self._batch)) // at_once), _LEAST)
            busy = {item.customer for part in self._parts for item in part.items}
            items: list[Item] = []
            waits: list[Item] = []
            mine: set[str | None] = set()
            while self._inbox and len(items) < BATCH and len(waits) < BATCH:
                item = self._inbox.popleft()
                if item.future is not None and item.future.done() and not isinstance(item.op, Record):
                    continue  # withdrawn: its caller gave up while it waited
                if item.customer is None and (self._parts or waits):
                    waits.append(item)
                    break
                if item.customer in busy or (len(items) >= share and item.customer not in mine):
                    waits.append(item)
                else:
                    items.append(item)
                    mine.add(item.customer)
            self._inbox.extendleft(reversed(waits))
            if not items:
                break
            self._batch = self._batch + items
            self._parts.append(Part(items))

    def _unsend(self) -> None:
        """Put what was not answered, or not written yet, back to where it came from."""
        batch, self._batch, self._aside = self._batch + self._aside, [], []
        self._parts = deque()
        self._inbox.extendleft(reversed(batch))

    async def _recall(self) -> None:
        """Wait for no part any more. What was under way is still in the batch, and whether it was applied unknown."""
        parts, self._parts = self._parts, deque()
        tasks = [part.answers for part in parts if isinstance(part.answers, asyncio.Task)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _probe(self) -> None:
        """Find out whether storage is back, and takes writes, at nobody's expense."""
        await self._try(lambda: self._alone(Item(_PROBE, None)), self.timeout)

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
            await in_thread(lambda: self._journal.write(entries))
        except Exception as disk:
            for item in waited:
                item.taken = False
            self._notices.unkept(disk, self._clock.monotonic())
        else:
            for item in fresh:
                item.on_disk = True

    async def _try(self, work: Callable[[], Awaitable[None]], patience: float) -> None:
        self._sent_at = self.loop.time()
        fault: Exception | None = None
        try:
            if not self._opened:
                await self.open()
            async with asyncio.timeout(patience):
                await work()
                if self.breaker.failures or self.breaker.is_open:
                    # Storage that is full or read-only answers what only reads. A write that changes nothing tells.
                    await self.backend.set_fact(*_PROBED, str(self._clock.now_ms()))
        except Exception as error:  # also a fault of ours or of the driver must not end the drain
            fault = error
            await self._recall()
            if isinstance(error, BackendError):
                await self._failed(error)
            elif isinstance(error, TimeoutError):
                await self._failed(StorageUnavailable(f"storage gave no answer within {patience:g} s"))
            elif isinstance(error, ConfigurationError):
                await self._failed(StorageUnavailable(str(error)))
            else:
                await self._failed(StorageUnavailable(f"the storage backend failed: {error!r}"), error)
        else:
            self.breaker.worked()
            self._notices.worked()
            self._works()
        if telemetry.on:
            telemetry.stored("apply", self.loop.time() - self._sent_at, fault)

    async def _advance(self) -> None:
        """Send the parts that were not sent yet, and hear what came of the oldest.

        The others are answered behind it, also where their answers came first: a marker tells that all before it is
        stored.
        """
        for part in self._parts:
            if part.answers is None:
                self._send(part)
        part = self._parts[0]
        assert part.answers is not None
        self._sent_at = part.sent_at
        try:
            answers = iter(await part.answers)
        except _POISON as error:
            if len(part.items) == 1:
                self._refuse(part.items[0], error)
                del self._batch[:1], part.items[:1]
            while part.items:  # one op is the poison; find it, and let the others through in order
                await self._alone(part.items[0])
                self._batch = self._batch[1:]
                del part.items[0]
        else:
            for item in part.items:
                self._answer(item, None if item.op is None else next(answers))
            self._batch = self._batch[len(part.items) :]
        self._parts.popleft()

    def _send(self, part: Part) -> None:
        for item in part.items:
            item.taken = True
        ops = [item.op for item in part.items if item.op is not None]
        part.sent_at = self.loop.time()
        sending = self.backend.apply(ops, self._now())
        # A task is needed, and costs something, only where one part is on its way while another is waited for.
        part.answers = sending if self.backend.at_once == 1 else self.loop.create_task(sending)

    async def _alone(self, item: Item) -> None:
        """Send one op, and refuse it if it can't be stored."""
        item.taken = True
        try:
            answers = await self.backend.apply([] if item.op is None else [item.op], self._now())
        except _POISON as error:
            self._refuse(item, error)
        else:
            self._answer(item, answers[0] if answers else None)

    def _now(self) -> int | None:
        return None if self._server_clock else self._clock.now_ms()

    def _answer(self, item: Item, outcome: Outcome | None) -> None:
        if isinstance(outcome, TooLate) and isinstance(item.op, Record):
            self._journal.bury(item.op.entry, PRUNED)
        elif telemetry.on and isinstance(item.op, Record):
            observe_entry(item.op.entry, outcome)
        if item.future is not None and not item.future.done():
            item.future.set_result(outcome)  # type: ignore[arg-type]  # a marker's result is not read

    def _refuse(self, item: Item, error: Exception) -> None:
        if isinstance(item.op, Record):
            self._journal.bury(item.op.entry, str(error))
        if item.future is not None and not item.future.done():
            unstorable = error if isinstance(error, BackendError) else Unstorable(f"it can't be stored: {error}")
            item.future.set_exception(unstorable)

    async def _failed(self, error: BackendError, fault: Exception | None = None) -> None:
        """Answer those who wait, and keep what must not be lost."""
        was_open = self.breaker.is_open
        self.breaker.failed(str(error))
        self._notices.failed(error, self._clock.monotonic(), fault)
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
                await in_thread(self.spill)
            except Exception as disk:
                self._notices.unkept(disk, self._clock.monotonic())
