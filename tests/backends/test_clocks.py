"""Clocks that are wrong or step back: of one process of many, or of the server of a store."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from decimal import Decimal
from pathlib import Path

import pytest

from respan_guard import Admission, Customer, Guard, Usage
from respan_guard.backends.base import Op, Refused, Release, Renew
from respan_guard.clock import SystemClock
from respan_guard.testing.contract_support import NOW, admit, record, total

from .conftest import new_store, storage_url

_AHEAD_MS = 20 * 60_000


class Ahead(SystemClock):
    """A machine's clock that is 20 minutes ahead of the store's."""

    def now_ms(self) -> int:
        """Too late."""
        return super().now_ms() + _AHEAD_MS


Pair = tuple[Guard, Guard]


@pytest.fixture(params=["redis", "postgresql"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    """Two processes on one store with a clock of its own; the second one's machine is ahead of it."""
    url, namespace = storage_url(request.param, tmp_path), f"test-{secrets.token_hex(6)}"
    if request.param == "postgresql":
        namespace = "default"

    def make(**options: object) -> Guard:
        limits = {"total_budget": 1, "rate_limit": 10}
        return Guard(
            url,
            namespace=namespace,
            default_limits=limits,
            storage_timeout=10.0,
            journal_dir=tmp_path / secrets.token_hex(4),
            **options,  # type: ignore[arg-type]
        )

    async with AsyncExitStack() as stack:
        right, ahead = make(), make(clock=Ahead())
        yield await stack.enter_async_context(right), await stack.enter_async_context(ahead)


async def _puts(guard: Guard) -> None:
    await guard.put_customer(Customer(customer_identifier="other", name="x"))


async def _deletes(guard: Guard) -> None:
    await _puts(guard)
    await guard.delete_customer("other")


async def _looks(guard: Guard) -> None:
    await guard.status("ann")
    await guard.lane().call(lambda backend: backend.holds("ann", now=guard.now_ms()))


@pytest.mark.parametrize("does", [_puts, _deletes, _looks])
async def test_a_wrong_clock_of_one_process_ends_nobody_s_hold(
    pair: Pair, does: Callable[[Guard], Awaitable[None]]
) -> None:
    """The store's clock counts, whatever else a process tells the store: budgets hold with one that is ahead."""
    right, ahead = pair
    async with right.admit("ann", estimate=Decimal("0.9")) as first:
        await does(ahead)
        assert not await ahead.try_admit("ann", estimate=Decimal("0.9"))
        await first.record(Usage(model="m", cost=Decimal("0.9")))
    assert (await right.status("ann")).total_spend == Decimal("0.9")


async def test_a_wrong_clock_of_one_process_starts_no_window_anew(pair: Pair) -> None:
    """10 requests a minute are 10, though every second one is asked for by a process whose clock is ahead."""
    await _puts(pair[1])
    admitted = 0
    for at in range(24):
        admission = await pair[at % 2].try_admit("ann")
        if isinstance(admission, Admission):
            admitted += 1
            await admission.release()
    assert admitted == 10


async def test_a_customer_that_a_wrong_clock_deleted_can_come_back(pair: Pair) -> None:
    """It was deleted when the store says, not in 20 minutes: what it spends from then on is its own."""
    right, ahead = pair
    await ahead.put_customer(Customer(customer_identifier="ann", name="x"))
    await ahead.delete_customer("ann")
    await right.admit("ann")  # a never-seen customer again
    booked = await right.lane().call(lambda backend: backend.booked_on("ann", right.now_ms() + 1000))
    assert booked == "ann"


# -- a server's clock that steps back ----------------------------------------------------------------


@pytest.mark.parametrize("scope", ["customer", "all"])
@pytest.mark.parametrize("does", [Release("ann", "h1"), record("e1", 80, admission="h1"), Renew("ann", "h1", 600_000)])
@pytest.mark.parametrize("name", ["redis", "postgresql"])
async def test_a_clock_that_steps_back_leaves_no_wrong_hold(tmp_path: Path, name: str, scope: str, does: Op) -> None:
    """A hold had expired, and by the stepped clock it has not: what is held is never below what live holds hold."""
    make, limit = new_store(name, tmp_path), total(1000, scope=scope)
    first, second = make(), make()
    await first.open()
    await second.open()
    await first.apply([admit("h1", limit, cost=80, ttl_ms=1000)], NOW)
    await first.apply([admit("h2", limit, cost=50, ttl_ms=600_000)], NOW + 1500)
    await second.apply([does], NOW + 900)  # the same server, after the step
    for now in (NOW + 900, NOW + 1600):
        live = await second.holds("ann", now=now)
        (held,) = (await second.standing("ann", [limit], now=now)).held
        assert held == sum(hold.cost for hold in live) >= 50
    outcome = await second.apply([admit("h3", limit, cost=1000 - held + 1)], NOW + 1600)
    assert isinstance(outcome[0], Refused)
    assert await second.verify() == []
    await first.close()
    await second.close()
