"""Anthropic's messages API.

Anthropic counts exclusively: `input_tokens` leaves out what was read from the cache and what was written
to it (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching). `Usage` counts inclusively.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from respan_guard.providers.base import Call, Layout, Media, count, fallbacks, limit, mapping, measure, shares, text
from respan_guard.usage import Usage

__all__ = ["call", "merge", "reply_usage"]

# An image is scaled down to 1,568 pixels (about 1,600 tokens), or 2,576 (about 4,800) on models with high resolution.
_IMAGE_TOKENS = 5_000
_SERVER_TOOLS = ("web_search", "web_fetch", "code_execution", "tool_search", "advisor", "mcp_toolset")


def _media(part: Mapping[str, Any]) -> Media | None:
    kind, source = part.get("type"), part.get("source")
    if kind not in ("image", "document") or not isinstance(source, Mapping):
        return None
    data, form = source.get("data"), source.get("media_type")
    form = form.lower() if isinstance(form, str) else ""
    if kind == "image":
        return Media("image", remote=True)
    beside = tuple(v for k, v in part.items() if k not in ("type", "source", "cache_control"))
    if source.get("type") == "base64" and isinstance(data, str):
        return Media("file", len(data), form, text=beside)
    if source.get("type") in ("url", "file"):
        return Media("file", remote=True, text=beside)
    return None  # plain text and content blocks count as what they are


_LAYOUT = Layout(
    _media,
    _IMAGE_TOKENS,
    content=frozenset({"messages", "system"}),
    opaque=frozenset({"input", "cache_control"}),
    skip=frozenset({"metadata", "customer_params"}),
)


def call(path: str, body: Mapping[str, Any]) -> Call:
    """Read a request. The budget for thinking lies within `max_tokens`."""
    tools = body.get("tools")
    size = measure(body, _LAYOUT, has_tools=isinstance(tools, list))
    speed = text(body.get("speed"), 32)
    return Call(
        provider="anthropic",
        operation="chat",
        model=text(body.get("model")) or "",
        input_tokens_bound=size.tokens,
        max_output_tokens=limit(body.get("max_tokens")),
        stream=body.get("stream") is True,
        hidden=size.hidden or body.get("container") is not None,
        tool_runs=_tool_runs(body),
        has_images=size.has_images,
        service_tier=speed if speed == "fast" else text(body.get("service_tier"), 32),
        fallbacks=fallbacks(body),
    )


def _tool_runs(body: Mapping[str, Any]) -> int | None:
    """How often tools that Anthropic runs may be used; most take a `max_uses` of their own."""
    tools = body.get("tools")
    own = (
        [t for t in tools if str(mapping(t).get("type", "")).startswith(_SERVER_TOOLS)]
        if isinstance(tools, list)
        else []
    )
    uses = [limit(tool.get("max_uses")) for tool in own]
    if body.get("mcp_servers") is not None:
        uses.append(None)
    return sum(n for n in uses if n is not None) if None not in uses else None


def reply_usage(body: Mapping[str, Any]) -> Usage | None:
    """Read the usage off a message; None if it is none or its usage is malformed."""
    usage = body.get("usage")
    if body.get("type") != "message" or not isinstance(usage, Mapping) or "input_tokens" not in usage:
        return None
    fresh = count(usage["input_tokens"])
    read = shares(usage, "cache_read_input_tokens")
    written = shares(usage, "cache_creation_input_tokens")
    by_lifetime = usage.get("cache_creation")
    hour, minutes = shares(by_lifetime, "ephemeral_1h_input_tokens"), shares(by_lifetime, "ephemeral_5m_input_tokens")
    output = shares(usage, "output_tokens")
    reasoning = shares(usage.get("output_tokens_details"), "thinking_tokens", "reasoning_tokens")
    if fresh is None or read is None or written is None or hour is None or minutes is None:
        return None
    if output is None or reasoning is None or fresh + read + written + hour + minutes > 10**12:
        return None
    written = max(written, hour + minutes)
    model = text(body.get("model"))
    speed = text(usage.get("speed"), 32)
    return Usage(
        model=model or "",
        input_tokens=fresh + read + written,
        output_tokens=output,
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=hour,
        reasoning_tokens=reasoning,
        provider="anthropic",
        response_id=text(body.get("id")),
        response_model=model,
        operation="chat",
        service_tier=speed if speed == "fast" else text(usage.get("service_tier"), 32),
    )


def merge(start: Mapping[str, Any], delta: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message that `message_start` opened, with the counts of the last `message_delta`.

    The counts of a delta are cumulative: they replace those of the start, they don't add to them. What a
    delta leaves out (or sends as null) stays.
    """
    usage = {**mapping(start.get("usage")), **{k: v for k, v in delta.items() if v is not None}}
    return {**start, "usage": usage}
