"""A circuit breaker for one home's storage: whether asking it makes sense at the moment.

Closed, requests ask. After failures in a row it opens: requests are told at once that storage is down and the drain
alone probes, ever less often, with an operation that changes nothing. The first answer closes it. So a dead store
costs requests nothing but for the first few, and none of them is the guinea pig.
"""

from __future__ import annotations

import random

__all__ = ["Breaker"]

_FAILURES = 3
"""Failures in a row that open it; a hang counts one for each deadline that passes without any answer."""
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0


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

    def worked(self) -> bool:
        """Storage answered. Returns whether it was taken for dead."""
        was_open = self.is_open
        self.is_open, self.failures = False, 0
        return was_open

    @property
    def pause(self) -> float:
        """Seconds until the next try: doubled with each failure, and spread, as all processes lost it together."""
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * (1 << min(self.failures, 10)))
        return longest * (0.5 + random.random() / 2)
