"""Servers that are no primary any more: connections to them are not kept.

A server that was made a replica keeps its clients, while its address (a name, a proxy, a floating address) may lead to
the new primary already. Who stays connected is refused for ever.
"""

from __future__ import annotations

from typing import Any

from redis.exceptions import MasterDownError, ReadOnlyError

__all__ = ["Renewal", "refuses_writes", "renewing"]

_SAID = ("READONLY", "MASTERDOWN", "NOREPLICAS")
_SAID_IN_SCRIPTS = "-READONLY"  # of Redis 6


def refuses_writes(error: BaseException) -> bool:
    """Whether a server says that it is a replica, or a primary that is cut off from its replicas."""
    text = str(error)
    return isinstance(error, (ReadOnlyError, MasterDownError)) or text.startswith(_SAID) or _SAID_IN_SCRIPTS in text


class Renewal:
    """How often the connections of a pool had to be made anew."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class _Renewed:
    """A connection of redis-py's that is made anew when one of its pool heard that the server takes no writes."""

    renewal: Renewal
    _made_after = 0

    async def connect(self) -> None:
        """Connect, if need be. Pools call this before each use."""
        if self._made_after != self.renewal.count:
            self._made_after = self.renewal.count
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
        await super().connect()  # type: ignore[misc]

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        """Read an answer."""
        try:
            return await super().read_response(*arguments, **options)  # type: ignore[misc]
        except Exception as error:
            if self._made_after == self.renewal.count and refuses_writes(error):
                self.renewal.count += 1
            raise


def renewing(client: Any) -> Renewal:
    """Have a client of redis-py renew all connections of its pool once a server says that it takes no writes.

    Whoever counts one more in what is returned has them renewed, too.
    """
    pool, renewal = client.connection_pool, Renewal()
    kind = pool.connection_class
    pool.connection_class = type(kind.__name__, (_Renewed, kind), {"renewal": renewal})
    return renewal
