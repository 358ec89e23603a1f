"""A request log as it comes in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from respan_guard.api.fields import (
    MAX_KEY,
    Anything,
    Count,
    Flag,
    Identifier,
    Instant,
    Key,
    Money,
    Object,
    Seconds,
    Text,
    clean,
)

__all__ = ["FAILED", "RESERVED", "SIZES", "Log", "LogUsage", "custom_record_id", "spread"]

FAILED: Final = ("error", "failed")
"""The status of a call that failed, which sums count, and of failed work around calls, which they don't."""

RESERVED: Final = "_respan"
"""The key of a record's metadata under which the fields of a log are kept that a usage has no place for."""

SIZES: Final = "sizes"
"""The key, under that one, of tokens and times that are shown and not added up."""

_CONTROLS = (
    "customer_identifier", "customer_params", "thread_identifier", "custom_identifier", "group_identifier",
    "disable_log", "metadata",
)  # fmt: skip
_ALIASES = (
    ("time_to_first_token", "ttft"), ("latency", "generation_time"), ("thread_identifier", "session_identifier"),
    ("group_identifier", "trace_group_identifier"), ("trace_unique_id", "trace_id"), ("span_unique_id", "span_id"),
)  # fmt: skip


class LogUsage(BaseModel):
    """Tokens as OpenAI has them (`prompt_tokens`, with cached ones) or Anthropic (`input_tokens`, without)."""

    model_config = ConfigDict(extra="allow")

    prompt_tokens: Count = None
    completion_tokens: Count = None
    total_tokens: Count = None
    input_tokens: Count = None
    output_tokens: Count = None
    cache_creation_input_tokens: Count = None
    cache_read_input_tokens: Count = None
    prompt_tokens_details: Object = None
    completion_tokens_details: Object = None
    input_tokens_details: Object = None
    output_tokens_details: Object = None


class Log(BaseModel):
    """One call (or span) to log. Any other field of Respan's is accepted and not kept."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, BeforeValidator(clean)] = Field(
        min_length=1, max_length=MAX_KEY, description="The model that was called."
    )
    input: Anything = None
    output: Anything = None
    prompt_messages: Anything = None
    messages: Anything = None
    completion_message: Anything = None
    prompt_tokens: Count = None
    completion_tokens: Count = None
    usage: LogUsage | None = None
    cost: Money = Field(None, description="USD; priced by the guard where it is absent.")
    prompt_unit_price: Money = Field(None, description="USD per million input tokens, where `cost` is absent.")
    completion_unit_price: Money = Field(None, description="USD per million output tokens, where `cost` is absent.")
    latency: Seconds = None
    time_to_first_token: Seconds = None
    timestamp: Instant = Field(None, description="When the call ended; now where it is absent.")
    start_time: Instant = None
    customer_identifier: Anything = Field(None, description="Whose the call is, a string or an integer.")
    customer_email: Text = None
    customer_params: Object = Field(None, description="`customer_identifier` (which wins), `name`, `email`, limits.")
    thread_identifier: Identifier = None
    custom_identifier: Identifier = Field(
        None, description="Logging the same one again for a customer counts once; a reply with an id counts by that."
    )
    group_identifier: Identifier = None
    metadata: Object = None
    properties: Object = None
    log_type: Text = None
    stream: Flag = None
    status_code: Count = None
    status: Text = Field(None, description='"success" or "error".')
    error_message: Text = None
    error_code: Text = None
    warnings: Anything = None
    trace_unique_id: Key = None
    span_unique_id: Key = None
    span_name: Text = None
    span_parent_id: Identifier = None
    span_workflow_name: Text = None
    prompt_id: Identifier = None
    prompt_name: Text = None
    provider_id: Key = None
    full_response: Anything = None
    positive_feedback: Flag = None
    disable_log: Flag = Field(None, description="Keep no text of this call, whatever the guard's setting.")
    respan_params: Object = Field(None, description="May hold what names the customer; goes before top-level fields.")
    keywordsai_params: Object = None


def spread(body: Mapping[str, Any]) -> dict[str, Any]:
    """A log with its aliases and `respan_params` resolved; null is absent."""
    found = {name: value for name, value in body.items() if value is not None}
    controls: dict[str, Any] = {}
    for name in ("keywordsai_params", "respan_params"):
        given = found.get(name)
        if isinstance(given, Mapping):
            controls |= {name: given[name] for name in _CONTROLS if given.get(name) is not None}
    if isinstance(controls.get("metadata"), Mapping) and isinstance(found.get("metadata"), Mapping):
        controls["metadata"] = {**found["metadata"], **controls["metadata"]}
    found |= controls
    for name, alias in _ALIASES:
        if alias in found:
            found.setdefault(name, found[alias])
    return found


def custom_record_id(custom_identifier: str) -> str:
    """The id of the record that was logged under a custom identifier.

    It is a hash: the identifier may say who somebody is, and the record outlives the customer.
    """
    return f"custom:{hashlib.sha256(custom_identifier.encode()).hexdigest()[:40]}"
