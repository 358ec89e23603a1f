"""Where each fact about a call stands, in the words of every family.

The strings are our own: OpenTelemetry's GenAI names are all deprecated in the packages that carry them, and still move.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["NAMES", "NOTHING", "NO_PROVIDERS", "PROVIDERS", "as_json", "first", "first_read"]

T = TypeVar("T")
_MOST_JSON = 2_000_000

NAMES: dict[str, tuple[str, ...]] = {
    "model": (
        "gen_ai.request.model",
        "llm.request.model_name",
        "llm.request.model",
        "embedding.model_name",
        "langfuse.observation.model.name",
    ),
    "response_model": (
        "gen_ai.response.model",
        "llm.response.model_name",
        "llm.response.model",
        "llm.model_name",
        "model_name",
    ),
    "provider": ("gen_ai.provider.name", "llm.provider", "gen_ai.system", "llm.system", "llm.vendor"),
    "response_id": ("gen_ai.response.id",),
    "input_tokens": (
        "gen_ai.usage.input_tokens",
        "llm.token_count.prompt",
        "gen_ai.usage.prompt_tokens",
        "llm.usage.prompt_tokens",
    ),
    "output_tokens": (
        "gen_ai.usage.output_tokens",
        "llm.token_count.completion",
        "gen_ai.usage.completion_tokens",
        "llm.usage.completion_tokens",
    ),
    "total_tokens": ("gen_ai.usage.total_tokens", "llm.token_count.total", "llm.usage.total_tokens"),
    "cache_read_tokens": (
        "gen_ai.usage.cache_read.input_tokens",
        "gen_ai.usage.cache_read_input_tokens",
        "llm.token_count.prompt_details.cache_read",
        "prompt_cache_hit_tokens",
    ),
    "cache_write_tokens": (
        "gen_ai.usage.cache_write.input_tokens",
        "gen_ai.usage.cache_creation.input_tokens",
        "gen_ai.usage.cache_creation_input_tokens",
        "llm.token_count.prompt_details.cache_write",
        "prompt_cache_creation_tokens",
    ),
    "cache_write_1h_tokens": (
        "anthropic.usage.cache_creation.ephemeral_1h_input_tokens",
        "gen_ai.usage.cache_creation.ephemeral_1h_input_tokens",
    ),
    "reasoning_tokens": (
        "gen_ai.usage.reasoning.output_tokens",
        "gen_ai.usage.reasoning_tokens",
        "llm.usage.reasoning_tokens",
        "llm.token_count.completion_details.reasoning",
        "gen_ai.usage.details.reasoning_tokens",
    ),
    "input_audio_tokens": ("gen_ai.usage.audio.input_tokens", "llm.token_count.prompt_details.audio"),
    "output_audio_tokens": ("gen_ai.usage.audio.output_tokens", "llm.token_count.completion_details.audio"),
    "cache_audio_read_tokens": ("gen_ai.usage.audio.cache_read.input_tokens",),
    "input_image_tokens": ("gen_ai.usage.image.input_tokens",),
    "output_image_tokens": ("gen_ai.usage.image.output_tokens",),
    "cache_image_read_tokens": (),  # these are told only where a span has the provider's own usage whole
    "input_video_tokens": (),
    "output_video_tokens": (),
    "cost": (
        "operation.cost",
        "gen_ai.usage.cost.amount",
        "gen_ai.usage.cost",
        "gen_ai.usage.cost_usd",
        "gen_ai.usage.cost.total",
        "gen_ai.cost.total_cost",
        "llm.cost.total",
        "llm.usage.cost",
    ),
    "service_tier": (
        "openai.response.service_tier",
        "anthropic.response.service_tier",
        "gen_ai.openai.response.service_tier",
    ),
    "max_tokens": ("gen_ai.request.max_tokens", "llm.request.max_tokens"),
    "finish": (
        "gen_ai.response.finish_reasons",
        "gen_ai.response.finish_reason",
        "llm.finish_reason",
        "gen_ai.completion.0.finish_reason",
    ),
    "content_in": (
        "gen_ai.input.messages",
        "gen_ai.prompt.0.content",
        "input.value",
        "langfuse.observation.input",
        "traceloop.entity.input",
    ),
    "content_out": (
        "gen_ai.output.messages",
        "gen_ai.completion.0.content",
        "output.value",
        "langfuse.observation.output",
        "traceloop.entity.output",
    ),
    "usage_json": ("gen_ai.usage.raw", "langfuse.observation.usage_details", "metadata.usage_object"),
}
"""Where each fact stands, the most precise name first. Sums over several calls (`gen_ai.aggregated_usage.*`) and the
raw counts of `gen_ai.usage.details.*`, whose meaning differs by provider, are left out."""

PROVIDERS = {
    "azure.ai.openai": "azure",
    "azure.openai": "azure",
    "azure_openai": "azure",
    "az.ai.openai": "azure",
    "gemini": "google",
    "gcp.gemini": "google",
    "gcp.gen_ai": "google",
    "gcp.vertex_ai": "google",
    "vertex_ai": "google",
    "vertexai": "google",
    "google_genai": "google",
    "aws.bedrock": "aws",
    "aws_bedrock": "aws",
    "bedrock": "aws",
    "x_ai": "x-ai",
    "xai": "x-ai",
    "mistralai": "mistral",
    "mistral_ai": "mistral",
}
"""Providers' names as the other doors write them, so that one call has one id whichever saw it."""
NO_PROVIDERS = frozenset({"langchain", "langgraph", "litellm", "llamaindex", "unknown", "none", ""})

NOTHING = ("", "None", "none", "null", "NOT_GIVEN", "Omit()", "NotGiven()")
"""What some write where they have no value."""


def first(attributes: Mapping[str, Any], fact: str) -> Any:
    """The first of the attributes that may hold a fact and does."""
    for name in NAMES[fact]:
        value = attributes.get(name)
        if value is not None and not (isinstance(value, str) and value in NOTHING):
            return value
    return None


def first_read(attributes: Mapping[str, Any], fact: str, read: Callable[[Any], T | None]) -> T | None:
    """What the first of the attributes holds that may hold a fact and can be read: nonsense hides no other."""
    for name in NAMES[fact]:
        if (value := attributes.get(name)) is not None and (found := read(value)) is not None:
            return found
    return None


def as_json(value: object) -> Any:
    """A JSON value that an attribute holds as text; None if it holds none."""
    if not isinstance(value, str) or not value or len(value) > _MOST_JSON or value[0] not in "{[":
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if value[1:2] != "'" or len(value) > 20_000:
        return None
    try:  # Python's own way to write a dict
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
