"""Keeping holds alive for as long as the work goes on that they are for."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from respan_guard.clock import Clock

if TYPE_CHECKING:
    from respan_guard.admission import Admission

__all__ = ["Renewer"]

logger = logging.getLogger("respan_guard")


class Renewer:
    """Keeps the holds of long work alive: admissions that end with a block or a request, and no others.

    One timer per loop for all of them; without a loop, later admissions do its work.
    """

    def __init__(self, clock: Clock, ttl_ms: int) -> None:
        self._clock = clock
        self._ttl_ms = ttl_ms
        self._every = ttl_ms / 3000
        self._live: dict[str, Admission] = {}
        self._due = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    def watch(self, admission: Admission) -> None:
        """Renew the admission's hold until it ends."""
        self._live[admission.id] = admission
        if admission.ended:  # by another thread, just now
            self._live.pop(admission.id, None)
            return
        loop = self._loop
        if loop is not None and loop.is_running():
            return
        self._loop = loop = asyncio._get_running_loop()  # None if there is none; an error each time would take longer
        if loop is not None:
            loop.call_later(self._every, self._tick, loop)
        elif self._clock.monotonic() >= self._due:
            self._renew()

    def unwatch(self, admission: Admission) -> None:
        """Forget an admission that ended."""
        self._live.pop(admission.id, None)

    @property
    def live(self) -> list[Admission]:
        """Those in force."""
        return list(self._live.values())

    def forget(self) -> None:
        """Forget all, after a fork: they are the parent's."""
        self._live = {}
        self._loop = None

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not loop:  # it had stopped, and another one took over
            return
        self._loop = None
        if self._live:
            self._loop = loop
            loop.call_later(self._every, self._tick, loop)
            self._renew()  # of those that just came too: it is one op each, and rare

    def _renew(self) -> None:
        self._due = self._clock.monotonic() + self._every
        for admission in list(self._live.values()):
            try:
                admission.renew(self._ttl_ms)
            except Exception:  # those behind it live on
                logger.exception("a hold could not be renewed")
