"""Tells, once, that a customer has used a share of a budget, or all of it.

One more reader of the log, beside the exporters: after calls were booked it looks where their customers stand. So
nothing is added to a request, and what is told is what was stored. What was told is remembered in the store, under a
key that names the customer by a hash only: it survives restarts, and all processes together tell it once.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from respan_guard.budget_events import REACHED, SHARE_REACHED, BudgetEvent
from respan_guard.clock import Clock
from respan_guard.dead_letters import DeadLetter, DeadLetters, redacted
from respan_guard.decision import as_datetime
from respan_guard.errors import ConfigurationError
from respan_guard.exporters.base import BatchRefused, ExportResult, check_name
from respan_guard.exporters.webhook import SignedSender
from respan_guard.money import EXACT, from_nano, to_nano
from respan_guard.periods import start_of_day
from respan_guard.tracing import untraced
from respan_guard.usage import UsageRecord

if TYPE_CHECKING:
    from respan_guard.backends.base import Backend, Limit
    from respan_guard.guard import Guard

__all__ = ["REACHED", "SHARE_REACHED", "BudgetEvent", "BudgetNotifier", "BudgetTarget", "BudgetWebhook"]

SPACE: Final = "notifications"
OWED: Final = "notifications-owed"
_DAY_MS: Final = 86_400_000
_KEPT_MS: Final = 40 * _DAY_MS
_FULL: Final = Decimal(100)
_TELLING: Final = 8.0  # seconds that a target may take
_PASS: Final = 8.0  # seconds after which no more is begun, so that all is over before an export has to be
_LONGEST_WAIT: Final = 300.0
_PAGE: Final = 100
_REFUSED_MS: Final = _DAY_MS  # so long it is told again to a target that says that it won't take it
logger = logging.getLogger("respan_guard")


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


@dataclass(frozen=True, slots=True)
class _Reached:
    """What may have to be told: under which key it is noted, and the record that says so."""

    key: str
    event: BudgetEvent
    record: UsageRecord
    until_ms: int  # when its period is over; 0 for never


@dataclass(frozen=True, slots=True)
class _Owed:
    """What the target did not take. It names a place in the log, and nothing of the customer."""

    sequence: int
    since_ms: int
    tries: int
    due_ms: int
    reason: str


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
        self._letters = DeadLetters(self.name)
        self._place = f"{self.name}/"  # what is owed is read in turn, a page at a time
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
                    await self._guard.lane().call(_setting(SPACE, key, None))
            if not ours or len(ours) < len(page):
                return
            after = ours[-1][0]

    async def close(self) -> None:
        """Let go of the target's connections, if it has any."""
        if (close := getattr(self._target, "close", None)) is not None and isinstance(self._target, BudgetWebhook):
            await close()

    async def export(self, batch: Sequence[UsageRecord]) -> ExportResult | None:
        """Tell what became true with these records, in the order of the customers in them."""
        calls: dict[str, list[UsageRecord]] = {}
        for record in batch:
            if record.customer_identifier:
                calls.setdefault(record.customer_identifier, []).append(record)
        until = self._guard.clock.monotonic() + _PASS
        for customer, records in calls.items():
            for found in await self._reached(customer, records):
                await self._tell(found, until)
        return None

    async def catch_up(self) -> str:
        """Tell what is owed and due; why the oldest of what is still owed was not taken."""
        lane, until, reason = self._guard.lane(), self._guard.clock.monotonic() + _PASS, ""
        page = await lane.call(lambda backend: backend.facts(OWED, after=self._place, limit=_PAGE))
        ours = [(key, text) for key, text in page if key.startswith(f"{self.name}/")]
        self._place = ours[-1][0] if len(ours) == _PAGE else f"{self.name}/"
        for key, text in ours:
            owed = _owed(text)
            if owed.due_ms <= self._guard.now_ms() and self._guard.clock.monotonic() <= until:
                letter = DeadLetter(self.name, owed.sequence, "", 0)
                record = await lane.call(partial(self._letters.record, letter=letter))
                reached = await self._reached(record.customer_identifier, [record]) if record is not None else []
                found = [one for one in reached if one.key == key]
                # Its budget was raised meanwhile, its customer is gone, or who told it was killed before it noted so.
                if not found or await self._told(key):
                    await lane.call(_setting(OWED, key, None))
                    continue
                for one in found:
                    await self._tell(one, until)
            reason = reason or owed.reason
        return reason

    async def _told(self, key: str) -> bool:
        return await self._guard.lane().call(lambda backend: backend.fact(SPACE, key)) is not None

    async def _reached(self, customer: str, records: Sequence[UsageRecord]) -> list[_Reached]:
        """What the customer has reached of its budgets, those of the days on which something was booked."""
        guard, lane = self._guard, self._guard.lane()
        days = {date.fromisoformat(record.day).toordinal(): record for record in records}
        row = await lane.call(lambda backend: backend.get(customer))
        if row is None:  # deleted meanwhile
            return []
        known = guard.policies.default
        if row.params is not None:
            known = guard.policies.learn(customer, row.revision, row.params)
        now = guard.now_ms()
        asked: dict[tuple[str, str], tuple[Limit, int | None, tuple[date, date] | None, UsageRecord]] = {}
        for day, record in days.items():
            terms = known.policy.at(start_of_day(day, known.policy.zone))
            for limit, resets in zip(terms.limits, terms.resets, strict=True):
                long_over = resets is not None and resets < now - _KEPT_MS
                if limit.metric == "cost" and limit.amount and not limit.shared and not long_over:
                    period = terms.period if limit.kind == "span" else None
                    asked[limit.name, limit.key] = (limit, resets, period, record)
        limits = tuple(limit for limit, *_ in asked.values())
        standing = await lane.call(lambda backend: backend.standing(customer, limits, now=now))
        found = []
        for (limit, resets, period, record), used in zip(asked.values(), standing.used, strict=True):
            start, end = (day.isoformat() for day in period) if period else (None, None)
            for threshold in self._thresholds:
                if used * 100 < EXACT.multiply(limit.amount, threshold):
                    continue
                # A customer of the same name after a deletion is another, and so is a total budget that was changed,
                # and a period that begins as the one before a change of its length did.
                new = (customer, row.first_seen_ms, limit.name, f"{threshold:f}", period or limit.amount)
                digest = hashlib.sha256("\0".join(map(str, new)).encode()).hexdigest()[:40]
                event = BudgetEvent(
                    id=f"budget_{digest}",
                    type=REACHED if threshold >= _FULL else SHARE_REACHED,
                    customer_identifier=customer,
                    limit=limit.name,
                    threshold=threshold,
                    used=from_nano(used),
                    budget=from_nano(limit.amount),
                    period_start=start,
                    period_end=end,
                    resets_at=None if resets is None else as_datetime(resets),
                    time=as_datetime(now),
                )
                found.append(_Reached(f"{self.name}/{digest}", event, record, resets or 0))
        return found

    async def _tell(self, found: _Reached, until: float) -> None:
        """Tell one, unless that was done; if the target won't take it, it is owed, and others are told meanwhile."""
        lane, key = self._guard.lane(), found.key
        if await self._told(key):
            return
        text = await lane.call(lambda backend: backend.fact(OWED, key))
        owed = None if text is None else _owed(text)
        if owed is not None and owed.due_ms > self._guard.now_ms():
            return
        if self._guard.clock.monotonic() > until:  # one that hangs must not hold up the others for long
            owed = owed or _Owed(found.record.sequence, self._guard.now_ms(), 0, 0, "it is not its turn yet")
            await lane.call(_setting(OWED, key, json.dumps(asdict(owed))))
            return
        try:
            async with asyncio.timeout(_TELLING):
                told = self._target(found.event)
                if inspect.isawaitable(told):
                    await told
        except Exception as error:
            await self._owe(found, owed, error)
            return
        # Only now: told twice after a crash between the two, under one id, rather than never.
        noted = json.dumps({"told_ms": self._guard.now_ms(), "until_ms": found.until_ms})
        await lane.call(_setting(SPACE, key, noted))
        if owed is not None:
            await lane.call(_setting(OWED, key, None))

    async def _owe(self, found: _Reached, owed: _Owed | None, error: Exception) -> None:
        lane, now, record = self._guard.lane(), self._guard.now_ms(), found.record
        reason = redacted(f"{type(error).__name__}: {str(error)[:200]}", record)
        since, tries = (now, 1) if owed is None else (owed.since_ms, owed.tries + 1)
        level = logging.WARNING if tries in (1, 10) else logging.DEBUG
        logger.log(level, "%s: of a budget in record %s nobody could be told: %s", self.name, record.sequence, reason)
        if isinstance(error, BatchRefused) and now - since >= _REFUSED_MS:
            logger.error("%s: record %s is a dead letter: %s", self.name, record.sequence, reason)
            await lane.call(partial(self._letters.bury, record=record, reason=reason, now_ms=now))
            await lane.call(_setting(OWED, found.key, None))
            return
        longest = min(_LONGEST_WAIT, 2 ** min(tries, 20))
        due = now + int(random.uniform(longest / 2, longest) * 1000)
        text = json.dumps(asdict(_Owed(record.sequence, since, tries, due, reason)))
        await lane.call(_setting(OWED, found.key, text))


def _setting(space: str, key: str, text: str | None) -> Callable[[Backend], Awaitable[bool]]:
    return lambda backend: backend.set_fact(space, key, text)


def _behind(after: str) -> Callable[[Backend], Awaitable[list[tuple[str, str]]]]:
    return lambda backend: backend.facts(SPACE, after=after)


def _owed(text: str) -> _Owed:
    try:
        return _Owed(**json.loads(text))
    except (ValueError, TypeError):
        return _Owed(0, 0, 0, 0, "")


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
