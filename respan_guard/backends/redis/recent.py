"""What a store acknowledged a moment ago, in case it turns out to have forgotten it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence

from respan_guard.backends.base import Op, Outcome, Record, Recorded

__all__ = ["Recent"]

_MOST = 2_000
logger = logging.getLogger("respan_guard")


class Recent:
    """The last records of one part that this process had acknowledged, and how far the log was then.

    A replica that becomes the primary lacks what it had not got yet, a server that starts again lacks what was not on
    disk. Both show by a log that is shorter than it was, and both come with a connection that broke. Then the records
    are sent again: those that are there answer that they are known, those that are new were lost.

    Args:
        counted: Places in the log are counts, so that a shorter one tells how much is missing.
    """

    def __init__(self, *, counted: bool) -> None:
        self.suspicious = False
        self._counted = counted
        self._records: deque[Record] = deque(maxlen=_MOST)
        self._seq = 0

    def keep(self, ops: Sequence[Op], outcomes: Iterable[Outcome], before: int, after: int) -> None:
        """Take note of an acknowledged batch; the log went from `before` to `after`."""
        if before < self._seq:
            self.suspicious = True
        else:
            self._seq = after
        for op, outcome in zip(ops, outcomes, strict=True):
            if isinstance(op, Record) and isinstance(outcome, Recorded) and outcome.new:
                self._records.append(op)

    def to_compare(self) -> list[Op]:
        """What to send again because the store is suspected to have lost it."""
        return list(self._records)

    def compared(self, outcomes: Iterable[Outcome], before: int, after: int, url: str) -> None:
        """See what the store said to that, and tell people of what it had lost."""
        again = sum(isinstance(outcome, Recorded) and outcome.new for outcome in outcomes)
        missing = max(again, self._seq - before if self._counted else 0)
        if missing:
            logger.error(
                "%s lost %d usage records that it had acknowledged (a failover, or a restart without appendfsync "
                "always): %d are stored again, %d are not in this process any more",
                url,
                missing,
                again,
                missing - again,
            )
        self._seq, self.suspicious = after, False
