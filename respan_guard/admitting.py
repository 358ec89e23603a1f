"""Letting customers in: asking storage, and binding admissions to requests."""

from __future__ import annotations

import logging
import sys
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from respan_guard.admission import Admission
from respan_guard.backends.base import Admit, Allowed, Entry, Refused, Stale
from respan_guard.context import Slot
from respan_guard.customer import Customer, normalise_identifier
from respan_guard.decision import Decision
from respan_guard.errors import (
    BackendError,
    BudgetExceeded,
    ConfigurationError,
    CustomerBlocked,
    CustomerUnknown,
    GuardError,
    InvalidIdentifier,
    RateLimitExceeded,
    StorageUnavailable,
    UnpricedModel,
)
from respan_guard.estimates import Ask
from respan_guard.observing import observed
from respan_guard.rated import RatedAsk
from respan_guard.telemetry import telemetry
from respan_guard.tracing import ended, name_customer, unname
from respan_guard.usage import Usage

if TYPE_CHECKING:
    from respan_guard.guard import Guard
    from respan_guard.lanes import Lane
    from respan_guard.policies import KnownPolicy
    from respan_guard.providers import Call

__all__ = ["Admissions"]

logger = logging.getLogger("respan_guard")
_ERRORS = {"blocked": CustomerBlocked, "rate": RateLimitExceeded}
_TRIES = 4
_NO_LIMITS = Allowed(now=0)


class Admissions:
    """How one guard lets customers in. The doors stand on it."""

    def __init__(self, guard: Guard) -> None:
        settings = guard.settings
        self._guard = guard
        self._switch = guard.switch
        self._ttl_ms = int(settings.hold_ttl * 1000)
        self._known_only = settings.unknown_customers == "refuse"
        self._trusted = settings.trust_customer_params
        self._remember = guard.failover.remember
        self._rated = settings.rate_limit_storage is not None

    def ask(self, customer: str, ask: Ask, *, requests: int = 1) -> Coroutine[Any, Any, Admission]:
        """Ask storage, and let the customer in or raise; see `Guard.admit` for the errors."""
        asking = self._ask(customer, ask, requests)
        return observed(asking, self._guard.clock) if telemetry.on else asking

    async def _ask(self, customer: str, ask: Ask, requests: int) -> Admission:
        guard = self._guard
        switch = self._switch
        if not switch.off:
            lane = guard.lane()
            if lane.asleep:
                await switch.wake(lane)
        if switch.off:
            return Admission(guard, None, "", Decision(customer, (), (), _NO_LIMITS))
        if not customer:
            return self.unattributed()
        known = guard.policies.get(customer)
        if self._known_only and not known.revision:
            known = await self._look_up(lane, customer)
        op_id = guard.ids()
        now = guard.now_ms()
        rated = RatedAsk(guard, lane, customer, requests) if self._rated else None
        remember = self._remember
        stored = 0
        for _ in range(_TRIES):
            if remember is not None:
                stored = guard.failover.stored(customer)
            terms = known.policy.at(now)
            if terms.per_model is not None and ask.model:
                terms = terms.per_model
            if ask.unpriced is not None and terms.money and not switch.shadow:
                raise UnpricedModel(ask.unpriced)
            try:
                op = Admit(
                    op_id,
                    customer,
                    known.revision,
                    terms.day,
                    terms.day_from_ms,
                    terms.day_to_ms,
                    terms.limits,
                    ask.model,
                    requests,
                    ask.cost,
                    ask.tokens,
                    self._ttl_ms,
                    ask.free,
                )
                if rated is None:
                    limits, resets = terms.limits, terms.resets
                    outcome = await lane.submit(op)
                else:
                    limits, resets, outcome = await rated.submit(op, terms)
            except BackendError as error:
                return guard.failover.admit(error, lane, op_id, customer, known, terms, ask, requests)
            if isinstance(outcome, Stale):
                guard.follow(outcome.now)
                now = outcome.now
                known = guard.policies.learn(customer, outcome.revision, outcome.params)
                if self._known_only and not known.revision and not switch.shadow:
                    raise _unknown(customer)  # it was deleted
                continue
            assert isinstance(outcome, (Allowed, Refused))
            decision = Decision(customer, limits, resets, outcome, requests)
            if remember is not None:
                remember(decision, ask.cost, stored)
            if outcome.__class__ is Allowed:
                return Admission(guard, lane, op_id, decision, day=terms.day, held=ask.cost, model=ask.model)
            guard.refusals.add(decision)
            if switch.shadow:
                decision.shadow = decision.allowed = True
                return Admission(guard, lane, op_id, decision, day=terms.day, stored=False)
            raise _ERRORS.get(decision.reason or "", BudgetExceeded)(decision)
        raise StorageUnavailable("the customer's limits kept changing while they were checked")

    def named(self, customer: str | int) -> str:
        """The identifier of a customer; nobody's ("") for an unusable one while nobody is refused.

        Raises:
            InvalidIdentifier: It is unusable.
        """
        try:
            return normalise_identifier(customer)
        except InvalidIdentifier as error:
            if not (self._switch.off or self._switch.shadow):
                raise
            logger.info("%s: an identifier would be refused: %s", self._switch.mode, error)
            return ""

    async def _look_up(self, lane: Lane, customer: str) -> KnownPolicy:
        if self._switch.shadow:
            try:
                return await self._known(lane, customer)
            except GuardError as error:
                logger.info("shadow mode: a customer would be refused: %s", error)
                return self._guard.policies.get(customer)
        return await self._known(lane, customer)

    async def _known(self, lane: Lane, customer: str) -> KnownPolicy:
        try:
            row = await lane.call(lambda backend: backend.get(customer), self._guard.storage_timeout)
        except (BackendError, ConfigurationError) as error:
            raise self._guard.failover.unusable(error) from error
        if row is None or row.params is None:
            raise _unknown(customer)
        return self._guard.policies.learn(customer, row.revision, row.params)

    async def request(
        self, slot: Slot, customer: str | Customer, call: Call | None = None, params: Mapping[str, Any] | None = None
    ) -> Admission:
        """Let a request in at the door and bind the admission to its slot; raises like `admit`.

        Args:
            slot: The request's.
            customer: Who it is; the fields that are set on a `Customer` are stored first, if they differ.
            call: What the body says about an LLM call; it decides what is held.
            params: `customer_params` of the request; limits in them are obeyed with `trust_customer_params=True`.
        """
        if isinstance(customer, Customer):
            identifier = customer.customer_identifier
            await self._merge(identifier, customer, trusted=True)
        else:
            identifier = normalise_identifier(customer)
            if params:
                await self._merge(identifier, params, trusted=self._trusted)
        admission = await self.ask(identifier, self._guard.estimator.of_call(call))
        self.bind(slot, admission)
        return admission

    async def _merge(self, identifier: str, given: Mapping[str, Any] | Customer, *, trusted: bool) -> None:
        """Merge what came with a request; a client's word neither makes a customer known nor decides on an outage."""
        if self._switch.off:
            return
        guard = self._guard
        if self._known_only and not trusted and not guard.policies.get(identifier).revision:
            await self._look_up(guard.lane(), identifier)
        try:
            if isinstance(given, Customer):
                await guard.customers.assign(given)
            else:
                await guard.customers.merge(identifier, given, trusted=trusted)
        except (BackendError, ConfigurationError) as error:
            told = guard.failover.unusable(error)
            if trusted and guard.failover.closed:
                raise told from error
            logger.info("what came with a request was not stored: %s", error)

    def end(
        self, slot: Slot, usage: Usage | None = None, call: Call | None = None, *, sent: bool = False, seen: int = 0
    ) -> None:
        """End a request: book what its response said, and end its admissions. Never waits, never raises.

        Args:
            slot: The request's.
            usage: What was read off the response; left out if another door recorded under this request.
            call: The LLM call that the request asked for.
            sent: Whether that call was made: without any usage it is then presumed by `missing_usage`.
            seen: Bytes of text that its answer brought.
        """
        slot.ended = True
        charged = slot.admission or slot.bound  # the app may have ended the one that was bound last
        witness = self._guard.recorder.witness
        if witness is not None:
            try:
                witness.hand_on()  # what spans told is known before it is decided whether the response counts
            except Exception:  # a fault of ours must neither reach the app nor leak the hold
                logger.exception("what spans told of a request could not be booked")
        for admission in slot.admissions:
            if admission.ended and admission is not charged:
                continue
            last: list[Entry] = []
            try:
                if admission is charged and not slot.recorded:
                    if usage is not None:
                        last.append(admission.entry(usage, "response", call=call))
                    elif sent and call is not None and not self._switch.off and not admission.claimed:
                        last.append(self.presume(admission, call, seen=seen))
                        if witness is not None:
                            witness.saw(last[-1])
            except Exception:  # a fault of ours must neither reach the app nor leak the hold
                logger.exception("the usage of a response could not be recorded")
            if not admission.ended:
                admission.end(*last)
            elif last:
                admission.book(*last)
        if slot.span is not None or slot.undo:
            ended(slot)

    def unattributed(self) -> Admission:
        """What a call is recorded under that is nobody's: it holds nothing, and no limit applies."""
        guard = self._guard
        day = guard.policies.get("").policy.day_of(guard.now_ms())
        return Admission(guard, guard.lane(), guard.ids(), Decision("", (), (), _NO_LIMITS), day=day, stored=False)

    def presume(
        self,
        admission: Admission,
        call: Call,
        claimed: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        seen: int = 0,
    ) -> Entry:
        """The entry of a call that was made under an admission and whose usage stayed unknown.

        Args:
            admission: Under which it was made.
            call: What was asked for.
            claimed: What it claimed of the admission's hold, nano-USD, where that is not the call's alone.
            metadata: What else is known of it.
            seen: Bytes of text that its answer brought.
        """
        cost, usage = self._guard.estimator.presume(call, admission.free if claimed is None else claimed, seen)
        admission.spend(cost or 0)
        usage.metadata = metadata
        return self._guard.recorder.presumed(
            admission.id if claimed is None else f"{admission.id}:{self._guard.ids()}",
            admission.hold_id,
            admission.customer_identifier,
            admission.day,
            self._guard.now_ms(),
            cost,
            usage,
        )

    def bind(self, slot: Slot, admission: Admission) -> None:
        """Make the admission the request's: it ends with it."""
        admission.slot = slot
        admission.scope = "request"
        slot.keep(admission)
        slot.bound = admission
        if slot.span is not None or "respan_tracing" in sys.modules:
            name_customer(slot, admission.decision)
        if slot.ended:  # the request is over: nobody else would end it
            admission.end()
        elif admission.id:
            self._guard.renewer.watch(admission)

    def unbind(self, slot: Slot, admission: Admission) -> None:
        """The admission is a block's after all, entered in a thread: the request is whose it was before."""
        admission.scope = "thread"
        if slot.bound is admission:
            slot.bound = next((one for one in reversed(slot.admissions) if one.scope == "request"), None)
            if slot.span is not None or slot.undo:
                unname(slot, None if slot.bound is None else slot.bound.decision)


def _unknown(customer: str) -> CustomerUnknown:
    return CustomerUnknown(f"customer {customer!r} is not known; put it first, or set unknown_customers='admit'")
