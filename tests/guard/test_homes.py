"""One guard from any loop, thread, script and process, and none of it hangs or loses anything."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from decimal import Decimal
from pathlib import Path

import pytest

from respan_guard import Guard, Usage
from respan_guard.errors import StorageUnavailable

from .conftest import MakeGuard


def script(body: str, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    """Run a Python program of its own and wait for it."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(body), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


async def costs(url: str) -> list[Decimal | None]:
    """What a fresh guard finds in a store."""
    async with Guard(url) as guard:
        return [record.cost async for record in guard.records()]


def test_a_guard_works_with_a_new_loop_for_every_call(make_guard: MakeGuard) -> None:
    """As under a bare TestClient: each request has a loop of its own, the one before is closed."""
    guard = make_guard(default_limits={"rate_limit": 3})

    async def request() -> bool:
        answer = await guard.try_admit("c1")
        if answer:
            await answer.release()  # type: ignore[union-attr]  # a Refusal is false
        return bool(answer)

    assert [asyncio.run(request()) for _ in range(4)] == [True, True, True, False]
    guard.sync.close()


async def test_an_opened_guard_serves_other_threads_and_loops_at_the_same_time(make_guard: MakeGuard) -> None:
    """The opening loop, another loop in a thread and a plain thread share one set of limits."""
    async with make_guard(default_limits={"total_budget": 1}) as guard:
        admitted: list[bool] = []

        def other_loop() -> None:
            async def work() -> None:
                answers = [await guard.try_admit("c1", estimate=Decimal("0.05")) for _ in range(10)]
                admitted.extend(map(bool, answers))

            asyncio.run(work())

        def plain_thread() -> None:
            admitted.extend(bool(guard.sync.try_admit("c1", estimate=Decimal("0.05"))) for _ in range(10))

        threads = [threading.Thread(target=other_loop), threading.Thread(target=plain_thread)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            admitted.append(bool(await guard.try_admit("c1", estimate=Decimal("0.05"))))
            await asyncio.sleep(0)
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert sum(admitted) == 20
        assert len(admitted) == 30


async def test_the_blocking_twin_on_the_apps_own_loop_does_not_deadlock(make_guard: MakeGuard) -> None:
    """A sync client called in an async handler blocks its loop, but storage answers on another one."""
    async with make_guard(default_limits={"rate_limit": 5}) as guard:
        with guard.sync.admit("c1") as admission:
            admission.record(Usage(cost=1))
            assert guard.current() is admission.admission
        assert guard.sync.status("c1").total_spend == 1


def test_the_blocking_twin_has_the_whole_life_of_a_customer(make_guard: MakeGuard) -> None:
    """A script puts, admits, records, reads and closes without an event loop."""
    from respan_guard import Customer, RateLimitExceeded

    with make_guard().sync as guard:
        guard.put_customer(Customer(customer_identifier="c1", rate_limit=1, markup_percentage=20))
        with guard.admit("c1"):
            guard.record(Usage(cost=1))
        with pytest.raises(RateLimitExceeded):
            guard.admit("c1")
        guard.record(Usage(cost=2), "c1")
        assert guard.status("c1").total_spend == 3
        assert [record.cost for record in guard.records("c1")] == [1, 2]
        assert [(row.cost, row.cost_with_markup) for row in guard.list_customers()] == [(Decimal(3), Decimal("3.6"))]
        assert guard.usage()[0].calls == 2
        assert guard.verify() == []


async def test_a_script_that_never_closes_its_guard_ends_by_itself_and_loses_nothing(tmp_path: Path) -> None:
    """No close, no flush: the interpreter's exit stores what record_soon took."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    done = script(
        """
        import sys
        from respan_guard import Guard, Usage
        guard = Guard(sys.argv[1])
        for _ in range(200):
            guard.record_soon(Usage(cost=1), "c1")
        """,
        url,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(await costs(url)) == 200


async def test_a_program_whose_loop_ends_with_the_guard_open_loses_nothing(tmp_path: Path) -> None:
    """asyncio.run ended before the inbox was drained: the guard's thread adopts what the dead loop left."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    done = script(
        """
        import asyncio, sys
        from respan_guard import Guard, Usage
        guard = Guard(sys.argv[1])
        async def main():
            await guard.open()
            for _ in range(200):
                guard.record_soon(Usage(cost=1), "c1")
        asyncio.run(main())
        """,
        url,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(await costs(url)) == 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
async def test_a_forked_child_meters_on_its_own(tmp_path: Path) -> None:
    """As under gunicorn --preload: the child forgets the parent's connections and threads, and both count."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    done = script(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what servers do
        from respan_guard import Guard, Usage
        guard = Guard(sys.argv[1])
        guard.sync.record(Usage(cost=1), "parent")
        children = []
        for n in range(4):
            pid = os.fork()
            if pid == 0:
                for _ in range(25):
                    guard.sync.record(Usage(cost=1), f"child-{n}")
                guard.record_soon(Usage(cost=1), f"child-{n}")
                guard.sync.close()
                os._exit(0)
            children.append(pid)
        guard.sync.record(Usage(cost=1), "parent")
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
        """,
        url,
    )
    assert (done.returncode, done.stderr) == (0, "")
    async with Guard(url) as guard:
        counts = {row.customer_identifier: row.calls for row in await guard.usage()}
        assert counts == {"parent": 2, "child-0": 26, "child-1": 26, "child-2": 26, "child-3": 26}
        assert await guard.verify() == []


async def test_opening_twice_needs_closing_twice(make_guard: MakeGuard) -> None:
    """The lifespan and the app's own `async with` may both open a guard."""
    guard = make_guard()
    async with guard:
        async with guard:
            await guard.record(Usage(cost=1), "c1")
        await guard.record(Usage(cost=1), "c1")
        assert len([record async for record in guard.records()]) == 2


async def test_a_closed_guard_leaves_no_thread_behind(tmp_path: Path) -> None:
    """After close, the guard's thread and the connections' threads are gone."""
    before = set(threading.enumerate())
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}") as guard:
        await guard.record(Usage(cost=1), "c1")
        guard.sync.record(Usage(cost=1), "c1")
    left = set(threading.enumerate()) - before
    deadline = time.monotonic() + 5
    while any(thread.is_alive() for thread in left if "asyncio" not in thread.name) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert [thread.name for thread in left if thread.is_alive() and "asyncio" not in thread.name] == []


async def test_storage_that_was_closed_is_not_opened_again(tmp_path: Path) -> None:
    """Not by work that goes on with the way to storage it had: it fails, and leaves no connection behind."""
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}") as guard:
        lane = guard.lane()
        assert await lane.call(lambda backend: backend.count_customers()) == 0
    before = set(threading.enumerate())
    with pytest.raises(StorageUnavailable, match="closed meanwhile"):
        await lane.call(lambda backend: backend.count_customers())
    assert set(threading.enumerate()) <= before
