"""What a store acknowledged a moment ago, in case it turns out to have forgotten it."""

from __future__ import annotations

import asyncio
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
    disk. Both come with another connection, and a log that is shorter than it was tells, too, as long as others have
    not filled it up. Then the store is asked for the last record, and, if it lacks that, all are sent again: those that
    are there answer that they are known, those that are new were lost.

    Args:
        way: What batches go over now; another one may lead to another server.
        counted: Places in the log are counts, so that a shorter one tells how much is missing.
    """

    def __init__(self, way: object, *, counted: bool) -> None:
        self.looking = asyncio.Lock()  # what was lost is found once
        self.seq = 0
        self._way = way
        self._counted = counted
        self._records: deque[Record] = deque(maxlen=_MOST)
        self._doubted = 0  # so many of the last were acknowledged by nobody knows which server
        self._suspicious = False
        self._lost = False  # it lacks some, and did not get all of them again yet
        self._again = 0  # so many of them it got

    def doubts(self, way: object) -> bool:
        """Whether the store that `way` leads to may have forgotten something."""
        return self._suspicious or self._doubted > 0 or way != self._way

    def failed(self) -> None:
        """A batch was not answered."""
        self._suspicious = True

    def keep(
        self, ops: Sequence[Op], outcomes: Iterable[Outcome], way: object, known: int, before: int, after: int
    ) -> None:
        """Take note of an acknowledged batch: the log was known to reach `known`, and went from `before` to `after`."""
        if before < known:
            self._suspicious = True
        else:
            self.seq = max(self.seq, after)
        doubted = self.doubts(way)
        for op, outcome in zip(ops, outcomes, strict=True):
            if isinstance(op, Record) and isinstance(outcome, Recorded) and outcome.new:
                self._records.append(op)
                self._doubted = min(self._doubted + doubted, _MOST)

    def parted(self) -> tuple[Sequence[Op], Sequence[Op], int]:
        """Which to ask for, all others, and what to give to `trusted` afterwards.

        What a store loses is always the end of what it was told. So the last record tells of those before it; but one
        that was acknowledged in doubt, maybe by the new server already, only of itself.
        """
        records = list(self._records)
        first = max(len(records) - self._doubted - 1, 0)
        return records[first:], records[:first], self._doubted

    @property
    def knows_any(self) -> bool:
        """Whether there is anything to ask for."""
        return bool(self._records)

    def is_there(self, outcomes: Iterable[Outcome], before: int) -> bool:
        """Whether the store, asked for some while its log ended at `before`, has lost nothing."""
        self._stored(outcomes)
        self._lost = self._lost or self._again > 0 or (self._counted and before < self.seq)
        return not self._lost

    def restored(self, outcomes: Iterable[Outcome], before: int, url: str) -> None:
        """Tell people of what was lost. `outcomes` are of the others, sent again when the log ended at `before`."""
        self._stored(outcomes)
        missing = max(self._again, self.seq - before if self._counted else 0)
        logger.error(
            "%s lost %d usage records that it had acknowledged (a failover, or a restart without appendfsync "
            "always): %d are stored again, %d are not in this process any more",
            url,
            missing,
            self._again,
            missing - self._again,
        )

    def trusted(self, way: object, seq: int, doubted: int) -> None:
        """All that was still known is there; the log that `way` leads to ends at `seq`."""
        self.seq, self._way = seq, way
        self._doubted -= doubted
        self._suspicious, self._lost, self._again = False, False, 0

    def _stored(self, outcomes: Iterable[Outcome]) -> None:
        self._again += sum(isinstance(outcome, Recorded) and outcome.new for outcome in outcomes)
