"""Usage from event streams as they pass by: of each provider, cut anywhere, long, hostile."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from respan_guard.providers import Reader, StreamReader, stream

DATA = Path(__file__).parent / "data"
STREAMS = {path.name: path.read_bytes() for path in sorted(DATA.glob("*.sse"))}

EXPECTED: dict[str, dict[str, Any]] = {
    "openai_chat.sse": {
        "model": "gpt-4o-2024-08-06",
        "input_tokens": 1117,
        "cache_read_tokens": 1024,
        "output_tokens": 46,
        "reasoning_tokens": 12,
        "provider": "openai",
        "response_id": "chatcmpl-CfX0y2bJv4T1nQ9sK7mZrE3uWpLd",
        "response_model": "gpt-4o-2024-08-06",
        "operation": "chat",
        "service_tier": "default",
    },
    "openai_chat_no_usage.sse": {},
    "openrouter_chat.sse": {
        "model": "anthropic/claude-sonnet-4.5",
        "input_tokens": 194,
        "output_tokens": 2,
        "provider": "openrouter",
        "cost": Decimal("0.000612"),
        "response_id": "gen-1795400000-Qh3Zt7VbXy0LkM2NpR5s",
        "response_model": "anthropic/claude-sonnet-4.5",
        "operation": "chat",
        "service_tier": "default",
    },
    "openai_responses.sse": {
        "model": "gpt-5.4-2026-03-05",
        "input_tokens": 328,
        "cache_read_tokens": 256,
        "output_tokens": 87,
        "reasoning_tokens": 64,
        "provider": "openai",
        "response_id": "resp_68b1f0a2c4d88190a7e3f5b60c9d1e2f0a1b2c3d4e5f6071",
        "response_model": "gpt-5.4-2026-03-05",
        "operation": "chat",
        "service_tier": "default",
    },
    "anthropic.sse": {
        "model": "claude-sonnet-4-5-20250929",
        "input_tokens": 12 + 900 + 2048,
        "cache_read_tokens": 2048,
        "cache_write_tokens": 900,
        "cache_write_1h_tokens": 500,
        "output_tokens": 31,
        "provider": "anthropic",
        "response_id": "msg_01XbZyWvUtSrQpOnMlKjIhGf",
        "response_model": "claude-sonnet-4-5-20250929",
        "operation": "chat",
        "service_tier": "standard",
    },
    "gemini.sse": {
        "model": "gemini-2.5-flash",
        "input_tokens": 264,
        "input_image_tokens": 258,
        "cache_read_tokens": 128,
        "output_tokens": 51,
        "reasoning_tokens": 40,
        "provider": "google",
        "response_id": "mNcgabKXOYmz7dcP0ZTJ8Ac",
        "response_model": "gemini-2.5-flash",
        "operation": "generate_content",
    },
    "odd_framing.sse": {
        "model": "m-1",
        "input_tokens": 5,
        "output_tokens": 6,
        "provider": "openai",
        "response_id": "chatcmpl-oddoddoddoddoddodd",
        "response_model": "m-1",
        "operation": "chat",
    },
}
SMALL = [
    b'data: {"object":"chat.completion.chunk","model":"m","usage":{"prompt_tokens":1}}',
    b'data: {"object":"chat.completion.chunk","id":"i","usage":{"prompt_tokens":2}}',
    b'data: {"type":"message_start","message":{"type":"message","usage":{"input_tokens":7}}}',
    b'data: {"type":"message_delta","usage":{"output_tokens":8}}',
    b'data: {"type":"message_stop"}',
    b'data: {"choices":[{"delta":{"content":"abc"}}]}',
    b"data: [DONE]",
    b"data: " + b"z" * 300,
]
EXPECTED["azure_chat.sse"] = EXPECTED["openai_chat.sse"]
EXPECTED["openai_responses_incomplete.sse"] = EXPECTED["openai_responses.sse"]


def outcome(reader: Reader) -> tuple[Any, ...]:
    """Everything that a reader tells."""
    usage = reader.usage()
    told = asdict(usage) if usage else None
    return told, reader.model, reader.response_id, reader.finished, reader.output_bytes, reader.broken


def read(pieces: list[bytes], *, eager: bool = True) -> tuple[Any, ...]:
    """Feed a stream in pieces; eager looks at the reader after each, so that no batching hides a cut."""
    reader = StreamReader()
    for piece in pieces:
        reader.feed(piece)
        if eager:
            assert isinstance(reader.finished, bool)
    reader.close()
    return outcome(reader)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut bytes at the given places."""
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", STREAMS)
def test_reads_each_format(name: str) -> None:
    """Each provider's stream yields its final usage, whole, normalised to inclusive counts."""
    usage, _, _, finished, output, broken = read([STREAMS[name]])
    found = {k: v for k, v in (usage or {}).items() if v not in (0, None, False, "ok", "")}
    assert found == EXPECTED[name]
    assert finished
    assert not broken
    assert output > 0 or name == "odd_framing.sse"


@pytest.mark.parametrize("name", STREAMS)
def test_every_single_cut_gives_the_same(name: str) -> None:
    """One byte at a time, and cut in two at every line end, within characters, and all along: always as the whole."""
    data = STREAMS[name]
    whole = read([data])
    assert read([data[i : i + 1] for i in range(len(data))], eager=False) == whole
    touchy = {i + shift for i, byte in enumerate(data) if byte in b"\r\n" or byte > 127 for shift in (0, 1)}
    for place in {*touchy, *range(0, len(data), 37)}:
        assert read([data[:place], data[place:]]) == whole


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(STREAMS)),
    st.lists(st.integers(0, 10**6), max_size=40),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.booleans(),
)
def test_any_cutting_and_any_line_end_gives_the_same(name: str, places: list[int], end: bytes, eager: bool) -> None:
    """Random cuts of each stream, rewritten to each kind of line end, tell the same as the whole."""
    data = re.sub(rb"\r\n|\n|\r", end, STREAMS[name])
    told = read(cut(data, places), eager=eager)
    assert told == read([STREAMS[name]])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *(b"\n", b"\r", b"\r\n", b"data: ", b"data:", b": x", b"[DONE]", b'{"usage":{', b'"text":"a', b'"'),
                b"\xef\xbb\xbf",
                b'{"object":"chat.completion.chunk","model":"m","usage":{"prompt_tokens":1}}',
                b"\xff",
                b"event: message_stop",
            ]
        ),
        max_size=60,
    ),
    st.lists(st.integers(0, 10**6), max_size=20),
)
def test_rubbish_gives_the_same_however_cut(tokens: list[bytes], places: list[int]) -> None:
    """Malformed streams never raise, and what is told doesn't depend on the cuts either."""
    data = b"".join(tokens)
    assert read(cut(data, places)) == read([data], eager=False)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            [
                *(event + end for event in SMALL for end in (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n")),
                b"\r",
                b"\n",
                b"\r\n",
                b": " + b"p" * 50,
                b"data: ",
            ]
        ),
        max_size=40,
    ),
    st.lists(st.integers(0, 10**6), max_size=30),
    st.booleans(),
)
@example([SMALL[0] + b"\n\n", SMALL[-1] + b"\n\n", b"data: ", SMALL[0] + b"\n\n", SMALL[4] + b"\n\n"], [202], False)
def test_letting_go_of_the_middle_does_not_depend_on_cuts(
    monkeypatch: pytest.MonkeyPatch, parts: list[bytes], places: list[int], eager: bool
) -> None:
    """With tiny ends and a tiny cap, so that most of each stream is dropped, cuts still make no difference."""
    for name, size in (("BATCH", 1), ("HEAD", 90), ("WINDOW", 120), ("EVENT_CAP", 200)):
        monkeypatch.setattr(stream, name, size)
    data = b"".join(parts)
    assert read(cut(data, places), eager=eager) == read([data], eager=False)


@given(st.binary(max_size=400))
def test_random_bytes_tell_nothing(data: bytes) -> None:
    """Bytes that are no stream are no usage and no error."""
    assert read([data])[0] is None


def test_long_streams_are_read_across_batches() -> None:
    """A stream of many batches, in chunks of uneven sizes, ends with its usage."""
    head, _, _ = STREAMS["openai_chat.sse"].partition(b"\n\n")
    events = STREAMS["openai_chat.sse"].split(b"\n\n")
    data = b"\n\n".join([head, *[events[2]] * 3_000, *events[1:]])
    assert len(data) > 20 * stream.BATCH
    rng = random.Random(1)
    reader, at = StreamReader(), 0
    while at < len(data):
        size = rng.choice((1, 100, 300, 5_000, 100_000))
        reader.feed(data[at : at + size])
        at += size
    reader.close()
    usage = reader.usage()
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (1117, 46)
    assert reader.output_bytes > 3_000


def test_memory_is_bounded_between_events() -> None:
    """However long the stream, no more than its two ends and a batch are kept."""
    reader = StreamReader()
    event = STREAMS["openai_chat.sse"].split(b"\n\n")[2] + b"\n\n"
    most = 0
    for _ in range(5_000):
        reader.feed(event)
        most = max(most, reader._size + len(reader._tail) + len(reader._head))
    assert most <= stream.BATCH + stream.WINDOW + stream.HEAD + 2 * len(event)


def test_events_are_not_decoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand chunks of a chat only the one with usage and the end are looked at."""
    seen: list[bytes] = []
    look = stream._json

    def spy(event: bytes) -> Any:
        seen.append(event)
        return look(event)

    monkeypatch.setattr(stream, "_json", spy)
    events = STREAMS["openai_chat.sse"].split(b"\n\n")
    assert read([b"\n\n".join([events[0], *[events[2]] * 1_000, *events[-3:]])], eager=False)[0]
    assert len(seen) == 2


def test_usage_in_the_middle_is_not_believed_later() -> None:
    """Usage that much more text follows is no final usage, whether or not somebody looked in between."""
    event = STREAMS["openai_chat.sse"].split(b"\n\n")[2] + b"\n\n"
    usage = b'data: {"object":"chat.completion.chunk","usage":{"prompt_tokens":5,"completion_tokens":1}}\n\n'
    for eager in (True, False):
        assert read([event * 9, usage, *[event] * 50], eager=eager)[0] is not None
        assert read([event * 9, usage, *[event] * 500], eager=eager)[0] is None


def test_output_is_extrapolated_from_the_head() -> None:
    """Text beyond the first 32 KiB is estimated by the head's share of text, within a tenth here."""
    rng = random.Random(3)
    words = ["a", " the", " calculation", " of", "\\n", " 世界", " interest"]
    chunks = [
        b'data: {"id":"chatcmpl-1234567890abcdefgh","object":"chat.completion.chunk","model":"m",'
        b'"choices":[{"index":0,"delta":{"content":"' + word.encode() + b'"}}],"usage":null}\n\n'
        for word in (rng.choice(words) for _ in range(3_000))
    ]
    real = sum(len(re.findall(rb'"content":"([^"]*)"', chunk)[0]) for chunk in chunks)
    assert read(chunks, eager=False)[4] == pytest.approx(real, rel=0.1)
    assert read(chunks[:100], eager=False)[4] == sum(
        len(re.findall(rb'"content":"([^"]*)"', chunk)[0]) for chunk in chunks[:100]
    )


def test_interrupted_streams_tell_what_they_can() -> None:
    """Cut off in the middle: no usage, not finished, but model, id and the size of the text so far."""
    data = STREAMS["openai_chat.sse"]
    usage, model, response_id, finished, output, _ = read([data[: len(data) // 2]])
    assert (usage, finished) == (None, False)
    assert model == "gpt-4o-2024-08-06"
    assert response_id == "chatcmpl-CfX0y2bJv4T1nQ9sK7mZrE3uWpLd"
    assert output >= len("Grüß Gott".encode())


def test_interrupted_anthropic_streams_keep_the_input() -> None:
    """Anthropic tells the input at the start: it is known even if the end never comes."""
    events = STREAMS["anthropic.sse"].split(b"\n\n")
    usage, _, _, finished, _, _ = read([b"\n\n".join(events[:5]) + b"\n\n"])
    assert usage is not None
    assert usage["input_tokens"] == 2960
    assert usage["output_tokens"] == 4
    assert not finished


def test_an_anthropic_stream_is_finished_by_its_stop_reason() -> None:
    """Some readers (LiteLLM) close the stream at the last `message_delta`: its counts are final all the same."""
    data = STREAMS["anthropic.sse"]
    at = data.index(b"event: message_stop")
    usage, _, _, finished, _, _ = read([data[:at]])
    assert finished
    assert usage == read([data])[0]


def test_text_of_responses_counts_once() -> None:
    """OpenAI's responses repeat their text in closing events; only the deltas count as output."""
    assert read([STREAMS["openai_responses.sse"]])[4] == len("Grüße, 世界 🎉".encode())


@pytest.mark.parametrize("size", [100_000, 3_000_000])
def test_last_event_may_be_large(size: int) -> None:
    """The event that ends a response carries the whole reply; up to 8 MiB of it are read."""
    data = STREAMS["openai_responses.sse"].replace("Grüße, 世界 🎉".encode(), b"x" * size)
    for step in (7_000, 10**9):
        usage, _, _, finished, _, broken = read([data[i : i + step] for i in range(0, len(data), step)], eager=False)
        assert usage is not None
        assert usage["output_tokens"] == 87
        assert finished
        assert not broken


@pytest.mark.parametrize("step", [4_096, 65_536, 10**9])
def test_an_event_beyond_the_cap_is_left_out(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is too large marks the reader as broken, is never held, and what follows is read."""
    monkeypatch.setattr(stream, "EVENT_CAP", 100_000)
    huge = b'data: {"object":"chat.completion.chunk","usage":{"prompt_tokens":9},"x":"' + b"y " * 250_000 + b'"}\n\n'
    for after, told in ((b"", None), (STREAMS["openai_chat.sse"], 1117)):
        whole = huge + after
        reader, most = StreamReader(), 0
        for i in range(0, len(whole), step):
            reader.feed(whole[i : i + step])
            most = max(most, len(reader._tail))
        reader.close()
        usage = reader.usage()
        assert reader.broken
        assert (usage.input_tokens if usage else None) == told
        assert most < 100_000 + 4 * stream.BATCH or step > 10**6


@pytest.mark.parametrize("step", [4_096, 65_536, 10**9])
def test_images_in_events_are_let_go(step: int) -> None:
    """A last event with 30 MiB of images is read like any other, and the images are not kept."""
    image = b'{"type":"image_generation_call","result":"' + b"iVBORw0+" * 1_310_720 + b'"}'
    whole = (
        b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"resp_1","object":"response",'
        b'"model":"gpt-5.4","output":[' + b",".join([image] * 3) + b"],"
        b'"usage":{"input_tokens":7,"output_tokens":5}}}\n\n'
    )
    reader, most = StreamReader(), 0
    for i in range(0, len(whole), step):
        reader.feed(whole[i : i + step])
        most = max(most, len(reader._tail))
    reader.close()
    usage = reader.usage()
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.response_id) == (7, 5, "resp_1")
    assert not reader.broken
    assert reader.finished
    assert most <= stream.EVENT_CAP + 4 * stream.BATCH


def test_endless_line_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that never ends its first event costs bounded memory."""
    monkeypatch.setattr(stream, "EVENT_CAP", 200_000)
    reader = StreamReader()
    for _ in range(2_000):
        reader.feed(b"data: " + b"z" * 1_000)
        assert len(reader._tail) < 300_000
    assert reader.broken
    reader.close()
    assert reader.broken
    assert reader.usage() is None


@pytest.mark.parametrize(
    "event",
    [
        b'{"object":"chat.completion.chunk","usage":{"prompt_tokens":-1}}',
        b'{"object":"chat.completion.chunk","usage":{"prompt_tokens":1.5}}',
        b'{"object":"chat.completion.chunk","usage":{"prompt_tokens":"1"}}',
        b'{"object":"chat.completion.chunk","usage":{"prompt_tokens":true}}',
        b'{"object":"chat.completion.chunk","usage":{"prompt_tokens":NaN}}',
        b'{"object":"chat.completion.chunk","usage":{"prompt_tokens":1e999}}',
        b'{"object":"chat.completion.chunk","usage":{"prompt_tokens":' + b"9" * 5_000 + b"}}",
        b'{"object":"chat.completion.chunk","usage":{"prompt_tokens":1,"completion_tokens_details":7}}',
        b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}',
        b'{"type":"response.completed","response":{"usage":{"input_tokens":1,"output_tokens":1}}}',
        b'{"type":"message_delta","usage":{"output_tokens":1}}',
        b'{"type":"message_start","message":{"usage":{"input_tokens":1}}}',
        b'{"usageMetadata":{"promptTokenCount":1}}',
        b'{"candidates":[],"usageMetadata":{"promptTokenCount":1,"thoughtsTokenCount":-4}}',
        b'{"usage":{' + b'"a":{' * 100_000,
        b'["usage":{',
    ],
)
def test_malformed_and_foreign_usage_is_no_usage(event: bytes) -> None:
    """Counts that can't be, and usage without the marks of a provider's format, are not believed."""
    assert read([b"data: " + event + b"\n\n"])[0] is None


def test_a_malformed_chunk_does_not_undo_a_good_one() -> None:
    """The last well-formed usage stands."""
    good = b'data: {"object":"chat.completion.chunk","usage":{"prompt_tokens":5,"completion_tokens":1}}\n\n'
    bad = b'data: {"object":"chat.completion.chunk","usage":{"prompt_tokens":-5,"completion_tokens":1}}\n\n'
    usage = read([good, bad])[0]
    assert usage["input_tokens"] == 5
