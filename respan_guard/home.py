"""A home: the event loop that owns a connection to storage, and the inbox of what it shall do.

Its drain, the one task that awaits the backend, is in `respan_guard.drain`; those who wait for what becomes of an
operation are in `respan_guard.submitting`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TypeVar

from respan_guard.backends.base import Admit, Backend, Limit, Op, Outcome, Record
from respan_guard.clock import Clock
from respan_guard.errors import BackendError, GuardError, StorageUnavailable
from respan_guard.home_rates import Counted
from respan_guard.items import Item
from respan_guard.journal import Journal
from respan_guard.overflow import Overflowing
from respan_guard.rate_storage import RateStorage
from respan_guard.telemetry import telemetry

__all__ = ["Home"]

T = TypeVar("T")
_OPENING = 30.0  # seconds that opening may take: it may migrate
_CLOSE_TIMEOUT = 6.0
_OPEN_AGAIN = 5.0  # seconds until work that found storage closed asks again
logger = logging.getLogger("respan_guard")


class Home(Overflowing):
    """One event loop's way to storage. Methods run on that loop, except `post`, which runs anywhere.

    Args:
        backend: The store; this home's own.
        clock: The guard's clock.
        journal: Where records go that storage won't take.
        inherit: Takes over, from any thread, what is posted to a home that is closed or whose loop is gone.
        timeout: Seconds that storage may take.
        server_clock: Whether the store's own clock counts.
        rates: Where rates are kept that the store shall not keep.
        limits: What it will be asked for, as far as the settings say it.
    """

    def __init__(
        self,
        backend: Backend,
        clock: Clock,
        journal: Journal,
        inherit: Callable[[Sequence[Op]], None],
        *,
        timeout: float,
        server_clock: bool = False,
        rates: RateStorage | None = None,
        limits: Sequence[Limit] = (),
    ) -> None:
        super().__init__(backend, clock, journal, timeout=timeout, server_clock=server_clock)
        self._inherit = inherit
        self._inheriting = threading.Lock()
        self._thread = threading.get_ident()
        self._opening: asyncio.Task[None] | None = None
        self._limits = limits
        self.rates = rates.open(timeout) if rates is not None else None
        self._looked_at = (0.0, 0)
        self.begun = False  # it was opened, or goes on without storage
        self.asleep = True  # nobody looks at the kill switch here
        self.wakes: Callable[[], Coroutine[object, object, None]] | None = None  # has somebody look again

    # -- what callers do ---------------------------------------------------------------------------

    def post(self, *ops: Op) -> None:
        """Apply `ops` in this order, some time soon. A plain append: from any thread, never blocks."""
        for op in ops:
            self._inbox.append(Item(op, None))
        if self._gone:  # looked at after the append, as `retire` takes after it has set this
            self._pass_on()
        elif self._draining:
            if self.breaker.failures and not self.breaker.is_open:
                self._call_threadsafe(self._wake.set)
        elif threading.get_ident() == self._thread and not self.loop.is_closed():
            self._start()
        else:
            self._call_threadsafe(self._start)

    async def call(self, work: Callable[[Backend], Awaitable[T]], timeout: float | None = 10.0) -> T:  # noqa: ASYNC109
        """Run a read or a change of customers.

        Nobody waits for a store that hangs or a thread that is busy: the work is a task of this home's, which is
        cancelled when its caller gives up, and ends when it can.

        Raises:
            StorageUnavailable: No answer within `timeout` seconds (None: wait as long as it takes), or storage is down.
                What storage has begun by then may still be done. To change a customer again is safe: a change names the
                revision that was read, and what is so already is not written.
        """
        if self.breaker.is_open:
            raise StorageUnavailable(f"storage is down: {self.breaker.cause}")
        if self._gone:  # it would be opened again, and nobody would close it
            raise StorageUnavailable("the guard was closed meanwhile")
        fault: Exception | None = None
        began = self.loop.time()
        task = self._share(self._opened_for(work))
        try:
            async with asyncio.timeout(timeout):
                return await _outcome(task)
        except TimeoutError as error:
            fault = error
            raise StorageUnavailable(f"storage gave no answer within {timeout:g} s") from None
        except GuardError as error:
            fault = error if isinstance(error, BackendError) else None
            raise
        except Exception as error:  # of the driver, untranslated: not the app's to know
            fault = error
            raise StorageUnavailable(f"the storage backend failed: {error!r}") from error
        finally:
            task.cancel()
            if telemetry.on:
                telemetry.stored("call", self.loop.time() - began, fault)

    @property
    def home(self) -> Home:
        """This one; a lane tells its home."""
        return self

    @property
    def opened(self) -> bool:
        """Whether storage was opened."""
        return self._opened

    @property
    def waiting(self) -> int:
        """How many operations wait here."""
        return len(self._inbox) + len(self._batch) + len(self._aside)

    def repeat(self, every: float, work: Callable[[], Awaitable[bool]]) -> None:
        """Do `work` every so many seconds until it says False or the home closes; from any thread.

        Whatever it raises is logged, and it is done again.
        """

        # A timer, not a task that sleeps: a loop that is closed under us has nothing to complain about.
        def due() -> None:
            if not self._closed and not self._gone:
                self._keep(once())

        async def once() -> None:
            try:
                again = await work()
            except Exception:
                logger.exception("background work failed, and is done again")
                again = True
            if again:
                self.loop.call_later(every, due)

        self._call_threadsafe(lambda: self.loop.call_later(every, due))

    def idle(self, looks: int) -> bool:
        """Whether nothing was sent since the last so many times that this was asked."""
        sent_at, count = self._looked_at
        self._looked_at = (self._sent_at, count + 1 if sent_at == self._sent_at else 0)
        return self._looked_at[1] >= looks

    async def count_rates(self, customer: str, rates: Sequence[Limit], requests: int) -> list[Counted]:
        """Count requests in the storage of rates; see `HomeRates.count`."""
        assert self.rates is not None  # asked only where `rate_limit_storage` is set
        return await self.rates.count(customer, rates, requests)

    async def look_at_rates(self, customer: str, rates: Sequence[Limit]) -> list[Counted]:
        """Where rates stand; see `HomeRates.look`."""
        assert self.rates is not None
        return await self.rates.look(customer, rates)

    def post_call(self, work: Callable[[Backend], Awaitable[object]], delay: float = 0.0) -> None:
        """Run `work` after `delay` seconds, once storage is open, from any thread; a failure is logged, not raised."""
        self._call_threadsafe(lambda: self.loop.call_later(delay, self._spawn, work))

    async def flush(self) -> None:
        """Return when everything that was sent before is stored; much may wait, so this may take a while.

        Raises:
            StorageUnavailable: Storage did not take it in time; it is kept.
        """
        if self._gone:
            return
        try:
            async with asyncio.timeout(self.timeout if self.breaker.failures else max(self.timeout, 5.0)):
                came_back = -1
                while came_back != self._came_back:  # else the marker has passed by what waits here again
                    if self._overflow is not None:
                        await asyncio.wait([self._overflow])
                    came_back = self._came_back
                    marker: asyncio.Future[Outcome] = self.loop.create_future()
                    self._inbox.append(Item(None, marker))
                    self._start()
                    self._wake.set()  # somebody waits: no pause before the next try
                    await marker
                    if self._overflow is not None:
                        await asyncio.wait([self._overflow])  # it may have begun since
                if self._catching_up is not None and not self._catching_up.done():
                    await self._caught_up()
        except TimeoutError:
            raise StorageUnavailable("storage did not take all usage records in time; they are kept") from None

    # -- life --------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the backend once, and post what earlier processes left in their journals.

        All who need it wait for the same opening, and whoever gives up waiting doesn't end it.
        """
        if self._opened:
            return
        if self._gone:  # nobody would close it again
            raise StorageUnavailable("the guard was closed meanwhile")
        if self._opening is None or self._opening.done():
            self._opening = self._share(self._open())
        await _outcome(self._opening)

    async def _open(self) -> None:
        self.backend.check_limits(self._limits)
        self._journal.look()
        try:
            async with asyncio.timeout(_OPENING):
                await self.backend.open()
        except TimeoutError:
            raise StorageUnavailable(f"storage could not be opened within {_OPENING:g} s") from None
        self._opened = True
        if self.backend.identity is not None:
            self._journal.met(self.backend.identity)
        for file in self._journal.orphans():
            self._keep(self._adopted(file))

    async def close(self) -> None:
        """Store what is in the inbox, or journal what storage won't take, and let go of the backend.

        Cancelled, it does the latter at once.
        """
        self._closed = True
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                if self._inbox or self._draining:
                    await self.flush()
                if self._opened and (file := self._journal.rotate()) is not None:
                    await self._replay(file)
        except (GuardError, TimeoutError) as error:
            logger.warning("closing with storage unavailable: %s", error)
        finally:
            try:
                tasks = {task for task in (self._drain_task, *self._calls) if task is not None and not task.done()}
                for task in tasks:
                    task.cancel()
                if tasks:  # a store that hangs may not even be cancelled
                    await asyncio.wait(tasks, timeout=self.timeout)
            finally:
                self._leave()
                await self._disconnect()

    async def _disconnect(self) -> None:
        try:
            if self.rates is not None:
                await self.rates.close()
        finally:
            if self._opened:
                self._opened = False
                await self.backend.close()

    def _leave(self) -> None:
        """Nothing waits here any more: records go to disk, callers get an answer. Never waits for the loop."""
        self._gone = True
        self._unsend()
        for item in list(self._inbox):
            if item.future is not None and not item.future.done():
                item.future.set_exception(StorageUnavailable("the guard was closed meanwhile"))
                item.future.exception()  # whoever waited may be gone, too
        try:
            self.spill()
        except Exception as disk:
            lost = sum(isinstance(item.op, Record) for item in self._inbox)
            logger.error("%d usage records are lost: neither storage nor the journal took them: %s", lost, disk)
            self._inbox.clear()

    def retire(self) -> None:
        """Pass on what waits and all that is posted from now on; for a home whose loop is gone. From any thread."""
        self._gone = True
        self._unsend()
        self._pass_on()
        self.backend.abandon()

    def forget(self) -> None:
        """After a fork, in the child: what waits is the parent's; what is posted here from now on is passed on."""
        self._inheriting = threading.Lock()
        self._inbox, self._batch, self._parts, self._gone = deque(), [], deque(), True
        self.backend.abandon()

    def _pass_on(self) -> None:
        with self._inheriting:  # so that two threads can't swap a record and its release
            items = [self._inbox.popleft() for _ in range(len(self._inbox))]
            for item in items:
                item.taken = True
            ops = [op for item in items if (op := item.op) is not None and not isinstance(op, Admit)]
            if ops:
                self._inherit(ops)

    def _works(self) -> None:
        if self.asleep and self.wakes is not None and not self._closed:
            self._keep(self.wakes())
        if not self._closed:
            self._make_room()

    def _spawn(self, work: Callable[[Backend], Awaitable[object]]) -> None:
        # A timer may come due while the loop of a home that was closed is ended.
        if not self._closed and not self._gone:
            self._keep(self._guarded(work))

    def _share(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Keep a task that may outlive those who wait for its outcome: nobody then misses it."""
        task = self._keep(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _opened_for(self, work: Callable[[Backend], Awaitable[T]]) -> T:
        await self.open()
        return await work(self.backend)

    async def _guarded(self, work: Callable[[Backend], Awaitable[object]]) -> None:
        try:
            await self.open()
        except Exception as error:
            logger.debug("background work waits for storage: %r", error)
            self.post_call(work, _OPEN_AGAIN)
            return
        try:
            await work(self.backend)
        except GuardError as error:
            logger.warning("background work on storage failed: %s", error)
        except Exception:
            logger.exception("background work on storage failed")


async def _outcome(task: asyncio.Task[T]) -> T:
    """What becomes of a home's task. To give up waiting doesn't touch it."""
    await asyncio.wait({task})
    if task.cancelled():
        raise StorageUnavailable("the guard was closed meanwhile")
    return task.result()
