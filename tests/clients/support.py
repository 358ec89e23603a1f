"""Holding the ledger against the provider's own books."""

from __future__ import annotations

from typing import Any

import anthropic
import openai

from respan_guard import Guard, UsageRecord
from respan_guard.testing import StandInProvider
from respan_guard.testing.provider import MeteredCall

CHAT = "gpt-4o-mini"
CLAUDE = "claude-haiku-4-5"
EMBEDDINGS = "text-embedding-3-small"
ASK: Any = [{"role": "user", "content": "How far is the moon?"}]


def open_ai(url: str, **options: Any) -> openai.OpenAI:
    """OpenAI's client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", **({"max_retries": 0} | options))


def async_open_ai(url: str, **options: Any) -> openai.AsyncOpenAI:
    """OpenAI's client for event loops."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-test", **({"max_retries": 0} | options))


def claude(url: str, **options: Any) -> anthropic.Anthropic:
    """Anthropic's client."""
    return anthropic.Anthropic(base_url=url, api_key="sk-test", **({"max_retries": 0} | options))


def async_claude(url: str, **options: Any) -> anthropic.AsyncAnthropic:
    """Anthropic's client for event loops."""
    return anthropic.AsyncAnthropic(base_url=url, api_key="sk-test", **({"max_retries": 0} | options))


def records(guard: Guard) -> list[UsageRecord]:
    """Everything recorded, from code without a loop."""
    guard.sync.flush()
    return list(guard.sync.records())


async def arecords(guard: Guard) -> list[UsageRecord]:
    """Everything recorded."""
    await guard.flush()
    return [record async for record in guard.records()]


def facts(call: UsageRecord | MeteredCall) -> tuple[Any, ...]:
    """What ledger and meter must agree on."""
    usage = call.usage if isinstance(call, UsageRecord) else call
    return (
        call.model,
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
        call.cost,
        usage.response_id or None,
    )


def same(found: list[UsageRecord], provider: StandInProvider) -> None:
    """Every call that the provider charges is recorded once, token by token, at its price, and no other."""
    assert sorted(map(facts, found), key=str) == sorted(map(facts, provider.meter.charged), key=str)
    assert all(record.kind == "usage" and record.source == "client" for record in found)
    assert not any(record.late for record in found)


async def holds(guard: Guard, customer: str) -> int:
    """Nano-USD that are held for a customer, from any loop."""
    return sum(
        hold.cost for hold in await guard.lane().call(lambda backend: backend.holds(customer, now=guard.now_ms()))
    )
