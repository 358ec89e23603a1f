"""What the client door adds to a call: the real SDK against a local provider, bare and wrapped, by turns.

The goal is less than 5 % of what the SDK itself takes. The provider is as small as one can be (it answers fixed bytes
from another process), so that what is compared is the client's side; storage is memory, since what a store adds is
measured by its own benchmark. It is the process's own time, in short turns, and of many turns the least: what other
programs take away from caches and cores only ever adds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from openai import AsyncOpenAI, OpenAI

from respan_guard import Guard

ROUNDS = 101
TIMES = 6
ASK: dict[str, Any] = {
    "model": "gpt-4o-mini",
    "messages": [{"role": "system", "content": "You are brief. " * 20}, {"role": "user", "content": "How far? " * 20}],
    "max_tokens": 100,
}

SERVER = """
import asyncio, itertools, json, sys

BODY = json.dumps({
    "id": "chatcmpl-000000000000000000000000", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "far " * 50}}],
    "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
              "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0}},
}).encode()
CHUNK = {"id": "chatcmpl-000000000000000000000000", "object": "chat.completion.chunk", "created": 1,
         "model": "gpt-4o-mini", "usage": None}
WORD = {**CHUNK, "choices": [{"index": 0, "delta": {"content": "far "}, "finish_reason": None}]}
USAGE = {**CHUNK, "choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}}


def chunk(data):
    return b"%x\\r\\n%s\\r\\n" % (len(data), data)


def stream(asked):
    events = [WORD] * 50 + ([USAGE] if asked else [])
    parts = [chunk(b"data: " + json.dumps(event).encode() + b"\\n\\n") for event in events]
    return parts + [chunk(b"data: [DONE]\\n\\n"), b"0\\r\\n\\r\\n"]


PLAIN, ASKED = stream(False), stream(True)
FRESH = map("%024d".__mod__, itertools.count(1))  # each reply has an id of its own: one that repeats is not booked anew
HEAD = b"HTTP/1.1 200 OK\\r\\ncontent-type: "


async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            size = int(next(x for x in head.lower().split(b"\\r\\n") if x.startswith(b"content-length")).split(b":")[1])
            body = await reader.readexactly(size)
            if b'"stream":true' in body:
                fresh = next(FRESH).encode()
                parts = [part.replace(b"0" * 24, fresh) for part in (ASKED if b"include_usage" in body else PLAIN)]
                writer.write(HEAD + b"text/event-stream\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n")
                for part in parts:
                    writer.write(part)
                    await writer.drain()
            else:
                body = BODY.replace(b"0" * 24, next(FRESH).encode())
                writer.write(HEAD + b"application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(body) + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
"""


def sync_call(client: OpenAI, *, stream: bool) -> None:
    """One call, read to its end."""
    reply = client.chat.completions.create(**ASK, stream=stream)
    if stream:
        for _ in reply:
            pass


async def async_call(client: AsyncOpenAI, *, stream: bool) -> None:
    """One call, read to its end."""
    reply = await client.chat.completions.create(**ASK, stream=stream)
    if stream:
        async for _ in reply:
            pass


def measure(work: Callable[[], object]) -> float:
    """Microseconds of this process for one call."""
    gc.collect()
    started = time.process_time()
    for _ in range(TIMES):
        work()
    return (time.process_time() - started) / TIMES * 1e6


def compare(name: str, bare: Callable[[], object], wrapped: Callable[[], object]) -> None:
    """Print a row: the least of each, and how much more the second is."""
    for work in (bare, wrapped):
        measure(work)
    gc.disable()
    try:
        rounds = [
            (measure(bare), measure(wrapped)) if n % 2 else (measure(wrapped), measure(bare))[::-1]
            for n in range(ROUNDS)
        ]
    finally:
        gc.enable()
    base, mine = (min(column) for column in zip(*rounds, strict=True))
    print(f"{name:32} {base:10.0f} {mine:10.0f} {(mine / base - 1) * 100:8.1f} %")


def main() -> None:
    """Print the table."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{json.loads(server.stdout.readline())}/v1"
        guard = Guard("memory://", default_limits={"rate_limit": 3_000_000, "period_budget": 1_000_000})
        print(f"{'':32} {'bare us':>10} {'wrapped us':>10} {'adds':>10}")
        with OpenAI(base_url=url, api_key="k") as bare, guard.wrap(bare) as wrapped, guard.on_behalf_of("c1"):
            for stream, name in ((False, "sync, whole"), (True, "sync, stream of 50 chunks")):
                compare(
                    f"openai {name}",
                    lambda stream=stream: sync_call(bare, stream=stream),
                    lambda stream=stream: sync_call(wrapped, stream=stream),
                )
            with asyncio.Runner() as runner:
                first = AsyncOpenAI(base_url=url, api_key="k")
                second = guard.wrap(first)
                for stream, name in ((False, "async, whole"), (True, "async, stream of 50 chunks")):
                    compare(
                        f"openai {name}",
                        lambda stream=stream: runner.run(async_call(first, stream=stream)),
                        lambda stream=stream: runner.run(async_call(second, stream=stream)),
                    )
                runner.run(second.close())
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
