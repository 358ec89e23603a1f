"""A circuit breaker for one home's storage: whether asking it makes sense at the moment.

Closed, requests ask. After failures in a row it opens: requests are told at once that storage is down and the drain
alone probes, ever less often, with a write that nobody sees: storage that is full or read-only still answers what only
reads. The first write that is taken closes it. So a dead store costs requests nothing but for the first few, and none
of them is the guinea pig.
"""

from __future__ import annotations

import logging
import random

__all__ = ["LOG_EVERY", "Breaker", "Notices"]

_FAILURES = 3
"""Failures in a row that open it; a hang counts one for each deadline that passes without any answer."""
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0
LOG_EVERY = 10.0
"""Seconds in which the log is told of an outage once."""
logger = logging.getLogger("respan_guard")


class Breaker:
    """Counts what happened to storage. Belongs to one loop; `is_open` may be read from any thread.

    Attributes:
        is_open: Whether storage is taken for dead.
        failures: How many tries in a row failed.
        cause: What the last failure said.
    """

    __slots__ = ("cause", "failures", "is_open")

    def __init__(self) -> None:
        self.is_open = False
        self.failures = 0
        self.cause = ""

    def failed(self, cause: str) -> None:
        """A batch or a probe failed."""
        self.failures += 1
        self.cause = cause
        if self.failures >= _FAILURES:
            self.is_open = True

    def stalled(self, deadlines: float, cause: str) -> None:
        """What was sent has been without an answer for so many deadlines."""
        if deadlines >= _FAILURES:
            self.is_open = True
            self.cause = cause

    def worked(self) -> None:
        """Storage took a write."""
        self.is_open, self.failures = False, 0

    @property
    def pause(self) -> float:
        """Seconds until the next try: doubled with each failure, and spread, as all processes lost it together."""
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * (1 << min(self.failures, 10)))
        return longest * (0.5 + random.random() / 2)


class Notices:
    """What the log says of one storage: that it is unavailable, once in ten seconds, and then once that it is back.

    What it says last is so: an outage that it did not tell of has no end that it tells of.

    Args:
        what: What is unavailable.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._told_at = self._unkept_at = float("-inf")
        self._is_told = False

    def failed(self, cause: object, now: float, fault: Exception | None = None) -> None:
        """It failed at `now`, in seconds; a fault of ours has its traceback."""
        if now - self._told_at >= LOG_EVERY:
            self._told_at, self._is_told = now, True
            logger.warning("%s is unavailable: %s", self._what, cause, exc_info=fault)

    def unkept(self, disk: Exception, now: float) -> None:
        """The journal takes nothing, either."""
        if now - self._unkept_at >= LOG_EVERY:
            self._unkept_at = now
            logger.error("neither %s nor the journal takes usage records: %s", self._what, disk)

    def worked(self) -> None:
        """It works again."""
        if self._is_told:
            self._is_told = False
            logger.warning("%s is available again", self._what)
