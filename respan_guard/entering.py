"""Blocks of code that work for a customer: entering them, nesting, leaving."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from contextvars import Token
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any

from respan_guard.admission import Admission
from respan_guard.context import Slot, current_slot, slot_of
from respan_guard.usage import Usage

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Admitting", "entered", "leave"]

logger = logging.getLogger("respan_guard")


@contextmanager
def entered(slot: Slot) -> Generator[None]:
    """Make `slot` the current one for the code inside."""
    token = current_slot.set(slot)
    try:
        yield
    finally:
        slot.ended = True
        leave(token)


def leave(token: Token[Slot | None]) -> None:
    """Give the slot before back; in another copy of the context (a dependency's thread) it never was set."""
    try:
        current_slot.reset(token)
    except ValueError:
        logger.debug("a slot was left in another context than it was entered")


class Admitting:
    """What `guard.admit(...)` returns: to be awaited, or entered."""

    __slots__ = ("_admission", "_customer", "_estimate", "_guard", "_token")

    def __init__(self, guard: Guard, customer: str | int, estimate: Decimal | Usage | None) -> None:
        self._guard = guard
        self._customer = customer
        self._estimate = estimate

    def __await__(self) -> Generator[Any, None, Admission]:
        return self.bound().__await__()

    async def bound(self) -> Admission:
        """Admit, and bind to the request around, if there is one."""
        outer = slot_of(self._guard)
        request = outer.request if outer is not None else None
        if request is None:
            return await self.scoped()
        customer = self._guard.admissions.named(self._customer)
        bound = request.admission
        if bound is not None and bound.customer_identifier == customer and self._estimate is None:
            return bound  # asked again, by another dependency or behind the door: it is the same request
        admission = await self._within(customer, request)
        self._guard.admissions.bind(request, admission)
        return admission

    def scoped(self) -> Coroutine[Any, Any, Admission]:
        """Admit, for whoever ends it."""
        return self._within(self._guard.admissions.named(self._customer), slot_of(self._guard))

    def _within(self, customer: str, around: Slot | None) -> Coroutine[Any, Any, Admission]:
        guard = self._guard
        inner = around is not None and around.around(customer) is not None
        return guard.admissions.ask(customer, guard.estimator.given(self._estimate), requests=0 if inner else 1)

    def enter(self, admission: Admission) -> None:
        """Make the admission the one in force for the code that follows."""
        slot = Slot(self._guard)
        request = slot.request
        slot.bound = admission
        admission.slot = request
        if request is not None:
            request.keep(admission)
        if admission.id:
            self._guard.renewer.watch(admission)
        self._admission = admission
        self._token = current_slot.set(slot)

    def leave(self) -> None:
        """End the admission."""
        self._admission.end()
        leave(self._token)

    async def __aenter__(self) -> Admission:
        admission = await self.scoped()
        self.enter(admission)
        return admission

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
