"""Our own faults: said in the log, never in the app's answers, and not once for each request."""

from __future__ import annotations

import logging

from respan_guard.clock import Clock

__all__ = ["Faults"]

logger = logging.getLogger("respan_guard")
_EVERY = 10.0


class Faults:
    """Logs exceptions of ours, each kind at most every ten seconds."""

    __slots__ = ("_clock", "_logged")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._logged: dict[str, float] = {}

    def report(self, message: str) -> None:
        """Log the exception being handled, unless the same message was logged a moment ago."""
        now = self._clock.monotonic()
        last = self._logged.get(message)
        if last is None or now - last >= _EVERY:
            self._logged[message] = now
            logger.exception("%s", message)
