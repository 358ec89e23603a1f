"""Changes of customers: put, merged from requests, updated, deleted, adjusted. Each is audited."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

from respan_guard.backends.base import AuditRow, Conflict, CustomerRow, Entry, Put
from respan_guard.customer import Customer, normalise_identifier
from respan_guard.errors import GuardError, InvalidInput, RevisionConflict
from respan_guard.identifiers import check_text
from respan_guard.markups import MARKUP, mark, mark_of, unmark
from respan_guard.money import to_nano
from respan_guard.policy import Today, assign_customer, customer_at, fix_period_start, merge_params, update_params
from respan_guard.threads import in_thread
from respan_guard.usage import Usage

if TYPE_CHECKING:
    from respan_guard.backends.base import Backend
    from respan_guard.guard import Guard

__all__ = ["Customers", "is_shown", "not_reserved"]

logger = logging.getLogger("respan_guard")
_TRIES = 8
_PATIENCE = 10.0  # seconds, of people who change things by hand; requests have the setting `storage_timeout`
_AUDIT_AGAIN = 10.0
_IDENTITY_FIELDS = ("name", "email")
_LABEL = re.compile(r"deleted-[0-9a-f]{16}")
Change: TypeAlias = Callable[[Mapping[str, Any], Today], Mapping[str, Any]]
"""Makes new params of those that are stored."""


def is_shown(row: CustomerRow) -> bool:
    """Whether that is somebody: not usage of nobody's, nor the sums of one that was deleted."""
    return bool(row.customer) and not (row.params is None and _LABEL.fullmatch(row.customer))


def not_reserved(identifier: str) -> str:
    """An id that comes in, if it is none of those under which sums of the deleted are kept.

    Raises:
        InvalidInput: It is.
    """
    if _LABEL.fullmatch(identifier):
        raise InvalidInput(
            "customer_identifier must not be deleted- and 16 hexadecimal digits: under such names the sums of deleted"
            " users are kept",
            field="customer_identifier",
        )
    return identifier


class Customers:
    """The writing half of the guard's customers."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def get(self, customer_identifier: str | int) -> Customer | None:
        """A customer with the bounds of its current period; None if it was never put or seen.

        Writing back what was read is no change: the period's anchor is kept beside its current bounds.
        """
        identifier = normalise_identifier(customer_identifier)
        row = await self._row(identifier)
        if row is None:
            return None
        known = self._guard.policies.learn(identifier, row.revision, row.params)
        today = date.fromordinal(known.policy.day_of(self._guard.now_ms()))
        return customer_at(identifier, row.params, today)

    async def put(self, customer: Customer, *, actor: str = "") -> Customer:
        """Store all fields of a customer; those it doesn't have are removed.

        A period that the stored budget has goes on: putting the same customer again never restarts it.
        """

        def changed(stored: Mapping[str, Any], today: Today) -> Mapping[str, Any]:
            params = dict(customer.to_params())
            if "period_budget" in params and "period_start" not in params and "period_budget" in stored:
                params |= {name: stored[name] for name in ("period_start",) if name in stored}
            return fix_period_start(params, today)

        return await self._change(customer.customer_identifier, changed, actor)

    async def create(self, customer: Customer, *, actor: str = "") -> Customer:
        """Store a customer that was never put.

        Raises:
            InvalidInput: It was, be it at the same time.
        """
        return await self._change(
            customer.customer_identifier,
            lambda _, today: fix_period_start(customer.to_params(), today),
            actor,
            new=True,
        )

    async def update(
        self,
        customer_identifier: str | int,
        changes: Mapping[str, Any],
        *,
        actor: str = "",
        check: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Customer:
        """Change single fields; None removes one.

        What `check` raises of what is stored is raised, and then nothing is changed.
        """

        def changed(stored: Mapping[str, Any], today: Today) -> Mapping[str, Any]:
            params = update_params(stored, changes, today)
            if check is not None:
                check(stored)
            return params

        return await self._change(normalise_identifier(customer_identifier), changed, actor)

    async def merge(
        self, identifier: str, given: Mapping[str, Any], *, trusted: bool, at_ms: int | None = None
    ) -> None:
        """Merge what came with a request; equal params write nothing.

        Untrusted, only name and email are taken, and only for a customer that has none: a caller must not
        rename somebody else's account. What was so at `at_ms` (None: now), before the customer was deleted, is
        nobody's any more.
        """
        if trusted:
            given = {name: value for name, value in given.items() if value is not None}
        else:
            stored = self._guard.policies.get(identifier).params or {}
            given = {n: given[n] for n in _IDENTITY_FIELDS if given.get(n) is not None and n not in stored}
        if not given:
            return

        def merged(stored: Mapping[str, Any], today: Today) -> Mapping[str, Any]:
            return merge_params(
                stored, given if trusted else {n: v for n, v in given.items() if n not in stored}, today
            )

        await self._take_over(identifier, merged, at_ms)

    async def assign(self, customer: Customer) -> None:
        """Take over what the app says of a customer with a request: the fields that it set, None and False too.

        The same again writes nothing.
        """
        if customer.model_fields_set != {"customer_identifier"}:
            await self._take_over(
                customer.customer_identifier, lambda stored, today: assign_customer(stored, customer, today)
            )

    async def _take_over(self, identifier: str, change: Change, at_ms: int | None = None) -> None:
        known = self._guard.policies.get(identifier)
        if known.params is not None:
            today = self._guard.policies.today(self._guard.now_ms())
            if change(known.params, today) == known.params:
                return  # steady state: no trip
        if at_ms is not None and await self._deleted_since(identifier, at_ms):
            return
        await self._change(identifier, change, "request", self._guard.storage_timeout)

    async def delete(self, customer_identifier: str | int, *, actor: str = "") -> bool:
        """Erase who a customer was and keep the sums.

        Params, audit and what apps noted on records go, also of calls that ended before and are booked later, and
        from the dead letters on this machine's disk. Out of reach are those of other machines, logs, and what
        exporters have handed on.
        """
        identifier = normalise_identifier(customer_identifier)
        check_text(actor, "actor")
        await self._guard.refusals.flush()  # what is counted here moves along; what others count goes to the label
        marked = await mark_of(self._guard, identifier, _PATIENCE)
        guard, lane = self._guard, self._guard.lane()
        done = await lane.call(
            lambda backend: backend.delete(identifier, actor=actor, now=guard.time_of_change(backend))
        )
        self._guard.policies.drop(identifier)
        await unmark(self._guard, identifier, marked, _PATIENCE)
        if lane.home is None:  # then this may run without an event loop, and must not wait for a thread
            self._guard.journal.erase(identifier)
        else:
            await in_thread(lambda: self._guard.journal.erase(identifier))
        return done

    async def adjust(self, customer_identifier: str | int, amount: Decimal, reason: str, *, actor: str = "") -> None:
        """Book a correction as an entry of its own, which says who and why, and audit it.

        It is booked, or kept until storage takes it, once this returns, and not if this raises: who is told of an
        error may try again. The audit follows as soon as storage takes it.

        Raises:
            InvalidInput: The amount is 0 or no number, or there is no reason.
            StorageUnavailable: Storage is down, and it is not kept.
            CounterOverflow: What the customer used would pass what can be counted.
        """
        guard = self._guard
        identifier = normalise_identifier(customer_identifier)
        check_text(reason, "reason")
        check_text(actor, "actor")
        nano = to_nano(amount, "amount", signed=True)
        if nano == 0:
            raise InvalidInput("amount must not be 0: negative gives budget back, positive takes it", field="amount")
        if not reason.strip():
            raise InvalidInput("reason must say why the budget is corrected", field="reason")
        row = await self._row(identifier)
        known = guard.policies.get(identifier)
        if row is not None and row.params is not None:
            known = guard.policies.learn(identifier, row.revision, row.params)
        now = guard.now_ms()
        await guard.lane().book(
            Entry(
                id=f"adjustment:{guard.ids()}",
                customer=identifier,
                day=known.policy.day_of(now),
                at_ms=now,
                cost=nano,
                kind="adjustment",
                usage=Usage(metadata={"reason": reason, "actor": actor}),
            )
        )
        after = {"amount": str(amount), "reason": reason}
        await self._audit(AuditRow(now, identifier, "adjust", actor, None, after))

    async def _audit(self, row: AuditRow) -> None:
        """Note a change that is made: now, or else again and again until storage takes it."""

        async def write(backend: Backend) -> None:
            known = await backend.audit(customer=row.customer)  # what storage was sent before may be there
            if row in [replace(found, seq=0) for found in known]:
                return
            if await backend.booked_on(row.customer, row.at_ms) == row.customer:  # else it was deleted meanwhile
                await backend.add_audit(row)

        lane = self._guard.lane()
        written = False
        try:
            await lane.call(write)
            written = True
        except GuardError as error:
            logger.warning("a correction is booked, and its audit waits for storage: %s", error)
        finally:
            if not written:
                lane.post_call(lambda _: self._audit(row), _AUDIT_AGAIN)

    async def _deleted_since(self, identifier: str, at_ms: int) -> bool:
        booked_on = await self._guard.lane().call(
            lambda backend: backend.booked_on(identifier, at_ms), self._guard.storage_timeout
        )
        return booked_on != identifier

    async def _row(self, identifier: str, patience: float = _PATIENCE) -> CustomerRow | None:
        return await self._guard.lane().call(lambda backend: backend.get(identifier), patience)

    async def _change(
        self,
        identifier: str,
        change: Change,
        actor: str,
        patience: float = _PATIENCE,
        *,
        new: bool = False,
    ) -> Customer:
        """Read, change, and write if nobody else wrote in between."""
        check_text(actor, "actor")
        guard = self._guard
        row = await self._row(identifier, patience)
        revision, stored = ("", None) if row is None else (row.revision, row.params)
        for _ in range(_TRIES):
            if new and revision:
                raise InvalidInput("there is a customer with this identifier", field="customer_identifier")
            guard.policies.learn(identifier, revision, stored)
            params = change(stored or {}, guard.policies.today(guard.now_ms()))
            customer = Customer.from_params(identifier, params)
            await guard.switch.announce_limits(params, patience)
            had, has = MARKUP in (stored or {}), MARKUP in params
            if has and not had:
                await mark(guard, identifier, patience)
            marked = await mark_of(guard, identifier, patience) if had and not has else None
            written = await self._write(identifier, params, revision, actor, patience)
            if not isinstance(written, Conflict):
                guard.policies.learn(identifier, written.revision, params)
                if has and not revision:  # a deletion meanwhile, which left no trace, may have taken the mark along
                    await mark(guard, identifier, patience)
                await unmark(guard, identifier, marked, patience)
                return customer
            revision, stored = written.revision, written.params
        raise RevisionConflict(f"customer {identifier!r} is changed by others all the time; try again")

    async def _write(
        self, identifier: str, params: Mapping[str, Any], revision: str, actor: str, patience: float
    ) -> Put | Conflict:
        guard = self._guard
        return await guard.lane().call(
            lambda backend: backend.put(
                identifier, params, if_revision=revision, actor=actor, now=guard.time_of_change(backend)
            ),
            patience,
        )
