"""A storage of rates that fails over: connections to what was the primary are not kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard, StorageUnavailable
from tests.backends.redis_server import RedisServer
from tests.faulty_proxy import FaultyProxy


@pytest.mark.parametrize("strategy", ["sliding-window-counter", "moving-window", "fixed-window"])
async def test_rates_leave_a_primary_that_was_made_a_replica(strategy: Any, tmp_path: Path) -> None:
    """The address leads to the new one, eight connections still to the old one: all are made anew at the first word."""
    old, new = RedisServer(), RedisServer()
    with FaultyProxy(old.port) as proxy:
        async with Guard(
            "memory://",
            journal_dir=tmp_path,
            default_limits={"rate_limit": 1000},
            rate_limit_storage=f"redis://127.0.0.1:{proxy.port}",
            rate_limit_strategy=strategy,
            rate_limit_failure="closed",
        ) as guard:

            async def admitted(customer: str) -> None:
                async with guard.admit(customer):
                    pass

            await asyncio.gather(*[admitted(f"c{number}") for number in range(8)])
            old.command("REPLICAOF", "127.0.0.1", str(new.port))
            proxy.lead_to(new.port)
            with pytest.raises(StorageUnavailable, match="read only"):
                await admitted("c0")
            for _ in range(3):
                await asyncio.gather(*[admitted(f"c{number}") for number in range(8)])
    for server in (old, new):
        server.stop()
