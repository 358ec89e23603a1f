"""200 admissions of a tenth of a budget, from 8 processes at once on one store: exactly 10 are admitted.

Prints a line per round and fails if any round admits another number, or if the store's sums are off afterwards.
With --full, 8 processes x 50 tasks x 200 requests follow, each with a random hold and a cost up to it, against a budget
for about half of them: not a nano-USD over it.

    python benchmarks/prove_overspend.py [--rounds 30] [--full] [--storage sqlite:///path]
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

from respan_guard import Customer, Guard, Usage

PROCESSES = 8
EACH = 25
TASKS, REQUESTS = 50, 200
BUDGET = Decimal(1)
SHARE = BUDGET / 10


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


def spender(url: str, customer: str, barrier: Barrier, admitted: multiprocessing.Queue[int], name: int) -> None:
    """50 tasks ask 200 times each, and spend what they hold or less."""
    chance = random.Random(name)

    async def run() -> int:
        async with Guard(url, storage_timeout=60) as guard:
            await asyncio.to_thread(barrier.wait)

            async def work() -> int:
                count = 0
                for _ in range(REQUESTS):
                    held = chance.randint(1, 1000)
                    answer = await guard.try_admit(customer, estimate=Decimal(held) / 10**6)
                    if answer:
                        count += 1
                        await answer.record(Usage(model="proof", cost=Decimal(chance.randint(0, held)) / 10**6))  # type: ignore[union-attr]
                        await answer.release()  # type: ignore[union-attr]
                return count

            return sum(await asyncio.gather(*[work() for _ in range(TASKS)]))

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


def full(url: str, customer: str) -> bool:
    """Run the long one; whether nothing was overspent."""
    budget = Decimal(PROCESSES * TASKS * REQUESTS * 125) / 10**6
    asyncio.run(prepare(url, customer, budget))
    context = multiprocessing.get_context("spawn")
    barrier, admitted = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=spender, args=(url, customer, barrier, admitted, name)) for name in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    count = sum(admitted.get(timeout=3600) for _ in processes)
    for process in processes:
        process.join()
    spend, found = asyncio.run(spent(url, customer))
    right = spend <= budget and found == 0
    print(
        f"full: {PROCESSES * TASKS * REQUESTS:,} asked from {PROCESSES} processes, {count:,} admitted, "
        f"{spend} of {budget} USD spent, {found} discrepancies {'' if right else '  <-- WRONG'}"
    )
    return right


def main() -> int:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="then 8 processes x 50 tasks x 200 requests")
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
            wrong += not full(url, f"full-{Path(directory).name}")
    print("exactly 10 admitted in every round" if not wrong else f"{wrong} rounds were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
