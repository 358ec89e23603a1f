"""Wire formats of LLM providers: what a request asks for, what a reply says it used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from respan_guard.errors import InvalidInput
from respan_guard.providers import anthropic, gemini, openai
from respan_guard.providers.base import Call, decode_json
from respan_guard.providers.body import JSONReader, Reader, reader_for
from respan_guard.providers.events import looks_like_events
from respan_guard.providers.forms import call_of_fields, form_call, is_form_path
from respan_guard.providers.replies import read_reply
from respan_guard.providers.stream import StreamReader
from respan_guard.providers.unmetered import warn_of, warn_unread
from respan_guard.providers.urls import as_read
from respan_guard.usage import Usage

__all__ = [
    "Call",
    "JSONReader",
    "Reader",
    "StreamReader",
    "call_from_request",
    "call_of_fields",
    "call_of_path",
    "decode_json",
    "form_call",
    "is_call_path",
    "is_form_path",
    "looks_like_events",
    "read_reply",
    "reader_for",
    "usage_from_reply",
    "usage_of_call",
    "warn_of",
    "warn_unread",
]

_CHEAPER = frozenset({"batch", "flex"})
"""Service tiers that cost less: to be asked for one is not to grant it, so the reply must say so."""

_GEMINI_VERBS = (":generateContent", ":streamGenerateContent", ":embedContent", ":batchEmbedContents")
# Paths whose bodies look like a call but cost nothing, or name calls to be made later.
_FREE = ("/moderations", "/count_tokens", "/input_tokens", ":countTokens", "/batches")
_VERB_ENDS, _FREE_ENDS = (tuple(end.lower() for end in ends) for ends in (_GEMINI_VERBS, _FREE))
_IMAGE_MODELS = ("image", "dall-e")


def call_from_request(path: str, body: Mapping[str, Any]) -> Call | None:
    """Read what a request asks for, by its path, else by the shape of its body.

    Whoever wrote the path may not be whoever routes it: its case, and what servers and proxies overlook in it
    (`as_read`), make no difference.

    Args:
        path: The URL's path, without the query.
        body: The request's JSON object.

    Returns:
        The call; None if nothing says that this is an LLM call.
    """
    path = as_read(path)
    lower = path.lower()
    if lower.endswith(_FREE_ENDS):
        return None
    if lower.endswith(_VERB_ENDS):
        return gemini.call(path, body)
    if lower.endswith("/messages"):
        return anthropic.call(path, body) if isinstance(body.get("messages"), list) else None
    for suffix, operation in openai.OPERATIONS.items():
        if lower.endswith(suffix):
            return openai.call(path, body, operation)
    return _by_shape(path, body)


def call_of_path(path: str) -> Call | None:
    """What a path alone says of requests to it, whatever their body; None if that is nothing."""
    return call_from_request(path, {"messages": []})


def is_call_path(path: str) -> bool:
    """Whether requests to this path are LLM calls whatever their body."""
    return is_form_path(path) or call_of_path(path) is not None


def _by_shape(path: str, body: Mapping[str, Any]) -> Call | None:
    if isinstance(body.get("contents"), list):
        return gemini.call(path, body)
    model, prompt = body.get("model"), body.get("prompt")
    if not isinstance(model, str) or path.lower().endswith("/videos"):
        return None
    if isinstance(body.get("messages"), list):
        if any(name in body for name in ("system", "anthropic_version", "stop_sequences", "thinking")):
            return anthropic.call(path, body)
        return openai.call(path, body, "chat")
    if isinstance(body.get("input"), (str, list)) or isinstance(prompt, Mapping):
        return openai.call(path, body, "chat")
    if isinstance(prompt, (str, list)):
        drawn = any(name in model.lower() for name in _IMAGE_MODELS)
        return openai.call(path, body, "image_generation" if drawn else "text_completion")
    return None


def usage_from_reply(reply: object, provider: str | None = None) -> Usage:
    """Read the usage off a provider's reply.

    Args:
        reply: An object of the openai, anthropic or google-genai SDK, or the reply's JSON as a dict.
        provider: Who served the call, where it is not the wire format's own provider ("azure", "openrouter").

    Raises:
        InvalidInput: The reply is of no known shape, or holds no usage or a malformed one.
    """
    body = reply if isinstance(reply, Mapping) else _as_json(reply)
    usage = read_reply(body) if body is not None else None
    if usage is None and body is not None:
        # The last event of a stream is as good as a reply.
        usage = openai.event_usage(body)
    if usage is None:
        if body is not None and (why := openai.untold(body)) is not None:
            raise InvalidInput(f"{why}; record it with Usage(model=..., cost=...)")
        raise InvalidInput(
            f"found no usage in this {type(reply).__name__}; a whole reply of OpenAI's chat completions, responses, "
            "embeddings, images or transcriptions, Anthropic's messages or Gemini's generateContent is needed, "
            "or a stream's last event "
            '(OpenAI: ask for it with stream_options={"include_usage": True})'
        )
    if provider is not None:
        usage.provider = provider
    return usage


def _as_json(reply: object) -> Mapping[str, Any] | None:
    """The JSON of an SDK's object, without importing the SDK."""
    dump: Callable[..., Any] | None = getattr(reply, "model_dump", None)
    if callable(dump):
        body = dump(mode="json", exclude_none=True, warnings=False)
        return body if isinstance(body, Mapping) else None
    if isinstance(reply, (str, bytes, bytearray)):
        body = decode_json(reply)
        return body if isinstance(body, Mapping) else None
    return None


def usage_of_call(reader: Reader, call: Call, started: float, ended: float) -> Usage | None:
    """What the body that a reader watched says a call used, under the model that was asked for; None if it is unknown.

    Many streams count as they go, so what one that was cut off told last is not the bill.

    Args:
        reader: Has seen the body.
        call: What was asked for; without a provider if that is not known.
        started: When it was sent, in seconds of the clock that the reader was given.
        ended: When the body was complete.

    Both doors that see replies read them here, so that one call has one provider and one id whichever saw it.
    """
    reader.close()
    usage = reader.usage()
    if usage is None or (call.provider and not reader.finished):
        return None
    usage.model = call.model or usage.model
    if call.provider == "azure":  # its replies are OpenAI's to the letter
        usage.provider = call.provider
    usage.provider = usage.provider or call.provider
    if call.service_tier not in _CHEAPER:
        usage.service_tier = usage.service_tier or call.service_tier
    usage.latency_ms = round((ended - started) * 1000)
    if reader.first_token is not None:
        usage.ttft_ms = round((reader.first_token - started) * 1000)
    return usage
