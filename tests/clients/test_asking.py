"""Servers that don't know `stream_options` serve a wrapped client as they serve a bare one."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from respan_guard import Guard

from .support import ASK, CHAT, arecords, records


def raw(data: bytes) -> bytes:
    """Deflate without zlib's header."""
    press = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return press.compress(data) + press.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "GZip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": raw,
    "gzip, deflate": lambda data: zlib.compress(gzip.compress(data)),
}


class Events(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that comes in pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


class Server:
    """An OpenAI-compatible server of limited knowledge.

    Args:
        status: Of the answer to who asks for usage; 200 if it is told.
        says: The answer's text.
        always: Whether that is the answer to all requests.
    """

    def __init__(self, status: int, says: str, *, always: bool = False) -> None:
        self.status = status
        self.says = says
        self.always = always
        self.asked: list[bool] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        """Stream an answer."""
        asked = "stream_options" in json.loads(request.content)
        self.asked.append(asked)
        if self.status != 200 and (asked or self.always):
            error = json.dumps({"error": {"message": self.says}}).encode()
            return httpx2.Response(self.status, stream=Events(error), headers={"content-type": "application/json"})
        chunks: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
        ]
        if asked:
            chunks.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})
        frame = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": CHAT}
        pieces = [b"data: " + json.dumps({**frame, **chunk}).encode() + b"\n\n" for chunk in chunks]
        headers = {"content-type": "text/event-stream"}
        return httpx2.Response(200, stream=Events(*pieces, b"data: [DONE]\n\n"), headers=headers)

    def client(self, guard: Guard, **options: Any) -> openai.OpenAI:
        """A client of one customer's."""
        http = httpx2.Client(transport=httpx2.MockTransport(self))
        client = openai.OpenAI(api_key="k", base_url="http://p/v1", http_client=http, max_retries=0)
        return guard.wrap(client, customer="c1", **options)


def ask(client: Any) -> int:
    """How many chunks a stream has."""
    return len(list(client.chat.completions.create(model=CHAT, messages=ASK, max_tokens=50, stream=True)))


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_to_be_asked(guard: Guard, caplog: pytest.LogCaptureFixture, status: int) -> None:
    """It gets the request again without the option, and is not asked again; each call is presumed, once."""
    server = Server(status, "Unrecognized request argument supplied: stream_options")
    client = server.client(guard)
    with caplog.at_level(logging.WARNING, "respan_guard"):
        assert [ask(client), ask(client)] == [1, 1]
    assert server.asked == [True, False, False]
    assert [record.kind for record in records(guard)] == ["presumed", "presumed"]
    assert guard.sync.status("c1").total_requests == 2
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["p refuses stream_options"]
    assert not any(limit.held for limit in guard.sync.status("c1").limits)


async def test_a_server_that_refuses_to_be_asked_on_a_loop(guard: Guard) -> None:
    """The same for clients of event loops."""
    server = Server(400, "stream_options is not supported")
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(server))
    bare = openai.AsyncOpenAI(api_key="k", base_url="http://p/v1", http_client=http, max_retries=0)
    async with guard:
        client = guard.wrap(bare, customer="c1")
        for _ in range(2):
            stream = await client.chat.completions.create(model=CHAT, messages=ASK, max_tokens=50, stream=True)
            assert len([chunk async for chunk in stream]) == 1
        assert [record.kind for record in await arecords(guard)] == ["presumed", "presumed"]
    assert server.asked == [True, False, False]


@pytest.mark.parametrize(
    ("says", "always", "asked"),
    [("no such model", False, [True, True]), ("bad body: stream_options, ...", True, [True, False, True, False])],
)
def test_other_errors_stay_errors(guard: Guard, says: str, always: bool, asked: list[bool]) -> None:
    """An error about something else reaches the caller, costs nothing, and the next stream is asked as before."""
    server = Server(400, says, always=always)
    client = server.client(guard)
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match=says[:8]):
            ask(client)
    assert server.asked == asked
    assert records(guard) == []


@pytest.mark.parametrize(
    ("version", "asked"),
    [("2024-02-01", False), ("2024-08-01-preview", False), ("2024-09-01-preview", True), ("preview", True)],
)
def test_azure_is_asked_by_the_version_of_its_api(
    guard: Guard, caplog: pytest.LogCaptureFixture, version: str, asked: bool
) -> None:
    """Versions before 2024-09-01-preview don't know the option; who uses them is told once."""
    server = Server(200, "")
    http = httpx2.Client(transport=httpx2.MockTransport(server))
    azure = openai.AzureOpenAI(api_key="k", azure_endpoint="http://p", api_version=version, http_client=http)
    with caplog.at_level(logging.WARNING, "respan_guard"):
        client = guard.wrap(azure, customer="c1")
        assert [ask(client), ask(client)] == [1, 1]
    assert server.asked == [asked, asked]
    assert [record.kind for record in records(guard)] == ["usage" if asked else "presumed"] * 2
    assert len(caplog.records) == (0 if asked else 1)


def test_nobody_need_be_asked(guard: Guard) -> None:
    """`include_usage=False` sends requests as they are."""
    server = Server(200, "")
    ask(server.client(guard, include_usage=False))
    assert server.asked == [False]
    assert [record.kind for record in records(guard)] == ["presumed"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("encoding", sorted(ENCODERS))
def test_a_stream_keeps_its_headers_and_hides_its_usage(guard: Guard, whole: bool, encoding: str) -> None:
    """From a transport that has the whole body already, and compressed although it was not asked to be."""
    server = Server(200, "")

    def answer(request: httpx2.Request) -> httpx2.Response:
        plain = server(request)
        body = plain.read()
        data = ENCODERS[encoding](body)
        headers = {"content-type": "text/event-stream", "x-request-id": "req_1", "content-length": str(len(data))}
        if encoding:
            headers["content-encoding"] = encoding
        if whole:
            return httpx2.Response(200, headers=headers, content=data)
        return httpx2.Response(200, headers=headers, stream=Events(*(data[i : i + 7] for i in range(0, len(data), 7))))

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    bare = openai.OpenAI(api_key="k", base_url="http://p/v1", http_client=http, max_retries=0)
    client = guard.wrap(bare, customer="c1")
    raw = client.chat.completions.with_raw_response.create(model=CHAT, messages=ASK, stream=True)
    assert raw.headers["x-request-id"] == "req_1"
    assert [len(chunk.choices) for chunk in raw.parse()] == [1]
    [record] = records(guard)
    assert (record.kind, record.usage.output_tokens) == ("usage", 2)


def test_who_is_asked_gets_one_length_that_fits_and_all_other_headers(guard: Guard) -> None:
    """The request that asks has a length of its own, wants nothing compressed, and is else what the client sent."""
    seen: list[httpx2.Request] = []
    server = Server(200, "")

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return server(request)

    transport = guard.transport(httpx2.MockTransport(answer), customer="c1")
    body = json.dumps({"model": CHAT, "messages": ASK, "max_tokens": 50, "stream": True}).encode()
    sent = [("Content-Type", "application/json"), ("X-Twice", "a"), ("X-Twice", "b")]
    with httpx2.Client(transport=transport) as client:
        for content in (body, iter([body])):  # of a known length, and in chunks
            request = client.build_request("POST", "http://p/v1/chat/completions", headers=sent, content=content)
            request.read()
            client.send(request)
            asked = seen.pop()
            assert asked.headers.get_list("content-length") == [str(len(asked.content))]
            assert asked.headers.get_list("accept-encoding") == ["identity"]
            assert "transfer-encoding" not in asked.headers
            own = ("content-length", "accept-encoding", "transfer-encoding")
            kept = [[(n, v) for n, v in r.headers.multi_items() if n not in own] for r in (asked, request)]
            assert kept[0] == kept[1]
            assert ("x-twice", "a") in kept[0]


@pytest.mark.parametrize("kind", ["", "text/plain; charset=utf-8", "application/x-ndjson", "application/json"])
def test_a_stream_of_any_type_hides_its_usage(guard: Guard, kind: str) -> None:
    """The SDKs don't look at the type: a stream is what begins like one, byte by byte too, and is recorded."""
    server = Server(200, "")

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = server(request).read()
        headers = {"content-type": kind} if kind else {}
        return httpx2.Response(200, headers=headers, stream=Events(*(body[i : i + 1] for i in range(len(body)))))

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    bare = openai.OpenAI(api_key="k", base_url="http://p/v1", http_client=http, max_retries=0)
    assert ask(bare) == ask(guard.wrap(bare, customer="c1")) == 1
    assert [record.kind for record in records(guard)] == ["usage"]


@pytest.mark.parametrize("body", [b"{}", b"", b'{"choices": [], "usage": {"prompt_tokens": 1}}', b" " * 5_000 + b"x"])
def test_what_is_no_stream_is_not_edited(guard: Guard, body: bytes) -> None:
    """A server that does not stream although it was asked to: its body passes to the letter."""
    server = httpx2.MockTransport(
        lambda _: httpx2.Response(200, stream=Events(*(body[i : i + 3] for i in range(0, len(body), 3))))
    )
    asked = json.dumps({"model": CHAT, "messages": ASK, "stream": True})
    with httpx2.Client(transport=guard.transport(server, customer="c1")) as http:
        assert http.post("http://p/v1/chat/completions", content=asked).content == body


@pytest.mark.parametrize("stream", [False, True])
async def test_damaged_compression_is_the_librarys_own_error(guard: Guard, stream: bool) -> None:
    """Who can't be read is told so as by a bare client, on a loop too."""
    damaged = b"\x1f\x8b\x08\x00" + b"garbage" * 10

    def answer(_: httpx2.Request) -> httpx2.Response:
        headers = {"content-type": "text/event-stream", "content-encoding": "gzip"}
        return httpx2.Response(200, headers=headers, stream=Events(damaged))

    asked = json.dumps({"model": CHAT, "messages": ASK, "stream": stream})
    blocking = guard.transport(httpx2.MockTransport(answer), customer="c1")
    looping = guard.async_transport(httpx2.MockTransport(answer), customer="c1")
    with httpx2.Client(transport=blocking) as http, pytest.raises(httpx2.DecodingError):
        http.post("http://p/v1/chat/completions", content=asked)
    async with httpx2.AsyncClient(transport=looping) as loop:
        with pytest.raises(httpx2.DecodingError):
            await loop.post("http://p/v1/chat/completions", content=asked)
    assert [record.kind for record in await arecords(guard)] == ["presumed"] * 2


def test_usage_that_comes_unasked_is_shown(guard: Guard) -> None:
    """OpenRouter tells usage and cost in each stream, asked or not: the app goes on seeing it."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "cost": 0.000002}
    frame = {"id": "gen-1", "object": "chat.completion.chunk", "created": 1, "model": CHAT}
    event = b"data: %s\n\n" % json.dumps({**frame, "choices": [], "usage": usage}).encode()
    headers = {"content-type": "text/event-stream"}
    http = httpx2.Client(
        transport=httpx2.MockTransport(lambda _: httpx2.Response(200, headers=headers, stream=Events(event)))
    )
    bare = openai.OpenAI(api_key="k", base_url="http://p/v1", http_client=http, max_retries=0)
    assert ask(bare) == ask(guard.wrap(bare, customer="c1")) == 1


@pytest.mark.parametrize(
    ("offered", "sent"),
    [
        ("gzip, deflate, br, zstd", "gzip, deflate"),
        ("br;q=1.0, GZIP;q=0.5, *;q=0.1", "GZIP;q=0.5"),
        ("br", "identity"),
        ("gzip, deflate", "gzip, deflate"),
        ("identity", "identity"),
    ],
)
def test_a_call_asks_for_no_encoding_that_can_not_be_read(guard: Guard, offered: str, sent: str) -> None:
    """HTTP clients offer br and zstd as soon as they can: a call's answer would not be read."""
    seen: list[httpx2.Request] = []
    usage = {"prompt_tokens": 3, "completion_tokens": 2}

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        body = json.dumps({"object": "chat.completion", "model": CHAT, "usage": usage}).encode()
        if "br" in request.headers["accept-encoding"]:
            return httpx2.Response(200, headers={"content-encoding": "br"}, stream=Events(b"?"))
        return httpx2.Response(200, stream=Events(body))

    with httpx2.Client(transport=guard.transport(httpx2.MockTransport(answer), customer="c1")) as http:
        headers = [("Accept-Encoding", offered), ("X-Twice", "a"), ("X-Twice", "b")]
        body = json.dumps({"model": CHAT, "messages": ASK}).encode()
        response = http.post("http://p/v1/chat/completions", content=body, headers=headers)
        assert response.request.headers["accept-encoding"] == offered  # the app's own is as it was
    [request] = seen
    assert request.headers.get_list("accept-encoding") == [sent]
    assert request.headers.get_list("x-twice") == ["a", "b"]
    assert (request.content, request.headers["content-length"]) == (body, str(len(body)))
    assert [record.kind for record in records(guard)] == ["usage"]
