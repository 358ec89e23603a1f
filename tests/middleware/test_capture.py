"""What the door reads off responses: the call that was asked for, booked once, whatever its dress."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import tracemalloc
import zlib
from decimal import Decimal
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respan_guard import Guard, Usage
from respan_guard.money import from_nano
from respan_guard.providers import body as body_module
from respan_guard.testing import StandInProvider
from tests.middleware.support import QUESTION, USAGE, Ledger, call, chunks, gateway, http_scope, make_guard, reply

JSON = b"application/json"
SSE = b"text/event-stream"
COST = Decimal("0.0000045")  # 10 tokens in at 0.15, 5 out at 0.60 USD per million


def answering(parts: list[bytes], content_type: bytes = JSON, encoding: bytes = b"", status: int = 200) -> Any:
    """An app that answers with these bytes."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Type", content_type)] + ([(b"Content-Encoding", encoding)] if encoding else [])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def book(parts: list[bytes], *details: Any, question: dict[str, Any] | None = None, **options: Any) -> Ledger:
    """Let one request through, check that its bytes came out as they went in, and give the ledger."""
    guard, ledger = make_guard(**options)
    body = json.dumps(question or QUESTION).encode()
    path = "/v1/messages" if question is not None and "system" in question else "/v1/chat/completions"
    exchange = await call(gateway(answering(parts, *details), guard), path, customer="org_1", body=body)
    assert exchange.body == b"".join(parts)
    await ledger.settled(1)
    return ledger


def priced(ledger: Ledger) -> list[Decimal | None]:
    """What the entries cost."""
    return [None if entry.cost is None else from_nano(entry.cost) for entry in ledger.entries]


WHOLE = json.dumps(reply()).encode()
STREAM = b"".join(chunks())


@pytest.mark.parametrize(
    ("parts", "details"),
    [
        ([WHOLE], (JSON,)),
        ([WHOLE], (b"Application/JSON; charset=utf-8",)),
        ([WHOLE[:9], WHOLE[9:]], (JSON,)),
        (chunks(), (SSE,)),
        ([STREAM], (b"text/event-stream; charset=utf-8",)),
        ([gzip.compress(WHOLE)], (JSON, b"gzip")),
        ([gzip.compress(STREAM)], (SSE, b"gzip")),
        ([zlib.compress(WHOLE)], (JSON, b"deflate")),
    ],
)
async def test_usage_is_read_and_priced(parts: list[bytes], details: tuple[bytes, ...]) -> None:
    """JSON and streams, plain and compressed: one entry with the tokens, the price, and both models."""
    ledger = await book(parts, *details)
    (entry,) = ledger.entries
    assert (entry.kind, entry.source) == ("usage", "response")
    assert (entry.input_tokens, entry.output_tokens) == (USAGE["prompt_tokens"], USAGE["completion_tokens"])
    assert priced(ledger) == [COST]
    assert (entry.usage.model, entry.usage.response_model) == ("gpt-4o-mini", "gpt-4o-mini-2024-07-18")
    assert entry.admission == ledger.admits[0].id


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, len(STREAM) - 1), max_size=12, unique=True), zipped=st.booleans())
def test_the_way_it_is_cut_does_not_matter(cuts: list[int], zipped: bool) -> None:
    """However the bytes are cut into messages, the entry is the same."""
    raw = gzip.compress(STREAM) if zipped else STREAM
    places = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
    parts = [raw[a:b] for a, b in itertools.pairwise(places)]
    ledger = asyncio.run(book(parts, SSE, *([b"gzip"] if zipped else [])))
    assert ledger.kinds == ["usage"]
    assert priced(ledger) == [COST]


@pytest.mark.parametrize(
    ("parts", "details"),
    [
        ([b'{"choices": []}'], (JSON,)),
        ([b"no json"], (JSON,)),
        ([b""], (JSON,)),
        (chunks(usage=False), (SSE,)),
        (chunks()[:1], (SSE,)),
        ([gzip.compress(WHOLE)[:20]], (JSON, b"gzip")),
        ([b"not gzip at all"], (JSON, b"gzip")),
        ([WHOLE], (JSON, b"br")),
        ([b"<html>"], (b"text/html",)),
        ([b"x"], (b"",)),
        ([json.dumps(reply() | {"usage": {"prompt_tokens": -1, "completion_tokens": "x"}}).encode()], (JSON,)),
    ],
)
async def test_a_success_without_readable_usage_is_presumed(parts: list[bytes], details: tuple[bytes, ...]) -> None:
    """A call that was made and told no usage is booked at what it held, not as nothing."""
    ledger = await book(parts, *details)
    assert ledger.kinds == ["presumed"]
    assert ledger.entries[0].cost == ledger.admits[0].cost > 0


@pytest.mark.parametrize("status", [400, 401, 429, 500, 529])
async def test_an_error_cost_nothing_unless_it_says_so(status: int) -> None:
    """A refused call is free; an error that reports usage was paid for."""
    ledger = await book([b'{"error": {"message": "no"}}'], JSON, b"", status)
    assert ledger.entries == []
    ledger = await book([WHOLE], JSON, b"", status)
    assert priced(ledger) == [COST]


async def test_a_cut_anthropic_stream_is_presumed() -> None:
    """Anthropic counts from the first event on: a stream that is cut off has not said its bill."""
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"id": "msg_01ABCDEFGHIJKLMNOPQR", "type": "message", "role": "assistant",
         "model": "claude-sonnet-4-5-20250929", "usage": {"input_tokens": 9, "output_tokens": 1}}},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 40}},
        {"type": "message_stop"},
    ]  # fmt: skip
    parts = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
    question = {"model": "claude-sonnet-4-5", "max_tokens": 100, "system": "x", "messages": [], "stream": True}
    whole = await book(parts, SSE, question=question)
    assert [(entry.kind, entry.output_tokens) for entry in whole.entries] == [("usage", 40)]
    cut = await book(parts[:1], SSE, question=question)
    assert cut.kinds == ["presumed"]


UNKNOWN: list[tuple[bytes, list[tuple[bytes, bytes]]]] = [
    (b'{"question": "hi"}', []),
    (b"question=hi", [(b"content-type", b"application/x-www-form-urlencoded")]),
    (
        b"--x\r\ncontent-disposition: form-data; name=file\r\n\r\n\x00\r\n--x--",
        [(b"content-type", b"multipart/form-data")],
    ),
    (b"\x1f\x8b", [(b"content-encoding", b"gzip")]),
    (b"[" + b"x" * 3_000, []),
    (b"", []),
]


@pytest.mark.parametrize(("asked", "headers"), UNKNOWN)
@pytest.mark.parametrize("kind", [JSON, SSE])
async def test_a_providers_reply_counts_whatever_was_asked(asked: bytes, headers: Any, kind: bytes) -> None:
    """Where the request says nothing of a call, a provider's reply with usage still tells that one was made."""
    guard, ledger = make_guard()
    parts = [WHOLE] if kind == JSON else chunks()
    app = gateway(answering(parts, kind), guard, max_body_bytes=2_000)
    exchange = await call(app, "/v1/ask", customer="org_1", body=asked, headers=headers)
    assert exchange.body == b"".join(parts)
    await ledger.settled(1)
    assert ledger.kinds == ["usage"]
    assert [from_nano(entry.cost or 0) for entry in ledger.entries] == [COST]
    assert ledger.entries[0].usage.model == "gpt-4o-mini-2024-07-18"


async def test_a_reply_to_a_get_counts_unless_it_was_kept() -> None:
    """An app that asks a provider on a GET spends, too; fetching a stored reply does not, nor does other JSON."""
    for path, entries in (("/v1/ask", 1), ("/v1/responses/resp_1", 0), ("/v1/chat/completions/chatcmpl-1", 0)):
        for version in ("1.1", "2"):
            guard, ledger = make_guard()
            app = gateway(answering([WHOLE]), guard)
            await call(app, path, method="GET", customer="org_1", http_version=version)
            await ledger.settled(1)
            assert len(ledger.entries) == entries, path
    guard, ledger = make_guard()
    app = gateway(answering([WHOLE]), guard)
    await call(app, "/v1/responses/1", method="GET", customer="org_1", body=b"{}", headers=[(b"content-length", b"2")])
    assert len(ledger.entries) == 1, "nothing is fetched with a body"
    for other in (b'{"usage": {"prompt_tokens": 10}}', b'{"data": [{"id": "gpt-4o"}]}', b'"text"', b"[1]", b"{"):
        guard, ledger = make_guard(default_hold="0.5")
        await call(gateway(answering([other]), guard), "/v1/ask", customer="org_1", body=b'{"question": "hi"}')
        await ledger.settled(1)
        assert ledger.entries == []


async def test_a_reply_that_another_door_recorded_is_not_counted_again() -> None:
    """What the app recorded under the admission is the call; its response tells of the same one."""
    guard, ledger = make_guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guard.record(Usage.from_response(json.loads(WHOLE)))
        await answering([WHOLE])(scope, receive, send)

    await call(gateway(app, guard), "/v1/ask", customer="org_1", body=b'{"question": "hi"}')
    await ledger.settled(1)
    assert [entry.source for entry in ledger.entries] == ["manual"]


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("cut", [False, True])
async def test_a_wrapped_clients_call_is_one_record(method: str, cut: bool) -> None:
    """An app that passes on what its wrapped client got, whole or cut off, is charged by the client's door alone."""
    guard = Guard("memory://", default_limits={"period_budget": 10})
    with StandInProvider().serve() as url:
        async with guard.wrap(openai.AsyncOpenAI(api_key="k", base_url=url + "/v1")) as client:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", SSE)]})
                stream = await client.chat.completions.create(
                    model="gpt-4o-mini",
                    max_tokens=50,
                    messages=[{"role": "user", "content": "hello"}],
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for chunk in stream:
                    part = b"data: " + chunk.model_dump_json().encode() + b"\n\n"
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                    if cut:
                        break
                await stream.close()
                await send({"type": "http.response.body", "body": b""})

            await call(gateway(app, guard), "/v1/ask", method=method, customer="org_1", body=b"question=hi")
    await guard.flush()
    assert [record.source async for record in guard.records("org_1")] == ["presumed" if cut else "client"]


async def test_a_cut_stream_of_an_unknown_call_is_booked() -> None:
    """A client that leaves before the last chunk, where the usage stands, does not spend for nothing."""
    guard, ledger = make_guard()
    app = gateway(answering(chunks()[:2], SSE), guard)
    await call(app, "/v1/ask", customer="org_1", body=b'{"question": "hi"}')
    await ledger.settled(1)
    assert ledger.kinds == ["presumed"]
    assert (ledger.entries[0].cost or 0) > 0
    start = {"type": "message_start", "message": {"id": "msg_01ABCDEFGHIJKLMNOPQR", "type": "message",
             "model": "claude-sonnet-4-5", "usage": {"input_tokens": 9_000, "output_tokens": 1}}}  # fmt: skip
    words = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x" * 400}}
    cut = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in (start, words)]
    guard, ledger = make_guard()
    await call(gateway(answering(cut, SSE), guard), "/v1/ask", customer="org_1", body=b'{"question": "hi"}')
    await ledger.settled(1)
    (entry,) = ledger.entries
    assert (entry.input_tokens, entry.output_tokens, entry.usage.estimated) == (9_000, 100, True)
    guard, ledger = make_guard()
    own = [b'data: {"id": "7", "model": "mine", "text": "hi"}\n\n']
    await call(gateway(answering(own, SSE), guard), "/v1/ask", customer="org_1", body=b'{"question": "hi"}')
    assert ledger.entries == []


async def test_a_large_reply_without_usage_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app's own megabytes of JSON would stall the event loop, and for nothing."""
    decoded: list[int] = []
    monkeypatch.setattr(body_module, "decode_json", lambda raw: decoded.append(len(raw)))
    guard, ledger = make_guard()
    large = json.dumps({"rows": ["x" * 100] * 5_000}).encode()
    await call(gateway(answering([large]), guard), "/v1/ask", customer="org_1", body=b'{"question": "hi"}')
    await ledger.settled(1)
    assert decoded == []


async def test_each_response_is_a_call_whatever_its_id() -> None:
    """Servers that make a reply's id of what the client sends give one for many calls: each is booked.

    So is a reply that a gateway serves again from a cache of its own: nothing tells it from a call.
    """
    guard, ledger = make_guard()
    app = gateway(answering([WHOLE]), guard)
    for _ in range(3):
        await call(app, customer="org_1")
    await ledger.settled(3)
    assert len({entry.id for entry in ledger.entries}) == 3
    assert (await guard.status("org_1")).total_spend == 3 * COST


async def test_a_client_of_azure_chooses_no_price() -> None:
    """Azure serves the deployment in the path: a cheap model in the body changes neither the hold nor the bill."""
    guard, ledger = make_guard()
    app = gateway(answering([json.dumps(reply() | {"model": "gpt-4-0613"}).encode()]), guard)
    body = json.dumps(QUESTION | {"model": "gpt-4o-mini"}).encode()
    for path in ("/v1/openai/deployments/gpt-4/chat/completions", "/v1/chat/completions"):
        await call(app, path, customer="org_1", body=body)
    await ledger.settled(2)
    assert [entry.model for entry in ledger.entries] == ["gpt-4", "gpt-4o-mini"]
    assert priced(ledger) == [Decimal("0.0006")] * 2  # 10 tokens in at 30, 5 out at 60 USD per million


async def test_a_client_that_names_the_reply_is_booked_by_every_worker() -> None:
    """A vLLM makes its reply's id of `X-Request-Id`: two workers that meet it first share no record."""
    reply_id = json.loads(WHOLE)["id"]
    ids = []
    for _ in range(2):
        guard, ledger = make_guard()
        headers = [(b"x-request-id", reply_id.partition("-")[2].encode())]
        await call(gateway(answering([WHOLE]), guard), customer="org_1", headers=headers)
        await ledger.settled(1)
        ids += [entry.id for entry in ledger.entries]
    assert len(set(ids)) == 2
    assert not any(reply_id in entry_id for entry_id in ids)


@pytest.mark.parametrize(("policy", "cost"), [("hold", True), ("estimate", True), ("flag", False)])
async def test_missing_usage_follows_its_setting(policy: str, cost: bool) -> None:
    """What is booked for unknown usage is the setting's choice."""
    ledger = await book([b"{}"], JSON, missing_usage=policy)
    assert ledger.kinds == ["presumed"]
    assert (ledger.entries[0].cost is not None) is cost


EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"word "}}],"usage":null}\n\n'


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        ("text/event-stream", (EVENT * 700)[:65_536]),
        ("text/event-stream", b"x" * 65_536),  # one event that never ends
        ("application/json", b"[" + b"1," * 32_767 + b"1"),
    ],
)
async def test_64_mebibytes_pass_and_are_not_kept(kind: str, chunk: bytes) -> None:
    """A response may be endless: what the door remembers of it is bounded."""
    guard, ledger = make_guard()
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]})
        for _ in range(1024):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(QUESTION).encode(), "more_body": False}

    async def send(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    door = gateway(app, guard)
    guard.prices.load()  # importing the tables would count, too
    tracemalloc.start()
    try:
        await door(http_scope(headers=[(b"x-customer", b"ann")]), receive, send)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent == 1024 * len(chunk)
    assert peak < 32 * 1024 * 1024  # a JSON body is kept up to 8 MiB, and joined once
    await ledger.settled(1)


async def test_streams_tell_how_long_they_took() -> None:
    """Latency and time to the first text, by the guard's clock; what the app does behind the body is no part of it."""
    guard, ledger = make_guard()
    clock: Any = guard.clock

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", SSE)]})
        for seconds, part in zip((0.5, 1, 1, 1), chunks(), strict=True):
            clock.advance(seconds)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        clock.advance(60)  # a background task

    await call(gateway(app, guard), customer="org_1", body=json.dumps(QUESTION).encode())
    await ledger.settled(1)
    (entry,) = ledger.entries
    assert (entry.usage.ttft_ms, entry.usage.latency_ms) == (500, 3500)
