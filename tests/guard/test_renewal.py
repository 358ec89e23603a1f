"""Holds of long work are renewed; holds of work that nobody ends expire, and count no longer."""

from __future__ import annotations

from decimal import Decimal

from respan_guard import Guard
from respan_guard.context import Slot
from respan_guard.testing import FakeClock

from .conftest import MakeGuard

HALF = Decimal("0.5")


async def live(guard: Guard) -> int:
    """How many holds count."""
    now = guard.clock.now_ms()
    return len(await guard.lane().call(lambda backend: backend.holds(state="live", now=now)))


async def test_a_stream_longer_than_the_hold_keeps_its_money(make_guard: MakeGuard, clock: FakeClock) -> None:
    """While a block runs its hold is renewed, as often as it takes, and ends with the block."""
    async with make_guard(default_limits={"total_budget": 1}, hold_ttl=600) as guard:
        async with guard.admit("c1", estimate=HALF):
            for _ in range(20):
                clock.advance(200)
                guard.renewer._renew()
                await guard.flush()
            assert await live(guard) == 1
            assert not await guard.try_admit("c1", estimate=Decimal("0.6"))
        await guard.flush()
        assert await live(guard) == 0


async def test_an_admission_that_nobody_ends_expires(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A bare admit outside a request that is never released holds its money until it expires, no longer."""
    async with make_guard(default_limits={"total_budget": 1}, hold_ttl=600) as guard:
        await guard.admit("c1", estimate=HALF)
        clock.advance(599)
        guard.renewer._renew()
        await guard.flush()
        assert not await guard.try_admit("c1", estimate=Decimal("0.6"))
        clock.advance(1)
        assert await guard.try_admit("c1", estimate=Decimal("0.6"))


async def test_a_requests_admission_is_renewed_until_the_request_ends(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Also an admission that was made by a bare await is renewed, if it belongs to a request."""
    async with make_guard(hold_ttl=600) as guard:
        slot = Slot(guard, is_request=True)
        await guard.admissions.request(slot, "c1")
        for _ in range(5):
            clock.advance(400)
            guard.renewer._renew()
            await guard.flush()
        assert await live(guard) == 1
        guard.admissions.end(slot)
        await guard.flush()
        assert await live(guard) == 0
        assert guard.renewer._live == {}


async def test_what_a_call_claimed_is_renewed_beyond_the_admission(make_guard: MakeGuard, clock: FakeClock) -> None:
    """The block is over and a call that claimed of its hold goes on: the money stays held until the call ends."""
    async with make_guard(default_limits={"total_budget": 1}, hold_ttl=600) as guard:
        async with guard.admit("c1", estimate=HALF) as admission:
            claim = admission.claim(1)
        for _ in range(5):
            clock.advance(400)
            guard.renewer._renew()
            await guard.flush()
        assert await live(guard) == 1
        admission.settle(claim)
        await guard.flush()
        assert await live(guard) == 0
        assert guard.renewer._live == {}
