"""Usage from JSON bodies and from compressed ones: cut anywhere, large, hostile."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respan_guard.providers import JSONReader, Reader, call_from_request, reader_for, usage_of_call
from respan_guard.providers.body import BODY_CAP
from respan_guard.providers.strings import without_media
from respan_guard.usage import Usage

DATA = Path(__file__).parent / "data"


def outcome(reader: Reader | None, data: bytes, step: int) -> tuple[Any, ...]:
    """Everything that a reader tells of a body, fed in steps."""
    assert reader is not None
    for i in range(0, len(data), step):
        reader.feed(data[i : i + step])
    reader.close()
    return reader.usage(), reader.model, reader.response_id, reader.finished, reader.output_bytes, reader.broken


def test_json_body_of_any_chunking() -> None:
    """A JSON reply is read when it is complete, Gemini's array of chunks by its last usage."""
    data = (DATA / "gemini_array.json").read_bytes()
    for step in (1, 7, 10**6):
        reader = JSONReader()
        for i in range(0, len(data), step):
            reader.feed(data[i : i + step])
        assert reader.usage() is None
        reader.close()
        usage = reader.usage()
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens) == (264, 51, 128)
        assert reader.finished
        assert reader.model == "gemini-2.5-flash"
        assert reader.response_id == "mNcgabKXOYmz7dcP0ZTJ8Ac"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 200_000, b"7", b'"x"', b"null", b"[1, 2]", b"\xff", b'{"a": 1e999}']
)
def test_json_bodies_without_usage(body: bytes) -> None:
    """What is no reply, or no JSON, or nested without end, is no usage and no error."""
    reader = JSONReader()
    reader.feed(body)
    reader.close()
    assert reader.usage() is None


def test_large_json_bodies_are_let_go() -> None:
    """A body beyond the cap is not kept, and says so."""
    reader = JSONReader()
    reader.feed(b'{"object":"chat.completion","x":"')
    for _ in range(BODY_CAP // 1_000_000 + 2):
        reader.feed(b"x " * 500_000)
        assert sum(map(len, reader._parts)) <= BODY_CAP + 2_100_000
    reader.feed(b'","usage":{"prompt_tokens":5}}')
    reader.close()
    assert reader.broken
    assert reader.usage() is None


@pytest.mark.parametrize("step", [1_000, 65_536, 10**9])
@pytest.mark.parametrize(
    ("before", "prefix", "after", "output"),
    [
        (b'{"created":1,"data":[', b'"', b'],"usage":{"input_tokens":10,"output_tokens":3000}}', 3_000),
        (
            b'{"object":"chat.completion","choices":[',
            b'"data:image/png;base64,',
            b'],"usage":{"prompt_tokens":1,"completion_tokens":2}}',
            2,
        ),
        (b'{"candidates":[', b'"', b'],"usageMetadata":{"promptTokenCount":1,"candidatesTokenCount":2}}', 2),
    ],
)
def test_images_are_let_go(step: int, before: bytes, prefix: bytes, after: bytes, output: int) -> None:
    """A reply with 40 MiB of images is read exactly, however it is cut, and keeps less than the cap of it."""
    images = b",".join([prefix + b"iVBORw0KGgo+/AAA" * 655_360 + b'=="'] * 4)
    whole = before + images + after
    reader, most = JSONReader(), 0
    for at in range(0, len(whole), step):
        reader.feed(whole[at : at + step])
        most = max(most, sum(map(len, reader._parts)))
    reader.close()
    usage = reader.usage()
    assert usage is not None
    assert usage.output_tokens == output
    assert not reader.broken
    assert most < BODY_CAP or step > 10**8
    assert reader.output_bytes == len(whole)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(['"', "\\", "A" * 5_000, "9" * 4_200, "\n", "x", "data:image/png;base64,"]), max_size=8),
    st.sampled_from([700, 2_048, 5_001, 100_000]),
)
def test_letting_go_of_images_keeps_the_structure(texts: list[str], step: int) -> None:
    """Whatever the strings hold, what stands beside them is read the same."""
    whole = json.dumps({"object": "chat.completion", "x": ["".join(texts), *texts], "usage": {"prompt_tokens": 5}})
    reader = b""
    for at in range(0, len(whole), step):
        reader = without_media(reader + whole[at : at + step].encode())
    found = json.loads(reader)
    assert found["usage"] == {"prompt_tokens": 5}
    assert [text[:20] for text in found["x"]] == [text[:20] for text in ["".join(texts), *texts]]


VECTOR = b'{"object":"embedding","index":0,"embedding":[' + b"-0.0069292834," * 1_535 + b"0.1]}"


@pytest.mark.parametrize("count", [1, 40, 600])
@pytest.mark.parametrize(
    ("head", "tail"),
    [
        (
            b'{\n  "object": "list",\n  "data": [\n ',
            b'],"model":"emb-3","usage":{"prompt_tokens":9,"total_tokens":9}}\n',
        ),
        (b'{"id":"x","object":"list","created":1,"model":"emb-3","data":[', b'],"usage":{"prompt_tokens":9}}'),
        (b'{"data":[', b'],"object":"list","model":"emb-3","usage":{"total_tokens":9,"prompt_tokens":9},"id":"x"}'),
    ],
)
def test_embeddings_of_any_size(head: bytes, tail: bytes, count: int) -> None:
    """Embeddings may be tens of megabytes; their usage is read without decoding the numbers."""
    data = head + b",".join([VECTOR] * count) + tail
    for step in (65_536, 10**9):
        reader = JSONReader()
        for i in range(0, len(data), step):
            reader.feed(data[i : i + step])
        reader.close()
        usage = reader.usage()
        assert usage is not None
        assert (usage.model, usage.input_tokens, usage.operation) == ("emb-3", 9, "embeddings")
        assert not reader.broken


@pytest.mark.parametrize(
    "body",
    [
        b'{"object":"chat.completion","data":[{"x":1}],"y":"%s","usage":{"prompt_tokens":1,"completion_tokens":2}}',
        b'{"object":"chat.completion","choices":[{"message":{"content":"%s"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}',
    ],
)
def test_large_bodies_that_are_no_embeddings_are_decoded(body: bytes) -> None:
    """Text in a large reply can't pass for usage: such a reply is decoded whole."""
    text = rb"\"data\":[{\"embedding\": \"list\" \"usage\":{\"prompt_tokens\":999}" * 8_000
    reader = JSONReader()
    reader.feed(body.replace(b"%s", text))
    reader.close()
    usage = reader.usage()
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (1, 2)


def encoded(data: bytes, encoding: str) -> bytes:
    """Compress as a server would."""
    if encoding == "gzip":
        return gzip.compress(data)
    return zlib.compress(data)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("step", [1, 10, 10**6])
def test_compressed_bodies(encoding: str, step: int) -> None:
    """Both gzip and deflate, cut anywhere, of streams and of JSON."""
    for kind, name in (
        ("text/event-stream; charset=utf-8", "openai_chat.sse"),
        ("application/json", "gemini_array.json"),
    ):
        plain = (DATA / name).read_bytes()
        told = outcome(reader_for(kind, encoding), encoded(plain, encoding), step)
        assert told == outcome(reader_for(kind), plain, len(plain))
        assert told[0] is not None


@pytest.mark.parametrize("step", [1, 3, 10**6])
def test_deflate_without_a_header_and_encodings_on_top_of_each_other(step: int) -> None:
    """Raw deflate, which HTTP clients take, too; and what was compressed twice, undone in the right order."""
    kind, plain = "application/json", (DATA / "gemini_array.json").read_bytes()
    told = outcome(reader_for(kind), plain, len(plain))
    press = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    assert outcome(reader_for(kind, "deflate"), press.compress(plain) + press.flush(), step) == told
    assert outcome(reader_for(kind, "deflate, gzip"), gzip.compress(zlib.compress(plain)), step) == told


@pytest.mark.parametrize("encoding", [None, "gzip"])
def test_events_that_are_labelled_as_json(encoding: str | None) -> None:
    """The SDKs read a stream whatever its type says, and so is its usage."""
    plain = (DATA / "openai_chat.sse").read_bytes()
    data = encoded(plain, encoding) if encoding else plain
    told = outcome(reader_for("application/json", encoding), data, 7)
    assert told == outcome(reader_for("text/event-stream"), plain, len(plain))


def test_gzip_of_two_members() -> None:
    """A gzip body may consist of several members."""
    data = (DATA / "anthropic.sse").read_bytes()
    kind = "text/event-stream"
    members = gzip.compress(data[:700]) + gzip.compress(data[700:])
    assert outcome(reader_for(kind, "gzip"), members, 10**6) == outcome(reader_for(kind), data, 10**6)


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_gzip_bombs_stop(kind: str) -> None:
    """A body that unfolds a thousandfold is given up after the cap; little of it is ever in memory."""
    bomb = gzip.compress(b"\0" * 100_000_000)
    reader = reader_for(kind, "gzip")
    assert reader is not None
    reader.feed(bomb)
    assert reader.broken
    reader.close()
    assert reader.usage() is None
    assert reader._out <= BODY_CAP + 200_000  # type: ignore[attr-defined]


def test_broken_compression_is_no_error() -> None:
    """Bytes that aren't what the header says end the reading, not the response."""
    reader = reader_for("application/json", "gzip")
    assert reader is not None
    reader.feed(b"not gzip at all")
    reader.close()
    assert reader.broken
    assert reader.usage() is None


@pytest.mark.parametrize(
    ("content_type", "encoding", "reads"),
    [
        ("text/event-stream", None, True),
        ("Text/Event-Stream; charset=utf-8", "", True),
        ("application/json", "identity", True),
        ("application/vnd.x+json", "GZIP", True),
        ("text/html", None, True),
        ("", None, True),
        ("audio/mpeg", None, False),
        ("image/png", None, False),
        ("application/json", "br", False),
        ("application/json", "zstd", False),
        ("application/json", "gzip, br", False),
        ("application/json", "gzip, Identity, X-Gzip", True),
        ("application/json", "gzip, gzip, gzip, gzip", False),
    ],
)
def test_reader_for(content_type: str, encoding: str | None, reads: bool) -> None:
    """All but sound and pictures, in encodings that can be undone, have a reader."""
    assert (reader_for(content_type, encoding) is not None) is reads


@pytest.mark.parametrize("step", [1, 7, 10**9])
@pytest.mark.parametrize("encoding", [None, "gzip"])
@pytest.mark.parametrize(
    ("body", "output"),
    [
        (b' \n{"object":"chat.completion","usage":{"prompt_tokens":1,"completion_tokens":2}}', 2),
        (b'data: {"object":"chat.completion.chunk","usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n', 2),
        (b'event: x\ndata: {"object":"chat.completion.chunk","usage":{"prompt_tokens":1}}\n\ndata: [DONE]\n\n', 0),
        (b'<html>{"object":"chat.completion","usage":{"prompt_tokens":1}}</html>', None),
        (b'"chat.completion"', None),
        (b"data", None),
        (b"", None),
    ],
)
def test_a_body_without_a_useful_type_is_what_it_begins_like(
    body: bytes, output: int | None, encoding: str | None, step: int
) -> None:
    """JSON or events under text/plain, or no type, are read as the SDKs read them; anything else tells nothing."""
    reader = reader_for("text/plain", encoding)
    assert reader is not None
    data = gzip.compress(body) if encoding else body
    for at in range(0, len(data), step):
        reader.feed(data[at : at + step])
    reader.close()
    usage = reader.usage()
    assert (usage.output_tokens if usage else None) == output
    assert not reader.broken


def test_azures_replies_are_azures_whichever_door_reads_them() -> None:
    """Its replies are OpenAI's to the letter; who served a call is told by its path, and is part of the record's id."""
    path = "/openai/deployments/mine/chat/completions"
    call = call_from_request(path, {"model": "gpt-4o", "messages": []})
    reader = reader_for("application/json", None)
    assert call is not None
    assert reader is not None
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    reply = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "gpt-4o-2024-08-06",
        "choices": [],
        "usage": usage,
    }
    reader.feed(json.dumps(reply).encode())
    found = usage_of_call(reader, call, 1.0, 1.5)
    assert found is not None
    assert (found.provider, found.output_tokens, found.latency_ms, found.ttft_ms) == ("azure", 2, 500, None)


def read(path: str, asked: dict[str, Any], body: bytes, kind: str) -> Usage | None:
    """What the reply to a request says."""
    call, reader = call_from_request(path, asked), reader_for(kind)
    assert call is not None
    assert reader is not None
    reader.feed(body)
    return usage_of_call(reader, call, 0.0, 1.0)


@pytest.mark.parametrize(
    ("asked", "told", "counts"),
    [
        ("batch", None, None),
        ("flex", None, None),
        ("flex", "flex", "flex"),
        ("flex", "default", "default"),
        ("priority", None, "priority"),
        (None, None, None),
    ],
)
def test_a_cheaper_tier_counts_only_if_the_reply_says_so(
    asked: str | None, told: str | None, counts: str | None
) -> None:
    """To ask for half the price is not to get it; a dearer tier counts also where the reply is silent."""
    reply = {
        "object": "chat.completion",
        "model": "gpt-4o-mini",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        **({"service_tier": told} if told else {}),
    }
    request: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [], "service_tier": asked}
    usage = read("/v1/chat/completions", request, json.dumps(reply).encode(), "application/json")
    assert usage is not None
    assert usage.service_tier == counts


def chunk(output: int, *choices: dict[str, Any]) -> bytes:
    """A chunk with the count so far."""
    usage = {"prompt_tokens": 10, "completion_tokens": output}
    return (
        b"data: %s\n\n"
        % json.dumps(
            {"id": "x", "object": "chat.completion.chunk", "model": "m", "choices": choices, "usage": usage}
        ).encode()
    )


WORD = {"index": 0, "delta": {"content": "w "}, "finish_reason": None}
STOP = {"index": 0, "delta": {}, "finish_reason": "stop"}
OTHER = {"index": 1, "delta": {"content": "w "}, "finish_reason": None}


@pytest.mark.parametrize(
    ("chunks", "output"),
    [
        ([chunk(1, WORD)], None),
        ([chunk(n, WORD) for n in range(2_000)], None),
        ([chunk(1, WORD), chunk(2, WORD), b"data: [DONE]\n\n"], 2),
        ([chunk(1, WORD), chunk(2, STOP)], 2),
        ([chunk(1, WORD), chunk(2)], 2),
        ([chunk(1, WORD), chunk(2, OTHER), chunk(3, STOP)], None),
        ([chunk(1, WORD), chunk(2, OTHER), chunk(3, STOP), b"data: [DONE]\n\n"], 3),
    ],
)
def test_a_count_so_far_is_not_the_bill(chunks: list[bytes], output: int | None) -> None:
    """Servers that count in every chunk: the count is final with the end, the stop of the only choice or no choices."""
    asked: dict[str, Any] = {"model": "m", "messages": [], "stream": True}
    usage = read("/v1/chat/completions", asked, b"".join(chunks), "text/event-stream")
    assert (None if usage is None else usage.output_tokens) == output
