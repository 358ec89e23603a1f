"""OpenAI's wire formats, also spoken by Azure, OpenRouter, vLLM and many others.

Chat completions, responses, legacy completions, embeddings, images, and audio transcription.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from respan_guard.money import MAX_NANO, NANO
from respan_guard.providers.base import Call, Layout, Media, count, limit, mapping, measure, shares, text
from respan_guard.usage import Usage

__all__ = ["call", "event_usage", "reply_usage"]

OPERATIONS = {
    "/chat/completions": "chat",
    "/responses": "chat",
    "/completions": "text_completion",
    "/embeddings": "embeddings",
    "/images/generations": "image_generation",
    "/audio/speech": "text_to_speech",
}

_CONTENT = frozenset({"messages", "input"})
_OPAQUE = frozenset({"tool_calls", "function_call", "arguments"})
# Input that the provider keeps, finds, or is given as a guess at the answer and charges as output.
_STORED = ("previous_response_id", "conversation", "web_search_options", "prediction")
# Never part of the prompt.
_SKIP = frozenset(
    {"metadata", "user", "safety_identifier", "prompt_cache_key", "store", "extra_body", "customer_params"}
)

# Tiles of gpt-4o and its kin: 85 + 8 * 170 = 1,445. Patches of the 4.1, 5 and o families: at most 1,536 * 2.46 or
# 2,500 * 1.62, both below 4,096. gpt-4o-mini counts a tile as 5,667: 2,833 + 8 * 5,667 = 48,169. Models from 5.4 on may
# look at up to 10,000 patches ("original" detail), at 1.62 a patch.
_IMAGE_TOKENS = 4_096
_IMAGE_TOKENS_4O_MINI = 48_500
_IMAGE_TOKENS_ORIGINAL = 16_384
_SMALL_IMAGE_MODELS = ("gpt-4", "gpt-3", "chatgpt-4", "o1", "o3", "o4", "gpt-5-", "gpt-5.1", "gpt-5.2", "gpt-5.3")
# High quality at 1536 x 1024 is 6,240 tokens; newer models draw larger.
_GENERATED_IMAGE_TOKENS = 16_384


def _image_tokens(model: str) -> int:
    name = model.rpartition("/")[2]
    if "4o-mini" in name:
        return _IMAGE_TOKENS_4O_MINI
    known = name == "gpt-5" or name.startswith(_SMALL_IMAGE_MODELS)
    return _IMAGE_TOKENS if known else _IMAGE_TOKENS_ORIGINAL


def _media(part: Mapping[str, Any]) -> Media | None:
    kind = part.get("type")
    if kind == "image_url" and isinstance(part.get("image_url"), (Mapping, str)):
        return Media("image", remote=True)
    if kind == "input_image":
        return Media("image", remote=True)
    if kind == "input_audio" and isinstance(part.get("input_audio"), Mapping):
        audio = part["input_audio"]
        data, form = audio.get("data"), audio.get("format")
        return Media("audio", len(data) if isinstance(data, str) else 0, form.lower() if isinstance(form, str) else "")
    if kind in ("file", "input_file"):
        file = mapping(part.get("file")) if kind == "file" else part
        data = file.get("file_data")
        if isinstance(data, str):
            head = data[:64].partition(";")[0]
            return Media("file", len(data), head.removeprefix("data:").lower(), text=(file.get("filename"),))
        if "file_id" in file or "file_url" in file:
            return Media("file", remote=True)
    return None


def call(path: str, body: Mapping[str, Any], operation: str) -> Call:
    """Read a request.

    Args:
        path: The URL's path; Azure names the model's deployment there.
        body: The request's JSON.
        operation: What is asked for, see `OPERATIONS`.
    """
    model = text(body.get("model")) or ""
    provider = "openai"
    _, found, after = path.partition("/openai/deployments/")
    if found:
        provider = "azure"
        model = model or after.partition("/")[0]
    responses = operation == "chat" and (path.endswith("/responses") or "messages" not in body)
    tools, given = body.get("tools"), body.get("input")
    size = measure(
        body,
        Layout(_media, _image_tokens(model), _CONTENT, _OPAQUE, _SKIP),
        has_tools=isinstance(tools, list) or isinstance(body.get("functions"), list),
    )
    bounded = size.bounded and all(body.get(name) is None for name in _STORED)
    if responses:
        referred = isinstance(given, list) and any(mapping(item).get("type") == "item_reference" for item in given)
        bounded = bounded and not referred and not isinstance(body.get("prompt"), Mapping)
    if isinstance(tools, list):
        # Built-in tools (search, interpreters, MCP) feed what they find back as input.
        bounded = bounded and all(mapping(tool).get("type") in ("function", "custom", None) for tool in tools)
    modalities = body.get("modalities")
    stream = body.get("stream") is True
    return Call(
        provider=provider,
        operation=operation,
        model=model,
        input_tokens_bound=size.tokens,
        max_output_tokens=_cap(body, operation, responses=responses),
        choices=1 if responses else _choices(body, operation),
        stream=stream,
        wants_usage=not stream or responses or mapping(body.get("stream_options")).get("include_usage") is True,
        bounded=bounded,
        has_audio=size.has_audio
        or operation == "text_to_speech"
        or (isinstance(modalities, list) and "audio" in modalities),
        has_images=size.has_images,
        service_tier=text(body.get("service_tier"), 32),
    )


def _cap(body: Mapping[str, Any], operation: str, *, responses: bool) -> int | None:
    """The cap on output. Only names that the API obeys count, and the highest of them, since servers differ."""
    if operation == "embeddings":
        return 0
    if operation == "image_generation":
        return _GENERATED_IMAGE_TOKENS
    names = ("max_output_tokens",) if responses else ("max_completion_tokens", "max_tokens")
    return max((cap for name in names if (cap := limit(body.get(name))) is not None), default=None)


def _choices(body: Mapping[str, Any], operation: str) -> int:
    """Answers asked for; legacy completions answer each prompt of a list."""
    prompt = body.get("prompt")
    several = (
        operation == "text_completion" and isinstance(prompt, list) and not all(isinstance(p, int) for p in prompt)
    )
    wanted = max(limit(body.get("n")) or 1, limit(body.get("best_of")) or 1)
    return wanted * len(prompt) if several and prompt else wanted


def reply_usage(body: Mapping[str, Any]) -> Usage | None:
    """Read the usage off a reply; None if it is no reply of OpenAI's or its usage is malformed."""
    kind = body.get("object")
    if kind in ("chat.completion", "chat.completion.chunk"):
        return _completion(body, "chat")
    if kind == "text_completion":
        return _completion(body, "text_completion")
    if kind == "response":
        return _response(body, "chat")
    if kind == "list":
        data = body.get("data")
        if isinstance(data, list) and data and mapping(data[0]).get("object") == "embedding":
            return _completion(body, "embeddings")
        return None
    usage = body.get("usage")
    if kind is None and isinstance(usage, Mapping):
        if isinstance(body.get("data"), list) and isinstance(body.get("created"), int):
            return _response(body, "image_generation")
        if isinstance(body.get("text"), str) and usage.get("type") == "tokens":
            return _response(body, "transcription")
    return None


def event_usage(event: Mapping[str, Any]) -> Usage | None:
    """Read the usage off an event of a stream: a chunk of a chat, or the end of a response."""
    if event.get("type") in ("response.completed", "response.incomplete", "response.failed"):
        response = mapping(event.get("response"))
        return reply_usage(response) if response.get("object") == "response" else None
    if event.get("type") in ("image_generation.completed", "transcript.text.done"):
        kind = "transcription" if event["type"] == "transcript.text.done" else "image_generation"
        return _response(event, kind)
    return reply_usage(event)


def _completion(body: Mapping[str, Any], operation: str) -> Usage | None:
    """Usage as `prompt_tokens` and `completion_tokens`, which include their details."""
    usage = body.get("usage")
    if not isinstance(usage, Mapping) or "prompt_tokens" not in usage:
        return None
    prompt, completion = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    counts = {
        "input_tokens": count(usage["prompt_tokens"]),
        "output_tokens": shares(usage, "completion_tokens"),
        "cache_read_tokens": shares(prompt, "cached_tokens"),
        "cache_write_tokens": shares(prompt, "cache_write_tokens"),
        "input_audio_tokens": shares(prompt, "audio_tokens"),
        "input_image_tokens": shares(prompt, "image_tokens"),
        "reasoning_tokens": shares(completion, "reasoning_tokens"),
        "output_audio_tokens": shares(completion, "audio_tokens"),
        "output_image_tokens": shares(completion, "image_tokens"),
    }
    return _usage(body, usage, counts, operation)


def _response(body: Mapping[str, Any], operation: str) -> Usage | None:
    """Usage as `input_tokens` and `output_tokens`, which include their details."""
    usage = body.get("usage")
    if not isinstance(usage, Mapping) or "input_tokens" not in usage:
        return None
    given = usage.get("input_tokens_details", usage.get("input_token_details"))
    made = usage.get("output_tokens_details", usage.get("output_token_details"))
    counts = {
        "input_tokens": count(usage["input_tokens"]),
        "output_tokens": shares(usage, "output_tokens"),
        "cache_read_tokens": shares(given, "cached_tokens"),
        "cache_write_tokens": shares(given, "cache_write_tokens"),
        "input_audio_tokens": shares(given, "audio_tokens"),
        "input_image_tokens": shares(given, "image_tokens"),
        "reasoning_tokens": shares(made, "reasoning_tokens"),
        "output_audio_tokens": shares(made, "audio_tokens"),
        "output_image_tokens": shares(made, "image_tokens"),
    }
    if operation == "image_generation" and made is None:
        counts["output_image_tokens"] = counts["output_tokens"]
    return _usage(body, usage, counts, operation)


def _usage(
    body: Mapping[str, Any], usage: Mapping[str, Any], counts: dict[str, int | None], operation: str
) -> Usage | None:
    known: dict[str, Any] = {name: value for name, value in counts.items() if value is not None}
    if len(known) < len(counts):
        return None
    model, response_id = text(body.get("model")), text(body.get("id"))
    cost = _claimed_cost(usage.get("cost"))
    return Usage(
        model=model or "",
        provider="openrouter" if cost is not None and (response_id or "").startswith("gen-") else "openai",
        cost=cost,
        response_id=response_id,
        response_model=model,
        operation=operation,
        service_tier=text(body.get("service_tier"), 32),
        **known,
    )


def _claimed_cost(cost: object) -> Decimal | None:
    """OpenRouter's `usage.cost` in USD, if it is an amount."""
    if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not math.isfinite(cost):
        return None
    return Decimal(str(cost)) if 0 <= cost <= MAX_NANO / NANO else None
