"""Bodies that are read to be looked at arrive at the app as they were sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respan_guard.errors import BodyTooLarge, InvalidInput
from respan_guard.middleware import body as body_module
from respan_guard.middleware.body import RequestBody, single_names
from respan_guard.middleware.weight import weight
from tests.middleware.support import call, gateway, make_guard

MIB = 1024 * 1024
NAMES = single_names(["customer_identifier", "customer_params", "respan_params"])


class Wire:
    """A server's `receive`: gives its messages, then blocks for ever, and counts."""

    def __init__(self, *chunks: bytes, end: bool = True) -> None:
        self.messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": chunk, "more_body": not end or at < len(chunks) - 1}
            for at, chunk in enumerate(chunks)
        ]
        self.calls = 0

    async def __call__(self) -> dict[str, Any]:
        self.calls += 1
        assert self.messages, "the server was asked for more than it has: a real one would block here"
        return self.messages.pop(0)


def make(wire: Any, *headers: tuple[bytes, bytes], limit: int = MIB) -> RequestBody:
    """A body under test."""
    return RequestBody({"type": "http", "headers": list(headers)}, wire, limit, NAMES)


async def read(raw: bytes, *headers: tuple[bytes, bytes], limit: int = MIB) -> RequestBody:
    """Read a body that came as one chunk."""
    body = make(Wire(raw), *headers, limit=limit)
    await body.read()
    return body


@given(st.lists(st.binary(max_size=64), min_size=1, max_size=12))
def test_any_chunking_is_replayed_exactly(chunks: list[bytes]) -> None:
    """However the body was cut, the app gets the same messages in the same order, then the server's own."""

    async def check() -> None:
        wire = Wire(*chunks)
        expected = [dict(message) for message in wire.messages]
        body = make(wire)
        await body.read()
        receive = body.replay()
        assert [await receive() for _ in expected] == expected
        wire.messages = [{"type": "http.disconnect"}]
        assert await receive() == {"type": "http.disconnect"}

    _run(check)


def _run(check: Callable[[], Any]) -> None:
    try:
        check().send(None)
    except StopIteration:
        return
    raise AssertionError("it waited for something")


async def test_ten_mebibytes_pass_the_cap_unharmed() -> None:
    """Beyond the cap reading stops, and the app still gets every byte."""
    chunks = [b"{" * 65_536, *(bytes([at % 256]) * 65_536 for at in range(159))]
    wire = Wire(*chunks)
    body = make(wire)
    await body.read()
    assert body.json is None
    assert wire.calls == 17, "one chunk beyond the cap"
    with pytest.raises(BodyTooLarge, match="1,048,576 bytes"):
        body.require()
    receive = body.replay()
    assert [(await receive())["body"] for _ in chunks] == chunks


async def test_a_large_body_is_parsed_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes of JSON take tens of milliseconds, for which other requests of the loop need not wait."""
    threads: list[int] = []

    def loads(raw: bytes, **how: Any) -> Any:
        threads.append(threading.get_ident())
        return json.JSONDecoder(**how).decode(raw.decode())

    monkeypatch.setattr(body_module, "json", SimpleNamespace(loads=loads))
    small, large = (json.dumps({"model": "m", "input": "x" * size}).encode() for size in (1000, 300_000))
    assert (await read(small)).json == json.loads(small)
    assert (await read(large)).json == json.loads(large)
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [True, False]


async def test_a_request_with_pictures_passes_by_default() -> None:
    """Eight megabytes of base64 are held as the pictures that they are, and reach the app byte for byte."""
    guard, ledger = make_guard(default_limits={"period_budget": 100}, hold="upper_bound")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4 * MIB}}
    message = {"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture, picture]}
    raw = json.dumps({"model": "gpt-4o-mini", "max_tokens": 10, "messages": [message]}).encode()
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            part = await receive()
            seen.append(part["body"])
            more = part["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    parts = [raw[at : at + 65_536] for at in range(0, len(raw), 65_536)]
    answer = await call(gateway(app, guard), body=parts, customer="ann")
    assert answer.status == 200
    assert seen == parts
    assert 0 < ledger.admits[0].cost < 100_000_000  # two pictures' worth, not eight million characters'


async def test_a_declared_length_beyond_the_cap_is_not_read() -> None:
    """Content-Length is believed when it says too much."""
    wire = Wire(b"{", b"}")
    body = make(wire, (b"content-length", b"1048577"))
    await body.read()
    assert wire.calls == 1, "until it is clear what it is"
    with pytest.raises(BodyTooLarge):
        body.require()
    receive = body.replay()
    assert [(await receive())["body"] for _ in range(2)] == [b"{", b"}"]


@pytest.mark.parametrize("length", [b"2", b"-1", b"abc", b"9" * 5000, b""])
async def test_a_lying_length_changes_nothing(length: bytes) -> None:
    """Only the bytes that come count; a length that is no plausible number is ignored."""
    body = make(Wire(b'{"a": "' + b"x" * 50, b'"}'), (b"content-length", length), limit=40)
    await body.read()
    with pytest.raises(BodyTooLarge):
        body.require()


async def test_a_client_that_leaves_is_noticed() -> None:
    """A disconnect while reading is told, and would be replayed."""
    wire = Wire(b'{"a"', end=False)
    wire.messages.append({"type": "http.disconnect"})
    body = make(wire)
    await body.read()
    assert body.disconnected
    assert body.json is None


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"GZIP", b"gzip, identity", b"deflate", b"\xff"])
async def test_compressed_bodies_are_not_unpacked(encoding: bytes) -> None:
    """A compressed body (a bomb, maybe) is left alone, and can't pass for one that was understood."""
    wire = Wire(b"\x1f\x8b", b"\x00")
    body = make(wire, (b"content-encoding", encoding))
    await body.read()
    assert wire.calls == 1
    body.check()
    with pytest.raises(InvalidInput, match="send it plain"):
        body.require()


async def test_identity_is_no_compression() -> None:
    """`Content-Encoding: identity` is read."""
    assert (await read(b'{"a": 1}', (b"content-encoding", b"Identity"))).json == {"a": 1}


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5_000 + b"}",
        b"\xff\xfe\xfa",
        b'{"a": 1,}',
        b"nul",
        b'"text"',
        b"[1, 2]",
        b"12",
        b'{"a": "\x01"}',
        b"\x00",
        b"NaN",
    ],
)
async def test_hostile_json_is_no_object(raw: bytes) -> None:
    """Whatever is no JSON object is refused where it has to be understood, and is no error of ours where it hasn't."""
    body = await read(raw)
    assert body.json is None
    with pytest.raises(InvalidInput, match="JSON"):
        body.require()


async def test_an_empty_body_is_nothing_rather_than_wrong() -> None:
    """No body: nothing to read, nothing to refuse."""
    body = await read(b"")
    body.require()
    assert body.json is None


@pytest.mark.parametrize(
    "raw",
    [
        b'{"customer_identifier": "a", "customer_identifier": "b"}',
        b'{"customer_identifier": "a", "customer_\\u0069dentifier": "b"}',
        b'{"customer_params": {"customer_identifier": "a", "customer_identifier": "b"}}',
        b'{"customer_params": {}, "x": 1, "customer_params": {}}',
        b'{"model": "cheap", "model": "dear"}',
        b'{"messages": [1], "messages": []}',
        b'{"generationConfig": {"maxOutputTokens": 100000, "maxOutputTokens": 1}}',
        b'{"generationConfig": {"maxOutputTokens": 100000}, "generationConfig": {"maxOutputTokens": 1}}',
        b'{"max_tokens": 1, "max_tokens": 100000}',
        '{"customer_identifier": "a", "customer_identifier": "b"}'.encode("utf-16"),
        '{"customer_identifier": "a", "customer_identifier": "b"}'.encode("utf-32"),
    ],
)
async def test_a_name_that_comes_twice_is_refused(raw: bytes) -> None:
    """Names that decide who pays and how much must be said once, however they are spelled."""
    body = await read(raw)
    with pytest.raises(InvalidInput, match="twice"):
        body.require()
    assert body.json is None


@pytest.mark.parametrize(
    "raw",
    [
        b'{"customer_identifier": "a", "customer_params": {"customer_identifier": "a"}}',
        b'{"messages": [{"content": "\\u00e9"}, {"content": "model model"}], "model": "m"}',
        b'{"x": 1, "x": 2}',
        '\ufeff{"a": 1}'.encode(),
    ],
)
async def test_what_is_no_repetition_passes(raw: bytes) -> None:
    """The same name in different objects, in text, or a name that decides nothing, is fine."""
    body = await read(raw)
    body.require()
    assert body.json == json.loads(raw)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CODE = 'if (a[0] == {"x": [1, 2]}) { print("\\\\[", a, b[1], {}); }  // x[y], {z}\n'


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "messages": [{"role": "user", "content": CODE * (4 * MIB // len(CODE))}]},
        {"model": "m", "messages": [{"role": "user", "content": json.dumps([[1.5, 2.5]] * 350_000)}]},
        {"model": "m", "input": list(range(300_000))},
        {"model": "m", "input": [[1234] * 146] * 2_048},
        {"model": "m", "messages": [{"role": "user", "content": "hello"}] * 10_000, "tools": [TOOL] * 500},
        {"model": "m", "messages": [{"role": "user", "content": "\u4e2d" * 1_500_000}]},
        {"model": "m", "input": "A" * 19 * MIB},
    ],
    ids=["code", "data in text", "tokens", "token lists", "a long chat", "chinese", "a picture"],
)
async def test_real_requests_are_not_too_heavy(body: dict[str, Any]) -> None:
    """What somebody may really send is parsed, on another thread."""
    raw = json.dumps(body).encode()
    found = await read(raw, limit=20 * MIB)
    found.require()
    assert found.json == body
    assert found.is_large


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":[' + b"[]," * 250_000 + b"0]}",
        b'{"a":[' + b'{"a":1},' * 80_000 + b"0]}",
        b'{"a":[' + b"0," * 600_000 + b"0]}",
        b'{"a":[' + b'"",' * 600_000 + b"0]}",
        b'{"a":[' + b'"\\\\",' * 300_000 + b"[]," * 250_000 + b"0]}",
        b'{"a":["' + b"\\n" * 3_000_000 + b'"]}',
        b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b"}",
        b'{"a":[' + (b"9" * 4_000 + b",") * 100 + b"0]}",
        b'{"a":' * 100_000,
        ('{"a":[' + "[]," * 250_000 + "0]}").encode("utf-16"),
    ],
)
async def test_bombs_are_refused_unparsed(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that would stop the event loop is told by counting, on every path, and never given to the parser."""
    monkeypatch.setattr(body_module, "json", None)
    body = await read(raw, limit=20 * MIB)
    assert body.is_large
    with pytest.raises(BodyTooLarge, match="more JSON values"):
        body.check()


@pytest.mark.parametrize("count", [1_000, 80_000])
async def test_a_small_body_is_parsed_at_once_only_if_it_is_light(count: int) -> None:
    """A quarter of a megabyte of brackets takes as long as many megabytes of text."""
    body = await read(b'{"a":[' + b"[]," * count + b"0]}")
    body.require()
    assert body.is_large is (count == 80_000)


def test_what_is_written_in_text_weighs_nothing() -> None:
    """Brackets in strings cost nothing to parse; strings end where JSON ends them."""
    assert weight(json.dumps({"a": '[{,:"\\' * 1_000}).encode()) == weight(b'{"a": ""}')
    assert weight(b'["\\\\", [], "\\"[]"]') == weight(b'["", [], ""]')
    assert weight(b"[" + b"0," * 9_999 + b"0]") > weight(b"[0]")


async def test_a_name_that_comes_twice_in_a_large_body_is_refused() -> None:
    """Large bodies are searched by their outline, which has every name, however near they stand and are spelled."""
    text = json.dumps('"' * 10 + "\\" * 9 + "x" * 300_000).encode()
    for twice in (b'"n":1,"n":2', b'"n":1,"\\u006e":2', b'"n":"n","n":2', b'"x":{"max_tokens":1,"max_tokens":2}'):
        body = await read(b'{"input":' + text + b"," + twice + b"}")
        assert body.is_large
        with pytest.raises(InvalidInput, match="twice"):
            body.check()
    once = await read(b'{"input":' + text + b',"n":"n","x":{"n":1}}')
    once.require()
