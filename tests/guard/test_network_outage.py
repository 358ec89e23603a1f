"""A guard over Redis and PostgreSQL whose network loses answers, resets, swallows and comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from respan_guard import Guard, GuardMiddleware, StorageUnavailable, Usage
from respan_guard.home import Home
from tests.backends import postgres_server, redis_server
from tests.faulty_proxy import Faults, FaultyProxy
from tests.middleware.support import call, provider

DIME = Decimal("0.1")


@pytest.fixture(params=["redis", "postgres"])
def direct(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty store on a server."""
    if request.param == "redis":
        server = redis_server.RedisServer()
        yield server.url
        server.kill()
    else:
        yield postgres_server.new_store(postgres_server.given_or_started())


@pytest.fixture
def network(direct: str) -> Iterator[tuple[str, FaultyProxy]]:
    """The same store behind a proxy: its URL there, and the proxy."""
    parts = urlsplit(direct)
    with FaultyProxy(parts.port or 0, parts.hostname or "", seed=5) as proxy:
        user, at, _ = parts.netloc.rpartition("@")
        yield urlunsplit(parts._replace(netloc=f"{user}{at}{proxy.host}:{proxy.port}")), proxy


def make(url: str, tmp_path: Path, **options: Any) -> Guard:
    """A guard with a budget, whose journal lies in the test's own directory."""
    return Guard(url, journal_dir=tmp_path, **({"default_limits": {"total_budget": 1000}} | options))


def home_of(guard: Guard) -> Home:
    """Its home on this loop."""
    home = guard._homes._app
    assert home is not None
    return home


async def until_stored(guard: Guard, within: float = 30.0) -> None:
    """Wait until storage has everything."""
    async with asyncio.timeout(within):
        while True:
            with contextlib.suppress(StorageUnavailable):
                await guard.flush()
                home = home_of(guard)
                if not home.breaker.is_open and not home._journal.pending and not home._calls:
                    return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("fault", ["black_hole", "refuse"])
async def test_an_outage_is_a_503_at_the_door_and_ends(
    fault: str, network: tuple[str, FaultyProxy], tmp_path: Path
) -> None:
    """A hundred requests into it: each has its answer, later ones at once; and then nothing is held, all works."""
    url, proxy = network
    async with make(url, tmp_path, storage_timeout=0.25) as guard:
        app = GuardMiddleware(provider, guard, identify="header:x-customer", include=["/v1/*"])
        assert (await call(app, customer="c1")).status == 200
        await guard.flush()
        getattr(proxy, fault)()
        for exchange in await asyncio.gather(*[call(app, customer=f"c{number}") for number in range(50)]):
            assert exchange.status == 503
        while not home_of(guard).breaker.is_open:
            assert (await call(app, customer="c1")).status == 503
        requests = proxy.counts["requests"]
        for _ in range(50):
            assert (await call(app, customer="c1")).status == 503
        assert proxy.counts["requests"] - requests < 10  # probes at most
        proxy.recover()
        await until_stored(guard)
        for _ in range(5):
            assert (await call(app, customer="c1")).status == 200
        await until_stored(guard)
        assert (await guard.status("c1")).total_calls == 6
        held = await guard.lane().call(lambda backend: backend.holds())
        assert held == []
        assert await guard.verify() == []


async def test_records_over_outages_of_all_kinds_count_once(network: tuple[str, FaultyProxy], tmp_path: Path) -> None:
    """Let in while storage is down, recorded, and the breaker opens and closes several times: the sum is exact."""
    url, proxy = network
    async with make(url, tmp_path, budget_failure="open", storage_timeout=0.25) as guard:
        done = 0
        for fault in (None, "black_hole", None, "refuse", None, "cut", None):
            if fault is not None:
                getattr(proxy, fault)()
            for number in range(20):
                async with guard.admit("c1", estimate=DIME) as admission:
                    if number % 2:
                        await admission.record(Usage(cost=DIME))
                    else:
                        admission.record_soon(Usage(cost=DIME))
                done += 1
            if fault is not None:
                proxy.recover(cut=fault == "black_hole")
                await until_stored(guard)
        await until_stored(guard)
        status = await guard.status("c1")
        assert (status.total_calls, status.total_spend) == (done, DIME * done)
        assert await guard.verify() == []
    assert list(tmp_path.glob("*.journal")) == []


async def test_lost_answers_under_the_guard_count_once(network: tuple[str, FaultyProxy], tmp_path: Path) -> None:
    """A fifth of all answers is lost, with resets and delays: no call is lost or double, no hold is left."""
    url, proxy = network
    async with make(url, tmp_path, budget_failure="open", storage_timeout=1) as guard:
        await guard.flush()
        proxy.faults = Faults(drop_reply=0.2, reset=0.05, delay=0.002, spare=8)
        for _ in range(100):
            await asyncio.gather(*[_work(guard) for _ in range(2)])
        proxy.faults = Faults()
        await until_stored(guard)
        assert proxy.counts["drop_reply"] > 10
        status = await guard.status("c1")
        assert (status.total_calls, status.total_spend) == (200, DIME * 200)
        held = await guard.lane().call(lambda backend: backend.holds())
        assert held == []
        assert await guard.verify() == []


async def _work(guard: Guard) -> None:
    async with guard.admit("c1", estimate=DIME) as admission:
        await admission.record(Usage(cost=DIME))


async def test_the_switch_reaches_a_process_through_the_server(direct: str, tmp_path: Path) -> None:
    """Thrown by one guard, obeyed by another one."""
    async with make(direct, tmp_path / "one") as one, make(direct, tmp_path / "two") as other:
        await other.try_admit("c1")
        await one.switch.set("off", reason="a test")
        async with asyncio.timeout(10):
            while other.switch.mode != "off":
                await asyncio.sleep(0.02)
        await one.switch.set(None)
