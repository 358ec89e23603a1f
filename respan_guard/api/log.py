"""A request log as it comes in, and the usage that it tells of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from respan_guard.api.fields import (
    MAX_KEPT_BYTES,
    Anything,
    Count,
    Flag,
    Identifier,
    Instant,
    Money,
    Object,
    Seconds,
    Text,
    clean,
    text_of,
)
from respan_guard.customer import Customer
from respan_guard.errors import InvalidInput
from respan_guard.identifiers import normalise_identifier
from respan_guard.money import from_nano, to_nano
from respan_guard.providers import read_reply
from respan_guard.usage import MAX_TOKENS, TOKEN_KINDS, Usage

__all__ = ["RESERVED", "Log", "Told", "read_log"]

RESERVED: Final = "_respan"
"""The key of a record's metadata under which the fields of a log are kept that a usage has no place for."""

_BYTES_PER_TOKEN = 4  # of English text
_MAX_METADATA_BYTES = 16_384
_MILLION = 1_000_000

# What these log is the work around calls, and often repeats what the calls inside logged; so tokens of it are not
# priced, and it costs what it says it costs, else nothing.
_NO_CALLS = frozenset(
    {"workflow", "agent", "task", "tool", "handoff", "guardrail", "function", "custom", "score", "batch", "span"}
)
_OPERATIONS = {"embedding": "embeddings", "completion": "text_completion"}
# Kept as they came, beside the usage.
_KEPT = (
    "custom_identifier", "thread_identifier", "group_identifier", "log_type", "stream", "status_code", "error_message",
    "error_code", "warnings", "span_name", "span_parent_id", "span_workflow_name", "prompt_id", "prompt_name",
    "positive_feedback",
)  # fmt: skip
_CUSTOMER_FIELDS = frozenset(Customer.model_fields) - {"customer_identifier"}
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
        min_length=1, max_length=1000, description="The model that was called."
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
    custom_identifier: Identifier = Field(None, description="Logging the same one again for a customer counts once.")
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
    trace_unique_id: Identifier = None
    span_unique_id: Identifier = None
    span_name: Text = None
    span_parent_id: Identifier = None
    span_workflow_name: Text = None
    prompt_id: Identifier = None
    prompt_name: Text = None
    provider_id: Identifier = None
    full_response: Anything = None
    positive_feedback: Flag = None
    disable_log: Flag = Field(None, description="Keep no text of this call, whatever the guard's setting.")
    respan_params: Object = Field(None, description="May hold what names the customer; goes before top-level fields.")
    keywordsai_params: Object = None


@dataclass(slots=True)
class Told:
    """What a log says.

    Attributes:
        usage: To be recorded; its cost is set if the log says one.
        customer: Whose it is; "" for nobody's.
        params: What it says about the customer.
        entry_id: The record's id, if the log has one of its own.
        unpriced: Nothing says what it cost, not even its text.
    """

    usage: Usage
    customer: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    entry_id: str | None = None
    unpriced: bool = False


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


def read_log(log: Log, *, store_content: bool = False) -> Told:
    """Turn a log into a usage.

    Raises:
        InvalidInput: Something in it can't be meant.
    """
    given = log.customer_params or {}
    named = given.get("customer_identifier")
    named = log.customer_identifier if named is None else named
    params = {name: value for name, value in given.items() if name in _CUSTOMER_FIELDS}
    if log.customer_email is not None:
        params.setdefault("email", log.customer_email)
    customer = "" if named is None else normalise_identifier(named)
    failed = log.status in ("error", "failed") or (log.status_code or 0) >= 400
    usage = Usage(
        model=log.model,
        provider=log.provider_id,
        operation=_OPERATIONS.get(log.log_type or "chat", log.log_type or "chat"),
        status="error" if failed else "ok",
        trace_id=log.trace_unique_id or None,
        span_id=log.span_unique_id or None,
    )
    told = Told(usage, customer, params)
    reply = read_reply(log.full_response) if isinstance(log.full_response, Mapping) else None
    if reply is not None:  # then the call has the id under which the guard's other doors know it
        usage.response_id, usage.response_model = reply.response_id, reply.response_model
        usage.provider = usage.provider or reply.provider
    counted = _count_tokens(log, usage)
    if not counted and reply is not None:
        for name in TOKEN_KINDS:
            setattr(usage, name, getattr(reply, name))
        counted = True
    _settle_cost(log, told, counted=counted, failed=failed)
    _place_in_time(log, usage)
    if log.custom_identifier:
        # Hashed: it may say who somebody is, and the record outlives the customer.
        told.entry_id = f"custom:{hashlib.sha256(log.custom_identifier.encode()).hexdigest()[:40]}"
    usage.metadata = _metadata(log, store_content=store_content and not log.disable_log)
    return told


def _count_tokens(log: Log, usage: Usage) -> bool:
    """Set the tokens that the log counts; False if it counts none."""
    given = log.usage or LogUsage()
    prompt = _first(log.prompt_tokens, given.prompt_tokens, given.input_tokens)
    completion = _first(log.completion_tokens, given.completion_tokens, given.output_tokens)
    if prompt is None and completion is None:
        if not given.total_tokens:
            return False
        prompt = given.total_tokens  # of embeddings, for one, that is all there is
    read, written = given.cache_read_input_tokens or 0, given.cache_creation_input_tokens or 0
    usage.input_tokens, usage.output_tokens = prompt or 0, completion or 0
    # Who names the cache like Anthropic counts like Anthropic: beside the input. Not so under OpenAI's name for the
    # input if the total says otherwise: gateways put the cache in there.
    theirs = log.prompt_tokens is None and given.prompt_tokens is None
    total = usage.input_tokens + usage.output_tokens
    if theirs or given.total_tokens != total or read + written > usage.input_tokens:
        usage.input_tokens += read + written
    details = given.prompt_tokens_details or given.input_tokens_details or {}
    usage.cache_read_tokens = read or _share(details.get("cached_tokens"), usage.input_tokens)
    usage.cache_write_tokens = written
    made = given.completion_tokens_details or given.output_tokens_details or {}
    usage.reasoning_tokens = _share(made.get("reasoning_tokens"), usage.output_tokens)
    if usage.total_tokens > MAX_TOKENS:
        raise InvalidInput("usage counts more tokens than any call has", field="usage")
    return True


def _share(value: Any, of: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= of else 0


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _settle_cost(log: Log, told: Told, *, counted: bool, failed: bool) -> None:
    usage = told.usage
    usage.cost = log.cost
    if log.log_type in _NO_CALLS:
        if usage.cost is None:
            usage.cost = Decimal(0)
        return
    if not counted:
        given = _sizes(_first_of(log.input, log.prompt_messages, log.messages))
        made = _sizes(_first_of(log.output, log.completion_message))
        if failed and not made:  # what broke off without an answer is not billed
            usage.cost = Decimal(0) if usage.cost is None else usage.cost
            return
        if given or made:
            usage.input_tokens, usage.output_tokens = -(-given // _BYTES_PER_TOKEN), -(-made // _BYTES_PER_TOKEN)
            usage.estimated = True
        elif usage.cost is None:
            told.unpriced = True
            return
    prices = log.prompt_unit_price, log.completion_unit_price
    if usage.cost is None and prices != (None, None):
        per_million = usage.input_tokens * (prices[0] or 0) + usage.output_tokens * (prices[1] or 0)
        usage.cost = from_nano(to_nano(Decimal(per_million) / _MILLION, "cost"))


def _first_of(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _sizes(value: Any) -> int:
    """Bytes of the text in a message, a list of them, or whatever was logged; what is not text has none."""
    return sum(len(text.encode("utf-8", "replace")) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            if not item.startswith("data:"):  # an image or a file, by value
                yield item
        elif isinstance(item, Mapping):
            left += [part for name, part in item.items() if name not in ("role", "type", "id", "name", "tool_call_id")]
        elif isinstance(item, list):
            left += item


def _place_in_time(log: Log, usage: Usage) -> None:
    latency = log.latency
    usage.time = log.timestamp
    if log.start_time is not None:
        if log.timestamp is None and latency is not None:
            usage.time = log.start_time + timedelta(milliseconds=_milliseconds(latency))
        elif log.timestamp is None:
            usage.time = log.start_time
        elif latency is None and log.timestamp >= log.start_time:
            latency = Decimal((log.timestamp - log.start_time) // timedelta(milliseconds=1)).scaleb(-3)
    usage.latency_ms = None if latency is None else _milliseconds(latency)
    usage.ttft_ms = None if log.time_to_first_token is None else _milliseconds(log.time_to_first_token)


def _milliseconds(seconds: Decimal) -> int:
    return int((seconds * 1000).to_integral_value())


def _metadata(log: Log, *, store_content: bool) -> dict[str, Any] | None:
    kept = {name: clean(value) for name in _KEPT if (value := getattr(log, name)) is not None}
    if log.properties is not None:
        kept["properties"] = clean(log.properties)
    if store_content:
        for name, value in (
            ("input", _first_of(log.input, log.prompt_messages, log.messages)),
            ("output", _first_of(log.output, log.completion_message)),
        ):
            if value is not None:
                kept[name] = _shortened(clean(value))
    if "warnings" in kept:
        kept["warnings"] = text_of(kept["warnings"])[:1000]
    # Keys with an underscore are reserved, as at Respan: they are hidden on read.
    found: dict[str, Any] = {
        name[:200]: text_of(value) for name, value in (log.metadata or {}).items() if not name.startswith("_")
    }
    for name, value in (("metadata", found), ("properties", kept.get("properties", {}))):
        size = len(json.dumps(value))
        if size > _MAX_METADATA_BYTES:
            most = f"{_MAX_METADATA_BYTES:,} bytes of JSON"
            raise InvalidInput(f"{name} must be at most {most}, got {size:,}", field=name)
    if kept:
        found[RESERVED] = kept
    return clean(found) or None


def _shortened(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False)
    if len(text.encode()) <= MAX_KEPT_BYTES:
        return value
    return text.encode()[:MAX_KEPT_BYTES].decode("utf-8", "ignore") + " [cut]"
