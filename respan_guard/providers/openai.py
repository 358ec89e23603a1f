"""OpenAI's wire formats, also spoken by Azure, OpenRouter, vLLM and many others.

Chat completions, responses, legacy completions, embeddings, images, and audio transcription.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from respan_guard.money import MAX_NANO, NANO
from respan_guard.providers.base import Call, Layout, Media, fallbacks, limit, mapping, measure, text
from respan_guard.usage import MAX_TOKENS, Usage

__all__ = ["call", "deployment", "event_usage", "reply_usage", "untold"]

OPERATIONS = {
    "/chat/completions": "chat",
    "/responses": "chat",
    "/responses/compact": "chat",
    "/decisions": "decision",
    "/completions": "text_completion",
    "/embeddings": "embeddings",
    "/images/generations": "image_generation",
    "/audio/speech": "text_to_speech",
}

_CONTENT = frozenset({"messages", "input"})
_OPAQUE = frozenset({"tool_calls", "function_call", "arguments"})
# Input that the provider keeps.
_STORED = ("previous_response_id", "conversation")
_REQUEST_IDS = ("request_id", "rid")  # vLLM's and SGLang's
_ANSWERS = ("predicate", "choice", "score", "refusal")  # of decisions
# Never part of the prompt.
_SKIP = frozenset(
    {"metadata", "user", "safety_identifier", "prompt_cache_key", "store", "extra_body", "customer_params"}
)

_DEPLOYMENT = re.compile(r"/openai/deployments/([^/]+)/", re.IGNORECASE)

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
    if kind is None or kind == "text":
        return None
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


@functools.cache
def _layout(image_tokens: int) -> Layout:
    return Layout(_media, image_tokens, _CONTENT, _OPAQUE, _SKIP)


# Our names of parts of the input and the output, and theirs.
_GIVEN = (
    ("cache_read_tokens", "cached_tokens"),
    ("cache_write_tokens", "cache_write_tokens"),
    ("input_audio_tokens", "audio_tokens"),
    ("input_image_tokens", "image_tokens"),
)
_CACHED = (("cache_audio_read_tokens", "audio_tokens"), ("cache_image_read_tokens", "image_tokens"))
_MADE = (
    ("reasoning_tokens", "reasoning_tokens"),
    ("output_audio_tokens", "audio_tokens"),
    ("output_image_tokens", "image_tokens"),
)


def call(path: str, body: Mapping[str, Any], operation: str) -> Call:
    """Read a request.

    Args:
        path: The URL's path; Azure's names the model's deployment, which is then the model.
        body: The request's JSON.
        operation: What is asked for, see `OPERATIONS`.
    """
    named = deployment(path)  # Azure serves it, whatever the body says
    others = fallbacks(body) if named is None else ()
    model = named or text(body.get("model")) or (others[0] if others else "")
    responses = operation == "decision" or (
        operation == "chat" and (path.lower().endswith(("/responses", "/compact")) or "messages" not in body)
    )
    tools, given = body.get("tools"), body.get("input")
    size = measure(
        body,
        _layout(max(map(_image_tokens, (model, *others)))),
        has_tools=isinstance(tools, list) or isinstance(body.get("functions"), list),
    )
    if operation == "decision" and isinstance(body.get("questions"), list):
        size.tokens = min(size.tokens * max(1, len(body["questions"])), MAX_TOKENS)  # each is asked about all the input
    hidden = size.hidden
    if not hidden:
        for name in _STORED:
            hidden |= body.get(name) is not None
    if responses:
        referred = isinstance(given, list) and any(mapping(item).get("type") == "item_reference" for item in given)
        hidden = hidden or referred or isinstance(body.get("prompt"), Mapping)
    modalities = body.get("modalities")
    stream = body.get("stream") is True
    return Call(
        provider="openai" if named is None else "azure",
        operation=operation,
        model=model,
        input_tokens_bound=size.tokens,
        max_output_tokens=_cap(body, operation, responses=responses),
        choices=1 if responses else _choices(body, operation),
        stream=stream,
        wants_usage=not stream or responses or mapping(body.get("stream_options")).get("include_usage") is True,
        hidden=hidden,
        tool_runs=_tool_runs(body),
        predicted_tokens=size.tokens if body.get("prediction") is not None else 0,
        has_audio=size.has_audio
        or operation == "text_to_speech"
        or (isinstance(modalities, list) and "audio" in modalities),
        has_images=size.has_images,
        service_tier=text(body.get("service_tier"), 32),
        fallbacks=others,
        request_ids=tuple(own for field in _REQUEST_IDS if (own := text(body.get(field)))),
    )


def deployment(path: str) -> str | None:
    """The deployment that a path of Azure's names; it may be called like its model, or anything."""
    found = _DEPLOYMENT.search(path)
    return found[1][:256] if found else None


def _tool_runs(body: Mapping[str, Any]) -> int | None:
    """How often built-in tools (search, interpreters, MCP), which feed what they find back as input, may be used."""
    tools = body.get("tools")
    built_in = isinstance(tools, list) and any(
        mapping(tool).get("type") not in ("function", "custom", None) for tool in tools
    )
    if not built_in and body.get("web_search_options") is None:
        return 0
    return limit(body.get("max_tool_calls"))


def _cap(body: Mapping[str, Any], operation: str, *, responses: bool) -> int | None:
    """The cap on output. Only names that the API obeys count, and the highest of them, since servers differ."""
    if operation == "embeddings":
        return 0
    if operation == "image_generation":
        return _GENERATED_IMAGE_TOKENS
    if responses:
        return limit(body.get("max_output_tokens"))
    cap, other = limit(body.get("max_completion_tokens")), limit(body.get("max_tokens"))
    return other if cap is None or (other is not None and other > cap) else cap


def _choices(body: Mapping[str, Any], operation: str) -> int:
    """Answers asked for; legacy completions answer each prompt of a list."""
    prompt = body.get("prompt")
    several = (
        operation == "text_completion" and isinstance(prompt, list) and not all(isinstance(p, int) for p in prompt)
    )
    wanted = 1
    if "n" in body or "best_of" in body:
        wanted = max(limit(body.get("n")) or 1, limit(body.get("best_of")) or 1)
    return wanted * len(prompt) if several and prompt else wanted


def reply_usage(body: Mapping[str, Any]) -> Usage | None:
    """Read the usage off a reply; None if it is no reply of OpenAI's or its usage is malformed."""
    kind = body.get("object")
    if kind in ("chat.completion", "chat.completion.chunk"):
        return _completion(body, "chat")
    if kind == "text_completion":
        return _completion(body, "text_completion")
    if kind in ("response", "response.compaction"):
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
        answers = body.get("answers")
        if isinstance(answers, list) and answers and mapping(answers[0]).get("type") in _ANSWERS:
            return _response(body, "decision")
        if isinstance(body.get("text"), str) and usage.get("type") == "tokens":
            return _response(body, "transcription")
    return None


def untold(body: Mapping[str, Any]) -> str | None:
    """Why a reply that is whole tells no tokens; None if nothing is known."""
    usage = body.get("usage")
    if isinstance(body.get("text"), str) and mapping(usage).get("type") == "duration":
        seconds = mapping(usage).get("seconds")
        return f"this audio is charged by its duration ({seconds} seconds), not by tokens, and its reply names no model"
    if usage is None and isinstance(body.get("text"), str) and ("duration" in body or body.keys() == {"text"}):
        return "this transcription of audio tells no usage"
    if usage is None and isinstance(body.get("data"), list) and isinstance(body.get("created"), int):
        return "these images are charged by the piece, and their reply tells no usage"
    return None


def event_usage(event: Mapping[str, Any]) -> Usage | None:
    """Read the usage off an event of a stream: a chunk of a chat, or the end of a response."""
    if event.get("type") in ("response.completed", "response.incomplete", "response.failed"):
        response = mapping(event.get("response"))
        return reply_usage(response) if response.get("object") == "response" else None
    if event.get("type") in ("image_generation.completed", "image_edit.completed", "transcript.text.done"):
        kind = "transcription" if event["type"] == "transcript.text.done" else "image_generation"
        return _response(event, kind)
    return reply_usage(event)


def _completion(body: Mapping[str, Any], operation: str) -> Usage | None:
    """Usage as `prompt_tokens` and `completion_tokens`, which include their details."""
    usage = body.get("usage")
    if not isinstance(usage, Mapping) or "prompt_tokens" not in usage:
        return None
    given, made = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    return _usage(body, usage, operation, usage["prompt_tokens"], usage.get("completion_tokens"), given, made)


def _response(body: Mapping[str, Any], operation: str) -> Usage | None:
    """Usage as `input_tokens` and `output_tokens`, which include their details."""
    usage = body.get("usage")
    if not isinstance(usage, Mapping) or "input_tokens" not in usage:
        return None
    given = usage.get("input_tokens_details", usage.get("input_token_details"))
    made = usage.get("output_tokens_details", usage.get("output_token_details"))
    output = usage.get("output_tokens")
    if operation == "image_generation" and made is None:
        made = {"image_tokens": output}
    return _usage(body, usage, operation, usage["input_tokens"], output, given, made)


def _usage(
    body: Mapping[str, Any],
    usage: Mapping[str, Any],
    operation: str,
    input_tokens: object,
    output_tokens: object,
    given: object,
    made: object,
) -> Usage | None:
    counts: dict[str, Any] = {"input_tokens": input_tokens}
    if output_tokens is not None:
        counts["output_tokens"] = output_tokens
    cached = given.get("cached_tokens_details") if isinstance(given, Mapping) else None
    for parts, names in ((given, _GIVEN), (cached, _CACHED), (made, _MADE)):
        if parts is None:
            continue
        if not isinstance(parts, Mapping):
            return None
        for name, theirs in names:
            found = parts.get(theirs)
            if found is not None:
                counts[name] = found
    for found in counts.values():
        if found.__class__ is not int or not 0 <= found <= MAX_TOKENS:
            return None
    model, response_id = text(body.get("model")), text(body.get("id"))
    cost = _claimed_cost(usage.get("cost")) if "cost" in usage else None
    return Usage(
        model=model or "",
        provider="openrouter" if cost is not None and (response_id or "").startswith("gen-") else "openai",
        cost=cost,
        response_id=response_id,
        response_model=model,
        operation=operation,
        service_tier=text(body.get("service_tier"), 32),
        **counts,
    )


def _claimed_cost(cost: object) -> Decimal | None:
    """OpenRouter's `usage.cost` in USD, if it is an amount."""
    if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not math.isfinite(cost):
        return None
    return Decimal(str(cost)) if 0 <= cost <= MAX_NANO / NANO else None
