"""The parts of a store: which customer is in which, and one order over the logs of all."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from respan_guard.backends.base import Op, Record

__all__ = ["Parts"]


class Parts:
    """A single server has one part, a cluster several: all keys of a decision must be in one hash slot.

    On one part, places in the log count up from 1. On several, a place is the time of the commit on that part's server
    (in 1/256 ms, and always above the one before), and the place that callers see is that times the number of parts,
    plus the part: one order over all of them. What a later commit could still get in front of is not shown yet.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def of(self, customer: str) -> int:
        """The part that a customer is in."""
        return crc32(customer.encode()) % self.count if self.count > 1 else 0

    def split(self, ops: Sequence[Op]) -> dict[int, list[int]]:
        """The places of operations in the batch, by part."""
        found: dict[int, list[int]] = {}
        for at, op in enumerate(ops):
            found.setdefault(self.of(op.entry.customer if isinstance(op, Record) else op.customer), []).append(at)
        return found

    def outer(self, place: int, part: int) -> int:
        """The place in the whole log of a place in a part's."""
        return place * self.count + part

    def behind(self, seq: int, part: int) -> int:
        """The last place of a part's log that is not behind `seq` of the whole log."""
        return (seq - part) // self.count

    def before(self, seq: int, part: int) -> int:
        """The first place of a part's log that is not before `seq` of the whole log."""
        return -((part - seq) // self.count)
