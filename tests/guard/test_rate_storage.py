"""Rates in a storage of `limits`, money in the store: memory, Redis and memcached for real, every strategy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest
from limits.util import MissingModule

from respan_guard import (
    BudgetExceeded,
    Customer,
    CustomerBlocked,
    Guard,
    GuardMiddleware,
    RateLimitExceeded,
    StorageUnavailable,
    Usage,
)
from respan_guard.errors import ConfigurationError
from respan_guard.rate_storage import RateStorage
from tests.faulty_proxy import FaultyProxy
from tests.middleware.support import call, provider

from .rate_servers import memcached, redis


@pytest.fixture(scope="module")
def redis_port() -> Iterator[int]:
    """A Redis."""
    with redis() as port:
        yield port


@pytest.fixture(scope="module")
def memcached_port() -> Iterator[int]:
    """A memcached."""
    with memcached() as port:
        yield port


def _url(kind: str, request: pytest.FixtureRequest) -> str:
    return "memory://" if kind == "memory" else f"{kind}://127.0.0.1:{request.getfixturevalue(f'{kind}_port')}"


@pytest.fixture(params=["memory", "redis", "memcached"])
def rates(request: pytest.FixtureRequest) -> str:
    """The URL of a storage of `limits`."""
    return _url(request.param, request)


@pytest.fixture(params=["redis", "memcached"])
def shared_rates(request: pytest.FixtureRequest) -> str:
    """One that several processes share."""
    return _url(request.param, request)


@pytest.fixture(
    params=[
        (kind, strategy)
        for kind in ("memory", "redis", "memcached")
        for strategy in ("sliding-window-counter", "moving-window", "fixed-window")
        if (kind, strategy) != ("memcached", "moving-window")  # limits has none there
    ],
    ids="-".join,
)
def counting(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a guard: a storage of `limits` with a strategy that it can do."""
    kind, strategy = request.param
    return {"rates": _url(kind, request), "rate_limit_strategy": strategy}


_numbers = iter(range(10**6))


def make(tmp_path: Path, rates: str, storage: str = "", **options: Any) -> Guard:
    """A guard with its money in SQLite; nobody else's rates are in its namespace."""
    defaults: dict[str, Any] = {
        "default_limits": {"rate_limit": "5/hour", "total_budget": 1},
        "journal_dir": tmp_path / "journal",
        "namespace": f"test-{next(_numbers)}",
        "storage_timeout": 5,  # the machine may be busy
    }
    return Guard(storage or f"sqlite:///{tmp_path / 'guard.db'}", rate_limit_storage=rates, **(defaults | options))


async def admitted(guard: Guard, customer: str = "c1", times: int = 1) -> int:
    """How many of so many requests are let in."""
    count = 0
    for _ in range(times):
        answer = await guard.try_admit(customer)
        if answer:
            count += 1
            await answer.release()  # type: ignore[union-attr]  # a Refusal is false
    return count


# -- what is decided ---------------------------------------------------------------------------------


async def test_exactly_the_limit_is_let_in(counting: dict[str, Any], tmp_path: Path) -> None:
    """Five of eight, then a 429 with the rate that refused and when it makes sense to come back."""
    async with make(tmp_path, **counting) as guard:
        assert await admitted(guard, times=8) == 5
        assert await admitted(guard, "c2", times=2) == 2  # somebody else's rate is another one
        with pytest.raises(RateLimitExceeded) as refused:
            await guard.admit("c1")
        decision = refused.value.decision
        assert [(limit.name, limit.used, limit.reason) for limit in decision.limits] == [("rate_limit", 5, "rate")]
        assert 0 < (refused.value.retry_after or 0) <= 7200


async def test_after_retry_after_it_fits_again(counting: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the strategy: whoever waits as long as told is let in."""
    limits = {"rate_limit": "2/second"}
    async with make(tmp_path, **counting, default_limits=limits) as guard:
        while answer := await guard.try_admit("c1"):
            pass
        wait = answer.retry_after  # type: ignore[union-attr]  # it is a Refusal
        assert wait is not None
        assert wait < 2.1
        await asyncio.sleep(wait + 0.01)
        assert await admitted(guard) == 1


async def test_concurrent_requests_do_not_pass_the_limit(counting: dict[str, Any], tmp_path: Path) -> None:
    """Forty at once against five."""
    async with make(tmp_path, **counting) as guard:
        answers = await asyncio.gather(*[guard.try_admit("c1") for _ in range(40)])
        if counting["rates"].startswith("memcached") and counting["rate_limit_strategy"] != "fixed-window":
            assert sum(map(bool, answers)) <= 5  # limits counts there first and takes back later: strict under load
        else:
            assert sum(map(bool, answers)) == 5


@pytest.mark.parametrize("mode", ["closed", "open", "local"])
@pytest.mark.parametrize("strategy", ["sliding-window-counter", "moving-window", "fixed-window"])
async def test_a_crowd_is_no_outage(
    mode: Literal["closed", "open", "local"],
    strategy: Literal["sliding-window-counter", "moving-window", "fixed-window"],
    redis_port: int,
    tmp_path: Path,
) -> None:
    """300 at once, more than connections are opened for: 20 fit, the rest is a 429, and the breaker stays closed."""
    options: dict[str, Any] = {"default_limits": {"rate_limit": "20/hour; 30/day"}, "rate_limit_strategy": strategy}
    async with make(
        tmp_path, f"redis://127.0.0.1:{redis_port}", "memory://", rate_limit_failure=mode, **options
    ) as guard:
        answers = await asyncio.gather(*(guard.try_admit("c1") for _ in range(300)))
        assert sum(map(bool, answers)) == 20
        status = await guard.status("c1")
        assert [limit.used for limit in status.limits] == [20, 20]


async def test_the_money_stays_in_the_store(rates: str, tmp_path: Path) -> None:
    """The budget is decided, held and booked where it always is; and a request that it refuses counts for the rate."""
    async with make(tmp_path, rates) as guard:
        async with guard.admit("c1", estimate=Decimal("0.6")) as admission:
            with pytest.raises(BudgetExceeded) as full:
                await guard.admit("c1", estimate=Decimal("0.6"))
            assert full.value.decision.transient
            await admission.record(Usage(cost=1))
        await guard.flush()
        with pytest.raises(BudgetExceeded) as spent:
            await guard.admit("c1")
        names = {limit.name: limit for limit in spent.value.decision.limits}
        assert names["rate_limit"].used == 1
        assert names["rate_limit"].reason is None
        assert names["total_budget"].reason == "exhausted"
        status = await guard.status("c1")
        assert [(limit.name, limit.used) for limit in status.limits] == [("rate_limit", 2), ("total_budget", 1)]
        assert status.total_requests == 1
        assert await guard.verify() == []


async def test_several_rates_hold_together(rates: str, tmp_path: Path) -> None:
    """The shorter is asked first; what it counted before the longer one refused stays counted."""
    async with make(tmp_path, rates, default_limits={"rate_limit": "6/minute; 4/hour"}) as guard:
        assert await admitted(guard, times=5) == 4
        status = {limit.name: limit.used for limit in (await guard.status("c1")).limits}
        assert status == {"rate_limit": 5, "rate_limit:hour": 4}


async def test_work_within_an_admission_counts_once(rates: str, tmp_path: Path) -> None:
    """Only the outermost admission counts for the rate, here, too."""
    async with make(tmp_path, rates) as guard, guard.admit("c1"):
        for _ in range(20):
            async with guard.admit("c1"):
                pass
        assert (await guard.status("c1")).limits[0].used == 1


async def test_a_blocked_customer_is_blocked_whatever_its_rate(rates: str, tmp_path: Path) -> None:
    """403, not 429, and nothing is counted."""
    async with make(tmp_path, rates) as guard:
        await guard.put_customer(Customer(customer_identifier="c1", blocked=True, rate_limit="1/hour"))
        for _ in range(3):
            with pytest.raises(CustomerBlocked):
                await guard.admit("c1")
        await guard.update_customer("c1", blocked=None)
        assert await admitted(guard, times=2) == 1


async def test_a_rate_of_nothing_refuses_without_asking(rates: str, tmp_path: Path) -> None:
    """And says no time to come back at."""
    async with make(tmp_path, rates, default_limits={"rate_limit": 0}) as guard:
        with pytest.raises(RateLimitExceeded) as refused:
            await guard.admit("c1")
        assert refused.value.retry_after is None


async def test_limits_of_its_own_count_from_the_first_request_of_a_cold_process(
    shared_rates: str, tmp_path: Path
) -> None:
    """A process that knows only the default never refuses by it somebody who may more, nor lets in who may less."""
    options: dict[str, Any] = {"namespace": f"cold-{next(_numbers)}", "default_limits": {"rate_limit": "2/hour"}}
    async with make(tmp_path, shared_rates, **options) as guard:
        await guard.put_customer(Customer(customer_identifier="more", rate_limit="10/hour"))
        await guard.put_customer(Customer(customer_identifier="less", rate_limit="1/hour"))
        assert await admitted(guard, "more", times=4) == 4
    async with make(tmp_path, shared_rates, **options) as guard:
        assert await admitted(guard, "more", times=8) == 6
    async with make(tmp_path, shared_rates, **options) as guard:
        assert await admitted(guard, "less", times=3) == 1


async def test_a_changed_limit_holds_at_once_in_other_processes(shared_rates: str, tmp_path: Path) -> None:
    """And what was counted under the old amount counts under the new one."""
    options: dict[str, Any] = {"namespace": f"changed-{next(_numbers)}"}
    async with make(tmp_path, shared_rates, **options) as one, make(tmp_path, shared_rates, **options) as other:
        assert await admitted(one, times=3) == 3
        await other.put_customer(Customer(customer_identifier="c1", rate_limit="3/hour"))
        assert await admitted(one) == 0
        await other.update_customer("c1", rate_limit="5/hour")
        assert await admitted(one, times=2) == 1  # one was counted before the store could say that it was too many


async def test_no_identifier_reaches_anothers_rate(rates: str, tmp_path: Path) -> None:
    """Spaces, slashes, braces, the longest there are: each is a customer of its own, and none breaks a protocol."""
    names = ["a b", "a", "a/1", "{a}", "a\u00e9" * 80, "x" * 254, "a:b", "a/60", "*", "\U0001f600"]
    async with make(tmp_path, rates, default_limits={"rate_limit": "1/hour"}) as guard:
        for name in names:
            assert await admitted(guard, name, times=2) == 1


async def test_it_works_from_threads_scripts_and_other_loops(rates: str, tmp_path: Path) -> None:
    """One set of rates for the opening loop, another loop and a plain thread, the store in memory or not."""
    for storage in ("", "memory://"):
        async with make(tmp_path, rates, storage) as guard:
            assert await admitted(guard) == 1
            assert await asyncio.to_thread(guard.sync.try_admit, "c1")
            assert await asyncio.to_thread(asyncio.run, admitted(guard, times=5)) == 3


async def test_the_headers_say_what_is_left(counting: dict[str, Any], tmp_path: Path) -> None:
    """Behind the door: RateLimit counts down, and the sixth is a 429 with Retry-After."""
    async with make(tmp_path, **counting, default_limits={"rate_limit": "5/30second"}) as guard:
        app = GuardMiddleware(provider, guard, identify="header:x-customer", include=["/v1/*"])
        left = []
        for _ in range(5):
            exchange = await call(app, customer="c1")
            assert exchange.status == 200
            assert exchange.headers["ratelimit-policy"] == '"rate_limit";q=5;w=30'
            name, _, parameters = exchange.headers["ratelimit"].partition(";")
            remaining, reset = (int(part.partition("=")[2]) for part in parameters.split(";"))
            assert name == '"rate_limit"'
            assert 0 <= reset <= 31
            left.append(remaining)
        assert left == sorted(left, reverse=True)
        assert left[0] in (4, 5)
        assert left[-1] in (0, 1)  # 1 where a clock's window ended in between
        exchange = await call(app, customer="c1")
        if exchange.status == 200:
            exchange = await call(app, customer="c1")
        assert exchange.status == 429
        assert 1 <= int(exchange.headers["retry-after"]) <= 60


async def test_shadow_mode_reports_and_refuses_nobody(rates: str, tmp_path: Path) -> None:
    """As with any other limit."""
    async with make(tmp_path, rates, mode="shadow", default_limits={"rate_limit": "1/hour"}) as guard:
        async with guard.admit("c1"):
            pass
        async with guard.admit("c1") as admission:
            assert admission.decision.shadow
            assert admission.decision.reason == "rate"


# -- what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"rate_limit_storage": "nosuch://x"},
            "rate_limit_storage nosuch://x can't be used; known are the storage URLs of limits",
        ),
        ({"rate_limit_storage": "redis"}, "rate_limit_storage must be a storage URL of limits"),
        (
            {"rate_limit_storage": "memcached://127.0.0.1:1", "rate_limit_strategy": "moving-window"},
            'can\'t do rate_limit_strategy "moving-window"',
        ),
        ({"rate_limit_strategy": "fixed-window"}, "needs rate_limit_storage"),
        ({"rate_limit_storage": "memory://", "rate_limit_strategy": "leaky"}, 'must be "sliding-window-counter"'),
        ({"rate_limit_storage": "redis://:hunter2@127.0.0.1:notaport/0"}, "can't be used"),
    ],
)
def test_what_cannot_work_is_said_when_the_guard_is_made(options: dict[str, Any], said: str) -> None:
    """An error that names the setting, and never a password."""
    with pytest.raises(ConfigurationError) as error:
        Guard("memory://", **options)
    assert said in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(("url", "package"), [("redis://x", "redis"), ("memcached://x:1", "memcachio")])
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, instead of an ImportError."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf"pip install 'respan-guard\[{url[:5]}"):
        RateStorage(url, "fixed-window", "default")


async def test_a_wrong_password_is_said_at_start(tmp_path: Path) -> None:
    """Whatever the failure mode, and so is a database that isn't there; the password is nowhere in what is said."""
    with redis("--requirepass", "right") as port:
        for url in (f"redis://:hunter2@127.0.0.1:{port}", f"redis://:right@127.0.0.1:{port}/99"):
            with pytest.raises(ConfigurationError, match="refuses to serve") as error:
                await make(tmp_path, url, "memory://", rate_limit_failure="open").open()
            assert "hunter2" not in str(error.value)
            assert ":right" not in str(error.value)
        async with make(tmp_path, f"redis://:right@127.0.0.1:{port}", rate_limit_failure="closed") as guard:
            assert await admitted(guard) == 1


async def test_a_password_that_is_wrong_while_serving_is_an_outage_of_the_rates(tmp_path: Path) -> None:
    """Not of the app: the failure mode decides, and the error says what the storage said."""
    with redis("--requirepass", "right") as port:
        guard = make(tmp_path, f"redis://:hunter2@127.0.0.1:{port}", rate_limit_failure="closed")
        with pytest.raises(StorageUnavailable, match="invalid username-password") as error:
            await guard.admit("c1")
        assert "hunter2" not in str(error.value)
        await asyncio.to_thread(guard.sync.close)


async def test_rates_that_are_down_stop_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so; what it means is decided for each request."""
    async with make(tmp_path, "redis://127.0.0.1:1", rate_limit_failure="open") as guard:
        assert await admitted(guard) == 1
    assert "the guard starts without it" in caplog.text


# -- when it is down ---------------------------------------------------------------------------------


async def works(guard: Guard, rate: int = 10) -> bool:
    """Whether a request that is within its rate is let in by the rates' own word."""
    try:
        async with guard.admit("c1") as admission:
            return any(limit.limit == rate for limit in admission.decision.limits)
    except (StorageUnavailable, RateLimitExceeded):
        return False


@pytest.fixture(params=["redis", "memcached"])
def proxied(request: pytest.FixtureRequest) -> Iterator[tuple[str, FaultyProxy]]:
    """A storage of rates behind a proxy that can fail."""
    with FaultyProxy(request.getfixturevalue(f"{request.param}_port")) as proxy:
        yield f"{request.param}://127.0.0.1:{proxy.port}", proxy


@pytest.mark.parametrize("fault", ["refuse", "black_hole"])
@pytest.mark.parametrize(("mode", "expected"), [("closed", 0), ("open", 10), ("local", 5)])
async def test_rates_without_an_answer_do_as_configured(
    fault: str, mode: Any, expected: int, proxied: tuple[str, FaultyProxy], tmp_path: Path
) -> None:
    """Ten requests: none, all, or this process's half of the rate; and it works again once it is back."""
    url, proxy = proxied
    limits = {"rate_limit": "10/hour", "total_budget": 1}
    async with make(
        tmp_path, url, rate_limit_failure=mode, local_share=0.5, default_limits=limits, storage_timeout=0.5
    ) as guard:
        assert await admitted(guard) == 1
        getattr(proxy, fault)()
        count, refused = 0, set()
        for _ in range(10):
            try:
                async with guard.admit("c1") as admission:
                    await admission.record(Usage(cost=Decimal("0.01")))
                count += 1
            except StorageUnavailable:
                refused.add("closed")
            except RateLimitExceeded:
                refused.add("local")
        assert count == expected
        assert refused == {mode} - {"open"}
        home = guard._homes._app
        assert home is not None
        assert home.rates is not None
        assert home.rates.breaker.is_open
        proxy.recover(cut=True)
        async with asyncio.timeout(20):
            while not await works(guard):
                await asyncio.sleep(0.05)
        await guard.flush()
        assert (await guard.status("c1")).total_spend == Decimal("0.01") * expected


def command(port: int, *words: str) -> None:
    """Tell a Redis something."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(" ".join(words).encode() + b"\r\n")
        assert connection.recv(100).startswith(b"+")


@pytest.mark.parametrize("strategy", ["sliding-window-counter", "moving-window", "fixed-window"])
@pytest.mark.parametrize(
    ("fault", "mending"),
    [
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
    ],
)
async def test_rates_that_take_no_writes_are_down(
    fault: str, mending: str, strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A demoted primary, or a full one, answers what only reads: the breaker stays open, and the log says it once."""
    with redis() as port:
        limits = {"rate_limit": "1000/hour"}
        async with make(
            tmp_path,
            f"redis://127.0.0.1:{port}",
            rate_limit_strategy=strategy,
            rate_limit_failure="closed",
            default_limits=limits,
        ) as guard:
            assert await admitted(guard) == 1
            home = guard._homes._app
            assert home is not None
            assert home.rates is not None
            command(port, *fault.split())
            opened = 0
            for _ in range(60):
                with pytest.raises(StorageUnavailable):
                    await guard.admit("c1")
                with contextlib.suppress(StorageUnavailable):
                    await guard.status("c1")  # only reads
                opened += home.rates.breaker.is_open
                await asyncio.sleep(0.02)
            assert opened >= 50
            told = [record.getMessage() for record in caplog.records if "storage of rates" in record.getMessage()]
            assert len(told) == 1
            assert "unavailable" in told[0]
            command(port, *mending.split())
            async with asyncio.timeout(20):
                while not await works(guard, 1000):
                    await asyncio.sleep(0.05)
            assert caplog.records[-1].getMessage() == "the storage of rates is available again"
            assert not home.rates.breaker.failures


async def test_a_budget_is_kept_while_the_rates_are_down(redis_port: int, tmp_path: Path) -> None:
    """The two are apart: an outage of the one is none of the other."""
    with FaultyProxy(redis_port) as proxy:
        async with make(tmp_path, f"redis://127.0.0.1:{proxy.port}", rate_limit_failure="open") as guard:
            proxy.refuse()
            await guard.record(Usage(cost=1), "c1")
            with pytest.raises(BudgetExceeded):
                await guard.admit("c1")


def test_a_package_that_limits_does_not_find_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is this library that doesn't: limits has words of its own for a client that is not installed."""
    monkeypatch.setattr("limits.util.get_dependency", lambda name: (MissingModule, None))
    for url, extra in (("memcached://x:1", "memcached"), ("redis://x", "redis")):
        with pytest.raises(ConfigurationError, match=rf"pip install 'respan-guard\[{extra}\]'"):
            RateStorage(url, "fixed-window", "default")
