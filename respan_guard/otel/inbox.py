"""What spans leave behind, and who picks it up.

`put` waits for nothing and takes no lock. A garbage collection may end an abandoned stream's span, and so call `put`,
anywhere in this process: within a lock of ours, of a store, of logging. `SimpleQueue.put` and single operations on
deques can be entered again; all else is done by whoever holds the lock: a thread of its own, or a request that ends and
wants its records stored before its hold is released.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypeVar

__all__ = ["Inbox"]

T = TypeVar("T")
Item: TypeAlias = tuple[Any, ...]
"""What is to be called, and with what: a tuple is the cheapest thing to make."""
logger = logging.getLogger("respan_guard")

_IDLE = 5.0  # seconds after which a thread that has nothing to do ends
_MOST_WAITING = 4_096  # items beyond which whoever starts a call makes way for the thread that drains
_MOST_CROWDED = 16_384  # items from which on they are done although what comes of them can't go on
_WAY = 0.0005  # seconds; to get back the interpreter takes ten times that
_GATHER = 0.02  # seconds from the first item until it is done, with all that came meanwhile: a wake-up costs much


class Inbox:
    """Work to be done in the order it came, by one thread at a time.

    Args:
        settle: Done after each item and whenever `due` says so, under the lock.
        due: Seconds until `settle` has something to do; None if nothing waits.
        crowded: Whether what comes of the items should wait, as it can't go on.
    """

    def __init__(
        self, settle: Callable[[], object], due: Callable[[], float | None], crowded: Callable[[], bool]
    ) -> None:
        self._settle = settle
        self._due = due
        self._crowded = crowded
        self.begin()

    def begin(self) -> None:
        """Begin with nothing to do; in a forked child, what waits is the parent's."""
        self._items: deque[Item] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._lock = threading.Lock()
        self._holder = 0  # the thread that holds the lock: a collection may bring it here again
        self._asleep = True
        self._draining = threading.Lock()  # held by the thread that drains; never waited for
        self.exiting = False

    def put(self, item: Item) -> None:
        """Have `item` done, soon. From any thread, from within anything."""
        self._items.append(item)
        if self._asleep:  # looked at behind the append, as the thread looks at the items after it has set this
            self._asleep = False
            self._bell.put(None)
        if self.exiting:  # no thread would get to it
            self.do(lambda: None, timeout=0)
        elif self._draining.acquire(blocking=False):
            try:
                _thread.start_new_thread(self._drain, (self._bell, self._draining))
            except RuntimeError:  # the interpreter is exiting: what is left is done then
                self._draining.release()

    def make_way(self) -> None:
        """Let the thread that drains go on, if much waits: else what is made faster than it is read has no end.

        Not in `put`, which a collection may call for any number of spans at once, and within anything.
        """
        if len(self._items) > _MOST_WAITING and self._holder != threading.get_ident():
            time.sleep(_WAY)

    def do(self, work: Callable[[], T], *, most: int | None = None, timeout: float = -1) -> T | None:
        """Do what waits, then `work`, under the lock.

        Args:
            work: What to do behind it.
            most: How many items are done before, at most.
            timeout: Seconds to wait for the lock; for ever if negative.

        Returns:
            What `work` returns. None if the lock was not to be had, because this very thread holds it further out or
            because time was up, and if `work` failed, which is logged.
        """
        if not self._hold(timeout):
            return None
        try:
            left = len(self._items) if most is None else min(most, len(self._items))
            while left and self._one():
                left -= 1
            return _quietly(work)
        finally:
            self._let_go()

    def _hold(self, timeout: float) -> bool:
        me = threading.get_ident()
        if self._holder == me or not self._lock.acquire(blocking=timeout != 0, timeout=timeout or -1):
            return False
        self._holder = me
        return True

    def _let_go(self) -> None:
        self._holder = 0
        self._lock.release()

    def _one(self) -> bool:
        """Do one item, under the lock. False if there is none."""
        try:
            item = self._items.popleft()
        except IndexError:
            return False
        _quietly(item[0], *item[1:])
        return True

    def _drain(self, bell: SimpleQueue[None], draining: threading.Lock) -> None:
        due: float | None = None
        while True:
            self._asleep = True
            if not self._items:
                try:
                    bell.get(timeout=_IDLE if due is None else min(due + 0.01, _IDLE))
                except Empty:
                    if due is None:
                        draining.release()
                        # Who put something in just before saw a thread at work, and relies on it.
                        if not self._items or not draining.acquire(blocking=False):
                            return
            self._asleep = False
            time.sleep(_GATHER)
            busy = True
            while busy:
                while len(self._items) < _MOST_CROWDED and not self.exiting and self._crowded():
                    time.sleep(_GATHER)
                self._hold(-1)  # anew for each: a request that ends wants it, too
                try:
                    busy = self._one()
                    if not busy:
                        _quietly(self._settle)
                        due = _quietly(self._due)
                finally:
                    self._let_go()


def _quietly(work: Callable[..., T], *arguments: Any) -> T | None:
    try:
        return work(*arguments)
    except Exception:
        logger.exception("a span could not be turned into a usage record")
        return None
