"""Where customers stand, as last heard of: asked at the start of a span, which can't wait for storage."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from respan_guard.errors import BudgetExceeded, CustomerBlocked, LimitExceeded, RateLimitExceeded
from respan_guard.estimates import Ask

if TYPE_CHECKING:
    from respan_guard.backends.base import Backend
    from respan_guard.decision import Decision
    from respan_guard.guard import Guard

__all__ = ["Standing"]

logger = logging.getLogger("respan_guard")

_ERRORS: dict[str, type[LimitExceeded]] = {"blocked": CustomerBlocked, "rate": RateLimitExceeded}
_FRESH = 0.2  # seconds that an answer is taken for news
_MOST = 10_000


class Standing:
    """Knows which customers may not go on. What it knows is as old as their last call, or a fifth of a second.

    Args:
        guard: Decides.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._known: OrderedDict[str, tuple[Decision | None, float]] = OrderedDict()
        self._asking: set[str] = set()

    def check(self, customer: str) -> None:
        """Refuse a customer that is known to be over a limit; ask anew behind that, or behind a call that goes on.

        Raises:
            LimitExceeded: The customer is over a limit, as far as is known.
        """
        now = self._guard.clock.monotonic()
        known = self._known.get(customer)
        if known is None or now - known[1] >= _FRESH:
            self.ask(customer)
            known = self._known.get(customer)  # a store in memory has answered already
        if known is not None and known[0] is not None:
            decision = known[0]
            raise _ERRORS.get(decision.reason or "", BudgetExceeded)(decision)

    def ask(self, customer: str) -> None:
        """Find out where a customer stands, without waiting for it."""
        if customer in self._asking:
            return
        self._asking.add(customer)

        async def ask(_: Backend) -> None:
            decision: Decision | None = None
            try:
                # It holds nothing, since nothing is known of what to hold, and counts against no rate.
                admission = await self._guard.admissions.ask(customer, Ask(), requests=0)
                admission.end()
            except LimitExceeded as refused:
                decision = refused.decision
            finally:
                self._asking.discard(customer)
            self._known[customer] = (decision, self._guard.clock.monotonic())
            self._known.move_to_end(customer)
            if len(self._known) > _MOST:
                self._known.popitem(last=False)

        self._guard.lane().post_call(ask)
