"""Tells, once, that a customer has used a share of a budget, or all of it.

One more reader of the log, beside the exporters: after calls were booked it looks where their customers stand. So
nothing is added to a request, and what is told is what was stored. What was told is remembered in the store, under a
key that names the customer by a hash only: it survives restarts, and all processes together tell it once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from respan_guard.clock import Clock
from respan_guard.decision import LimitStatus, as_datetime
from respan_guard.errors import ConfigurationError
from respan_guard.exporters.base import ExportResult, check_name
from respan_guard.exporters.webhook import SignedSender
from respan_guard.money import from_nano, to_nano
from respan_guard.tracing import untraced
from respan_guard.usage import UsageRecord

if TYPE_CHECKING:
    from respan_guard.backends.base import Backend
    from respan_guard.guard import Guard

__all__ = ["REACHED", "SHARE_REACHED", "BudgetEvent", "BudgetNotifier", "BudgetTarget", "BudgetWebhook"]

SPACE: Final = "notifications"
REACHED: Final = "customer_budget_limit_reached"
SHARE_REACHED: Final = "customer_budget_share_reached"
_DAY_MS: Final = 86_400_000
_KEPT_MS: Final = 40 * _DAY_MS
_FULL: Final = Decimal(100)


@dataclass(frozen=True, slots=True)
class BudgetEvent:
    """A customer has used so much of a budget.

    Attributes:
        id: The same each time the same thing is told.
        type: "customer_budget_limit_reached", or below 100 % "customer_budget_share_reached".
        customer_identifier: Whose budget.
        limit: "period_budget" or "total_budget".
        threshold: The share that was reached, in percent.
        used: What is used of it, USD.
        budget: The budget, USD.
        period_start: First day of the period, ISO format; None for a total budget.
        period_end: The day after its last.
        resets_at: When it begins anew.
        time: When it was noticed.
    """

    id: str
    type: str
    customer_identifier: str
    limit: str
    threshold: Decimal
    used: Decimal
    budget: Decimal
    period_start: str | None
    period_end: str | None
    resets_at: datetime | None
    time: datetime

    def to_dict(self) -> dict[str, Any]:
        """JSON values; money as decimal strings."""
        return {
            "id": self.id,
            "customer_identifier": self.customer_identifier,
            "limit": self.limit,
            "threshold_percent": f"{self.threshold:f}",
            "used": f"{self.used:f}",
            "budget": f"{self.budget:f}",
            "period_start": self.period_start,
            "period_end": self.period_end,
            "resets_at": None if self.resets_at is None else self.resets_at.isoformat().replace("+00:00", "Z"),
        }


BudgetTarget: TypeAlias = Callable[[BudgetEvent], Awaitable[None] | None]
"""Who is told: a function, async or not, or a `BudgetWebhook`. If it raises, it is told again."""


class BudgetWebhook:
    """Posts each event to an URL, signed per Standard Webhooks; the body is described by `webhook.schema.json`.

    Args:
        url: Where to. Redirects are not followed.
        secret: "whsec_" and the base64 of 24 to 64 random bytes; several while one takes the place of another.
        allow_private: Whether the URL may lead to an address that is not public.
        clock: Where time comes from.

    Raises:
        ConfigurationError: URL or secret can't work, or httpx2 is missing.
    """

    def __init__(
        self, url: str, secret: str | Sequence[str], *, allow_private: bool = False, clock: Clock | None = None
    ) -> None:
        self._sender = SignedSender(url, secret, allow_private=allow_private, clock=clock)

    async def __call__(self, event: BudgetEvent) -> None:
        """Send one."""
        with untraced():
            await self._sender.send(event.id, event.type, event.to_dict())

    async def close(self) -> None:
        """Let go of connections."""
        await self._sender.close()


class BudgetNotifier:
    """The reader that looks where customers stand; it is an `Exporter`, so one process at a time does it.

    Args:
        guard: Whose customers.
        target: Who is told.
        thresholds: Shares of a budget, in percent, above 0 and below 100; that it is used up is always told.
        name: Names its place in the log, and what was told.

    Raises:
        ConfigurationError: A threshold or the name can't work, or the target can't be called.
    """

    batch_size = 500
    from_start = False  # what was used before anybody wanted to know is not news
    traced = True  # the function that is told is the app's work

    def __init__(
        self, guard: Guard, target: BudgetTarget, thresholds: Iterable[Decimal | int | float], name: str
    ) -> None:
        self.name = check_name(name)
        self._guard = guard
        self._target = target
        if not callable(target):
            raise ConfigurationError(f"on_budget needs a function or a BudgetWebhook, got {target!r}")
        shares = sorted({_percent(share) for share in thresholds})
        self._thresholds = [*shares, _FULL]

    async def open(self) -> None:
        """Forget what was told of periods that are long over."""
        old = self._guard.now_ms() - _KEPT_MS
        after = prefix = f"{self.name}/"
        while True:
            page = await self._guard.lane().call(_behind(after))
            ours = [(key, text) for key, text in page if key.startswith(prefix)]
            for key, text in ours:
                if 0 < _until(text) < old:
                    await self._guard.lane().call(_forget(key))
            if not ours or len(ours) < len(page):
                return
            after = ours[-1][0]

    async def close(self) -> None:
        """Let go of the target's connections, if it has any."""
        if (close := getattr(self._target, "close", None)) is not None and isinstance(self._target, BudgetWebhook):
            await close()

    async def export(self, batch: Sequence[UsageRecord]) -> ExportResult | None:
        """Tell what became true with these records, in the order of the customers in them."""
        for customer in dict.fromkeys(record.customer_identifier for record in batch):
            if customer:
                await self._look(customer)
        return None

    async def _look(self, customer: str) -> None:
        status = await self._guard.status(customer)
        for limit in status.limits:
            if limit.metric != "cost" or not limit.limit:
                continue
            period = (status.period_start, status.period_end) if limit.name == "period_budget" else (None, None)
            for threshold in self._thresholds:
                if limit.used * 100 >= limit.limit * threshold:
                    await self._tell(customer, limit, threshold, *period)

    async def _tell(
        self, customer: str, limit: LimitStatus, threshold: Decimal, start: str | None, end: str | None
    ) -> None:
        lane = self._guard.lane()
        digest = hashlib.sha256(f"{customer}\0{limit.name}\0{threshold:f}\0{start}".encode()).hexdigest()[:40]
        key = f"{self.name}/{digest}"
        if await lane.call(lambda backend: backend.fact(SPACE, key)) is not None:
            return
        now = self._guard.now_ms()
        event = BudgetEvent(
            id=f"budget_{digest}",
            type=REACHED if threshold >= _FULL else SHARE_REACHED,
            customer_identifier=customer,
            limit=limit.name,
            threshold=threshold,
            used=Decimal(limit.used),
            budget=Decimal(limit.limit),
            period_start=start,
            period_end=end,
            resets_at=limit.resets_at,
            time=as_datetime(now),
        )
        told = self._target(event)
        if inspect.isawaitable(told):
            await told
        # Only now: told twice after a crash between the two, under one id, rather than never.
        until = 0 if limit.resets_at is None else int(limit.resets_at.timestamp() * 1000)
        text = json.dumps({"told_ms": now, "until_ms": until})
        await lane.call(lambda backend: backend.set_fact(SPACE, key, text))


def _behind(after: str) -> Callable[[Backend], Awaitable[list[tuple[str, str]]]]:
    return lambda backend: backend.facts(SPACE, after=after)


def _forget(key: str) -> Callable[[Backend], Awaitable[bool]]:
    return lambda backend: backend.set_fact(SPACE, key, None)


def _percent(share: Decimal | int | float) -> Decimal:
    try:
        percent = from_nano(to_nano(share, "threshold"))
    except (ArithmeticError, ValueError):
        percent = Decimal(0)
    if isinstance(share, bool) or not 0 < percent < _FULL:
        raise ConfigurationError(
            f"a threshold must be a share in percent, above 0 and below 100, like 80; got {share!r}"
        )
    return percent


def _until(text: str) -> int:
    try:
        return int(json.loads(text)["until_ms"])
    except (ValueError, KeyError, TypeError):
        return 0
