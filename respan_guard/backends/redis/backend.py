"""`redis://`: a server, or a cluster, for any number of processes on any number of machines."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import Any, ClassVar

from respan_guard.backends.base import (
    ANY,
    Admit,
    Allowed,
    AuditRow,
    Backend,
    Conflict,
    CustomerQuery,
    CustomerRow,
    Discrepancy,
    Expected,
    HoldRow,
    Limit,
    Op,
    Outcome,
    Params,
    Put,
    RecordQuery,
    RefusalRow,
    StoredEntry,
    StoreInfo,
    UsageQuery,
    UsageRow,
)
from respan_guard.backends.redis import changes, checks, reads, sums
from respan_guard.backends.redis.batches import Batches
from respan_guard.backends.redis.link import Link
from respan_guard.backends.redis.location import locate
from respan_guard.backends.redis.rows import Encoder, outcome_from
from respan_guard.backends.redis.shelf import Shelf
from respan_guard.clock import SystemClock
from respan_guard.errors import ConfigurationError, SchemaMismatch, StorageReadOnly, StorageUnavailable, StoreReset

__all__ = ["RedisBackend"]

SCHEMA = 1
_MINIMUM = (7, 0)
_clock = SystemClock()
_told: set[tuple[str, str]] = set()
logger = logging.getLogger("respan_guard")


class RedisBackend(Backend):
    """A Redis or Valkey 7.0 or newer, or a cluster of them.

    A batch is one script call, and with it one transaction: it decides everything on copies and writes last, so a batch
    that can't be applied leaves nothing behind. On a cluster a batch is cut by customer into up to 16 of them: each is
    whole, and ids make it safe to send all again when one of them failed.

    Args:
        url: `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://` with TLS, `redis+unix:///path`,
            `redis+cluster://HOST:PORT,HOST:PORT`; `valkey` does for `redis`. `?timeout=5` are the seconds that
            connecting or an answer may take before the connection is given up.
        namespace: Stores of different namespaces on a server do not know each other.
        options: `timeout` as in the URL.

    Raises:
        ConfigurationError: The URL names no server, or an option is unknown.
    """

    server_clock: ClassVar[bool] = True

    def __init__(self, url: str, *, namespace: str = "default", **options: Any) -> None:
        self._at = locate(url, namespace, options)
        self.place = self._at.place
        self._link = Link(self._at)
        self.at_once = 1 if self._at.nodes else 2  # the parts of a cluster have connections of their own: no order
        self._shelf: Shelf | None = None
        self._encoder = Encoder()
        self._batches: Batches | None = None
        self._now = 0

    # -- life --------------------------------------------------------------------------------------

    def check_limits(self, limits: Sequence[Limit]) -> None:
        """See `Backend.check_limits`."""
        for limit in limits if self._at.nodes else ():
            if limit.shared:
                raise ConfigurationError(
                    f"{limit.name} counts all customers together, and a Redis Cluster keeps each customer in a part of "
                    "its own; use a single server, or PostgreSQL, for limits that span customers"
                )

    async def open(self) -> None:
        """See `Backend.open`."""
        if self._shelf is not None:
            return
        link = self._link
        link.opening = True
        await link.connect()
        try:
            await self._look_at_servers()
            epoch = await self._create()
        except BaseException:
            await link.close()
            raise
        link.opening = False
        self._shelf, self.identity = Shelf(link, epoch), epoch
        self._batches = Batches(self._shelf, self._encoder)

    async def _look_at_servers(self) -> None:
        """Refuse what can't work, and tell people what can't be relied on, once for each process."""
        url = self._at.url
        servers = await checks.settings_of(self._link)
        for settings in servers.values():
            if settings.get("cluster_enabled") == "1" and not self._at.nodes:
                raise ConfigurationError(
                    f"{url} is a node of a Redis Cluster; write redis+cluster:// instead of redis://"
                )
            if settings.get("role") == "slave":
                raise StorageReadOnly(f"{url} is a read-only replica; name the primary")
            version = settings.get("redis_version", "7.0")
            if tuple(map(int, version.split(".")[:2])) < _MINIMUM:
                raise ConfigurationError(f"{url} is Redis {version}; 7.0 or newer is needed, or any Valkey")
        for problem in checks.gathered(servers)[0]:
            if (url, problem) not in _told:
                _told.add((url, problem))
                logger.warning("budgets on %s do not hold: %s", url, problem)

    async def _create(self) -> str:
        epoch, schema = await self._link.run("create", 0, secrets.token_hex(8), SCHEMA)
        parts = [(epoch, schema)]
        if self._at.nodes:
            parts = await self._link.run_all("create", epoch, SCHEMA)
        for its_epoch, its_schema in parts:
            if its_epoch is None:
                raise StoreReset(f"{self._at.url} has keys of a store, but not what makes it one")
            if int(its_schema) > SCHEMA:
                raise SchemaMismatch(
                    f"{self._at.url} was written by a newer version of respan_guard (schema {its_schema}, this one "
                    f"knows {SCHEMA}); upgrade"
                )
            if its_epoch != epoch:
                raise StoreReset(f"a part of the store on {self._at.url} was wiped or replaced")
        return str(epoch)

    async def close(self) -> None:
        """See `Backend.close`."""
        batches, self._shelf, self._batches = self._batches, None, None
        try:
            if batches is not None:
                await batches.look_back(self._now)
        finally:
            await self._link.close()

    def abandon(self) -> None:
        """See `Backend.abandon`."""
        self._shelf = self._batches = None
        self._link.abandon()

    def _opened(self) -> Shelf:
        if self._shelf is None:
            raise StorageUnavailable(f"{self._at.url} is not open")
        return self._shelf

    def _seen(self, now: int | None) -> int:
        """The time to read at: not before what was last applied.

        It is no floor for later batches: where the server's clock counts, the caller's may be wrong.
        """
        return (self._now or _clock.now_ms()) if now is None else max(self._now, now)

    # -- operations --------------------------------------------------------------------------------

    async def apply(self, ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        """See `Backend.apply`."""
        shelf, batches = self._opened(), self._batches
        assert batches is not None
        if now is not None:
            self._now = max(self._now, now)
        if shelf.parts.count == 1:
            return await batches.send(0, ops, self._now, now)
        for op in ops:
            if isinstance(op, Admit):
                self.check_limits(op.limits)
        split = shelf.parts.split(ops)
        sent = [batches.send(part, [ops[at] for at in places], self._now, now) for part, places in split.items()]
        answers = await asyncio.gather(*sent, return_exceptions=True)
        outcomes: dict[int, Outcome] = {}
        for places, answer in zip(split.values(), answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            outcomes.update(zip(places, answer, strict=True))
        return [outcomes[at] for at in range(len(ops))]

    # -- customers ---------------------------------------------------------------------------------

    async def put(
        self, customer: str, params: Params, *, if_revision: str | None = None, actor: str = "", now: int | None = None
    ) -> Put | Conflict:
        """See `Backend.put`."""
        return await changes.put(self._opened(), customer, params, if_revision, actor, self._time(now))

    async def delete(self, customer: str, *, actor: str = "", now: int | None = None) -> bool:
        """See `Backend.delete`."""
        return await changes.delete(self._opened(), customer, actor, self._time(now))

    def _time(self, now: int | None) -> int | None:
        """The time of a change: the caller's, which never goes back, or None for the server's."""
        return None if now is None else self._seen(now)

    async def get(self, customer: str) -> CustomerRow | None:
        """See `Backend.get`."""
        return await reads.get(self._opened(), customer)

    async def customers(self, query: CustomerQuery) -> list[CustomerRow]:
        """See `Backend.customers`."""
        return await reads.customers(self._opened(), query)

    async def count_customers(self, *, seen_since_ms: int | None = None, blocked: bool | None = None) -> int:
        """See `Backend.count_customers`."""
        return await reads.count_customers(self._opened(), seen_since_ms, blocked)

    async def standing(
        self, customer: str, limits: Sequence[Limit], model: str = "", now: int | None = None
    ) -> Allowed:
        """See `Backend.standing`."""
        shelf, limits = self._opened(), tuple(limits)
        self.check_limits(limits)
        at, server = self._seen(now) if now is not None else self._now, "1" if now is None else "0"
        asked = self._encoder.standing(customer, limits, model)
        reply = await shelf.run("apply", shelf.parts.of(customer), at, server, shelf.timed, asked)
        outcome = outcome_from(reply[2])
        assert isinstance(outcome, Allowed)
        return outcome

    # -- reads -------------------------------------------------------------------------------------

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """See `Backend.usage`."""
        return await sums.usage(self._opened(), query)

    async def entries(self, query: RecordQuery) -> list[StoredEntry]:
        """See `Backend.entries`."""
        return await reads.entries(self._opened(), query)

    async def entry(self, customer: str, entry_id: str) -> StoredEntry | None:
        """See `Backend.entry`."""
        return await reads.entry(self._opened(), customer, entry_id)

    async def booked_on(self, customer: str, at_ms: int) -> str:
        """See `Backend.booked_on`."""
        return await reads.booked_on(self._opened(), customer, at_ms)

    async def holds(
        self, customer: str | None = None, *, state: str = "live", now: int | None = None, limit: int = 1000
    ) -> list[HoldRow]:
        """See `Backend.holds`."""
        return await reads.holds(self._opened(), customer, state, self._seen(now), limit)

    async def add_refusals(self, rows: Sequence[RefusalRow]) -> None:
        """See `Backend.add_refusals`."""
        await changes.add_refusals(self._opened(), rows)

    async def refusals(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40, limit: int = 10_000
    ) -> list[RefusalRow]:
        """See `Backend.refusals`."""
        return await changes.refusals(self._opened(), customer, since_minute, until_minute, limit)

    async def refusal_sums(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40
    ) -> dict[str, int]:
        """See `Backend.refusal_sums`."""
        return await changes.refusal_sums(self._opened(), customer, since_minute, until_minute)

    async def add_audit(self, row: AuditRow) -> None:
        """See `Backend.add_audit`."""
        await changes.add_audit(self._opened(), row)

    async def audit(
        self, *, customer: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[AuditRow]:
        """See `Backend.audit`."""
        return await changes.audit(self._opened(), customer, before, limit)

    async def cursor(self, name: str) -> int | None:
        """See `Backend.cursor`."""
        stored = await self._opened().ask(0, "HGET", "cursors", name)
        return None if stored is None else int(stored)

    async def set_cursor(self, name: str, seq: int) -> None:
        """See `Backend.set_cursor`."""
        await self._opened().ask(0, "HSET", "cursors", name, seq)

    async def set_fact(self, space: str, key: str, value: str | None, *, expected: Expected = ANY) -> bool:
        """See `Backend.set_fact`."""
        return await changes.set_fact(self._opened(), space, key, value, expected)

    async def fact(self, space: str, key: str) -> str | None:
        """See `Backend.fact`."""
        return await changes.fact(self._opened(), space, key)

    async def facts(self, space: str, *, after: str = "", limit: int = 1000) -> list[tuple[str, str]]:
        """See `Backend.facts`."""
        return await changes.facts(self._opened(), space, after, limit)

    async def prune(self, before_day: int, *, limit: int = 1000) -> int:
        """See `Backend.prune`."""
        return await changes.prune(self._opened(), before_day, limit)

    async def verify(self) -> list[Discrepancy]:
        """See `Backend.verify`. Runs in steps beside the traffic, and holds up nobody."""
        return await checks.verify(self._opened())

    async def info(self) -> StoreInfo:
        """See `Backend.info`."""
        return await checks.info(self._opened())
