"""How a guard is opened and closed: wholly or not at all, also where either is cancelled halfway."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Self

from respan_guard.errors import GuardError
from respan_guard.threads import in_thread

if TYPE_CHECKING:
    from respan_guard.homes import Homes
    from respan_guard.lanes import Lane
    from respan_guard.outbox import Outbox
    from respan_guard.pricing import PriceBook
    from respan_guard.reports import RefusalLog
    from respan_guard.switch import Switch

__all__ = ["Opening"]


class Opening:
    """The part of `Guard` that has a beginning and an end."""

    _homes: Homes
    _off: bool
    outbox: Outbox
    prices: PriceBook
    refusals: RefusalLog
    switch: Switch

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Open storage on the running loop. Each `open` needs its `aclose`; one that raises is undone.

        Raises:
            ConfigurationError: Storage can't work as configured.
            BackendError: Storage is unreachable, damaged, read-only or newer than the code.
        """
        if self._off:
            return
        await self._homes.open()
        self.outbox.enter()
        try:
            await self.switch.wake(self.lane())
            await in_thread(self.prices.load)  # a fifth of a second that no request should wait for
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Store what waits, and let go of storage. Cancelled, it leaves out what it waits for, and lets go."""
        async with AsyncExitStack() as closing:
            closing.push_async_callback(self._homes.close)
            closing.push_async_callback(self.outbox.leave)
            with suppress(GuardError):  # counts of refusals are no records: storage that is down does without
                await self.refusals.flush()

    def lane(self) -> Lane:
        """The way to storage from the caller's loop and thread."""
        return self._homes.lane()
