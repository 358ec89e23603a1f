"""Whose turn it is at a store in memory, where even a garbage collection may want one.

Finalizers run wherever memory is allocated: an abandoned stream may be closed, and post its usage, while its own
thread is in the middle of an operation. Such a thread must neither wait for itself nor change what it is working on.
So who waits for nothing posts, and whoever has the turn applies what was posted before giving it back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from respan_guard.backends.base import Op, Told
from respan_guard.errors import StorageUnavailable

__all__ = ["Turns"]

T = TypeVar("T")
_INTERRUPTED = "a finalizer asked the store whose work it interrupted; let it use record_soon"


class Turns:
    """A lock with an inbox. `with turns:` waits for other threads, and applies what was posted first.

    Args:
        apply: Applies what was posted; it must not raise.

    Raises:
        StorageUnavailable: On entering, from a finalizer that interrupted this very thread's turn.
    """

    __slots__ = ("_apply", "_busy", "_lock", "_posted")

    def __init__(self, apply: Callable[[Sequence[Op], int, Told | None], None]) -> None:
        self._apply = apply
        self.forget()

    def forget(self) -> None:
        """After a fork: another thread's turn would never end in the child, and what was posted is the parent's."""
        self._lock = threading.RLock()
        self._busy = False
        self._posted: deque[tuple[Sequence[Op], int, Told | None]] = deque()

    def post(self, ops: Sequence[Op], now: int, told: Told | None = None) -> None:
        """Have operations applied, in the order in which they are posted. Never waits, from anywhere."""
        self._posted.append((ops, now, told))
        self._catch_up()

    def take(self, work: Callable[[Sequence[Op], int], T], ops: Sequence[Op], now: int) -> T:
        """What `with turns: work(ops, now)` does, for the hot path: one call in place of two."""
        with self._lock:
            if self._busy:
                raise StorageUnavailable(_INTERRUPTED)
            self._busy = True
            try:
                if self._posted:
                    self._apply_posted()
                done = work(ops, now)
            finally:
                self._busy = False
        if self._posted:
            self._catch_up()
        return done

    def _catch_up(self) -> None:
        """Apply what was posted; if somebody has the turn, then they do so before they give it back, or behind it."""
        posted = self._posted
        while posted and self._lock.acquire(blocking=False):
            try:
                if self._busy:
                    return
                self._busy = True
                try:
                    while posted:
                        self._apply(*posted.popleft())
                finally:
                    self._busy = False
            finally:
                self._lock.release()

    def _apply_posted(self) -> None:
        while self._posted:
            self._apply(*self._posted.popleft())

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._busy:
            self._lock.release()
            raise StorageUnavailable(_INTERRUPTED)
        self._busy = True
        self._apply_posted()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._busy = False
        self._lock.release()
        self._catch_up()
