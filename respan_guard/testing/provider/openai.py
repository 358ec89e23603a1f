"""OpenAI's wire formats: chat and legacy completions, responses, embeddings, images."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping
from typing import Any

from respan_guard.testing.provider.answer import FilledAnswer
from respan_guard.testing.provider.request import Event, ProviderRequest, Rejected, count_tokens, unknown_names

__all__ = ["ENDPOINTS", "ID_PREFIXES", "error", "events", "models", "read", "reply"]

ENDPOINTS = {
    "/chat/completions": "chat.completions",
    "/completions": "completions",
    "/responses": "responses",
    "/embeddings": "embeddings",
    "/images/generations": "images",
}
ID_PREFIXES = {"chat.completions": "chatcmpl-", "completions": "cmpl-", "responses": "resp_"}

# Top-level names as the official SDK types them; OpenAI refuses others.
_SHARED = frozenset({"model", "user", "stream", "stream_options", "temperature", "top_p"})
_SAFETY = frozenset({"metadata", "moderation", "safety_identifier", "service_tier", "store"})
_CACHE = frozenset({"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"})
_TOOLS = frozenset({"parallel_tool_calls", "tool_choice", "tools", "top_logprobs"})
_SAMPLING = frozenset({"frequency_penalty", "logit_bias", "logprobs", "n", "presence_penalty", "seed", "stop"})
_KNOWN = {
    "chat.completions": _SHARED
    | _SAFETY
    | _CACHE
    | _TOOLS
    | _SAMPLING
    | {"audio", "function_call", "functions", "max_completion_tokens", "max_tokens", "messages", "modalities"}
    | {"prediction", "reasoning_effort", "response_format", "verbosity", "web_search_options"},
    "responses": _SHARED
    | _SAFETY
    | _CACHE
    | _TOOLS
    | {"background", "context_management", "conversation", "include", "input", "instructions", "max_output_tokens"}
    | {"max_tool_calls", "previous_response_id", "prompt", "reasoning", "text", "truncation"},
    "completions": _SHARED | _SAMPLING | {"best_of", "echo", "max_tokens", "prompt", "suffix"},
    "embeddings": frozenset({"dimensions", "encoding_format", "input", "model", "user"}),
    "images": frozenset({"background", "model", "moderation", "n", "output_compression", "output_format"})
    | {
        "partial_images",
        "prompt",
        "quality",
        "response_format",
        "safety_identifier",
        "size",
        "stream",
        "style",
        "user",
    },
}

_DATED = {
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-4.1": "gpt-4.1-2025-04-14",
    "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
    "gpt-5": "gpt-5-2025-08-07",
    "gpt-5-mini": "gpt-5-mini-2025-08-07",
}
_PROMPTS = {"chat.completions": ("messages",), "responses": ("input", "instructions"), "embeddings": ("input",)}
_CAPS = {"responses": ("max_output_tokens",), "chat.completions": ("max_completion_tokens", "max_tokens")}
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def read(
    endpoint: str, body: Mapping[str, Any], headers: Mapping[str, str], size: int, *, strict: bool
) -> ProviderRequest:
    """Understand a request.

    Raises:
        Rejected: OpenAI would answer 400.
    """
    unknown = unknown_names(body, _KNOWN[endpoint]) if strict else None
    if unknown is not None:
        raise Rejected(400, f"Unknown parameter: '{unknown}'.", param=unknown, code="unknown_parameter")
    if not isinstance(body.get("model"), str):
        raise Rejected(400, "you must provide a model parameter")
    names = _PROMPTS.get(endpoint, ("prompt",))
    if body.get(names[0]) is None and body.get("prompt") is None:
        message = f"Missing required parameter: '{names[0]}'."
        raise Rejected(400, message, param=names[0], code="missing_required_parameter")
    caps = [_number(body, name) for name in _CAPS.get(endpoint, ("max_tokens",))]
    choices = _number(body, "n") or 1
    prompt = body.get("prompt")
    if endpoint == "completions" and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        choices *= len(prompt)
    options = body.get("stream_options")
    if options is not None and body.get("stream") is not True:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise Rejected(400, message, param="stream_options")
    return ProviderRequest(
        endpoint=endpoint,
        provider="openai",
        model=body["model"],
        body=body,
        headers=headers,
        prompt_tokens=count_tokens(*(body.get(name) for name in (*names, "tools", "functions")), size=size),
        max_output_tokens=next((cap for cap in caps if cap is not None), None),
        choices=choices,
        stream=body.get("stream") is True and endpoint not in ("embeddings", "images"),
        include_usage=isinstance(options, Mapping) and options.get("include_usage") is True,
    )


def _number(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise Rejected(400, f"Invalid type for '{name}': expected an integer.", param=name, code="invalid_type")
    if value < 1:
        message = f"Invalid '{name}': integer below minimum value. Expected a value >= 1, but got {value} instead."
        raise Rejected(400, message, param=name, code="integer_below_min_value")
    return value


def error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error's body."""
    kind, usual = {
        401: ("invalid_request_error", "invalid_api_key"),
        429: ("requests", "rate_limit_exceeded"),
    }.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}


def models(names: tuple[str, ...], created: int) -> dict[str, Any]:
    """The list of models."""
    listed = [{"id": name, "object": "model", "created": created, "owned_by": "openai"} for name in names]
    return {"object": "list", "data": listed}


def reply(request: ProviderRequest, filled: FilledAnswer) -> dict[str, Any]:
    """The whole answer."""
    if request.endpoint == "responses":
        return _response(request, filled, "completed")
    if request.endpoint == "embeddings":
        return _embeddings(request, filled)
    if request.endpoint == "images":
        return _images(request, filled)
    choices = []
    for index in range(request.choices):
        part: dict[str, Any] = {"text": filled.text}
        if request.endpoint == "chat.completions":
            part = {"message": {"role": "assistant", "content": filled.text, "refusal": None, "annotations": []}}
        choices.append({"index": index, **part, "logprobs": None, "finish_reason": _finish(filled)})
    kind = "chat.completion" if request.endpoint == "chat.completions" else "text_completion"
    return {**_head(request, filled, kind), "choices": choices, "usage": _completion_usage(filled)}


def events(request: ProviderRequest, filled: FilledAnswer) -> list[Event]:
    """The answer as a stream."""
    if request.endpoint == "responses":
        return _response_events(request, filled)
    chat = request.endpoint == "chat.completions"
    head = _head(request, filled, "chat.completion.chunk" if chat else "text_completion")
    usage = {"usage": None} if request.include_usage else {}

    def chunk(index: int, text: str | None, finish: str | None = None, **more: Any) -> Event:
        part = {"delta": more if text is None else {**more, "content": text}} if chat else {"text": text or ""}
        choice = {"index": index, **part, "logprobs": None, "finish_reason": finish}
        return Event({**head, "choices": [choice], **usage})

    found = []
    for index in range(request.choices):
        if chat:
            found.append(chunk(index, "", role="assistant", refusal=None))
        found += [chunk(index, piece) for piece in filled.pieces()]
        found.append(chunk(index, None, _finish(filled)))
    if request.include_usage:
        found.append(Event({**head, "choices": [], "usage": _completion_usage(filled)}))
    return [*found, Event("[DONE]")]


def _finish(filled: FilledAnswer) -> str:
    return "length" if filled.truncated else "stop"


def _head(request: ProviderRequest, filled: FilledAnswer, kind: str) -> dict[str, Any]:
    return {
        "id": filled.response_id,
        "object": kind,
        "created": filled.created,
        "model": _DATED.get(request.model, request.model),
        "service_tier": "default",
        "system_fingerprint": "fp_stand_in",
    }


def _completion_usage(filled: FilledAnswer) -> dict[str, Any]:
    answer = filled.answer
    return {
        "prompt_tokens": filled.input_tokens,
        "completion_tokens": filled.output_tokens,
        "total_tokens": filled.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": answer.cache_read_tokens,
            "audio_tokens": answer.input_audio_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": filled.reasoning_tokens,
            "audio_tokens": filled.output_audio_tokens,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _message(filled: FilledAnswer, text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]
    identity = {"id": f"msg_{filled.response_id[5:]}", "type": "message", "role": "assistant"}
    return {**identity, "status": status, "content": content}


def _response(request: ProviderRequest, filled: FilledAnswer, status: str) -> dict[str, Any]:
    done = status != "in_progress"
    if done and filled.truncated:
        status = "incomplete"
    usage = {
        "input_tokens": filled.input_tokens,
        "input_tokens_details": {"cached_tokens": filled.answer.cache_read_tokens},
        "output_tokens": filled.output_tokens,
        "output_tokens_details": {"reasoning_tokens": filled.reasoning_tokens},
        "total_tokens": filled.total_tokens,
    }
    return {
        "id": filled.response_id,
        "object": "response",
        "created_at": filled.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.body.get("instructions"),
        "max_output_tokens": request.max_output_tokens,
        "metadata": {},
        "model": _DATED.get(request.model, request.model),
        "output": [_message(filled, filled.text, status)] if done else [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "service_tier": "default" if done else "auto",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": request.body.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": usage if done else None,
    }


def _response_events(request: ProviderRequest, filled: FilledAnswer) -> list[Event]:
    whole = _message(filled, filled.text, "completed")
    part = {"item_id": whole["id"], "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
    end = _response(request, filled, "completed")
    found: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": _response(request, filled, "in_progress")}),
        ("response.in_progress", {"response": _response(request, filled, "in_progress")}),
        ("response.output_item.added", {"output_index": 0, "item": _message(filled, None, "in_progress")}),
        ("response.content_part.added", {**part, "part": empty}),
        *(("response.output_text.delta", {**part, "delta": piece, "logprobs": []}) for piece in filled.pieces()),
        ("response.output_text.done", {**part, "text": filled.text, "logprobs": []}),
        ("response.content_part.done", {**part, "part": whole["content"][0]}),
        ("response.output_item.done", {"output_index": 0, "item": whole}),
        (f"response.{end['status']}", {"response": end}),
    ]
    return [Event({"type": name, "sequence_number": at, **data}, name) for at, (name, data) in enumerate(found)]


def _embeddings(request: ProviderRequest, filled: FilledAnswer) -> dict[str, Any]:
    given = request.body["input"]
    several = isinstance(given, list) and not (given and isinstance(given[0], int))
    width = request.body.get("dimensions") or 1_536
    data = []
    for index, text in enumerate(given if several else [given]):
        digest = hashlib.sha256(repr(text).encode("utf-8", "surrogatepass")).digest()
        floats = [(digest[i % 32] - 127.5) / 128 for i in range(width)]
        packed = base64.b64encode(struct.pack(f"<{width}f", *floats)).decode()
        embedding: Any = packed if request.body.get("encoding_format") == "base64" else floats
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    usage = {"prompt_tokens": filled.input_tokens, "total_tokens": filled.input_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def _images(request: ProviderRequest, filled: FilledAnswer) -> dict[str, Any]:
    usage = {
        "input_tokens": filled.input_tokens,
        "output_tokens": filled.output_tokens,
        "total_tokens": filled.total_tokens,
        "input_tokens_details": {"text_tokens": filled.input_tokens, "image_tokens": 0},
    }
    return {"created": filled.created, "data": [{"b64_json": _PIXEL}] * request.choices, "usage": usage}
