"""An entry that no column takes: found, kept as a dead letter, and nobody else is stopped by it."""

from __future__ import annotations

import math
import secrets
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard, Usage
from respan_guard.backends.base import Entry, Record
from tests.backends.postgres_server import given_or_started, new_store
from tests.backends.redis_server import shared_url


def usage(**fields: Any) -> Usage:
    """A usage of which nobody looked at the fields."""
    found = Usage()
    for name, value in fields.items():
        setattr(found, name, value)
    return found


BAD: dict[str, dict[str, Any]] = {
    "latency": {"usage": usage(latency_ms=math.nan)},
    "first token": {"usage": usage(ttft_ms=1 << 70)},
    "status": {"usage": usage(status=None)},
    "provider": {"usage": usage(provider={"a": 1})},
    "trace": {"usage": usage(trace_id=b"ab")},
    "metadata": {"usage": usage(metadata={"a": object()})},
    "tokens": {"input_tokens": 3.5},
    "day": {"day": 738_000.5},
    "model": {"model": "a\ud800"},
}


@pytest.mark.parametrize("storage", ["sqlite", "redis", "postgres"])
@pytest.mark.parametrize("bad", list(BAD))
async def test_an_entry_that_can_not_be_stored_stops_nobody(storage: str, bad: str, tmp_path: Path) -> None:
    """It travels among others, whoever let it through: they are stored, in this process and the next."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    if storage != "sqlite":
        url = shared_url() if storage == "redis" else new_store(given_or_started())
    options: dict[str, Any] = {"journal_dir": tmp_path / "journal"}
    if storage == "redis":
        options["namespace"] = f"unstorable-{bad.replace(' ', '-')}-{secrets.token_hex(4)}"
    async with Guard(url, **options) as guard:
        day, now = guard.policies.get("").policy.day_of(guard.now_ms()), guard.now_ms()
        lane = guard.lane()
        guard.record_soon(Usage(cost=1), "c1")
        fields: dict[str, Any] = {"id": "bad", "customer": "c2", "day": day, "at_ms": now, "cost": 5}
        lane.post(Record(Entry(**fields | BAD[bad])))
        guard.record_soon(Usage(cost=1), "c1")
        await guard.flush()
        async with guard.admit("c1"):
            pass
    async with Guard(url, **options) as guard:
        await guard.flush()
        assert (await guard.status("c1")).total_spend == 2
