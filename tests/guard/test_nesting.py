"""Blocks within blocks: of one customer, of several, of two guards, and beyond a fork."""

from __future__ import annotations

import asyncio
import gc
from decimal import Decimal
from pathlib import Path

import pytest

from respan_guard import Guard, RateLimitExceeded, Usage
from respan_guard.context import Slot, current_slot
from respan_guard.testing import FakeClock, StandInProvider
from respan_guard.testing.provider import Answer
from tests.clients.support import ASK, CHAT, arecords, async_open_ai

from .conftest import MakeGuard
from .test_homes import script

DIME = Decimal("0.1")


async def test_a_named_customer_within_its_own_admission_is_that_admission(make_guard: MakeGuard) -> None:
    """Calls in `on_behalf_of` the admitted customer join its admission: no second count, its hold, its records."""
    provider = StandInProvider()
    with provider.serve() as url:
        async with (
            make_guard(default_limits={"rate_limit": 1, "total_budget": 1}) as guard,
            async_open_ai(url) as bare,
            guard.wrap(bare) as client,
            guard.admit("c1", estimate=Decimal(1)) as admission,
        ):
            for _ in range(3):
                with guard.on_behalf_of("c1"):
                    assert guard.current() is admission
                    await client.chat.completions.create(model=CHAT, messages=ASK, max_tokens=20)
                    await guard.record(Usage(cost=DIME))
            with guard.on_behalf_of("c2"):
                assert guard.current() is None
    found = await arecords(guard)
    assert [record.customer_identifier for record in found] == ["c1"] * 6
    assert {record.admission_id for record in found} == {admission.id}


async def test_only_the_outermost_admission_of_a_customer_counts(make_guard: MakeGuard) -> None:
    """Also with another customer's in between; and a block that is over has no part in it."""
    async with make_guard(default_limits={"rate_limit": 2}) as guard:
        for _ in range(2):
            async with guard.admit("x"), guard.admit("y"), guard.admit("x"):
                pass
        with pytest.raises(RateLimitExceeded):
            await guard.admit("x")
        assert (await guard.status("x")).total_requests == 2


async def test_each_guard_has_its_own_admissions(clock: FakeClock) -> None:
    """Inside another guard's admission a guard's limits hold, and its records are its own."""
    outer = Guard("memory://", default_limits={"rate_limit": 100}, clock=clock)
    inner = Guard("memory://", default_limits={"rate_limit": 1}, clock=clock)
    async with outer.admit("c1") as admission:
        assert inner.current() is None
        async with inner.admit("c1") as own:
            assert (inner.current(), outer.current()) == (own, admission)
            await inner.record(Usage(cost=DIME))
            await outer.record(Usage(cost=2 * DIME))
        with pytest.raises(RateLimitExceeded):
            await inner.admit("c1")
        with inner.on_behalf_of("c2"):
            await inner.record(Usage(cost=DIME))
            await outer.record(Usage(cost=DIME))
    assert [(r.customer_identifier, r.cost) for r in await arecords(outer)] == [("c1", 2 * DIME), ("c1", DIME)]
    assert [(r.customer_identifier, r.cost) for r in await arecords(inner)] == [("c1", DIME), ("c2", DIME)]


async def test_work_that_starts_work_keeps_no_chain_of_blocks(make_guard: MakeGuard) -> None:
    """Each task starts the next within its block: blocks that are over are let go."""
    async with make_guard() as guard:

        async def step(left: int, named: bool) -> None:
            if named:
                with guard.on_behalf_of("c1"):
                    task = asyncio.create_task(step(left - 1, named)) if left else None
                    await asyncio.sleep(0)
            else:
                async with guard.admit("c1"):
                    task = asyncio.create_task(step(left - 1, named)) if left else None
            if task is not None:
                tasks.append(task)

        def slots() -> int:
            gc.collect()
            return sum(isinstance(one, Slot) for one in gc.get_objects())

        before = slots()
        for named in (True, False):
            tasks: list[asyncio.Task[None]] = []
            await step(50, named)
            for task in tasks:
                await task
            tasks.clear()
            assert slots() < before + 10
    assert current_slot.get() is None


def test_a_forked_childs_calls_hold_for_themselves(tmp_path: Path) -> None:
    """The parent's hold is not spent twice: a call in the child that does not fit beside it is refused."""
    provider = StandInProvider()
    provider.script(Answer(output_tokens=2000))
    with provider.serve() as url:
        done = script(
            """
            import os, sys, warnings
            warnings.simplefilter("ignore", DeprecationWarning)
            from decimal import Decimal
            from openai import OpenAI, APIStatusError
            from respan_guard import Guard
            guard = Guard(sys.argv[1], journal_dir=sys.argv[2], storage_timeout=20,
                default_limits={"rate_limit": 1, "total_budget": "0.004"})
            client = guard.wrap(OpenAI(base_url=sys.argv[3], api_key="k", max_retries=0))
            def call():
                ask = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2000}
                try:
                    client.chat.completions.create(**ask)
                except APIStatusError as error:
                    return error.status_code, error.code
                return 200
            with guard.sync.admit("c1", estimate=Decimal("0.004")):
                for _ in range(2):
                    pid = os.fork()
                    if pid == 0:
                        print("child", call(), guard.current().customer_identifier, flush=True)
                        os._exit(0)
                    os.waitpid(pid, 0)
                print("parent", call(), flush=True)
            guard.sync.flush()
            status = guard.sync.status("c1")
            print(status.total_requests, status.limits[-1].held, guard.sync.verify(), flush=True)
            client.close()
            guard.sync.close()
            """,
            f"sqlite:///{tmp_path / 'guard.db'}",
            str(tmp_path / "journal"),
            f"{url}/v1",
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child (429, 'budget_in_flight') c1"] * 2 + ["parent 200", "1 0 []"]
    assert len(provider.meter.calls) == 1


def test_a_forked_child_does_not_end_its_parents_admission(tmp_path: Path) -> None:
    """A child that leaves the block, or records in it, leaves the parent's hold as it is."""
    done = script(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from decimal import Decimal
        from respan_guard import Guard, Usage
        guard = Guard(sys.argv[1], journal_dir=sys.argv[2], default_limits={"total_budget": 10}, storage_timeout=20)
        child = False
        with guard.sync.admit("c1", estimate=Decimal(9)) as admission:
            guard.sync.flush()
            pid = os.fork()
            if pid == 0:
                child = True
                admission.record(Usage(cost="0.5"))
                guard.record_soon(Usage(cost="0.25"))
            else:
                os.waitpid(pid, 0)
                status = guard.sync.status("c1")
                print(status.total_spend, status.limits[0].held, bool(guard.sync.try_admit("c1", estimate=Decimal(1))))
        guard.sync.close()
        if not child:
            print([record.customer_identifier for record in guard.sync.records()], guard.sync.verify())
            print(guard.sync.status("c1").limits[0].held)
            guard.sync.close()
        """,
        f"sqlite:///{tmp_path / 'guard.db'}",
        str(tmp_path / "journal"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0.75 9 False", "['c1', 'c1'] []", "0"]
