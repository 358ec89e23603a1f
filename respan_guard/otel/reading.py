"""From a span's attributes to what its call consumed, whatever names and ways to count its family has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from respan_guard.errors import InvalidInput
from respan_guard.otel.conventions import LITELLM, Family
from respan_guard.otel.names import NAMES, NO_PROVIDERS, NOTHING, PROVIDERS, as_json, first, first_read
from respan_guard.otel.texts import estimate_from_texts, was_made
from respan_guard.providers import read_reply
from respan_guard.usage import MAX_TOKENS, Usage

__all__ = ["Reading", "model_key", "read"]

_ID = re.compile(r'^\s*\{\s*"id"\s*:\s*"([^"\\]{1,200})"')
_DATE = re.compile(r"[-@](?:\d{4}-\d{2}-\d{2}|\d{8})$")
_KINDS = (
    "cache_read_tokens",
    "cache_write_tokens",
    "cache_write_1h_tokens",
    "reasoning_tokens",
    "input_audio_tokens",
    "output_audio_tokens",
    "cache_audio_read_tokens",
    "input_image_tokens",
    "cache_image_read_tokens",
    "output_image_tokens",
    "input_video_tokens",
    "output_video_tokens",
)


@dataclass(slots=True)
class Reading:
    """What one span says about its call.

    Attributes:
        usage: Tokens, model and provider, as far as they are told; times and ids of the span are not in it.
        complete: Whether the tokens are what the provider charges for; otherwise the call was made and nobody said.
        made: Whether the call was made, or may have been; False if the provider refused it or never got it.
        estimate: Tokens that the texts on the span come to, where tokens are missing; None if there are none.
        max_output: The cap on output that was asked for.
        whole: The provider's own usage object was read.
    """

    usage: Usage
    complete: bool
    made: bool
    estimate: tuple[int, int] | None = None
    max_output: int | None = None
    whole: bool = False


def model_key(model: str) -> str:
    """What the names of one model have in common: case, prefixes and dates are left out."""
    return _DATE.sub("", model.strip().lower().removeprefix("models/").rpartition("/")[2])


def read(
    attributes: Mapping[str, Any],
    family: Family,
    status: str = "UNSET",
    description: str | None = None,
    kinds: Sequence[str] = (),
) -> Reading:
    """Read a span that is a call.

    Args:
        attributes: The span's.
        family: Whose it is.
        status: Its status code, "UNSET", "OK" or "ERROR".
        description: Of its status.
        kinds: Types of the exceptions that were noted on it.
    """
    failed = status == "ERROR"
    counts = _counts(attributes)
    total, has_output = first_read(attributes, "total_tokens", _count), "output_tokens" in counts
    raw = _raw(attributes)
    provider = _provider(attributes, raw)
    model, response_model = _models(attributes)
    if raw is not None:
        _fill(counts, raw)
        has_output = True
    told = counts.get("input_tokens", 0) > 0  # 0 is what some write who don't know; no call has no input
    operation = _operation(attributes)
    finished = first(attributes, "finish") is not None or attributes.get("anthropic.message.stop_reason") is not None
    if told:
        cached = counts.get("cache_read_tokens", 0) + counts.get("cache_write_tokens", 0)
        if family.exclusive or cached > counts["input_tokens"]:
            counts["input_tokens"] += cached
        if (
            family.thoughts_apart
            and total is not None
            and total > counts["input_tokens"] + counts.get("output_tokens", 0)
        ):
            thoughts = total - counts["input_tokens"] - counts.get("output_tokens", 0)
            counts["output_tokens"] = counts.get("output_tokens", 0) + thoughts
            counts.setdefault("reasoning_tokens", thoughts)
        if family.extra_output and counts.get("output_tokens", 0) > family.extra_output and _streamed(attributes):
            counts["output_tokens"] -= family.extra_output
    # Anthropic's streams begin with a placeholder for the output; one that is broken off has nothing else.
    cut_off = (
        provider == "anthropic" and counts.get("output_tokens", 0) <= 1 and not finished and not _stopped(attributes)
    )
    complete = told and not cut_off and (has_output or operation == "embeddings")
    usage = Usage(
        model=model or response_model or "",
        provider=provider,
        response_model=response_model,
        response_id=_response_id(attributes, family),
        operation=operation,
        service_tier=_text(first(attributes, "service_tier"), 32),
        cost=first_read(attributes, "cost", _cost) if complete else None,
        status="error" if failed else "ok",
    )
    for kind, value in _sound(counts).items():
        setattr(usage, kind, value)
    return Reading(
        usage,
        complete,
        not failed
        or told
        or was_made(attributes, usage, description, [*kinds, str(attributes.get("error.type") or "")]),
        None if complete else estimate_from_texts(attributes, usage, cut_off=cut_off),
        first_read(attributes, "max_tokens", _count),
        raw is not None,
    )


def _counts(attributes: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind in ("input_tokens", "output_tokens", *_KINDS):
        value = first_read(attributes, kind, _count)
        if value is not None:
            found[kind] = value
    return found


def _count(value: object) -> int | None:
    """A count, also as a float or as text: some write what they were given."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        value = value.strip()
        if not value.isascii() or not value.isdigit() or len(value) > 15:
            return None
        value = int(value)
    if isinstance(value, float):
        if not value.is_integer():
            return None
        value = int(value)
    return value if isinstance(value, int) and 0 <= value <= MAX_TOKENS else None


def _sound(counts: dict[str, int]) -> dict[str, int]:
    """Counts whose parts are no more than their whole: what can't be is the whole's fault, or is not believed."""
    given, made = counts.get("input_tokens", 0), counts.get("output_tokens", 0)
    for kind in ("reasoning_tokens", "output_audio_tokens", "output_image_tokens", "output_video_tokens"):
        if counts.get(kind, 0) > made:
            counts.pop(kind)
    for kind in ("input_audio_tokens", "input_image_tokens", "input_video_tokens"):
        if counts.get(kind, 0) > given:
            counts.pop(kind)
    if counts.get("cache_write_1h_tokens", 0) > counts.get("cache_write_tokens", 0):
        counts.pop("cache_write_1h_tokens")
    for kind, whole in (
        ("cache_audio_read_tokens", "input_audio_tokens"),
        ("cache_image_read_tokens", "input_image_tokens"),
    ):
        if counts.get(kind, 0) > min(counts.get("cache_read_tokens", 0), counts.get(whole, 0)):
            counts.pop(kind)
    return counts


def _fill(counts: dict[str, int], raw: Usage) -> None:
    """Take from the provider's own usage, where a span has it whole, what its attributes leave out."""
    counts["input_tokens"], counts["output_tokens"] = raw.input_tokens, raw.output_tokens
    for kind in _KINDS:
        if value := getattr(raw, kind):
            counts[kind] = value


def _raw(attributes: Mapping[str, Any]) -> Usage | None:
    """The provider's own usage object, where a span carries it as JSON (or as Python wrote it)."""
    usage = as_json(first(attributes, "usage_json"))
    if not isinstance(usage, Mapping):
        return None
    usage = {name: value for name, value in usage.items() if value is not None}
    if "prompt_tokens" in usage:
        body: dict[str, Any] = {"object": "chat.completion", "usage": usage}
    elif any(name in usage for name in ("cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation")):
        body = {"type": "message", "usage": usage}
    elif "input_tokens" in usage:
        body = {"object": "response", "usage": usage}
    elif "input" in usage and ("output" in usage or attributes.get("langfuse.observation.type") == "embedding"):
        # Langfuse's own words
        names = {"input": "input_tokens", "output": "output_tokens", "input_cached_tokens": "cached"}
        found = {names.get(name, name): value for name, value in usage.items()}
        body = {
            "object": "response",
            "usage": found | {"input_tokens_details": {"cached_tokens": found.get("cached", 0)}},
        }
    else:
        return None
    if "details" in str(sorted(usage)):  # flattened or null details are no objects
        body["usage"] = {k: v for k, v in body["usage"].items() if "details" not in k or isinstance(v, Mapping)}
    try:
        found_usage = read_reply(body)
    except (InvalidInput, TypeError, ValueError):
        return None
    return found_usage if found_usage is not None and found_usage.total_tokens else None


def _provider(attributes: Mapping[str, Any], raw: Usage | None) -> str | None:
    for name in NAMES["provider"]:
        value = attributes.get(name)
        if not isinstance(value, str):
            continue
        key = value.strip().lower()
        if key and key not in NO_PROVIDERS and len(key) <= 64 and "." not in key.removesuffix(".openai"):
            return PROVIDERS.get(key, key)
        if key in PROVIDERS:
            return PROVIDERS[key]
    model = model_key(str(first(attributes, "model") or first(attributes, "response_model") or ""))
    for beginning, provider in _BY_MODEL:
        if model.startswith(beginning):
            return provider
    return raw.provider if raw is not None else None


_BY_MODEL = (
    ("claude", "anthropic"),
    ("gpt", "openai"),
    ("chatgpt", "openai"),
    ("o1", "openai"),
    ("o3", "openai"),
    ("o4", "openai"),
    ("text-embedding", "openai"),
    ("gemini", "google"),
)


def _models(attributes: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The model that was asked for, as the provider got it, and the one that answered."""
    asked = _text(first(attributes, "model"), 256)
    answered = _text(first(attributes, "response_model"), 256)
    if asked is None:
        for name in (
            "llm.invocation_parameters",
            "embedding.invocation_parameters",
        ):  # content is not asked: it is users'
            found = as_json(attributes.get(name))
            if isinstance(found, Mapping) and (asked := _text(found.get("model") or found.get("model_name"), 256)):
                break
    if asked is not None:
        asked = asked.removeprefix("models/")
        before, slash, rest = asked.partition("/")
        if slash and rest and before.lower() in _PREFIXES:  # LiteLLM's way to say whose model it is
            asked = rest
    return asked, answered


_PREFIXES = frozenset({"openai", "anthropic", "azure", "gemini", "vertex_ai", "bedrock", "mistral", "groq", "cohere"})


def _response_id(attributes: Mapping[str, Any], family: Family) -> str | None:
    value = first(attributes, "response_id")
    if isinstance(value, str):
        return value if len(value) <= 256 and not (family.invents_ids and _made_up(attributes, value)) else None
    if family.reply_json and attributes.get("output.mime_type") == "application/json":
        reply = attributes.get("output.value")
        if isinstance(reply, str) and (found := _ID.match(reply[:300])):
            return found[1]
    return None


def _made_up(attributes: Mapping[str, Any], value: str) -> bool:
    """LiteLLM gives replies of other providers than OpenAI an id of its own, `chatcmpl-` and a UUID."""
    return attributes.get("gen_ai.system") not in ("openai", "azure") or value.count("-") == 5


def _operation(attributes: Mapping[str, Any]) -> str:
    operation = attributes.get("gen_ai.operation.name")
    if isinstance(operation, str) and operation:
        return LITELLM.get(operation, operation)[:64]
    for name in ("openinference.span.kind", "langfuse.observation.type", "llm.request.type"):
        kind = attributes.get(name)
        if isinstance(kind, str) and kind.lower() == "embedding":
            return "embeddings"
    return "chat"


def _stopped(attributes: Mapping[str, Any]) -> bool:
    """Whether the reply's text on the span says why it stopped."""
    for name in ("output.value", "gen_ai.output.messages", "response_data"):
        value = attributes.get(name)
        if isinstance(value, str) and re.search(r'"(?:stop_reason|finish_reason)"\s*:\s*"', value):
            return True
    return False


def _streamed(attributes: Mapping[str, Any]) -> bool:
    """Whether a reply came as a stream.

    Traceloop does not say so of Anthropic's helper, but writes the usage of streams before the model, and that of whole
    replies behind it.
    """
    if attributes.get("gen_ai.is_streaming") is not None:
        return attributes["gen_ai.is_streaming"] is True
    names = [n for n in attributes if n in ("gen_ai.usage.output_tokens", "gen_ai.response.model")]
    return names[:1] == ["gen_ai.usage.output_tokens"]


def _cost(value: object) -> Decimal | None:
    """A cost in USD. Spans have floats; their shortest text is what was meant."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        cost = Decimal(str(value))
    except (InvalidOperation, ValueError):  # an int may have too many digits to be written
        return None
    return cost if cost.is_finite() and 0 <= cost <= 9_000_000 else None


def _text(value: object, limit: int) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= limit and value not in NOTHING else None
