"""Callers that give up at random moments: nobody gets somebody else's answer, and nothing is held for ever."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import BudgetExceeded, Guard, StorageUnavailable, Usage
from respan_guard.backends.base import Op, Outcome
from respan_guard.errors import GuardError
from respan_guard.money import from_nano
from tests.backends import postgres_server, redis_server

from .faulty import FaultyBackend, faulty_guard, live_holds

CUSTOMERS = 100
ROUNDS = [pytest.param(2_000), pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
BUDGET: dict[str, Any] = {"default_limits": {"total_budget": 1}}


def slow(store: FaultyBackend, rng: random.Random) -> None:
    """Let batches take their time, fail and lose their answers now and then."""
    apply = store.apply

    async def slowly(ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() * 0.003)
        fault = rng.random()
        if fault < 0.02:
            raise StorageUnavailable("before")
        outcomes = await apply(ops, now)
        if fault > 0.98:
            raise StorageUnavailable("its answer is lost")
        return outcomes

    store.apply = slowly  # type: ignore[method-assign]


async def prepare(guard: Guard) -> None:
    """Give each customer a spend of its own: an answer tells whose it is."""
    for number in range(CUSTOMERS):
        await guard.record(Usage(cost=from_nano(number)), f"c{number}", entry_id="first")
    await guard.flush()


async def admit(guard: Guard, number: int, rng: random.Random) -> None:
    """Be let in, look at whose answer it is, and record nothing or nothing that costs."""
    async with guard.admit(f"c{number}", estimate=Decimal("0.0001")) as admission:
        assert admission.decision.outcome.used[0] % 1000 == number, "somebody else's answer"
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            await admission.record(Usage(cost=0, input_tokens=1))


async def bind(guard: Guard, number: int, rng: random.Random) -> None:
    """Be let in without a block; released by hand, if it comes to that."""
    admission = await guard.admit(f"c{number}", estimate=Decimal("0.0001"))
    try:
        assert admission.decision.outcome.used[0] % 1000 == number, "somebody else's answer"
        await asyncio.sleep(0)
    finally:
        admission.end()


async def read(guard: Guard, number: int, rng: random.Random) -> None:
    """Where does it stand?"""
    status = await guard.status(f"c{number}")
    assert status.customer_identifier == f"c{number}"
    assert status.total_spend == from_nano(number)


WORK: list[Callable[[Guard, int, random.Random], Awaitable[None]]] = [admit, admit, bind, read]


async def storm(guard: Guard, rounds: int, rng: random.Random) -> Counter[str]:
    """Start work, 50 at a time, and cancel each piece after a random number of passes or of milliseconds."""
    seen: Counter[str] = Counter()

    async def one() -> None:
        task = asyncio.ensure_future(rng.choice(WORK)(guard, rng.randrange(CUSTOMERS), rng))
        if rng.random() < 0.9:
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(rng.random() * 0.005)
        task.cancel()
        try:
            await task
            seen["done"] += 1
        except asyncio.CancelledError:
            seen["cancelled"] += 1
        except (StorageUnavailable, BudgetExceeded):
            seen["failed"] += 1

    for _ in range(rounds // 50):
        await asyncio.gather(*[one() for _ in range(50)])
    return seen


async def settled(guard: Guard) -> None:
    """Wait until storage has taken everything."""
    async with asyncio.timeout(30):
        while True:
            try:
                await guard.flush()
            except GuardError:
                await asyncio.sleep(0.05)
            else:
                return


@pytest.mark.parametrize("rounds", ROUNDS)
async def test_random_cancellations_on_the_opening_loop(rounds: int, store: FaultyBackend, tmp_path: Path) -> None:
    """A store that is slow and loses answers; the storm over, each customer has what it had and nothing is held."""
    rng = random.Random(rounds)
    async with faulty_guard(tmp_path, **BUDGET, storage_timeout=1) as guard:
        await prepare(guard)
        slow(store, rng)
        seen = await storm(guard, rounds, rng)
        assert seen["cancelled"] > rounds / 10
        assert seen["done"] > rounds / 100
        await settled(guard)
        assert await live_holds(guard) == 0
        assert await guard.verify() == []
        for number in range(CUSTOMERS):
            await read(guard, number, rng)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_random_cancellations_from_another_loop(rounds: int, store: FaultyBackend, tmp_path: Path) -> None:
    """The same where answers cross threads: the guard was never opened, and its caller's loop is another one."""
    rng = random.Random(rounds + 1)
    guard = faulty_guard(tmp_path, **BUDGET, storage_timeout=1)

    async def main() -> None:
        await prepare(guard)
        slow(store, rng)
        seen = await storm(guard, rounds, rng)
        assert seen["cancelled"] > rounds / 10
        await settled(guard)
        assert await live_holds(guard) == 0
        assert await guard.verify() == []

    asyncio.run(main())
    guard.sync.close()


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store that has connections and transactions."""
    if request.param == "redis":
        server = redis_server.RedisServer()
        yield server.url
        server.kill()
    elif request.param == "postgres":
        yield postgres_server.new_store(postgres_server.given_or_started())
    else:
        yield f"sqlite:///{tmp_path / 'guard.db'}"


@pytest.mark.parametrize("rounds", ROUNDS)
async def test_random_cancellations_over_real_stores(rounds: int, url: str, tmp_path: Path) -> None:
    """Real transactions: none is left open, and the next caller gets an answer of its own."""
    rng = random.Random(rounds + 2)
    async with Guard(url, **BUDGET, journal_dir=tmp_path, storage_timeout=5) as guard:
        await prepare(guard)
        seen = await storm(guard, rounds, rng)
        assert seen["cancelled"] > rounds / 10
        await settled(guard)
        assert await live_holds(guard) == 0
        assert await guard.verify() == []
        for number in range(CUSTOMERS):
            await admit(guard, number, rng)
