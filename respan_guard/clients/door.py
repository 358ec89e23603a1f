"""What happens before a call: whose is it, may it go on."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from respan_guard.clients.asking import Asking
from respan_guard.clients.exchange import Exchange
from respan_guard.context import slot_of
from respan_guard.errors import ConfigurationError, GuardError, LimitExceeded, StorageUnavailable
from respan_guard.refusal import RefusalAnswer, is_refusal, render
from respan_guard.tracing import recording_span, refused

if TYPE_CHECKING:
    from respan_guard.admission import Admission
    from respan_guard.context import Slot
    from respan_guard.guard import Guard
    from respan_guard.providers import Call

__all__ = ["Door", "RefusedCall"]

logger = logging.getLogger("respan_guard")


class RefusedCall(Exception):
    """A call must not be made.

    Attributes:
        error: Why.
        answer: What the client gets instead of the provider's answer.
    """

    def __init__(self, error: GuardError, answer: RefusalAnswer) -> None:
        super().__init__(error)
        self.error = error
        self.answer = answer


class Door:
    """Lets calls of one wrapped client through, or not.

    Args:
        guard: Decides.
        customer: Whose all calls of this client are; None for the customer in force where each is made.
        include_usage: Whether to ask for the usage of streams that would not tell it.
    """

    def __init__(self, guard: Guard, customer: str | None, *, include_usage: bool) -> None:
        self.guard = guard
        self.customer = customer
        self.asking = Asking(wanted=include_usage)
        self._warned = False

    async def open(self, call: Call) -> Exchange:
        """Let a call through.

        Raises:
            RefusedCall: It must not be made.
            ConfigurationError: Storage can't work as configured.
        """
        guard = self.guard
        slot = slot_of(guard)
        request = slot.request if slot is not None else None
        if request is not None:
            request.called = True
        customer = self.customer
        if customer is None and slot is not None:
            customer = slot.customer_identifier
        if not customer:
            self._warn(call)
            return Exchange(guard, call, request, guard.admissions.unattributed())
        try:
            return await self._admitted(call, request, customer, None if slot is None else slot.around(customer))
        except ConfigurationError:
            raise
        except GuardError as error:
            if not is_refusal(error):
                raise
            if isinstance(error, LimitExceeded):
                refused(recording_span(), error.decision)
            raise self._refused(error) from error
        except Exception as error:  # a fault of ours: the call could cost what nobody allowed
            logger.exception("the guard failed to decide; the call is refused")
            raise self._refused(StorageUnavailable("the guard failed to decide")) from error

    async def _admitted(self, call: Call, request: Slot | None, customer: str, around: Admission | None) -> Exchange:
        guard = self.guard
        ask = guard.estimator.of_call(call)
        claim = None
        # A hold for another model, or for none, is not in the budget of this one.
        serves = around is not None and (around.model == ask.model or not guard.policies.per_model)
        if around is not None and serves and ask.cost and ask.unpriced is None:
            # The admission around it holds money already, maybe for this very call: only what is missing is asked for.
            claim = around.claim(ask.cost)
            if claim is not None and claim.amount == ask.cost:
                return Exchange(guard, call, request, around=around, claim=claim)
        try:
            rest = ask if claim is None else replace(ask, cost=ask.cost - claim.amount)
            own = await guard.admissions.ask(customer, rest, requests=0 if around is not None else 1)
        except BaseException:
            if around is not None and claim is not None:
                around.settle(claim)
            raise
        return Exchange(guard, call, request, own, around=around, claim=claim)

    def _refused(self, error: GuardError) -> RefusedCall:
        settings = self.guard.settings
        answer = render(error, show_amounts=settings.show_amounts, budget_status_code=settings.budget_status_code)
        # Clients retry a 429 and a 503 on their own, and would sleep here for as long as `Retry-After` says, with a
        # request open. Whoever made the call decides: the header still tells when asking again makes sense.
        if (b"x-should-retry", b"false") not in answer.headers:
            answer.headers.append((b"x-should-retry", b"false"))
        return RefusedCall(error, answer)

    def _warn(self, call: Call) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "a call of model %r is made for no known customer: it is recorded as nobody's and no limit applies; "
                "admit a customer, use guard.on_behalf_of(id), or guard.wrap(client, customer=id)",
                call.model[:100],
            )
