"""`guard.sync`: the guard's methods for threads and scripts, blocking."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextvars import Token
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Self, TypeVar

from respan_guard.admission import Admission, Refusal
from respan_guard.context import Slot, current_slot, slot_of
from respan_guard.entering import leave
from respan_guard.errors import LimitExceeded

if TYPE_CHECKING:
    from respan_guard.backends.base import Discrepancy, StoreInfo
    from respan_guard.customer import Customer
    from respan_guard.decision import Decision, Status
    from respan_guard.guard import Guard
    from respan_guard.homes import Homes
    from respan_guard.options import Mode
    from respan_guard.outbox import ExporterStatus
    from respan_guard.reports import CustomerReport, UsageReport
    from respan_guard.usage import Usage, UsageRecord

__all__ = ["BlockingAdmission", "BlockingGuard"]

T = TypeVar("T")


class BlockingAdmission:
    """An admission whose methods block. Ends with its `with` block, its request, or `release`.

    Attributes:
        admission: The admission itself, for what does not block.
    """

    def __init__(self, admission: Admission, guard: Guard, homes: Homes) -> None:
        self.admission = admission
        self._guard = guard
        self._homes = homes
        self._token: Token[Slot | None] | None = None

    @property
    def customer_identifier(self) -> str:
        """Whom the work is done for."""
        return self.admission.customer_identifier

    @property
    def decision(self) -> Decision:
        """The decision behind it."""
        return self.admission.decision

    def record(self, usage: Usage) -> None:
        """Charge a call to this admission; see `Admission.record`."""
        self._homes.run(self.admission.record(usage))

    def record_soon(self, usage: Usage) -> None:
        """Charge a call to this admission without waiting."""
        self.admission.record_soon(usage)

    def release(self) -> None:
        """End the admission."""
        self.admission.end()

    def __enter__(self) -> Self:
        slot = Slot(self._guard)
        slot.bound = self.admission
        if self.admission.scope == "request" and slot.request is not None:
            self._guard.admissions.unbind(slot.request, self.admission)
        if self.admission.id:
            # Only now: what nobody ends must expire. On the guard's loop, since there may be none here.
            self._homes.call_soon(self.admission.watch)
        self._token = current_slot.set(slot)
        return self

    def __exit__(self, *_: object) -> None:
        self.admission.end()
        if self._token is not None:
            leave(self._token)


class BlockingGuard:
    """The guard's methods, blocking. Not for code on an event loop, which it would block too.

    Args:
        guard: The guard; it is the same store, the same limits and the same admissions.
        homes: The guard's homes.
    """

    def __init__(self, guard: Guard, homes: Homes) -> None:
        self._guard = guard
        self._homes = homes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Store what waits, and let go of storage; a guard that is used again opens itself again."""
        self._homes.check_waiting("await guard.aclose()")
        self._homes.run(self._guard.flush())
        self._homes.run(self._guard.outbox.leave())
        self._homes.close_blocking()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the guard and block for it, from any thread; see `Homes.run`."""
        return self._homes.run(work)

    def admit(self, customer_identifier: str | int, *, estimate: Decimal | Usage | None = None) -> BlockingAdmission:
        """Let a customer in, or raise; see `Guard.admit` for the errors.

        Admits at once. `with guard.sync.admit(id) as admission:` ends with the block, and a request around stays with
        its own customer; a bare `guard.sync.admit(id)` inside a request makes it that customer's and ends with it,
        elsewhere with `release`.
        """
        admission = self._homes.run(self._guard.admit(customer_identifier, estimate=estimate).scoped())
        outer = slot_of(self._guard)
        if outer is not None and outer.request is not None:
            self._guard.admissions.bind(outer.request, admission)
        return BlockingAdmission(admission, self._guard, self._homes)

    def try_admit(
        self, customer_identifier: str | int, *, estimate: Decimal | Usage | None = None
    ) -> BlockingAdmission | Refusal:
        """See `Guard.try_admit`."""
        try:
            return self.admit(customer_identifier, estimate=estimate)
        except LimitExceeded as refused:
            return Refusal(refused.decision)

    def record(
        self, usage: Usage, customer_identifier: str | int | None = None, *, entry_id: str | None = None
    ) -> None:
        """See `Guard.record`."""
        self._homes.run(self._guard.record(usage, customer_identifier, entry_id=entry_id))

    def flush(self) -> None:
        """See `Guard.flush`."""
        self._homes.check_waiting("await guard.flush()")
        self._homes.run(self._guard.flush())

    def put_customer(self, customer: Customer, *, actor: str = "") -> Customer:
        """See `Guard.put_customer`."""
        return self._homes.run(self._guard.put_customer(customer, actor=actor))

    def get_customer(self, customer_identifier: str | int) -> Customer | None:
        """See `Guard.get_customer`."""
        return self._homes.run(self._guard.get_customer(customer_identifier))

    def update_customer(self, customer_identifier: str | int, *, actor: str = "", **changes: Any) -> Customer:
        """See `Guard.update_customer`."""
        return self._homes.run(self._guard.update_customer(customer_identifier, actor=actor, **changes))

    def delete_customer(self, customer_identifier: str | int, *, actor: str = "") -> bool:
        """See `Guard.delete_customer`."""
        return self._homes.run(self._guard.delete_customer(customer_identifier, actor=actor))

    def list_customers(self, **query: Any) -> list[CustomerReport]:
        """See `Guard.list_customers`."""
        return self._homes.run(self._guard.list_customers(**query))

    def adjust(self, customer_identifier: str | int, amount: Decimal, reason: str, *, actor: str = "") -> None:
        """See `Guard.adjust`."""
        self._homes.run(self._guard.adjust(customer_identifier, amount, reason, actor=actor))

    def switch(self, mode: Mode | None, *, reason: str = "", actor: str = "") -> None:
        """The kill switch; see `Switch.set`."""
        self._homes.run(self._guard.switch.set(mode, reason=reason, actor=actor))

    def status(self, customer_identifier: str | int) -> Status:
        """See `Guard.status`."""
        return self._homes.run(self._guard.status(customer_identifier))

    def records(
        self,
        customer_identifier: str | int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        **filters: Any,
    ) -> Iterator[UsageRecord]:
        """See `Guard.records`."""
        records = self._guard.records(customer_identifier, since, until, **filters)

        async def following() -> UsageRecord | None:
            return await anext(records, None)

        while (record := self._homes.run(following())) is not None:
            yield record

    def usage(self, *by: str, **query: Any) -> list[UsageReport]:
        """See `Guard.usage`."""
        return self._homes.run(self._guard.usage(*by, **query))

    def exporters(self) -> list[ExporterStatus]:
        """See `Guard.exporters`."""
        return self._homes.run(self._guard.exporters())

    def verify(self) -> list[Discrepancy]:
        """See `Guard.verify`."""
        return self._homes.run(self._guard.verify())

    def prune(self, before: date, progress: Callable[[int], None] | None = None) -> int:
        """See `Guard.prune`."""
        return self._homes.run(self._guard.prune(before, progress))

    def info(self) -> StoreInfo:
        """See `Guard.info`."""
        return self._homes.run(self._guard.info())
