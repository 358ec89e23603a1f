"""kill -9 in the middle of a run, again and again: nothing that was acknowledged is lost, and every sum is right.

Each round starts processes that admit, record and release on one SQLite file and write down what `record()`
acknowledged, kills them at a random moment, and then looks for every acknowledged record.

    python benchmarks/prove_kill.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path

from respan_guard import Guard, Usage

WRITERS = 3


async def write(url: str, journal: str) -> None:
    """Admit, record and release for ever, several at once; print each id once its record is acknowledged."""
    async with Guard(url, storage_timeout=60, journal_dir=journal) as guard:

        async def one(task: int) -> None:
            number = 0
            while True:
                async with guard.admit(f"customer-{task}", estimate=Decimal("0.01")):
                    number += 1
                    name = f"{guard.ids()}"
                    await guard.record(Usage(model="proof", cost=Decimal("0.001")), f"customer-{task}", entry_id=name)
                    print(f"own:{name}", flush=True)

        await asyncio.gather(*[one(task) for task in range(8)])


async def check(url: str, journal: str, acknowledged: set[str]) -> tuple[int, int, int]:
    """How many records there are, how many acknowledged ones are missing, and what `verify` finds."""
    async with Guard(url, journal_dir=journal) as guard:
        await guard.flush()
        stored = {record.id async for record in guard.records()}
        return len(stored), len(acknowledged - stored), len(await guard.verify())


def main() -> int:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        asyncio.run(write(*options.write))
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        url, journal = f"sqlite:///{Path(directory) / 'proof.db'}", str(Path(directory) / "journal")
        acknowledged: set[str] = set()
        for number in range(1, options.rounds + 1):
            outputs = [Path(directory) / f"{number}-{writer}.txt" for writer in range(WRITERS)]
            processes = []
            for output in outputs:
                with output.open("w") as file:
                    processes.append(subprocess.Popen([sys.executable, __file__, "--write", url, journal], stdout=file))
            while not all(output.stat().st_size for output in outputs):
                time.sleep(0.01)
            time.sleep(random.uniform(0.0, 0.5))
            for process in processes:
                process.send_signal(signal.SIGKILL)
            for process in processes:
                process.wait()
            for output in outputs:
                lines = output.read_text().split("\n")
                acknowledged.update(lines[:-1])  # what comes behind the last line break is torn
            stored, missing, found = asyncio.run(check(url, journal, acknowledged))
            wrong += bool(missing or found)
            print(
                f"round {number:2}: {WRITERS} processes killed, {len(acknowledged)} records acknowledged, "
                f"{stored} stored, {missing} missing, {found} discrepancies"
            )
    print("nothing acknowledged was lost" if not wrong else f"{wrong} rounds were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
