"""The homes of one guard: made when first needed, forgotten after a fork, emptied when the interpreter exits."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from respan_guard.backends.base import Backend, Limit, Op, Record
from respan_guard.backends.registry import backend_factory
from respan_guard.clock import Clock, store_counts
from respan_guard.errors import ConfigurationError, StorageFull, StorageReadOnly, StorageUnavailable
from respan_guard.home import Home
from respan_guard.journal import Journal
from respan_guard.lanes import GuardThread, Lane, RemoteLane, SharedLane, run_inline
from respan_guard.rate_storage import RateStorage, rate_storage
from respan_guard.settings import Settings
from respan_guard.threads import in_thread

__all__ = ["Homes", "make_homes"]

T = TypeVar("T")
_CLOSE_TIMEOUT = 15.0
logger = logging.getLogger("respan_guard")


class Homes:
    """Knows which lane leads to storage from the caller's loop and thread.

    Args:
        factory: Makes a backend; the same one each time if it is shared.
        clock: The guard's clock.
        journal: Where records go that storage won't take.
        timeout: Seconds that storage may take; None for the backend's own default.
        on_open: Called with each new home, on its loop, once it may be used.
        on_fork: Called in a forked child.
        rates: Where rates are kept that the store shall not keep.
        limits: What customers without limits of their own are asked for: a store says at once if it can't keep them.
        needed: Whether to open fails while storage is down; else it goes on, and storage is opened when it is back.
    """

    def __init__(
        self,
        factory: Callable[[], Backend],
        clock: Clock,
        journal: Journal,
        timeout: float | None,
        on_open: Callable[[Lane], None],
        on_fork: Callable[[], None],
        rates: RateStorage | None = None,
        limits: tuple[Limit, ...] = (),
        *,
        needed: bool = True,
    ) -> None:
        self._factory = factory
        self._clock = clock
        self._journal = self.journal = journal
        self._timeout = timeout
        self._on_open = on_open
        self._on_fork = on_fork
        self._rates = rates
        self._limits = limits
        self._needed = needed
        self._lock = threading.Lock()
        self._app: Home | None = None
        self._opens = 0
        self._thread: GuardThread | None = None
        self._remote: RemoteLane | None = None
        self.shared: SharedLane | None = None
        backend = factory()
        self.backend_class = type(backend)
        if backend.shared and rates is None:  # connections to rates need homes
            self.shared = SharedLane(backend, clock, journal)
        _all.add(self)

    def lane(self) -> Lane:
        """The way to storage from here."""
        if self.shared is not None:
            return self.shared
        app = self._app
        if app is not None:
            if app.loop.is_closed():
                self._adopt(app)
            elif _running_loop() is app.loop:
                return app
        return self._remote or self._start_thread()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the guard from code without a loop, in the caller's context, and block for it."""
        if self.shared is not None:
            return run_inline(work)
        lane = self._remote or self._start_thread()
        return lane.thread.run(work)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call `function` on the guard thread's loop, or at once where the store needs none."""
        if self.shared is not None:
            function()
            return
        lane = self._remote or self._start_thread()
        with contextlib.suppress(RuntimeError):  # it was closed just now
            lane.thread.loop.call_soon_threadsafe(function)

    async def open(self) -> None:
        """Make the running loop the guard's first home. May be nested; each needs its `close`.

        Raises:
            GuardError: Storage can't be opened.
        """
        loop = asyncio.get_running_loop()
        if self.shared is not None:
            self.shared.backend.check_limits(self._limits)
            self._on_open(self.shared)
            return
        if self._app is not None and self._app.loop.is_closed():
            self._adopt(self._app)
        with self._lock:  # before anything is awaited: others may open at the same time, on other loops too
            if self._app is None:
                self._app = self._make_home()
            app = self._app
        if app.loop is not loop:
            return
        self._opens += 1
        try:
            if not app.begun:
                await self._begin(app)
        except BaseException:
            if self._app is app:
                await self.close()
            raise

    async def _begin(self, app: Home) -> None:
        try:
            await app.open()
        except (StorageUnavailable, StorageReadOnly, StorageFull) as error:  # what passes; the rest is wrong for good
            if self._needed:
                raise
            logger.warning("storage is down, the guard starts without it: %s", error)
        if app.rates is not None:
            await app.rates.verify()
        if not app.begun:
            app.begun = True
            self._on_open(app)

    async def close(self) -> None:
        """Store what waits, and let go of the running loop's home and, with it, of the guard's thread."""
        app = self._app
        if app is None or app.loop is not asyncio.get_running_loop():
            return
        self._opens -= 1
        if self._opens > 0:
            return
        self._app = None
        try:
            await app.close()
        finally:
            thread, self._thread, self._remote = self._thread, None, None
            if thread is not None:
                await in_thread(thread.stop)
            self._journal.close()

    def open_homes(self) -> list[Home]:
        """Those there are at the moment."""
        return [home for home in (self._app, self._remote.home if self._remote else None) if home is not None]

    @property
    def journalled(self) -> int:
        """Records of this process that lie in the journal."""
        return self._journal.pending

    @property
    def settled(self) -> bool:
        """Whether nothing that was recorded is still on its way to the store."""
        return not self._journal.pending and not any(
            home._draining or home.waiting or home.breaker.failures for home in self.open_homes()
        )

    def check_waiting(self, instead: str) -> None:
        """Refuse to block the very loop that has to do the work that is waited for.

        Raises:
            ConfigurationError: The caller runs on the loop that opened the guard.
        """
        if self._app is not None and self._app.loop is _running_loop():
            raise ConfigurationError(
                f"this would wait for its own event loop, for ever; on the loop that opened the guard: {instead}"
            )

    def close_blocking(self) -> None:
        """What `close` does, from code without a loop: for scripts and for the interpreter's exit."""
        app, self._app = self._app, None
        if app is not None:
            self._opens = 0
            try:
                self._end(app)
            except Exception:  # the other home has what this one passed on
                logger.exception("closing a guard's event loop failed")
        thread, self._thread, self._remote = self._thread, None, None
        if thread is not None:
            thread.stop()
        self._journal.close()

    async def flush(self) -> None:
        """Return when everything recorded so far is stored, whichever home has it."""
        if self.shared is not None:
            return
        app = self._app
        if app is not None and not app.loop.is_running():
            self._adopt(app)
            app = None
        if app is not None:
            await self._flush_home(app)
        if self._remote is not None:
            await self._remote.flush()
            if app is not None and self._journal.pending:  # they share it: what this one set aside, that one may store
                await self._flush_home(app)

    async def _flush_home(self, app: Home) -> None:
        if app.loop is _running_loop():
            await app.flush()
        elif app.loop.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(app.flush(), app.loop))

    def forget(self) -> None:
        """After a fork, in the child: connections, threads and inboxes are the parent's."""
        self._lock = threading.Lock()
        for home in (self._app, self._remote.home if self._remote else None):
            if home is not None:
                home.forget()
        if self.shared is not None:
            self.shared.backend.abandon()
        self._app, self._opens, self._thread, self._remote = None, 0, None, None
        self._journal.forget()
        self._on_fork()

    def _make_home(self) -> Home:
        backend = self._factory()
        return Home(
            backend,
            self._clock,
            self._journal,
            self._inherit,
            timeout=backend.default_timeout if self._timeout is None else self._timeout,
            server_clock=store_counts(self._clock, backend.server_clock),
            rates=self._rates,
            limits=self._limits,
        )

    def _start_thread(self) -> RemoteLane:
        with self._lock:
            if self._remote is None:
                self._thread = GuardThread(self._make_home)
                self._remote = RemoteLane(self._thread)
                self._thread.loop.call_soon_threadsafe(self._on_open, self._thread.home)
            return self._remote

    def _adopt(self, app: Home) -> None:
        """The guard thread takes over what a home left behind whose loop was closed under it."""
        with self._lock:
            if self._app is not app:
                return
            self._app, self._opens = None, 0
        app.retire()

    def _end(self, app: Home) -> None:
        """Close a home from outside: by its loop if that runs elsewhere, else without it."""
        if app.loop.is_running() and app.loop is not _running_loop():
            closing = app.close()
            try:
                future = asyncio.run_coroutine_threadsafe(closing, app.loop)
            except RuntimeError:  # it was closed just now
                closing.close()
            else:
                try:
                    future.result(_CLOSE_TIMEOUT)
                except Exception as error:
                    logger.warning("an event loop did not close its guard: %r", error)
                else:
                    return
        app.retire()

    def _inherit(self, ops: Sequence[Op]) -> None:
        """Take what was posted to a home that is no more: an admission may outlive the loop it was made on."""
        try:
            (self._remote or self._start_thread()).post(*ops)
        except RuntimeError:  # no new threads while the interpreter exits (Python 3.12+)
            entries = [op.entry for op in ops if isinstance(op, Record)]
            try:
                self._journal.write(entries)
            except OSError as disk:
                logger.error("%d usage records are lost, the journal can't be written: %s", len(entries), disk)


def make_homes(
    settings: Settings, limits: tuple[Limit, ...], on_open: Callable[[Lane], None], on_fork: Callable[[], None]
) -> Homes:
    """The homes that the settings ask for.

    Raises:
        ConfigurationError: A storage can't work as configured.
    """
    factory = backend_factory(settings.storage, namespace=settings.namespace)
    return Homes(
        factory,
        settings.clock,
        Journal(settings.journal_dir, factory().place or f"{settings.storage}#{settings.namespace}"),
        settings.storage_timeout,
        on_open,
        on_fork,
        rate_storage(settings),
        limits,
        needed=settings.budget_failure == "closed",
    )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_all: weakref.WeakSet[Homes] = weakref.WeakSet()


def _close_all() -> None:
    for homes in list(_all):
        try:
            homes.close_blocking()
        except Exception:
            logger.exception("closing a guard failed")


def _forget_all() -> None:
    for homes in list(_all):
        with contextlib.suppress(Exception):
            homes.forget()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
