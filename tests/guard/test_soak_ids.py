"""A million customers who are never seen again: what the process keeps of them is bounded."""

from __future__ import annotations

import gc
import random
import sys
from decimal import Decimal

import pytest

from respan_guard import Guard, Usage
from respan_guard.backends.memory import MemoryBackend
from respan_guard.errors import RateLimitExceeded
from respan_guard.testing import FakeClock

IDS = 1_200_000


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_random_ids_do_not_grow_memory_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,200,000 random ids, 30 a second of the guard's clock, every tenth refused, one customer known by name.

    Once the store is full of idle customers (`max_customers`) and of counted refusals, the number of blocks that Python
    has allocated stays where it is; and the one that spent keeps its sums.
    """
    monkeypatch.setattr("respan_guard.backends.memory._MAX_REFUSALS", 20_000)
    clock = FakeClock()
    guard = Guard("memory://", default_limits={"rate_limit": 1, "total_budget": 10}, clock=clock)
    shared = guard._homes.shared
    assert shared is not None
    assert isinstance(shared.backend, MemoryBackend)
    store = shared.backend._store
    store.max_customers = 50_000
    rng = random.Random(7)
    async with guard.admit("spender") as admission:
        await admission.record(Usage("m", cost=Decimal(1)))
    sizes: list[int] = []
    for number in range(IDS):
        name = f"{rng.getrandbits(64):016x}"
        async with guard.admit(name):
            pass
        if number % 10 == 0:
            with pytest.raises(RateLimitExceeded):
                await guard.admit(name)
        clock.advance(1 / 30)
        if (number + 1) % (IDS // 12) == 0:
            gc.collect()
            sizes.append(sys.getallocatedblocks())
    assert len(store) <= 50_000 + 10_000
    assert len(shared.backend._refusals) == 20_000
    assert max(sizes[3:]) < 1.1 * sizes[3], sizes
    assert (await guard.status("spender")).total_spend == 1
    assert await guard.verify() == []
