"""Nothing in the request path blocks the event loop, and strangers can't grow memory."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from respan_guard import Customer, Guard, Usage
from respan_guard.testing import FakeClock


async def test_the_loop_goes_on_while_the_file_is_locked(tmp_path: Path) -> None:
    """An admission that waits for another process's transaction waits alone: the loop serves everybody else."""
    path = tmp_path / "guard.db"
    async with Guard(f"sqlite:///{path}", default_limits={"rate_limit": 5}, storage_timeout=30) as guard:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(guard.try_admit("c1"))
        for _ in range(200):
            await asyncio.sleep(0.0005)
        assert not waiting.done()
        other.execute("ROLLBACK")
        other.close()
        assert await waiting


async def test_known_policies_are_bounded_and_learned_again(tmp_path: Path) -> None:
    """The cache of policies holds so many customers and no more; who fell out is asked for again."""
    async with Guard("memory://", max_cached_customers=10, clock=FakeClock()) as guard:
        for number in range(100):
            await guard.put_customer(Customer(customer_identifier=f"c{number}", rate_limit=1))
        assert len(guard.policies._known) == 10
        async with guard.admit("c0"):
            pass
        assert not await guard.try_admit("c0")


async def test_strangers_leave_nothing_in_the_process(tmp_path: Path) -> None:
    """10,000 random ids that are refused leave no customer, no policy and a bounded count of refusals."""
    async with Guard(
        f"sqlite:///{tmp_path / 'guard.db'}", default_limits={"rate_limit": 0}, clock=FakeClock(), storage_timeout=30
    ) as guard:
        for start in range(0, 12_000, 400):
            await asyncio.gather(*[guard.try_admit(f"stranger-{start + n}") for n in range(400)])
        assert len(guard.policies._known) == 0
        assert len(guard.refusals._counts) <= 10_001
        assert await guard.list_customers() == []


async def test_a_flood_of_records_from_a_thread_is_taken_without_loss(tmp_path: Path) -> None:
    """record_soon faster than storage writes: everything waits its turn and is stored once."""
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}") as guard:

        def flood() -> None:
            for _ in range(5000):
                guard.record_soon(Usage(cost=1), "c1")

        await asyncio.gather(*[asyncio.to_thread(flood) for _ in range(2)])
        await guard.flush()
        assert (await guard.status("c1")).total_calls == 10_000
