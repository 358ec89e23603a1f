"""The answer: allowed or refused, and where every limit stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from respan_guard.backends.base import Allowed, Limit, Refused, Window
from respan_guard.money import from_nano

__all__ = ["BLOCKED", "BUDGETS", "Decision", "LimitStatus", "Status", "as_datetime", "rate_wait_ms"]

BLOCKED = "blocked"
"""Name of the limit that a blocked customer's params compile to."""

_SAID = {
    "period_budget": "The budget of this period",
    "total_budget": "The total budget",
    "app_period_budget": "The app's own budget of this period",
    "app_total_budget": "The app's own total budget",
    "model_period_budget": "The app's own budget of this period for this model",
    "model_total_budget": "The app's own total budget for this model",
}
BUDGETS = tuple(_SAID)
"""Names of the limits that cap cost."""

_RANK = {"exhausted": 3, "rate": 2, "held": 1}
_HELD_WAIT = 1.0


def as_datetime(ms: int) -> datetime:
    """Milliseconds since the epoch as an aware datetime, UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC)


def rate_wait_ms(window: Window, width: int, amount: int, requests: int, now: int) -> int | None:
    """Milliseconds from `now` until `requests` more fit a rate; None if they never will.

    Exactly the moment at which the next admit succeeds if nobody else asks, see CONTRACT `used` and `roll`.
    """
    if requests > amount:
        return None
    start, prev, cur = window
    for hits_before, hits in ((prev, cur), (cur, 0)):
        room = amount - requests - hits
        if room >= 0:
            # floor(before * (width - e) / width) <= room, solved for the smallest e
            e = 0 if hits_before == 0 else max(0, width - -(-(room + 1) * width // hits_before) + 1)
            if e < width:
                return max(0, start + e - now)
        start += width
    return max(0, start - now)


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """Where one limit stands. Amounts are USD (`Decimal`) for budgets, plain numbers for the rest.

    Attributes:
        name: "rate_limit", "period_budget", "total_budget", "app_period_budget", "model_total_budget", ...
        metric: "requests", "cost" or "tokens".
        used: What is spent or counted.
        held: What calls in flight may still spend.
        limit: The cap.
        remaining: What is left, not below 0.
        resets_at: When used falls to 0 (a budget's period ends) or the window ends; None for never.
        window_seconds: Length of a rate's window; None for budgets.
        reason: Why this limit refused: "rate", "held", "exhausted"; None if it did not.
        shared: Whether it counts all customers together. Its amounts are the app's own affair: clients never see them.
    """

    name: str
    metric: str
    used: Decimal | int
    held: Decimal | int
    limit: Decimal | int
    remaining: Decimal | int
    resets_at: datetime | None = None
    window_seconds: int | None = None
    reason: str | None = None
    shared: bool = False


def limit_statuses(
    limits: tuple[Limit, ...], resets: tuple[int | None, ...], outcome: Allowed | Refused
) -> tuple[LimitStatus, ...]:
    """Name the numbers of an outcome."""
    reasons = outcome.reasons if isinstance(outcome, Refused) else (None,) * len(limits)
    windows = iter(outcome.windows)
    found = []
    for limit, reset, used, held, reason in zip(limits, resets, outcome.used, outcome.held, reasons, strict=True):
        if limit.kind == "rate":
            reset = next(windows)[0] + limit.window_ms
        left = max(0, limit.amount - used - held)
        money = from_nano if limit.metric == "cost" else int
        found.append(
            LimitStatus(
                name=limit.name,
                metric=limit.metric,
                used=money(used),
                held=money(held),
                limit=money(limit.amount),
                remaining=money(left),
                resets_at=None if reset is None else as_datetime(reset),
                window_seconds=limit.window_ms // 1000 or None,
                reason=reason,
                shared=limit.shared,
            )
        )
    return tuple(found)


class Decision:
    """Whether a customer may go on, and where each limit stands.

    Attributes:
        allowed: The answer.
        customer_identifier: Who asked.
        shadow: True if it was refused but `mode="shadow"` lets it pass.
        compiled: The limits as storage was asked, see `limits` for what they mean.
        resets_ms: For each of them when its period ends; None for rates and totals.
        outcome: What storage answered.
        requests: How many requests the rates were asked for.
    """

    __slots__ = ("allowed", "compiled", "customer_identifier", "outcome", "requests", "resets_ms", "shadow")

    def __init__(
        self,
        customer_identifier: str,
        limits: tuple[Limit, ...],
        resets: tuple[int | None, ...],
        outcome: Allowed | Refused,
        requests: int = 1,
        *,
        shadow: bool = False,
    ) -> None:
        self.allowed = outcome.__class__ is Allowed
        self.customer_identifier = customer_identifier
        self.shadow = shadow
        self.compiled = limits
        self.resets_ms = resets
        self.outcome = outcome
        self.requests = requests

    @property
    def limits(self) -> tuple[LimitStatus, ...]:
        """Every limit with used, held and remaining, before this admission."""
        return limit_statuses(self.compiled, self.resets_ms, self.outcome)

    @property
    def violated(self) -> tuple[LimitStatus, ...]:
        """The limits that refuse, hardest first."""
        bad = [status for status in self.limits if status.reason]
        return tuple(sorted(bad, key=lambda s: (s.name != BLOCKED, -_RANK[s.reason or "held"])))

    @property
    def reason(self) -> str | None:
        """Why it was refused: "blocked", "exhausted", "rate", "held"; None if allowed. The hardest counts."""
        if not isinstance(self.outcome, Refused):
            return None
        if any(r and limit.name == BLOCKED for r, limit in zip(self.outcome.reasons, self.compiled, strict=True)):
            return BLOCKED
        return max((r for r in self.outcome.reasons if r), key=lambda r: _RANK[r])

    @property
    def transient(self) -> bool:
        """Whether waiting a short while may help: a rate, or a budget that only calls in flight fill."""
        return self.reason in ("rate", "held")

    @property
    def retry_after(self) -> float | None:
        """Seconds until asking again makes sense; None if allowed, blocked, spent, or if it never will."""
        outcome = self.outcome
        if not isinstance(outcome, Refused) or not self.transient:
            return None
        waits = [_HELD_WAIT] if "held" in outcome.reasons else []
        windows = iter(outcome.windows)
        for limit, reason in zip(self.compiled, outcome.reasons, strict=True):
            if limit.kind == "rate":
                window = next(windows)
                if reason == "rate":
                    wait = rate_wait_ms(window, limit.window_ms, limit.amount, self.requests, outcome.now)
                    if wait is None:
                        return None
                    waits.append(wait / 1000)
        return max(waits) if waits else None

    @property
    def resets_at(self) -> datetime | None:
        """When the hardest refusing limit resets; None if allowed or never."""
        violated = self.violated
        if not violated:
            return None
        if violated[0].reason == "rate":
            wait = self.retry_after
            return None if wait is None else as_datetime(self.outcome.now + math.ceil(wait * 1000))
        return violated[0].resets_at

    @property
    def detail(self) -> str:
        """One sentence for people, without amounts."""
        reason, violated = self.reason, self.violated
        if reason is None:
            return "Allowed."
        if reason == BLOCKED:
            return "The customer is blocked."
        hardest = violated[0]
        until = hardest.resets_at
        if reason == "rate":
            return f"Too many requests: {hardest.limit} per {hardest.window_seconds} seconds."
        name = _SAID.get(hardest.name, f"The limit {hardest.name}")
        if reason == "held":
            return f"{name} is full because of calls in flight. Try again shortly."
        said = f"{name} is used up."
        if hardest.used < hardest.limit:
            said = f"{name} has less left than this could cost."
        return said if until is None else f"{said} It resets on {until:%Y-%m-%d} at {until:%H:%M} UTC."

    def __repr__(self) -> str:
        word = "allowed" if self.allowed else f"refused: {self.reason}"
        return f"<Decision {word} for {self.customer_identifier!r}>"


@dataclass(frozen=True, slots=True)
class Status:
    """Where a customer stands.

    Attributes:
        limits: Every limit with used, held, remaining and `resets_at`.
        period_spend: USD booked in the current budget period; None without a period budget.
        total_spend: USD booked in all time.
        total_requests: Admissions in all time.
        total_calls: LLM calls in all time.
        blocked: Whether every request is refused.
        period_start: First day of the current period, ISO format.
        period_end: The day after the last day of the current period.
    """

    customer_identifier: str
    limits: tuple[LimitStatus, ...]
    period_spend: Decimal | None
    total_spend: Decimal
    total_requests: int
    total_calls: int
    blocked: bool = False
    period_start: str | None = None
    period_end: str | None = None

    def limit(self, name: str) -> LimitStatus | None:
        """The limit of that name, or None."""
        return next((status for status in self.limits if status.name == name), None)
