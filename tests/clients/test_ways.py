"""The other ways that the SDKs offer to make a call, and the surroundings that clients live in."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import openai
import pydantic
import pytest

from respan_guard import Guard
from respan_guard.testing import StandInProvider
from respan_guard.testing.provider import Answer

from .support import ASK, CHAT, CLAUDE, arecords, async_claude, async_open_ai, claude, holds, open_ai, records, same


class Moon(pydantic.BaseModel):
    """What is asked for as structured output."""

    km: int


def streaming(client: Any) -> None:
    """A response whose body the caller reads itself."""
    with client.chat.completions.with_streaming_response.create(model=CHAT, messages=ASK) as response:
        assert b"".join(response.iter_bytes())


def streaming_lines(client: Any) -> None:
    """The same, of a stream."""
    with client.chat.completions.with_streaming_response.create(model=CHAT, messages=ASK, stream=True) as response:
        assert list(response.iter_lines())


def raw_stream(client: Any) -> None:
    """A raw response of a stream, parsed."""
    assert list(client.chat.completions.with_raw_response.create(model=CHAT, messages=ASK, stream=True).parse())


def parsed(client: Any) -> None:
    """Structured output."""
    reply = client.beta.chat.completions.parse(model=CHAT, messages=ASK, response_format=Moon)
    assert reply.choices[0].message.parsed == Moon(km=384_400)


def parsed_response(client: Any) -> None:
    """The same by the other endpoint."""
    assert client.responses.parse(model=CHAT, input="hello", text_format=Moon).output_parsed == Moon(km=384_400)


def posted(client: Any) -> None:
    """The SDK's way to call what it has no method for."""
    assert client.post("/chat/completions", body={"model": CHAT, "messages": ASK}, cast_to=httpx2.Response)


def copied(client: Any) -> None:
    """A copy of the client, with other patience and headers."""
    copy = client.copy(timeout=9, default_headers={"x-team": "moon"}).with_options(max_retries=1)
    assert copy.chat.completions.create(model=CHAT, messages=ASK)


WAYS = [streaming, streaming_lines, raw_stream, parsed, parsed_response, posted, copied]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_is_metered(guard: Guard, provider: StandInProvider, url: str, way: Callable[[Any], None]) -> None:
    """One record each, as charged, and no hold."""
    provider.script(Answer(text='{"km": 384400}'))
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
        way(client)
    found = records(guard)
    same(found, provider)
    assert [record.customer_identifier for record in found] == ["c1"]
    assert guard.sync.run(holds(guard, "c1")) == 0


async def test_async_helpers_are_metered(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Helpers that put streams together, and bodies that the caller reads, on an event loop."""
    async with guard, guard.wrap(async_open_ai(url)) as client, guard.wrap(async_claude(url)) as other:
        with guard.on_behalf_of("c1"):
            async with client.chat.completions.stream(model=CHAT, messages=ASK) as chunks:
                assert (await chunks.get_final_completion()).choices
            async with client.responses.stream(model=CHAT, input="hello") as events:
                assert (await events.get_final_response()).output_text
            async with other.messages.stream(model=CLAUDE, max_tokens=9, messages=ASK) as told:
                assert (await told.get_final_message()).usage.output_tokens
            async with other.messages.with_streaming_response.create(
                model=CLAUDE, max_tokens=9, messages=ASK
            ) as response:
                assert await response.read()
        same(await arecords(guard), provider)
        assert len(provider.meter.charged) == 4
        assert await holds(guard, "c1") == 0


async def test_async_azure(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Azure's client for event loops, whole and streamed."""
    azure = openai.AsyncAzureOpenAI(azure_endpoint=url, api_version="2024-10-21", api_key="k", max_retries=0)
    async with guard, guard.wrap(azure) as client:
        assert isinstance(client, openai.AsyncAzureOpenAI)
        with guard.on_behalf_of("c1"):
            await client.chat.completions.create(model=CHAT, messages=ASK)
            async for _ in await client.chat.completions.create(model=CHAT, messages=ASK, stream=True):
                pass
        found = await arecords(guard)
        assert [record.provider for record in found] == ["azure"] * 2
        assert sum((record.cost or Decimal(0) for record in found), Decimal(0)) == provider.meter.total_cost > 0


def test_work_in_the_background_is_presumed(guard: Guard) -> None:
    """`background=True` is answered before there is any usage: it is presumed to cost what it held; polling is free."""
    queued = {"id": "resp_" + "0" * 32, "object": "response", "created_at": 1, "model": CHAT, "output": []}

    def answer(request: httpx2.Request) -> httpx2.Response:
        done = {"status": "completed", "usage": {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}}
        return httpx2.Response(200, json=queued | ({"status": "queued"} if request.method == "POST" else done))

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with guard.wrap(open_ai("http://x", http_client=http), customer="c1") as client:
        reply = client.responses.create(model=CHAT, input="hello", background=True, max_output_tokens=100)
        client.responses.retrieve(reply.id)
    (record,) = records(guard)
    assert (record.kind, record.usage.estimated) == ("presumed", True)
    assert record.cost
    assert guard.sync.run(holds(guard, "c1")) == 0


def test_batches_and_counting_cost_nothing_here(guard: Guard) -> None:
    """Calls to be made later are not this call's, and counted tokens are free: also for who has no money."""
    seen: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.url.path)
        return httpx2.Response(200, json={"id": "b", "input_tokens": 3, "object": "x"})

    guard.sync.update_customer("c1", total_budget=0)
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with (
        guard.wrap(open_ai("http://x", http_client=http), customer="c1") as client,
        guard.wrap(claude("http://x", http_client=http), customer="c1") as other,
    ):
        client.batches.create(input_file_id="f", endpoint="/v1/responses", completion_window="24h")
        client.moderations.create(input="hello")
        client.responses.input_tokens.count(model=CHAT, input="hello")
        other.messages.count_tokens(model=CLAUDE, messages=ASK)
        other.messages.batches.create(
            requests=[{"custom_id": "1", "params": {"model": CLAUDE, "max_tokens": 9, "messages": ASK}}]
        )
    assert len(seen) == 5
    assert records(guard) == []


# -- proxies -----------------------------------------------------------------------------------------------------


class Socks:
    """A SOCKS5 proxy for one connection after the other, which counts them."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"socks5://127.0.0.1:{self.listener.getsockname()[1]}"
        self.served = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.served += 1
            with client:
                client.recv(3)
                client.sendall(b"\x05\x00")
                head = client.recv(4)
                host = client.recv(4) if head[3] == 1 else client.recv(client.recv(1)[0])
                port = int.from_bytes(client.recv(2), "big")
                name = socket.inet_ntoa(host) if head[3] == 1 else host.decode()
                with socket.create_connection((name, port)) as server:
                    client.sendall(b"\x05\x00\x00\x01" + bytes(6))
                    _pump(client, server)


def _pump(one: socket.socket, other: socket.socket) -> None:
    while True:
        for ready in select.select([one, other], [], [])[0]:
            data = ready.recv(65_536)
            if not data:
                return
            (other if ready is one else one).sendall(data)


@pytest.mark.parametrize("how", ["environment", "by hand"])
def test_a_socks_proxy_is_kept(
    guard: Guard, provider: StandInProvider, url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Guarded calls go through a SOCKS proxy, from the environment or of a client of one's own."""
    proxy = Socks()
    http = None
    if how == "environment":
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
    else:
        http = httpx2.Client(proxy=proxy.url)
    with guard.wrap(open_ai(url, http_client=http)) as client, guard.on_behalf_of("c1"):
        client.chat.completions.create(model=CHAT, messages=ASK)
    proxy.listener.close()
    assert proxy.served == 1
    same(records(guard), provider)


# -- forks -------------------------------------------------------------------------------------------------------


FORKING = """
import faulthandler, os, sys
import openai
from respan_guard import Guard

faulthandler.dump_traceback_later(30, exit=True)
storage, url, journal = sys.argv[1:]
guard = Guard(storage, journal_dir=journal, storage_timeout=20)
made_before, first = [guard.wrap(openai.OpenAI(base_url=url, api_key="k", max_retries=0)) for _ in range(2)]

def ask(client, customer):
    with guard.on_behalf_of(customer):
        client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}])

ask(first, "parent")
for n in range(5):
    child = os.fork()
    ask(made_before if child == 0 else first, "parent" if child else "child")
    if child == 0:
        guard.sync.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
guard.sync.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_wrapped_client_survives_a_fork(tmp_path: Path, provider: StandInProvider, url: str) -> None:
    """A process that made calls forks: both go on, the child with a client wrapped before; each call counts once."""
    arguments = [f"sqlite:///{tmp_path / 'guard.db'}", f"{url}/v1", str(tmp_path / "journal")]
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    guard = Guard(arguments[0], journal_dir=tmp_path / "journal")
    found = records(guard)
    same(found, provider)
    assert Counter(record.customer_identifier for record in found) == {"child": 5, "parent": 6}
    assert guard.sync.verify() == []
    guard.sync.close()


async def test_tasks_and_groups_are_their_makers(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Tasks take the customer from where they are made, each its own, whatever runs beside them."""
    async with guard, guard.wrap(async_open_ai(url)) as client:

        async def work(customer: str) -> None:
            with guard.on_behalf_of(customer):
                async with asyncio.TaskGroup() as group:
                    for _ in range(3):
                        group.create_task(client.chat.completions.create(model=CHAT, messages=ASK))

        await asyncio.gather(*[work(f"c{n}") for n in range(5)])
        found = await arecords(guard)
        same(found, provider)
        assert Counter(record.customer_identifier for record in found) == {f"c{n}": 3 for n in range(5)}
