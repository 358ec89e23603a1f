"""Takes records to exporters while the guard is open: a task each, beside the requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from respan_guard.backends.base import Backend, RecordQuery
from respan_guard.dead_letters import DONE, DeadLetters
from respan_guard.delivery import Delivery, cursor_name
from respan_guard.errors import ConfigurationError, GuardError
from respan_guard.exporters.base import Exporter, check_name
from respan_guard.lease import SPACE, read_lease
from respan_guard.telemetry import telemetry

if TYPE_CHECKING:
    from respan_guard.guard import Guard
    from respan_guard.telemetry import Reading

__all__ = ["ExporterStatus", "Outbox"]

_FLUSH_TIMEOUT: Final = 5.0
logger = logging.getLogger("respan_guard")


@dataclass(frozen=True, slots=True)
class ExporterStatus:
    """Where an exporter stands.

    Attributes:
        name: Its name.
        cursor: How far it has read the log; None if it never began.
        behind: How many places of the log lie behind the cursor: at least as many as records wait.
        lag_seconds: How long ago the call of the oldest record ended that waits; 0 if none does.
        dead_letters: How many records were not taken.
        leader: Machine and process that exports under the name; None if none does at the moment.
        error: What went wrong last; None if nothing did since.
    """

    name: str
    cursor: int | None
    behind: int
    lag_seconds: float
    dead_letters: int
    leader: str | None
    error: str | None


class Outbox:
    """The exporters of one guard.

    Args:
        guard: Whose records.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._exporters: dict[str, Exporter] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opens = 0
        self._tasks: dict[str, tuple[Delivery, asyncio.Task[None]]] = {}
        telemetry.observe(self)

    def add(self, exporter: Exporter) -> None:
        """Have an exporter take records, from now on if the guard is open, else once it is.

        Raises:
            ConfigurationError: It is no exporter, or there is one of that name.
        """
        if not isinstance(exporter, Exporter):
            raise ConfigurationError(f"an exporter has a name and an async method export, {exporter!r} has not")
        name = check_name(exporter.name)
        if name in self._exporters:
            raise ConfigurationError(f"there is an exporter {name!r} already; give this one another name=")
        self._exporters[name] = exporter
        loop = self._loop
        if loop is not None and loop is _running_loop():
            self._begin()
        elif loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._begin)

    # -- life: called on the loop that it runs on --------------------------------------------------

    def start(self) -> None:
        """Run on this loop, unless it runs elsewhere."""
        loop = _running_loop()
        if self._loop is None or self._loop.is_closed():
            self._loop, self._opens = loop, 0
            self._tasks.clear()
        if loop is not None and loop is self._loop:
            self._begin()

    def enter(self) -> None:
        """The guard was opened once more on this loop."""
        if self._loop is _running_loop():
            self._opens += 1

    async def leave(self) -> None:
        """The guard is about to be closed once; the last time, hand over what can be within five seconds, and end."""
        if self._loop is None or self._loop is not _running_loop():
            return
        self._opens -= 1
        if self._opens <= 0:
            await self._stop()

    def forget(self) -> None:
        """After a fork, in the child: the tasks are the parent's."""
        self._loop, self._opens, self._tasks = None, 0, {}

    def _begin(self) -> None:
        loop = self._loop
        if loop is None or loop is not _running_loop():
            return
        for name, exporter in self._exporters.items():
            if name not in self._tasks:
                delivery = Delivery(self._guard, exporter, secrets.token_hex(8))
                self._tasks[name] = delivery, loop.create_task(_run(delivery), name=f"respan-guard export {name}")

    async def _stop(self) -> None:
        tasks, self._tasks, self._loop, self._opens = self._tasks, {}, None, 0
        if not tasks:
            return
        running = [task for _, task in tasks.values()]
        for delivery, _ in tasks.values():
            delivery.stopping.set()
        try:
            await asyncio.wait(running, timeout=_FLUSH_TIMEOUT)  # what is being sent had better be told of, too
        finally:
            for task in running:
                task.cancel()
        await asyncio.wait(running, timeout=1.0)
        with contextlib.suppress(GuardError):
            await self._guard.flush()
        async with asyncio.TaskGroup() as group:
            for delivery, _ in tasks.values():
                group.create_task(_finish(delivery))

    # -- what people ask ---------------------------------------------------------------------------

    async def statuses(self) -> list[ExporterStatus]:
        """All exporters that this guard has or that the store knows of, by name."""
        lane = self._guard.lane()
        names = set(self._exporters) | {
            key.removeprefix("lease:")
            for key, _ in await lane.call(lambda backend: backend.facts(SPACE))
            if key.startswith("lease:")
        }
        found = [await lane.call(self._status(name)) for name in sorted(names)]
        return [status for status in found if status.cursor != DONE or status.name in self._exporters]

    async def forget_exporter(self, name: str) -> None:
        """Forget an exporter that is no more, its dead letters too: pruning waits for it no longer."""
        lane = self._guard.lane()
        letters = DeadLetters(name)
        while page := await lane.call(letters.page):
            for letter in page:
                await lane.call(partial(letters.remove, letter=letter))
        await lane.call(lambda backend: backend.set_cursor(cursor_name(name), DONE))

    def _status(self, name: str) -> Callable[[Backend], Awaitable[ExporterStatus]]:
        async def read(backend: Backend) -> ExporterStatus:
            cursor = await backend.cursor(cursor_name(name))
            newest = await backend.entries(RecordQuery(descending=True, limit=1))
            oldest = await backend.entries(RecordQuery(after=cursor or 0, limit=1))
            lease = read_lease(await backend.fact(SPACE, f"lease:{name}"))
            now = self._guard.now_ms()
            return ExporterStatus(
                name=name,
                cursor=cursor,
                behind=max(0, newest[0].seq - (cursor or 0)) if newest and oldest else 0,
                lag_seconds=max(0, now - oldest[0].entry.at_ms) / 1000 if oldest else 0.0,
                dead_letters=await DeadLetters(name).count(backend),
                leader=lease.host if lease is not None and lease.until_ms > now else None,
                error=lease.error or None if lease is not None else None,
            )

        return read

    def __call__(self) -> Iterator[Reading]:
        """The readings, of the exporters that this process leads."""
        for name, (delivery, _) in list(self._tasks.items()):
            if delivery.leads:
                yield "respan_guard.export.lag", delivery.lag_ms // 1000, {"respan_guard.exporter": name}


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _run(delivery: Delivery) -> None:
    while not delivery.stopping.is_set():
        try:
            delay = await delivery.step()
        except Exception:
            logger.exception("exporter %s: a step failed", delivery.name)
            delay = 5.0
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(delivery.stopping.wait(), delay)


async def _finish(delivery: Delivery) -> None:
    try:
        async with asyncio.timeout(_FLUSH_TIMEOUT):
            delay = await delivery.step()  # the first one, if it was added just now
            while delivery.leads and not delivery.error and await delivery.pending():
                await asyncio.sleep(delay)
                delay = await delivery.step()
    except (GuardError, TimeoutError) as error:
        logger.info("exporter %s: the rest is left for the next process (%r)", delivery.name, error)
    except Exception:
        logger.exception("exporter %s: the last step failed", delivery.name)
    try:
        async with asyncio.timeout(_FLUSH_TIMEOUT):
            await delivery.close()
    except Exception as error:
        logger.warning("exporter %s: closing it failed: %r", delivery.name, error)
