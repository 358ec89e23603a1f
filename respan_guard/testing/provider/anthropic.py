"""Anthropic's messages API. It counts exclusively: `input_tokens` leaves out what the cache had or took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from respan_guard.testing.provider.answer import FilledAnswer
from respan_guard.testing.provider.request import Event, ProviderRequest, Rejected, count_tokens, unknown_names

__all__ = ["error", "events", "read", "reply"]

_KNOWN = frozenset(
    {
        *("cache_control", "container", "context_management", "inference_geo", "max_tokens", "mcp_servers", "messages"),
        *("metadata", "model", "output_config", "service_tier", "speed", "stop_sequences", "stream", "system"),
        *("temperature", "thinking", "tool_choice", "tools", "top_k", "top_p"),
    }
)
_DATED = {"claude-haiku-4-5": "claude-haiku-4-5-20251001"}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def read(
    endpoint: str, body: Mapping[str, Any], headers: Mapping[str, str], size: int, *, strict: bool
) -> ProviderRequest:
    """Understand a request.

    Raises:
        Rejected: Anthropic would answer 400.
    """
    if "anthropic-version" not in headers:
        raise Rejected(400, "anthropic-version: header is required")
    name = unknown_names(body, _KNOWN) if strict else None
    if name is not None:
        raise Rejected(400, f"{name}: Extra inputs are not permitted", param=name)
    for name in ("model", "messages", "max_tokens"):
        if body.get(name) is None:
            raise Rejected(400, f"{name}: Field required", param=name)
    cap = body["max_tokens"]
    if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
        raise Rejected(400, "max_tokens: Input should be greater than or equal to 1", param="max_tokens")
    return ProviderRequest(
        endpoint=endpoint,
        provider="anthropic",
        model=str(body["model"]),
        body=body,
        headers=headers,
        prompt_tokens=count_tokens(*(body.get(n) for n in ("messages", "system", "tools")), size=size),
        max_output_tokens=cap,
        stream=body.get("stream") is True,
    )


def error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error's body."""
    return {"type": "error", "error": {"type": _ERRORS.get(status, "api_error"), "message": message}}


def reply(request: ProviderRequest, filled: FilledAnswer) -> dict[str, Any]:
    """The whole answer."""
    return {
        "id": filled.response_id,
        "type": "message",
        "role": "assistant",
        "model": _DATED.get(request.model, request.model),
        "content": [{"type": "text", "text": filled.text}],
        "stop_reason": _stop(filled),
        "stop_sequence": None,
        "usage": _usage(filled, filled.output_tokens),
    }


def events(request: ProviderRequest, filled: FilledAnswer) -> list[Event]:
    """The answer as a stream. The counts of `message_delta` are cumulative."""
    start = {
        **reply(request, filled),
        "content": [],
        "stop_reason": None,
        "usage": _usage(filled, min(1, filled.output_tokens)),
    }
    found: list[dict[str, Any]] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
            for piece in filled.pieces()
        ),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": _stop(filled), "stop_sequence": None},
            "usage": {"output_tokens": filled.output_tokens},
        },
        {"type": "message_stop"},
    ]
    return [Event(data, data["type"]) for data in found]


def _stop(filled: FilledAnswer) -> str:
    return "max_tokens" if filled.truncated else "end_turn"


def _usage(filled: FilledAnswer, output_tokens: int) -> dict[str, Any]:
    answer = filled.answer
    return {
        "input_tokens": filled.input_tokens - answer.cache_read_tokens - answer.cache_write_tokens,
        "cache_creation_input_tokens": answer.cache_write_tokens,
        "cache_read_input_tokens": answer.cache_read_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": answer.cache_write_tokens - answer.cache_write_1h_tokens,
            "ephemeral_1h_input_tokens": answer.cache_write_1h_tokens,
        },
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }
