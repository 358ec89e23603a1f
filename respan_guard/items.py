"""What waits in an inbox, and what travels together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from respan_guard.backends.base import Op, Outcome, Record
from respan_guard.errors import BackendError

__all__ = ["Item", "Part", "Unstorable", "Waits"]


class Unstorable(BackendError):
    """An op that storage can't take, ever."""


class Waits:
    """What came of a record that storage was sent and did not answer for: it is kept, and sent until it is stored."""


class Item:
    """An op that waits, and who waits for it."""

    __slots__ = ("customer", "future", "on_disk", "op", "taken")

    def __init__(self, op: Op | None, future: asyncio.Future[Outcome] | None, *, on_disk: bool = False) -> None:
        self.op = op  # None is a marker: its future tells when all before it is stored
        self.customer = None if op is None else op.entry.customer if isinstance(op, Record) else op.customer
        self.future = future
        self.on_disk = on_disk  # a record that lies in the journal, too
        self.taken = on_disk  # storage was asked, or the journal or another home has it

    def withdraw(self) -> bool:
        """Have the op never be done; False if somebody took it, so that it is or will be."""
        # In this order: others, on threads of their own, say that they take it before they look at what it is.
        op, self.op = self.op, None
        if self.taken:
            self.op = op
            return False
        return True


class Part:
    """Items that travel together, and the answers they wait for."""

    __slots__ = ("answers", "items", "sent_at")

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self.answers: Awaitable[list[Outcome]] | None = None  # None: not sent yet
        self.sent_at = 0.0
