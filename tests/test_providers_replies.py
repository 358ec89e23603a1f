"""Replies: each provider's counts, normalised; and nothing believed that isn't a provider's reply."""

from __future__ import annotations

import copy
from dataclasses import asdict
from decimal import Decimal
from typing import Any

import anthropic.types
import openai.types
import openai.types.chat
import openai.types.responses
import pytest
from google.genai import types as genai
from hypothesis import given
from hypothesis import strategies as st
from openai.types.audio import Transcription, TranscriptionVerbose
from openai.types.create_embedding_response import CreateEmbeddingResponse
from openai.types.images_response import ImagesResponse

from respan_guard.errors import InvalidInput
from respan_guard.providers import read_reply, usage_from_reply
from respan_guard.usage import Usage

CHAT: dict[str, Any] = {
    "id": "chatcmpl-CfX0y2bJv4T1nQ9sK7mZrE3uWpLd",
    "object": "chat.completion",
    "created": 1795400000,
    "model": "gpt-4o-audio-preview-2025-06-03",
    "service_tier": "priority",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop", "logprobs": None}
    ],
    "usage": {
        "prompt_tokens": 1500,
        "completion_tokens": 300,
        "total_tokens": 1800,
        "prompt_tokens_details": {
            "cached_tokens": 1024,
            "audio_tokens": 200,
            "image_tokens": 20,
            "cache_write_tokens": 30,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 100,
            "audio_tokens": 50,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    },
}
RESPONSE: dict[str, Any] = {
    "id": "resp_68b1f0a2c4d88190a7e3f5b60c9d1e2f0a1b2c3d4e5f6071",
    "object": "response",
    "created_at": 1795400000,
    "model": "gpt-5.4-2026-03-05",
    "status": "completed",
    "service_tier": "default",
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 328,
        "input_tokens_details": {"cached_tokens": 256, "cache_write_tokens": 0},
        "output_tokens": 87,
        "output_tokens_details": {"reasoning_tokens": 64},
        "total_tokens": 415,
    },
}
COMPACTION: dict[str, Any] = {
    "id": "resp_001b1f0a2c4d88190a7e3f5b60c9d1e2f0a1b2c3d4e5f6071",
    "object": "response.compaction",
    "created_at": 1795400000,
    "output": [],
    "usage": RESPONSE["usage"],
}
DECISION: dict[str, Any] = {
    "answers": [{"type": "refusal", "name": None}],
    "model": "gpt-6-luna",
    "usage": RESPONSE["usage"],
}
EMBEDDING: dict[str, Any] = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}],
    "model": "text-embedding-3-small",
    "usage": {"prompt_tokens": 8, "total_tokens": 8},
}
COMPLETION: dict[str, Any] = {
    "id": "cmpl-1234567890abcdef",
    "object": "text_completion",
    "created": 1795400000,
    "model": "davinci-002",
    "choices": [{"text": "x", "index": 0, "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
}
IMAGES: dict[str, Any] = {
    "created": 1795400000,
    "data": [{"b64_json": "AAAA"}],
    "usage": {
        "input_tokens": 50,
        "output_tokens": 4160,
        "total_tokens": 4210,
        "input_tokens_details": {
            "text_tokens": 10,
            "image_tokens": 40,
            "cached_tokens": 35,
            "cached_tokens_details": {"text_tokens": 5, "image_tokens": 30},
        },
    },
}
TRANSCRIPTION: dict[str, Any] = {
    "text": "Hello",
    "usage": {
        "type": "tokens",
        "input_tokens": 14,
        "input_token_details": {"text_tokens": 4, "audio_tokens": 10},
        "output_tokens": 45,
        "total_tokens": 59,
    },
}
MESSAGE: dict[str, Any] = {
    "id": "msg_01XbZyWvUtSrQpOnMlKjIhGf",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5-20250929",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 12,
        "cache_creation_input_tokens": 900,
        "cache_read_input_tokens": 2048,
        "cache_creation": {"ephemeral_5m_input_tokens": 400, "ephemeral_1h_input_tokens": 500},
        "output_tokens": 31,
        "service_tier": "standard",
    },
}
GEMINI: dict[str, Any] = {
    "candidates": [{"content": {"role": "model", "parts": [{"text": "Hi"}]}, "finishReason": "STOP", "index": 0}],
    "usageMetadata": {
        "promptTokenCount": 1000,
        "cachedContentTokenCount": 600,
        "candidatesTokenCount": 50,
        "thoughtsTokenCount": 70,
        "toolUsePromptTokenCount": 30,
        "totalTokenCount": 1150,
        "promptTokensDetails": [
            {"modality": "TEXT", "tokenCount": 380},
            {"modality": "VIDEO", "tokenCount": 100},
            {"modality": "AUDIO", "tokenCount": 320},
            {"modality": "IMAGE", "tokenCount": 200},
        ],
        "cacheTokensDetails": [
            {"modality": "AUDIO", "tokenCount": 300},
            {"modality": "TEXT", "tokenCount": 180},
            {"modality": "IMAGE", "tokenCount": 120},
        ],
        "candidatesTokensDetails": [
            {"modality": "TEXT", "tokenCount": 25},
            {"modality": "AUDIO", "tokenCount": 10},
            {"modality": "VIDEO", "tokenCount": 15},
        ],
    },
    "modelVersion": "gemini-2.5-flash",
    "responseId": "mNcgabKXOYmz7dcP0ZTJ8Ac",
}

REPLIES: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    (
        "chat",
        CHAT,
        openai.types.chat.ChatCompletion,
        {
            "model": "gpt-4o-audio-preview-2025-06-03",
            "input_tokens": 1500,
            "output_tokens": 300,
            "cache_read_tokens": 1024,
            "cache_write_tokens": 30,
            "input_audio_tokens": 200,
            "input_image_tokens": 20,
            "reasoning_tokens": 100,
            "output_audio_tokens": 50,
            "provider": "openai",
            "operation": "chat",
            "service_tier": "priority",
            "response_id": CHAT["id"],
        },
    ),
    (
        "response",
        RESPONSE,
        openai.types.responses.Response,
        {
            "model": "gpt-5.4-2026-03-05",
            "input_tokens": 328,
            "output_tokens": 87,
            "cache_read_tokens": 256,
            "reasoning_tokens": 64,
            "provider": "openai",
            "operation": "chat",
            "service_tier": "default",
            "response_id": RESPONSE["id"],
        },
    ),
    (
        "compaction",
        COMPACTION,
        openai.types.responses.CompactedResponse,
        {
            "model": "",
            "input_tokens": 328,
            "output_tokens": 87,
            "cache_read_tokens": 256,
            "reasoning_tokens": 64,
            "provider": "openai",
            "operation": "chat",
            "response_id": COMPACTION["id"],
        },
    ),
    (
        "decision",
        DECISION,
        openai.types.Decision,
        {
            "model": "gpt-6-luna",
            "input_tokens": 328,
            "output_tokens": 87,
            "cache_read_tokens": 256,
            "reasoning_tokens": 64,
            "provider": "openai",
            "operation": "decision",
        },
    ),
    (
        "embedding",
        EMBEDDING,
        CreateEmbeddingResponse,
        {"model": "text-embedding-3-small", "input_tokens": 8, "provider": "openai", "operation": "embeddings"},
    ),
    (
        "completion",
        COMPLETION,
        openai.types.Completion,
        {
            "model": "davinci-002",
            "input_tokens": 5,
            "output_tokens": 7,
            "provider": "openai",
            "operation": "text_completion",
            "response_id": COMPLETION["id"],
        },
    ),
    (
        "images",
        IMAGES,
        ImagesResponse,
        {
            "model": "",
            "input_tokens": 50,
            "input_image_tokens": 40,
            "cache_read_tokens": 35,
            "cache_image_read_tokens": 30,
            "output_tokens": 4160,
            "output_image_tokens": 4160,
            "provider": "openai",
            "operation": "image_generation",
        },
    ),
    (
        "transcription",
        TRANSCRIPTION,
        Transcription,
        {
            "model": "",
            "input_tokens": 14,
            "input_audio_tokens": 10,
            "output_tokens": 45,
            "provider": "openai",
            "operation": "transcription",
        },
    ),
    (
        "message",
        MESSAGE,
        anthropic.types.Message,
        {
            "model": "claude-sonnet-4-5-20250929",
            "input_tokens": 2960,
            "output_tokens": 31,
            "cache_read_tokens": 2048,
            "cache_write_tokens": 900,
            "cache_write_1h_tokens": 500,
            "provider": "anthropic",
            "operation": "chat",
            "service_tier": "standard",
            "response_id": MESSAGE["id"],
        },
    ),
    (
        "gemini",
        GEMINI,
        genai.GenerateContentResponse,
        {
            "model": "gemini-2.5-flash",
            "input_tokens": 1030,
            "output_tokens": 120,
            "cache_read_tokens": 600,
            "reasoning_tokens": 70,
            "input_audio_tokens": 320,
            "cache_audio_read_tokens": 300,
            "input_image_tokens": 200,
            "cache_image_read_tokens": 120,
            "input_video_tokens": 100,
            "output_audio_tokens": 10,
            "output_video_tokens": 15,
            "provider": "google",
            "operation": "generate_content",
            "response_id": GEMINI["responseId"],
        },
    ),
]
NAMES = [name for name, *_ in REPLIES]
by_format = pytest.mark.parametrize(("body", "sdk", "expected"), [reply[1:] for reply in REPLIES], ids=NAMES)


def told(usage: Usage) -> dict[str, Any]:
    """The fields that say something, and the model."""
    found = {k: v for k, v in asdict(usage).items() if v not in (0, None, False, "ok", "") or k == "model"}
    assert found.pop("response_model", "") == found["model"]
    return found


@by_format
def test_replies_as_json(body: dict[str, Any], sdk: Any, expected: dict[str, Any]) -> None:
    """Each API's reply yields its counts, inclusive, with model, id and tier."""
    usage = read_reply(body)
    assert usage is not None
    assert told(usage) == expected


@by_format
def test_replies_as_objects_of_the_sdk(body: dict[str, Any], sdk: Any, expected: dict[str, Any]) -> None:
    """The official SDKs' own objects yield the same as the JSON that they were made from."""
    reply = sdk.model_validate(body)
    assert told(usage_from_reply(reply)) == expected
    assert told(Usage.from_response(reply)) == expected
    assert usage_from_reply(reply, provider="somebody").provider == "somebody"


def test_last_event_of_a_stream_is_a_reply() -> None:
    """The SDK's last chunk or event of a stream carries the usage too."""
    event = openai.types.responses.ResponseCompletedEvent.model_validate(
        {"type": "response.completed", "sequence_number": 9, "response": RESPONSE}
    )
    assert usage_from_reply(event).output_tokens == 87
    chunk = openai.types.chat.ChatCompletionChunk.model_validate(
        {**CHAT, "object": "chat.completion.chunk", "choices": []}
    )
    assert usage_from_reply(chunk).output_tokens == 300


@pytest.mark.parametrize(
    "reply",
    [
        None,
        7,
        "Hello",
        "[",
        b"\xff",
        [],
        {},
        object(),
        {"usage": {"prompt_tokens": 1, "completion_tokens": 1}},
        {**CHAT, "usage": None},
        openai.types.chat.ChatCompletion.model_validate({**CHAT, "usage": None}),
    ],
    ids=lambda reply: type(reply).__name__ if type(reply) is object else repr(reply),
)
def test_what_holds_no_usage_is_refused_with_a_hint(reply: object) -> None:
    """Anything that isn't a reply with usage raises InvalidInput, which says what would be right."""
    with pytest.raises(InvalidInput, match=r"found no usage in this \w+; a whole reply of OpenAI's"):
        usage_from_reply(reply)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (
            Transcription.model_validate({"text": "hi", "usage": {"type": "duration", "seconds": 12}}),
            r"audio is charged by its duration \(12.0 seconds\)",
        ),
        (
            TranscriptionVerbose.model_validate(
                {"text": "hi", "duration": 12, "language": "en", "usage": {"type": "duration", "seconds": 12}}
            ),
            r"audio is charged by its duration \(12.0 seconds\)",
        ),
        (Transcription.model_validate({"text": "hi"}), "this transcription of audio tells no usage"),
        (
            ImagesResponse.model_validate({"created": 1, "data": [{"url": "x"}]}),
            "these images are charged by the piece",
        ),
    ],
)
def test_what_is_not_charged_by_tokens_says_so(reply: Any, says: str) -> None:
    """Audio by its length and images by the piece: no count of tokens is made up; the error says what to record."""
    with pytest.raises(InvalidInput, match=says + r".*; record it with Usage\(model=..., cost=...\)"):
        Usage.from_response(reply)
    assert read_reply(reply.model_dump()) is None


def test_replies_as_text() -> None:
    """A reply's JSON text is read as well."""
    assert usage_from_reply('{"object": "text_completion", "usage": {"prompt_tokens": 3}}').input_tokens == 3


@pytest.mark.parametrize(
    "body",
    [
        {"usage": {"prompt_tokens": 1, "completion_tokens": 1}},
        {"usage": {"input_tokens": 1, "output_tokens": 1}, "model": "gpt-4o"},
        {"echo": CHAT},
        {"usageMetadata": {"promptTokenCount": 5}},
        {"object": "list", "data": [{"object": "model"}], "usage": {"prompt_tokens": 1}},
        {"object": "list", "data": [], "usage": {"prompt_tokens": 1}},
        {"object": "chat.completion"},
        {"object": "chat.completion", "usage": []},
        {"object": "chat.completion", "usage": {"input_tokens": 1}},
        {"object": ["chat.completion"], "usage": {"prompt_tokens": 1}},
        {"answers": [{"a": 1}], "usage": {"input_tokens": 1, "output_tokens": 1}, "model": "gpt-4o"},
        {"type": "message"},
        {"type": "message", "usage": {"output_tokens": 5}},
        {"type": "error", "error": {}, "usage": {"input_tokens": 1}},
        {"candidates": [], "usageMetadata": {"totalTokenCount": 0}},
    ],
    ids=str,
)
def test_other_json_is_not_believed(body: dict[str, Any]) -> None:
    """Usage counts only in the shapes of known APIs, so that an echo of a user's words is no bill."""
    assert read_reply(body) is None


def paths_of_counts(name: str, body: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Where a reply keeps counts that matter to us."""
    found: list[tuple[str, ...]] = []
    parts: list[tuple[tuple[str, ...], Any]] = [((part,), body.get(part)) for part in ("usage", "usageMetadata")]
    for path, value in parts:  # which grows meanwhile
        if isinstance(value, dict):
            parts += [((*path, name), inner) for name, inner in value.items()]
        elif isinstance(value, int):
            found.append(path)
    idle = (
        "total_tokens",
        "totalTokenCount",
        "text_tokens",
        "accepted_prediction_tokens",
        "rejected_prediction_tokens",
    )
    return [(name, path) for path in found if path[-1] not in idle]


COUNTS = [entry for name, body, _, _ in REPLIES for entry in paths_of_counts(name, body)]


@pytest.mark.parametrize(("name", "path"), COUNTS, ids=str)
@pytest.mark.parametrize("bad", [-1, 1.5, "7", True, 10**13, float("nan"), float("inf"), [], {}], ids=repr)
def test_malformed_counts_are_no_usage(name: str, path: tuple[str, ...], bad: Any) -> None:
    """One count that can't be makes the whole usage unusable, rather than half right; nothing raises."""
    body = copy.deepcopy(next(b for n, b, _, _ in REPLIES if n == name))
    target = body
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = bad
    assert read_reply(body) is None


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_no_reply_raises(name: str, data: st.DataObject) -> None:
    """A reply with anything in any one place is read or not, but never an error."""
    body = copy.deepcopy(next(b for n, b, _, _ in REPLIES if n == name))
    target: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
        if isinstance(target[key], (dict, list)) and target[key] and data.draw(st.booleans()):
            target = target[key]
            continue
        target[key] = data.draw(
            st.none()
            | st.integers()
            | st.floats()
            | st.text()
            | st.lists(st.integers())
            | st.dictionaries(st.text(), st.integers())
        )
        break
    usage = read_reply(body)
    assert usage is None or usage.input_tokens >= 0


@pytest.mark.parametrize(
    ("claim", "cost"),
    [
        (0.00014, Decimal("0.00014")),
        (0, Decimal(0)),
        (3, Decimal(3)),
        (-1, None),
        (float("nan"), None),
        (float("inf"), None),
        (True, None),
        ("0.1", None),
        (1e12, None),
        (None, None),
    ],
)
def test_cost_claimed_by_a_reply(claim: Any, cost: Decimal | None) -> None:
    """OpenRouter's usage.cost is kept if it is an amount; anything else is as if it weren't there."""
    body = {**CHAT, "id": "gen-1795400000-Qh3Zt7VbXy0LkM2NpR5s", "usage": {**CHAT["usage"], "cost": claim}}
    usage = read_reply(body)
    assert usage is not None
    assert usage.cost == cost
    assert usage.provider == ("openai" if cost is None else "openrouter")


def test_anthropic_lifetimes_and_speed() -> None:
    """Cache writes by lifetime are part of all writes, even if the sum is missing; fast mode is a tier."""
    usage = {"input_tokens": 1, "output_tokens": 2, "cache_creation": {"ephemeral_1h_input_tokens": 5}, "speed": "fast"}
    found = read_reply({**MESSAGE, "usage": usage})
    assert found is not None
    assert (found.input_tokens, found.cache_write_tokens, found.cache_write_1h_tokens) == (6, 5, 5)
    assert found.service_tier == "fast"


def test_gemini_blocked_prompt_still_has_usage() -> None:
    """A prompt that was blocked has no candidates, but was counted."""
    body = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 5}, "modelVersion": "g"}
    found = read_reply(body)
    assert found is not None
    assert (found.input_tokens, found.output_tokens) == (5, 0)
