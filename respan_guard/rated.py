"""Admissions whose rates live in a storage of `limits`: the rate is asked first, then the store for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from respan_guard.backends.base import Admit, Allowed, Refused, Stale
from respan_guard.decision import BLOCKED
from respan_guard.errors import BackendError, ConfigurationError, StorageUnavailable

if TYPE_CHECKING:
    from respan_guard.backends.base import Limit, Outcome, Window
    from respan_guard.guard import Guard
    from respan_guard.home_rates import Counted
    from respan_guard.lanes import Lane
    from respan_guard.policy import Terms

__all__ = ["RatedAsk", "with_rates"]

Resets = tuple[int | None, ...]
Answer = tuple[tuple["Limit", ...], Resets, "Outcome"]


class RatedAsk:
    """One admission's two steps. It may be asked again with other terms; no window is counted twice.

    Args:
        guard: Whose.
        lane: To the store and to the rates.
        customer: Who asks.
        requests: How many count; nothing is asked of the rates for 0.
    """

    __slots__ = ("_counted", "_customer", "_failed", "_guard", "_lane", "_requests")

    def __init__(self, guard: Guard, lane: Lane, customer: str, requests: int) -> None:
        self._guard = guard
        self._lane = lane
        self._customer = customer
        self._requests = requests
        self._counted: dict[int, Counted] = {}
        self._failed = False

    async def submit(self, op: Admit, terms: Terms) -> Answer:
        """Count the rates, then ask the store.

        Returns:
            The limits that were judged, when they reset, and the outcome. A refusal by a rate has the rates alone.

        Raises:
            StorageUnavailable: The rates gave no answer and fail closed.
            RateLimitExceeded: They gave none, and the local share is used up.
            BackendError: The store can't do it.
        """
        rates: tuple[Limit, ...] = ()
        if terms.limits and terms.limits[0].name != BLOCKED:  # who is blocked counts nowhere
            rates = tuple(limit for limit in terms.limits if limit.kind == "rate")
        counted: list[Counted] = []
        if rates and self._requests:
            counted = await self._count(op, terms, rates)
            if counted and not counted[-1].allowed:
                return await self._refused(op, terms, rates, counted)
        others = tuple(limit for limit in terms.limits if limit.kind != "rate")
        outcome = await self._lane.submit(replace(op, limits=others))
        if not counted or not isinstance(outcome, (Allowed, Refused)):
            resets = tuple(r for r, limit in zip(terms.resets, terms.limits, strict=True) if limit.kind != "rate")
            return others, resets, outcome
        return terms.limits, terms.resets, with_rates(terms.limits, outcome, counted, self._requests)

    async def _count(self, op: Admit, terms: Terms, rates: Sequence[Limit]) -> list[Counted]:
        """What each rate answers, in order, up to the first that refuses; nothing if they can't be asked."""
        todo = [rate for rate in rates if not self._has(rate)]
        if todo:
            if self._failed:
                return []
            try:
                answers = await self._lane.count_rates(self._customer, todo, self._requests)
            except StorageUnavailable as error:
                self._failed = True
                self._guard.failover.without_rates(error, op, terms, tuple(rates), self._requests)
                return []
            self._counted.update((rate.window_ms, answer) for rate, answer in zip(todo, answers, strict=False))
        found = []
        for rate in rates:
            answer = self._counted[rate.window_ms]
            if answer.used > rate.amount:  # it was counted under another amount, before the terms changed
                answer = replace(answer, allowed=False)
            found.append(answer)
            if not answer.allowed:
                break
        return found

    def _has(self, rate: Limit) -> bool:
        answer = self._counted.get(rate.window_ms)
        return answer is not None and answer.allowed

    async def _refused(self, op: Admit, terms: Terms, rates: Sequence[Limit], counted: Sequence[Counted]) -> Answer:
        """Refuse, unless the limits that did so are not the customer's any more: only the store knows."""
        guard = self._guard
        try:
            row = await self._lane.call(lambda backend: backend.get(self._customer), guard.storage_timeout)
        except (BackendError, ConfigurationError):
            row = None
        else:
            revision, params = (row.revision, row.params) if row is not None else ("", None)
            if revision != op.revision:
                return terms.limits, terms.resets, Stale(guard.now_ms(), revision, params)
        asked = tuple(rates[: len(counted)])
        now = guard.now_ms()
        reasons = tuple(None if answer.allowed else "rate" for answer in counted)
        used = tuple(answer.used - (self._requests if answer.allowed else 0) for answer in counted)
        windows = tuple(_window(now, rate, answer) for rate, answer in zip(asked, counted, strict=True))
        return asked, (None,) * len(asked), Refused(now, reasons, used, (0,) * len(asked), windows)


def with_rates(
    limits: Sequence[Limit], outcome: Allowed | Refused, counted: Sequence[Counted], requests: int
) -> Allowed | Refused:
    """Put what the rates answered into the store's answer on the other limits. `requests` are those just counted."""
    answers, used, held = iter(counted), iter(outcome.used), iter(outcome.held)
    reasons = iter(outcome.reasons) if isinstance(outcome, Refused) else iter(())
    all_used: list[int] = []
    all_held: list[int] = []
    all_reasons: list[str | None] = []
    windows: list[Window] = []
    for limit in limits:
        if limit.kind == "rate":
            answer = next(answers)
            all_used.append(max(0, answer.used - requests))
            all_held.append(0)
            all_reasons.append(None)
            windows.append(_window(outcome.now, limit, answer))
        else:
            all_used.append(next(used))
            all_held.append(next(held))
            all_reasons.append(next(reasons, None))
    if isinstance(outcome, Refused):
        return Refused(outcome.now, tuple(all_reasons), tuple(all_used), tuple(all_held), tuple(windows))
    return Allowed(outcome.now, tuple(all_used), tuple(all_held), tuple(windows))


def _window(now: int, rate: Limit, answer: Counted) -> Window:
    """A window that is over when the rate says so: when more fits, of a refusal, else when its own ends."""
    if answer.allowed:
        return now + answer.reset_ms - rate.window_ms, 0, answer.used
    return now + answer.wait_ms - rate.window_ms, 0, rate.amount
