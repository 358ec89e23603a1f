"""What exporters cost the requests beside them: requests at a steady pace, without exporters and with them, by turns.

A request is an admission, a priced record and the end of it, on SQLite (synchronous=FULL), in the process that also
exports. Two exporters run, a file and a webhook to another process; once with a webhook that answers, once with one
that takes what it is sent and never answers. The goal is that requests take as long as without. In the same run: what
was delivered, waits or is a dead letter is what was recorded.

    python -m benchmarks.bench_exporters [--seconds 4] [--rounds 3] [--pace 250]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import statistics
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path

from respan_guard import Guard, Usage
from respan_guard.exporters import JSONLExporter, WebhookExporter

SECRET = f"whsec_{base64.b64encode(bytes(range(32))).decode()}"
LIMITS = {"rate_limit": 3_000_000, "budget_duration": "monthly", "period_budget": 1_000_000}
SIDES = ("no exporter", "a file, a webhook", "a file, a webhook that hangs")
SERVER = """
import asyncio

async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            size = int(next(x for x in head.lower().split(b"\\r\\n") if x.startswith(b"content-length")).split(b":")[1])
            await reader.readexactly(size)
            if head.startswith(b"POST /hang"):
                await asyncio.sleep(3600)
            writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


async def requests(guard: Guard, seconds: float, pace: int) -> list[float]:
    """Seconds that each request took; they come at a pace, whether those before are over or not."""
    took: list[float] = []

    async def request(number: int) -> None:
        begun = time.perf_counter()
        async with guard.admit(f"customer-{number % 100}", estimate=Decimal("0.01")) as admission:
            await admission.record(Usage("gpt-4o-mini", 500, 120, provider="openai"))
        took.append(time.perf_counter() - begun)

    async with asyncio.TaskGroup() as group:
        begun = time.perf_counter()
        for number in range(int(seconds * pace)):
            await asyncio.sleep(max(0.0, begun + number / pace - time.perf_counter()))
            group.create_task(request(number))
    return took


async def run(side: str, port: int, seconds: float, pace: int) -> list[float]:
    """One turn of a side, on a store of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        guard = Guard(f"sqlite:///{path / 'guard.db'}", default_limits=LIMITS, journal_dir=path / "journal")
        lines = path / "usage.jsonl"
        if side != SIDES[0]:
            guard.add_exporter(JSONLExporter(lines))
            where = "hang" if "hangs" in side else "take"
            guard.add_exporter(WebhookExporter(f"http://127.0.0.1:{port}/{where}", SECRET, allow_private=True))
        async with guard:
            await requests(guard, 0.5, pace)  # connections, prices and pages are there
            took = await requests(guard, seconds, pace)
            if side != SIDES[0]:
                await check(guard, lines, int(0.5 * pace) + len(took))
        return took


async def check(guard: Guard, lines: Path, recorded: int) -> None:
    """Nothing is lost: an exporter that answers gets all, one that hangs keeps all waiting."""
    await guard.flush()
    until = time.perf_counter() + 60
    while True:
        file, webhook = await guard.exporters()
        if file.behind == 0 and (webhook.behind in (0, recorded)):
            break
        assert time.perf_counter() < until, (file, webhook)
        await asyncio.sleep(0.1)
    with lines.open() as text:
        assert sum(1 for _ in text) == recorded
    assert file.dead_letters == webhook.dead_letters == 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pace", type=int, default=250)
    options = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        runs: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                runs[side].append(sorted(asyncio.run(run(side, port, options.seconds, options.pace))))
    finally:
        server.terminate()
        server.wait()
    print(f"{options.pace} requests per second, SQLite with synchronous=FULL")
    print("| exporters | p50 ms | p99 ms | p50, of without | p99, of without |")
    print("|---|---|---|---|---|")
    figures = {
        side: [statistics.median(took[len(took) * share // 100] for took in runs[side]) * 1000 for share in (50, 99)]
        for side in SIDES
    }
    for side in SIDES:
        ratios = [mine / base for mine, base in zip(figures[side], figures[SIDES[0]], strict=True)]
        print(f"| {side} | {figures[side][0]:.2f} | {figures[side][1]:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
