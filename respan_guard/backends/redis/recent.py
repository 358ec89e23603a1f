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
        self.seq = 0

    def keep(self, ops: Sequence[Op], outcomes: Iterable[Outcome], known: int, before: int, after: int) -> None:
        """Take note of an acknowledged batch: the log was known to reach `known`, and went from `before` to `after`."""
        if before < known:
            self.suspicious = True
        else:
            self.seq = max(self.seq, after)
        for op, outcome in zip(ops, outcomes, strict=True):
            if isinstance(op, Record) and isinstance(outcome, Recorded) and outcome.new:
                self._records.append(op)

    @property
    def newest(self) -> Sequence[Op]:
        """The last one. What a store loses is always the end of what it was told: if it has this, it has all."""
        return list(self._records)[-1:]

    @property
    def all(self) -> Sequence[Op]:
        """All, to be sent again."""
        return list(self._records)

    def is_there(self, outcomes: Iterable[Outcome], before: int) -> bool:
        """Whether the store, asked with the newest while its log ended at `before`, has lost nothing."""
        lost = any(isinstance(outcome, Recorded) and outcome.new for outcome in outcomes)
        return not lost and not (self._counted and before < self.seq)

    def restored(self, outcomes: Iterable[Outcome], before: int, url: str) -> None:
        """Tell people of what was lost. `outcomes` are of all, sent again when the log ended at `before`."""
        again = sum(isinstance(outcome, Recorded) and outcome.new for outcome in outcomes)
        missing = max(again, self.seq - before if self._counted else 0)
        logger.error(
            "%s lost %d usage records that it had acknowledged (a failover, or a restart without appendfsync "
            "always): %d are stored again, %d are not in this process any more",
            url,
            missing,
            again,
            missing - again,
        )

    def trusted(self, seq: int) -> None:
        """All that is still known is there; the log ends at `seq`."""
        self.seq, self.suspicious = seq, False
