"""Who, of all processes of a store, does something that one alone shall do."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from respan_guard.backends.base import Backend

__all__ = ["SPACE", "Held", "Lease", "read_lease"]

SPACE = "outbox"
"""The facts of exporters: who leads, and what people asked for."""
_TTL_MS = 30_000
_RENEW_MS = 22_000  # what is left at least while work goes on


@dataclass(frozen=True, slots=True)
class Held:
    """A lease as it is stored.

    Attributes:
        owner: A random name of who holds it.
        until_ms: When it ends, unless it is renewed.
        host: Machine and process, for people.
        error: What went wrong last; "" if nothing did since.
    """

    owner: str
    until_ms: int
    host: str = ""
    error: str = ""


class Lease:
    """One name, one holder at a time, as far as clocks agree; for the rest, work done twice must do no harm.

    Args:
        name: What is leased.
        owner: A random name of this process.
        now_ms: The store's time.
    """

    def __init__(self, name: str, owner: str, now_ms: Callable[[], int]) -> None:
        self._key = f"lease:{name}"
        self._now_ms = now_ms
        self._mine = Held(owner, 0, f"{socket.gethostname()}:{os.getpid()}")
        self.error = ""

    @property
    def held(self) -> bool:
        """Whether it was ours when last seen, and still has to be."""
        return self._mine.until_ms > self._now_ms()

    async def take(self, backend: Backend) -> bool:
        """Take or renew it; whether it is ours now."""
        text = await backend.fact(SPACE, self._key)
        lease = read_lease(text)
        now = self._now_ms()
        ours = lease is not None and (lease.owner, lease.error) == (self._mine.owner, self.error[:300])
        if ours and lease is not None and _RENEW_MS < lease.until_ms - now <= _TTL_MS:
            self._mine = lease
            return True
        mine = replace(self._mine, until_ms=now + _TTL_MS, error=self.error[:300])
        # One that ends absurdly late was written by a clock that was wrong.
        if lease is not None and lease.owner != mine.owner and now < lease.until_ms <= now + 2 * _TTL_MS:
            self._mine = replace(self._mine, until_ms=0)
            return False
        if await backend.set_fact(SPACE, self._key, json.dumps(asdict(mine)), expected=text):
            self._mine = mine
            return True
        self._mine = replace(self._mine, until_ms=0)
        return False

    async def drop(self, backend: Backend) -> None:
        """Let others have it at once."""
        text = await backend.fact(SPACE, self._key)
        lease = read_lease(text)
        if lease is not None and lease.owner == self._mine.owner:
            gone = replace(self._mine, until_ms=0, error=self.error[:300])
            await backend.set_fact(SPACE, self._key, json.dumps(asdict(gone)), expected=text)
        self._mine = replace(self._mine, until_ms=0)


def read_lease(text: str | None) -> Held | None:
    """A lease as it is stored; None if there is none that can be read."""
    try:
        found = json.loads(text or "")
        return Held(str(found["owner"]), int(found["until_ms"]), str(found["host"]), str(found["error"]))
    except (ValueError, KeyError, TypeError):
        return None
