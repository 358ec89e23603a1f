"""200 admissions of a tenth of a budget, from 8 processes at once on one store: exactly 10 are admitted.

Prints a line per round and fails if any round admits another number, or if the store's sums are off afterwards.
With --full, 8 processes x 50 tasks x 200 requests follow, each with a random hold and a cost up to it, against a budget
for about half of them: not a nano-USD over it. Then the same without upper bounds, each holding next to nothing of what
it costs: what is over the budget is never more than the printed bound, which is what the calls in flight at a time can
cost beyond their holds.

    python benchmarks/prove_overspend.py [--rounds 30] [--full [--tasks 50] [--requests 200]] [--storage sqlite:///path]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import sys
import tempfile
from decimal import Decimal
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

from respan_guard import Customer, Guard, Usage

PROCESSES = 8
EACH = 25
TASKS, REQUESTS = 50, 200
BUDGET = Decimal(1)
SHARE = BUDGET / 10
MOST = 1000
"""The most that a call of the long runs costs, in millionths of a USD."""


class Long(NamedTuple):
    """A long run."""

    tasks: int
    requests: int
    bounded: bool


def worker(url: str, customer: str, barrier: Barrier, admitted: multiprocessing.Queue[int]) -> None:
    """Ask 25 times at once; what is let in spends all that it held."""

    async def run() -> int:
        async with Guard(url, storage_timeout=60) as guard:
            await asyncio.to_thread(barrier.wait)
            answers = await asyncio.gather(*[guard.try_admit(customer, estimate=SHARE) for _ in range(EACH)])
            for answer in answers:
                if answer:
                    await answer.record(Usage(model="proof", cost=SHARE))  # type: ignore[union-attr]
                    await answer.release()  # type: ignore[union-attr]
            return sum(1 for answer in answers if answer)

    admitted.put(asyncio.run(run()))


def spender(
    url: str, customer: str, barrier: Barrier, admitted: multiprocessing.Queue[int], name: int, long: Long
) -> None:
    """Tasks ask one time after another, and spend what they hold or less; without bounds, whatever they hold."""
    chance = random.Random(name)

    async def run() -> int:
        async with Guard(url, storage_timeout=60) as guard:
            await asyncio.to_thread(barrier.wait)

            async def work() -> int:
                count = 0
                for _ in range(long.requests):
                    most = chance.randint(1, MOST)
                    held = most if long.bounded else 1
                    answer = await guard.try_admit(customer, estimate=Decimal(held) / 10**6)
                    if answer:
                        count += 1
                        await answer.record(Usage(model="proof", cost=Decimal(chance.randint(0, most)) / 10**6))  # type: ignore[union-attr]
                        await answer.release()  # type: ignore[union-attr]
                return count

            return sum(await asyncio.gather(*[work() for _ in range(long.tasks)]))

    admitted.put(asyncio.run(run()))


async def prepare(url: str, customer: str, budget: Decimal = BUDGET) -> None:
    """Give the customer its budget."""
    async with Guard(url, storage_timeout=60) as guard:
        await guard.put_customer(Customer(customer_identifier=customer, total_budget=budget))


async def spent(url: str, customer: str) -> tuple[Decimal, int]:
    """What was spent, and how many discrepancies `verify` finds."""
    async with Guard(url) as guard:
        return (await guard.status(customer)).total_spend, len(await guard.verify())


def one_round(url: str, customer: str) -> tuple[int, Decimal, int]:
    """Run the eight processes once."""
    asyncio.run(prepare(url, customer))
    context = multiprocessing.get_context("spawn")
    barrier, admitted = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=worker, args=(url, customer, barrier, admitted)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    count = sum(admitted.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return (count, *asyncio.run(spent(url, customer)))


def full(url: str, customer: str, long: Long) -> bool:
    """Run a long one; whether nothing was overspent, or no more than can be without upper bounds."""
    asks = PROCESSES * long.tasks * long.requests
    budget = bound = Decimal(asks * MOST // 8) / 10**6
    if not long.bounded:  # each task has one call in flight, which was let in while there was room for its hold
        bound += PROCESSES * long.tasks * Decimal(MOST - 1) / 10**6
    asyncio.run(prepare(url, customer, budget))
    context = multiprocessing.get_context("spawn")
    barrier, admitted = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=spender, args=(url, customer, barrier, admitted, name, long))
        for name in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    count = sum(admitted.get(timeout=3600) for _ in processes)
    for process in processes:
        process.join()
    spend, found = asyncio.run(spent(url, customer))
    right = spend <= bound and found == 0 and count < asks
    print(
        f"{'full' if long.bounded else 'without bounds'}: {asks:,} asked from {PROCESSES} processes, "
        f"{count:,} admitted, {spend} of {budget} USD spent, at most {bound} can be, {found} discrepancies "
        f"{'' if right else '  <-- WRONG'}"
    )
    return right


def main() -> int:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="then 8 processes x 50 tasks x 200 requests")
    parser.add_argument("--tasks", type=int, default=TASKS, help="of each process of that")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each task")
    parser.add_argument("--storage", help="default: a fresh SQLite file")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        url = options.storage or f"sqlite:///{Path(directory) / 'proof.db'}"
        for number in range(1, options.rounds + 1):
            count, spend, found = one_round(url, f"customer-{number}-{Path(directory).name}")
            right = count == 10 and spend == BUDGET and found == 0
            wrong += not right
            print(
                f"round {number:2}: {PROCESSES * EACH} asked from {PROCESSES} processes, {count} admitted, "
                f"{spend} of {BUDGET} USD spent, {found} discrepancies {'' if right else '  <-- WRONG'}"
            )
        if options.full:
            for bounded in (True, False):
                long = Long(options.tasks, options.requests, bounded)
                wrong += not full(url, f"full-{bounded}-{Path(directory).name}", long)
    print("exactly 10 admitted in every round" if not wrong else f"{wrong} rounds were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
