"""A store that fails on demand: the real memory store, behind a switch, used like one with connections."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from respan_guard import Guard
from respan_guard.backends.base import (
    ANY,
    Admit,
    AuditRow,
    Conflict,
    CustomerRow,
    Expected,
    Op,
    Outcome,
    Params,
    Put,
    Record,
)
from respan_guard.backends.memory import MemoryBackend
from respan_guard.errors import BackendError
from respan_guard.testing import FakeClock


class FaultyBackend(MemoryBackend):
    """Each URL names one store in this process, whoever opens it.

    Attributes:
        error: Raised by every `apply` while it is set; `applied_anyway` applies the batch before.
        write_error: Raised by `set_fact` and by every `apply` that writes while it is set, as by a server that is full.
        other_error: Raised by `open`, `get`, `facts` and `put` while it is set.
        audit_error: Raised by `add_audit` while it is set; `applied_anyway` writes before.
        gate: `apply` waits for it, as for a server that hangs.
        delay: Seconds that each `apply` takes.
    """

    shared = False
    default_timeout = 0.2
    stores: ClassVar[dict[str, FaultyBackend]] = {}

    error: BackendError | Exception | None
    write_error: BackendError | None
    other_error: BackendError | Exception | None
    audit_error: BackendError | None
    applied_anyway: bool
    gate: asyncio.Event | None
    batches: list[int]
    refused: int
    delay: float

    def __new__(cls, url: str, **options: object) -> FaultyBackend:
        """The store of that URL."""
        if url not in cls.stores:
            store = super().__new__(cls)
            MemoryBackend.__init__(store, "memory://")
            store.error, store.applied_anyway, store.gate, store.batches = None, False, None, []
            store.other_error, store.audit_error, store.delay = None, None, 0.0
            store.write_error, store.refused = None, 0
            cls.stores[url] = store
        return cls.stores[url]

    def __init__(self, url: str, **options: object) -> None:
        """Made once, in `__new__`."""

    async def open(self) -> None:
        """Open, or fail as told."""
        if self.other_error is not None:
            raise self.other_error
        await super().open()

    async def get(self, customer: str) -> CustomerRow | None:
        """Read, or fail as told."""
        if self.other_error is not None:
            raise self.other_error
        return await super().get(customer)

    async def facts(self, space: str, *, after: str = "", limit: int = 1000) -> list[tuple[str, str]]:
        """Read, or fail as told."""
        if self.other_error is not None:
            raise self.other_error
        return await super().facts(space, after=after, limit=limit)

    async def put(
        self, customer: str, params: Params, *, if_revision: str | None = None, actor: str = "", now: int | None = None
    ) -> Put | Conflict:
        """Write, or fail as told."""
        if self.other_error is not None:
            raise self.other_error
        return await super().put(customer, params, if_revision=if_revision, actor=actor, now=now)

    async def set_fact(self, space: str, key: str, value: str | None, *, expected: Expected = ANY) -> bool:
        """Write, or fail as told."""
        if self.write_error is not None:
            raise self.write_error
        return await super().set_fact(space, key, value, expected=expected)

    async def add_audit(self, row: AuditRow) -> None:
        """Write, or fail as told."""
        if self.audit_error is None or self.applied_anyway:
            await super().add_audit(row)
        if self.audit_error is not None:
            raise self.audit_error

    async def apply(self, ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        """Apply, or fail as told."""
        if self.gate is not None:
            await self.gate.wait()
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.error is not None:
            if self.applied_anyway:
                await super().apply(ops, now)
            raise self.error
        if self.write_error is not None and any(isinstance(op, (Admit, Record)) for op in ops):
            self.refused += 1
            raise self.write_error
        self.batches.append(len(ops))
        await asyncio.sleep(0)
        return await super().apply(ops, now)


def faulty_guard(tmp_path: Path, **options: Any) -> Guard:
    """A guard over it."""
    defaults: dict[str, Any] = {"journal_dir": tmp_path, "clock": FakeClock()}
    return Guard("faulty://one", **(defaults | options))


async def live_holds(guard: Guard) -> int:
    """How many holds count."""
    now = guard.now_ms()
    return len(await guard.lane().call(lambda backend: backend.holds(state="live", now=now)))
