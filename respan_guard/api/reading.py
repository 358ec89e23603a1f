"""The usage that a request log tells of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any

from respan_guard.api.fields import MAX_KEPT_BYTES, clean, text_of
from respan_guard.api.log import FAILED, RESERVED, SIZES, Log, LogUsage, custom_record_id
from respan_guard.customer import Customer
from respan_guard.errors import InvalidInput
from respan_guard.identifiers import normalise_identifier
from respan_guard.money import from_nano, to_nano
from respan_guard.providers import read_reply
from respan_guard.recorder import response_entry_id
from respan_guard.usage import MAX_TOKENS, TOKEN_KINDS, Usage

__all__ = ["Told", "read_log"]

_BYTES_PER_TOKEN = 4  # of English text
_MAX_METADATA_BYTES = 16_384
_MILLION = 1_000_000

# What these log is the work around calls, and often repeats what the calls inside logged; so it is no call, its
# tokens and its time are shown and not added up, and it costs what it says it costs, else nothing.
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


@dataclass(slots=True)
class Told:
    """What a log says.

    Attributes:
        usage: To be recorded; its cost is set if the log says one.
        customer: Whose it is; "" for nobody's.
        params: What it says about the customer.
        entry_id: The record's id, if the log chose one and its reply has none.
        unpriced: Nothing says what it cost, not even its text.
        no_call: It is the work around calls.
    """

    usage: Usage
    customer: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    entry_id: str | None = None
    unpriced: bool = False
    no_call: bool = False


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
    failed = log.status in FAILED or (log.status_code or 0) >= 400
    no_call = log.log_type in _NO_CALLS
    usage = Usage(
        model=log.model,
        provider=log.provider_id,
        operation=_OPERATIONS.get(log.log_type or "chat", log.log_type or "chat"),
        status=("failed" if no_call else "error") if failed else "ok",
        trace_id=log.trace_unique_id or None,
        span_id=log.span_unique_id or None,
    )
    told = Told(usage, customer, params, no_call=no_call)
    reply = read_reply(log.full_response) if isinstance(log.full_response, Mapping) else None
    if reply is not None:
        usage.response_model = reply.response_model
        usage.provider = usage.provider or reply.provider
        if not no_call:  # then the call has the id under which the guard's other doors know it
            usage.response_id = reply.response_id
    counted = _count_tokens(log, usage)
    if not counted and reply is not None:
        for name in TOKEN_KINDS:
            setattr(usage, name, getattr(reply, name))
        counted = True
    _settle_cost(log, told, counted=counted, failed=failed)
    _place_in_time(log, usage)
    if log.custom_identifier and response_entry_id(usage.provider, usage.response_id) is None:
        told.entry_id = custom_record_id(log.custom_identifier)
    aside = _set_aside(usage) if no_call else {}
    usage.metadata = _metadata(log, aside, store_content=store_content and not log.disable_log)
    return told


def _set_aside(usage: Usage) -> dict[str, Any]:
    """Take the sizes out of what is no call, so that no sum has them."""
    found: dict[str, Any] = {}
    for name in (*TOKEN_KINDS, "latency_ms", "ttft_ms"):
        if value := getattr(usage, name):
            found[name] = value
            setattr(usage, name, None if name.endswith("_ms") else 0)
    return {SIZES: found} if found else {}


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


def _metadata(log: Log, aside: dict[str, Any], *, store_content: bool) -> dict[str, Any] | None:
    kept = {name: clean(value) for name in _KEPT if (value := getattr(log, name)) is not None} | aside
    if log.properties is not None:
        kept["properties"] = clean(log.properties, "properties")
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
