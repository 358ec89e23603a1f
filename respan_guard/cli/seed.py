"""60 days of believable traffic of 200 customers, through the guard's own doors, the same every time."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from respan_guard.clock import SystemClock
from respan_guard.customer import Customer
from respan_guard.errors import LimitExceeded, UnpricedModel
from respan_guard.guard import Guard
from respan_guard.testing.clock import FakeClock
from respan_guard.usage import Usage

__all__ = ["CUSTOMERS", "DAYS", "seed"]

DAYS = 60
CUSTOMERS = 200
_SEED = 20_260
_MODELS = (  # name, provider, how often, tokens in and out, milliseconds
    ("gpt-4o-mini", "openai", 38, 4_900, 760, 1_400),
    ("gpt-4o", "openai", 20, 8_800, 1_480, 3_100),
    ("claude-sonnet-4-5", "anthropic", 16, 9_200, 1_900, 4_800),
    ("gemini-2.5-flash", "google", 14, 7_500, 1_420, 1_700),
    ("text-embedding-3-small", "openai", 9, 12_400, 0, 240),
    ("house-llama-70b", "vllm", 3, 6_000, 900, 2_200),
)
_FIRST = ("Acme", "Blue Harbor", "Cedar", "Delta", "Ember", "Fjord", "Granite", "Halcyon", "Iris", "Juniper",
          "Kestrel", "Lumen", "Meridian", "Northwind", "Orchard", "Pioneer", "Quartz", "Riverbend", "Summit",
          "Tundra")  # fmt: skip
_SECOND = ("Analytics", "Books", "Care", "Foods", "Health", "Labs", "Legal", "Logistics", "Media", "Studio")
_PLANS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("free", 0.55, {}),
    ("pro", 0.33, {"rate_limit": 120, "budget_duration": "monthly", "period_budget": 15, "markup_percentage": 20}),
    ("scale", 0.12, {"rate_limit": "600/minute; 6000/hour", "budget_duration": "monthly", "period_budget": 90,
                     "total_budget": 240, "markup_percentage": 15}),
)  # fmt: skip


@dataclass(slots=True)
class _Tenant:
    identifier: str
    plan: str
    weight: float
    joins: int
    leaves: int
    favourite: int


def _tenants(chance: random.Random) -> list[_Tenant]:
    found = []
    names = [f"{first} {second}" for second in _SECOND for first in _FIRST]
    for name in names[:CUSTOMERS]:
        plan = chance.choices([plan for plan, _, _ in _PLANS], [share for _, share, _ in _PLANS])[0]
        scale = {"free": 0.5, "pro": 1.6, "scale": 5.0}[plan]
        joins = 0 if chance.random() < 0.6 else chance.randrange(max(1, DAYS - 2))
        leaves = DAYS if chance.random() < 0.85 else min(DAYS, joins + chance.randrange(5, 40))
        found.append(
            _Tenant(name.lower().replace(" ", "_"), plan, scale * chance.paretovariate(1.6), joins, leaves,
                    chance.randrange(4))
        )  # fmt: skip
    return found


async def seed(storage: str, *, until: datetime | None = None, progress: Callable[[int], None] | None = None) -> int:
    """Fill a store that is empty.

    Args:
        storage: Its URL.
        until: When the traffic ends (aware); now when omitted.
        progress: Told how many of the days are done.

    Returns:
        How many calls were recorded.
    """
    chance = random.Random(_SEED)
    end = until.astimezone(UTC) if until is not None else datetime.fromtimestamp(SystemClock().now_ms() / 1000, UTC)
    clock = FakeClock(end - timedelta(days=DAYS))
    limits = {"rate_limit": 60, "budget_duration": "monthly", "period_budget": 2.5}
    guard = Guard(
        storage, clock=clock, default_limits=limits, unknown_price="flag", mode="enforce", prices={},
        unknown_customers="admit", retention=None, storage_timeout=30.0,
    )  # fmt: skip
    calls = 0
    async with guard:
        tenants = _tenants(chance)
        for hour in range(DAYS * 24):
            day = hour // 24
            if hour % 24 == 0:
                await _administer(guard, tenants, day, chance)
            clock.set(end - timedelta(hours=DAYS * 24 - 1 - hour))
            counts = [_wanted(tenant, day, clock.now, chance) for tenant in tenants]
            answers = await asyncio.gather(
                *(_call(guard, tenant, clock.now, chance.getrandbits(64))
                  for tenant, count in zip(tenants, counts, strict=True) for _ in range(count))
            )  # fmt: skip
            calls += sum(answers)
            if hour % 24 == 23:
                await guard.flush()
                if progress is not None:
                    progress(day + 1)
    return calls


def _wanted(tenant: _Tenant, day: int, now: datetime, chance: random.Random) -> int:
    """How many calls a customer makes in an hour: by day, in the week, more every week, with a burst now and then."""
    if not tenant.joins <= day < tenant.leaves:
        return 0
    by_hour = 0.25 + 0.75 * max(0.0, math.sin((now.hour - 5) / 24 * 2 * math.pi))
    by_day = 0.35 if now.weekday() >= 5 else 1.0
    mean = 0.02 * tenant.weight * by_hour * by_day * (1 + day / 60)
    if chance.random() < 0.00003 * tenant.weight:
        return 70 + chance.randrange(60)
    return sum(1 for _ in range(12) if chance.random() < mean / 12 * 2.2)


async def _call(guard: Guard, tenant: _Tenant, now: datetime, number: int) -> int:
    """One call, if the customer is let in; 1 if it was made."""
    chance = random.Random(number)
    if chance.random() < 0.55:
        model = _MODELS[tenant.favourite]
    else:
        model = chance.choices(_MODELS, [share for _, _, share, _, _, _ in _MODELS])[0]
    name, provider, _, tokens_in, tokens_out, ms = model
    spread = chance.lognormvariate(0, 0.7)
    tokens_in, tokens_out = int(tokens_in * spread) + 12, int(tokens_out * chance.lognormvariate(0, 0.5))
    latency = int(ms * chance.lognormvariate(0, 0.35))
    failed = chance.random() < 0.012
    usage = Usage(
        model=name,
        provider=provider,
        input_tokens=tokens_in,
        output_tokens=0 if failed else tokens_out,
        cache_read_tokens=int(tokens_in * 0.6) if chance.random() < 0.18 else 0,
        response_id=f"resp-{number:016x}",
        operation="embeddings" if not tokens_out else "chat",
        latency_ms=latency,
        ttft_ms=int(latency * 0.22) if tokens_out and chance.random() < 0.6 else None,
        status="error" if failed else "ok",
        trace_id=f"{chance.getrandbits(128):032x}" if chance.random() < 0.7 else None,
        time=now - timedelta(seconds=chance.randrange(3600)),
        metadata={"feature": chance.choice(("chat", "search", "summary", "agent"))},
    )
    with suppress(LimitExceeded, UnpricedModel):
        async with guard.admit(tenant.identifier) as admission:
            await admission.record(usage)
            return 1
    return 0


async def _administer(guard: Guard, tenants: list[_Tenant], day: int, chance: random.Random) -> None:
    """What people set that day: plans of who joins, a raise, a block."""
    plans = {plan: limits for plan, _, limits in _PLANS}
    for tenant in tenants:
        if tenant.joins != day:
            continue
        name = tenant.identifier.replace("_", " ").title()
        email = f"it@{tenant.identifier.replace('_', '-')}.example"
        await guard.put_customer(
            Customer(customer_identifier=tenant.identifier, name=name, email=email, group_identifier=tenant.plan,
                     metadata={"plan": tenant.plan}, **plans[tenant.plan]),
            actor="console:ada",
        )  # fmt: skip
    if day and day % 9 == 0:
        lucky = chance.choice([tenant for tenant in tenants if tenant.joins < day and tenant.plan != "free"])
        stored = await guard.get_customer(lucky.identifier)
        if stored is not None and stored.period_budget is not None:
            await guard.update_customer(lucky.identifier, actor="console:ada", period_budget=stored.period_budget * 2)
    if day in (DAYS - 12, DAYS - 5):
        gone = chance.choice([tenant for tenant in tenants if tenant.leaves < day])
        await guard.update_customer(gone.identifier, actor="console:grace", blocked=True)
