"""Usage that somebody else reports, and single records: booked with an answer, found by id, read in pages."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from respan_guard.backends.base import Recorded, StoredEntry, TooLate
from respan_guard.customer import normalise_identifier
from respan_guard.errors import BackendError, CounterOverflow, InvalidInput, StorageUnavailable
from respan_guard.items import Unstorable, Waits
from respan_guard.recorder import record_from_entry
from respan_guard.usage import Usage, UsageRecord

if TYPE_CHECKING:
    from respan_guard.backends.base import Entry
    from respan_guard.guard import Guard

__all__ = ["Booked", "Bookings"]


@dataclass(frozen=True, slots=True)
class Booked:
    """What came of reporting usage.

    Attributes:
        record: What is stored under its id. Its place in the log is not known yet.
        new: False if that was there before; then it stands as it was.
        conflict: What was there before has other amounts.
        waits: Storage was sent it and did not answer, and the disk takes nothing: this process keeps it in memory and
            sends it, under its id, until storage has it.
        found: It is found by its customer and id; not so where the customer was deleted after the call.
    """

    record: UsageRecord
    new: bool = True
    conflict: bool = False
    waits: bool = False
    found: bool = True


class Bookings:
    """The ledger, record by record."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def book(
        self,
        usage: Usage,
        customer_identifier: str | int,
        *,
        entry_id: str | None = None,
        unpriced: bool = False,
        no_call: bool = False,
        look: bool = False,
    ) -> Booked:
        """Record usage that an admission has nothing to do with, and say what is stored.

        It is safe once this returns, unless `waits` says otherwise; it is not stored if this raises. So who is told
        of an error may send it again, and who is not must not.

        Args:
            usage: What the call consumed; priced if it has no cost, booked on the day that `usage.time` says.
            customer_identifier: Whose it is; "" for nobody's.
            entry_id: The record's id, with a prefix of its own; recording it again for the same customer changes
                nothing. Else the call's own id counts (the provider's, or of its span).
            unpriced: Keep it as unpriced whatever prices say: nothing is known about its size.
            no_call: It is the cost of work around calls, not of one: an adjustment.
            look: Say of usage of the past whether it is found; that costs a lookup.

        Raises:
            InvalidInput: The usage can't be stored, or its day is pruned; then it is among the dead letters.
            StorageUnavailable: Neither storage nor the journal took it, and it is not kept; or the guard is switched
                off.
        """
        guard = self._guard
        if guard.switch.off:
            raise StorageUnavailable("the guard is switched off, so usage is not recorded; send it again later")
        identifier = normalise_identifier(customer_identifier) if customer_identifier != "" else ""
        await self._know(identifier)
        traced, past = usage.trace_id, usage.time is not None
        entry = guard.make_entry(usage, identifier, source="api", entry_id=entry_id)
        entry.usage.trace_id = traced  # not of the request that reports it
        if unpriced:
            entry.cost = None
        if no_call:
            entry.kind = "adjustment"
        try:
            outcome = await guard.lane().book(entry)
        except (CounterOverflow, Unstorable) as error:
            raise InvalidInput(f"storage can't take this, ever: {error}") from error
        if isinstance(outcome, TooLate):
            raise InvalidInput("timestamp is before what is kept: records of that day are pruned", field="timestamp")
        if isinstance(outcome, Recorded) and not outcome.new:
            return await self._stored(entry, outcome)
        found = True
        if look and past and isinstance(outcome, Recorded):
            with contextlib.suppress(BackendError):  # it is stored all the same
                found = await self.find(entry.customer, entry.id) is not None
        return Booked(record_from_entry(StoredEntry(0, 1, entry)), waits=isinstance(outcome, Waits), found=found)

    async def find(self, customer_identifier: str, record_id: str) -> UsageRecord | None:
        """A customer's record by its id; None if there is none, or it is pruned."""
        stored = await self._guard.lane().call(lambda backend: backend.entry(customer_identifier, record_id))
        return None if stored is None else record_from_entry(stored)

    async def _stored(self, entry: Entry, outcome: Recorded) -> Booked:
        record = await self.find(entry.customer, entry.id)
        found = record is not None
        if record is None:  # its customer was deleted after the call, or it was pruned meanwhile
            entry.cost, entry.day = outcome.cost, outcome.day
            record = record_from_entry(StoredEntry(0, 1, entry))
        return Booked(record, new=False, conflict=outcome.conflict, found=found)

    async def _know(self, identifier: str) -> None:
        """Learn the customer's zone, which tells on which day its usage falls."""
        policies = self._guard.policies
        if identifier and policies.get(identifier) is policies.default:
            row = await self._guard.lane().call(lambda backend: backend.get(identifier))
            if row is not None and row.params is not None:
                policies.learn(identifier, row.revision, row.params)
