"""Work on the disk that an event loop does not wait for, as long as there are threads to do it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`; where no thread can be started `work` is done here, and the loop waits for it.

    None can at a limit of processes, and while the interpreter exits. A record that is kept nowhere would be worse.
    """
    begun = threading.Lock()
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()  # whoever gives up waiting does not end it

    def once() -> None:
        # An executor queues before it starts a thread: what that failed for is done by one that is free later.
        if begun.acquire(blocking=False):
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

    try:
        asyncio.get_running_loop().run_in_executor(None, once)
    except RuntimeError:
        once()
    return await asyncio.wrap_future(done)
