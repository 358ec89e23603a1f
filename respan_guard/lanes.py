"""Which way leads to storage from here: the opening loop's own home, the guard thread's, or none at all.

A process has at most two homes. The loop that opened the guard owns the first, so that its requests
pay no hop between threads. Everybody else (another loop, a plain thread, an unopened guard, the
interpreter's exit) uses the second, which lives on one daemon thread with a loop of its own.
`memory://` is one locked store without connections and needs neither.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from respan_guard.backends.base import Admit, Backend, Entry, Limit, Op, Outcome, Record, Recorded, Release, TooLate
from respan_guard.clock import Clock
from respan_guard.errors import BackendError, CounterOverflow, GuardError, StorageUnavailable
from respan_guard.home import Home
from respan_guard.home_rates import Counted
from respan_guard.items import Waits
from respan_guard.journal import PRUNED, Journal
from respan_guard.observing import observe_entry
from respan_guard.telemetry import telemetry

__all__ = ["GuardThread", "Lane", "RemoteLane", "SharedLane", "run_inline"]

T = TypeVar("T")
_START_TIMEOUT = 10.0
logger = logging.getLogger("respan_guard")


def run_inline(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, without an event loop."""
    try:
        work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    work.close()
    raise RuntimeError("a shared backend must not suspend")


class Lane(Protocol):
    """A way to storage. `Home` is one, for code on its loop.

    Attributes:
        home: Where it leads to, if to a home.
        asleep: Whether nobody looks at the kill switch there.
    """

    @property
    def home(self) -> Home | None:
        """Where it leads to, if to a home."""
        ...

    @property
    def asleep(self) -> bool:
        """Whether nobody looks at the kill switch there."""
        ...

    async def submit(self, op: Op) -> Outcome:
        """Apply `op` and return its outcome."""
        ...

    async def record(self, entry: Entry) -> Recorded | TooLate | None:
        """Book `entry`; it is safe once this returns."""
        ...

    async def book(self, entry: Entry) -> Recorded | TooLate | Waits | None:
        """Book `entry` for somebody who reports it again if this raises; see `Home.book`."""
        ...

    def post(self, *ops: Op) -> None:
        """Apply `ops` in this order, some time soon; from any thread."""
        ...

    async def call(self, work: Callable[[Backend], Awaitable[T]], timeout: float | None = 10.0) -> T:  # noqa: ASYNC109
        """Run a read or a change of customers."""
        ...

    def post_call(self, work: Callable[[Backend], Awaitable[object]], delay: float = 0.0) -> None:
        """Run `work` some time soon; from any thread."""
        ...

    async def count_rates(self, customer: str, rates: Sequence[Limit], requests: int) -> list[Counted]:
        """Count requests in the storage of rates, where that is another one."""
        ...

    async def look_at_rates(self, customer: str, rates: Sequence[Limit]) -> list[Counted]:
        """Where rates stand that are kept in another storage."""
        ...

    async def flush(self) -> None:
        """Return when everything that was sent before is stored."""
        ...


class SharedLane:
    """Straight to a locked store that any thread may use. Nobody else can switch it, so nobody looks."""

    home = None
    asleep = False

    def __init__(self, backend: Backend, clock: Clock, journal: Journal) -> None:
        self.backend = backend
        self._journal = journal
        self._apply = backend.apply_now
        self._post = backend.post_now
        self._now = clock.now_ms

    async def submit(self, op: Op) -> Outcome:
        """Apply `op` and return its outcome."""
        return self._apply((op,), self._now())[0]

    async def record(self, entry: Entry) -> Recorded | TooLate | None:
        """Book `entry`. What the store can't count, and what a finalizer books within its own work, is posted."""
        try:
            outcome = self._apply((Record(entry),), self._now())[0]
        except BackendError:
            self.post(Record(entry))
            return None
        self._heard(entry, outcome)
        return outcome if isinstance(outcome, (Recorded, TooLate)) else None

    async def book(self, entry: Entry) -> Recorded | TooLate | Waits | None:
        """As `record`, but that the store can't count it is said, not logged."""
        try:
            outcome = self._apply((Record(entry),), self._now())[0]
        except CounterOverflow:
            raise
        except BackendError:
            self.post(Record(entry))
            return None
        self._heard(entry, outcome)
        return outcome if isinstance(outcome, (Recorded, TooLate)) else None

    def post(self, *ops: Op) -> None:
        """Apply `ops` in this order. What the store can't count is logged: nobody waits who could be told."""
        self._post(ops, self._now(), self._hear)

    def _hear(self, ops: Sequence[Op], outcomes: Sequence[Outcome]) -> None:
        for op, outcome in zip(ops, outcomes, strict=True):
            if isinstance(op, Record):
                self._heard(op.entry, outcome)

    def _heard(self, entry: Entry, outcome: Outcome) -> None:
        if isinstance(outcome, TooLate):
            self._journal.bury(entry, PRUNED)
        elif telemetry.on:
            observe_entry(entry, outcome)

    async def call(self, work: Callable[[Backend], Awaitable[T]], timeout: float | None = 10.0) -> T:  # noqa: ASYNC109
        """Run a read or a change of customers."""
        return await work(self.backend)

    def post_call(self, work: Callable[[Backend], Awaitable[object]], delay: float = 0.0) -> None:
        """Run `work` at once: nothing is gained by waiting."""

        async def run() -> None:
            try:
                await work(self.backend)
            except GuardError as error:
                logger.warning("background work on storage failed: %s", error)

        run_inline(run())

    async def count_rates(self, customer: str, rates: Sequence[Limit], requests: int) -> list[Counted]:
        """Never asked: where rates are kept apart, this store is used through a home."""
        raise RuntimeError("rate_limit_storage is not set")

    async def look_at_rates(self, customer: str, rates: Sequence[Limit]) -> list[Counted]:
        """As `count_rates`."""
        raise RuntimeError("rate_limit_storage is not set")

    async def flush(self) -> None:
        """Nothing waits here."""


class GuardThread:
    """A daemon thread with an event loop, on which the second home lives."""

    def __init__(self, make_home: Callable[[], Home]) -> None:
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.gate = threading.Lock()
        self._make_home = make_home
        self._home: Home | None = None
        self._failure: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="respan-guard", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # none is started any more while the interpreter exits (Python 3.12+)
            self.loop.close()
            raise
        if not self._ready.wait(_START_TIMEOUT):
            raise RuntimeError("the guard's thread did not start")

    @property
    def home(self) -> Home:
        """The home on this thread."""
        if self._home is None:
            raise RuntimeError("the guard's thread did not start") from self._failure
        return self._home

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on this thread's loop, in the caller's context, and block for its result."""
        if self.is_current:
            work.close()
            raise RuntimeError("guard.sync was called on the guard's own thread, which would wait for itself")
        try:
            with self.gate:
                future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:
            work.close()
            raise StorageUnavailable("the guard was closed meanwhile") from None
        try:
            return future.result(timeout)
        except concurrent.futures.CancelledError:
            raise StorageUnavailable("the guard was closed meanwhile") from None
        except BaseException:
            future.cancel()  # out of time, or the caller was interrupted; if it is done this does nothing
            del future  # what came of it is nobody's, also while somebody looks at the traceback
            raise

    def stop(self, timeout: float = 10.0) -> None:
        """Close the home, then end the thread."""
        try:
            self.run(self.home.close(), timeout)
        except TimeoutError:
            logger.warning("storage did not take all usage records within %g s", timeout)
        finally:
            self._stopping = True
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)

        async def begin() -> None:
            try:
                self._home = self._make_home()
            except BaseException as error:
                self._failure = error
                raise
            finally:
                self._ready.set()

        try:
            self.loop.run_until_complete(begin())
            while not self._stopping:
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt):  # of an exporter, say; there would be no other thread
                    logger.exception("the guard's thread goes on")
            self._cancel_all()
        finally:
            with self.gate:  # what came until now is answered, what comes later finds the loop closed
                self._cancel_all()
                self.loop.close()

    def _cancel_all(self) -> None:
        """Answer callers on other loops, those too whose work has not begun."""
        self.loop.run_until_complete(asyncio.sleep(0))
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        if left:
            self.loop.run_until_complete(asyncio.wait(left, timeout=1.0))


class RemoteLane:
    """The guard thread's home, for code on other loops and threads."""

    def __init__(self, thread: GuardThread) -> None:
        self.thread = thread
        self.home = thread.home
        self.post = self.home.post
        self.post_call = self.home.post_call

    @property
    def asleep(self) -> bool:
        """Whether nobody looks at the kill switch there."""
        return self.home.asleep

    async def _on_thread(self, work: Coroutine[Any, Any, T]) -> T:
        if self.thread.is_current:
            return await work
        try:
            with self.thread.gate:
                future = asyncio.run_coroutine_threadsafe(work, self.thread.loop)
        except RuntimeError:
            work.close()
            raise StorageUnavailable("the guard was closed meanwhile") from None
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and not task.cancelling() and future.cancelled():
                raise StorageUnavailable("the guard was closed meanwhile") from None
            raise

    async def submit(self, op: Op) -> Outcome:
        """Apply `op` and return its outcome."""
        try:
            return await self._on_thread(self.home.submit(op))
        except asyncio.CancelledError:
            if isinstance(op, Admit):
                self.post(Release(op.customer, op.id))  # the answer may have been on its way between the threads
            raise

    async def record(self, entry: Entry) -> Recorded | TooLate | None:
        """Book `entry`; it is safe once this returns."""
        return await self._on_thread(self.home.record(entry))

    async def book(self, entry: Entry) -> Recorded | TooLate | Waits | None:
        """Book `entry` for somebody who reports it again if this raises."""
        return await self._on_thread(self.home.book(entry))

    async def call(self, work: Callable[[Backend], Awaitable[T]], timeout: float | None = 10.0) -> T:  # noqa: ASYNC109
        """Run a read or a change of customers."""
        return await self._on_thread(self.home.call(work, timeout))

    async def count_rates(self, customer: str, rates: Sequence[Limit], requests: int) -> list[Counted]:
        """Count requests in the storage of rates."""
        return await self._on_thread(self.home.count_rates(customer, rates, requests))

    async def look_at_rates(self, customer: str, rates: Sequence[Limit]) -> list[Counted]:
        """Where rates stand."""
        return await self._on_thread(self.home.look_at_rates(customer, rates))

    async def flush(self) -> None:
        """Return when everything that was sent before is stored."""
        await self._on_thread(self.home.flush())
