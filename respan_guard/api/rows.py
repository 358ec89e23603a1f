"""A usage record as Respan shows a request log."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

from respan_guard.api.fields import text_of
from respan_guard.api.log import FAILED, RESERVED, SIZES
from respan_guard.markups import with_markup
from respan_guard.usage import UsageRecord

__all__ = ["ENVIRONMENT", "LOG_KINDS", "log_field", "log_row", "read_unique_id", "size_of", "unique_id"]

ENVIRONMENT: Final = "prod"
"""What everything here belongs to: a guard keeps test apart by its namespace."""

_LOG_TYPES = {"embeddings": "embedding", "text_completion": "completion", "generate_content": "chat"}


def unique_id(customer: str, record_id: str) -> str:
    """The one name of a record: its own id is unique for the customer only."""
    return base64.urlsafe_b64encode(f"{customer}\0{record_id}".encode()).decode().rstrip("=")


def read_unique_id(text: str) -> tuple[str, str] | None:
    """Customer and id of a record; None if that is no name of one."""
    try:
        customer, mark, record_id = (
            base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode().partition("\0")
        )
    except ValueError:  # no base64, no ASCII, no UTF-8
        return None
    return (customer, record_id) if mark and "\0" not in record_id else None


def _kept(record: UsageRecord) -> Mapping[str, Any]:
    found = (record.usage.metadata or {}).get(RESERVED)
    return found if isinstance(found, Mapping) else {}


def _seconds(ms: int | None) -> Decimal | None:
    return None if ms is None else Decimal(ms).scaleb(-3)


def size_of(record: UsageRecord, name: str) -> int | None:
    """Tokens or milliseconds, as they were logged; of what is no call they lie apart."""
    apart = _kept(record).get(SIZES)
    found = apart.get(name) if isinstance(apart, Mapping) else None
    logged: int | None = getattr(record.usage, name)
    return found if isinstance(found, int) else logged


def _speed(record: UsageRecord) -> Decimal | None:
    latency, made = size_of(record, "latency_ms"), size_of(record, "output_tokens")
    return (Decimal(made) * 1000 / latency).quantize(Decimal("0.001")) if latency and made else None


def _status(record: UsageRecord) -> str:
    if record.usage.status in FAILED:
        return "failed"
    return "warning" if record.usage.estimated or record.unpriced else "success"


def _status_code(record: UsageRecord) -> int | None:
    code = _kept(record).get("status_code")
    return code if isinstance(code, int) else (200 if record.usage.status == "ok" else None)


def _log_type(record: UsageRecord) -> str:
    operation = record.usage.operation or "chat"
    return str(_kept(record).get("log_type") or _LOG_TYPES.get(operation, operation))


def _kept_field(name: str) -> Callable[[UsageRecord], Any]:
    return lambda record: _kept(record).get(name)


_NUMBERS: Mapping[str, Callable[[UsageRecord], Any]] = {
    "status_code": _status_code,
    "prompt_tokens": lambda r: size_of(r, "input_tokens"),
    "completion_tokens": lambda r: size_of(r, "output_tokens"),
    "total_request_tokens": lambda r: sum(size_of(r, name) or 0 for name in ("input_tokens", "output_tokens")),
    "prompt_cache_hit_tokens": lambda r: size_of(r, "cache_read_tokens"),
    "prompt_cache_creation_tokens": lambda r: size_of(r, "cache_write_tokens"),
    "reasoning_tokens": lambda r: size_of(r, "reasoning_tokens"),
    "cost": lambda r: r.cost,
    "latency": lambda r: _seconds(size_of(r, "latency_ms")),
    "time_to_first_token": lambda r: _seconds(size_of(r, "ttft_ms")),
    "tokens_per_second": _speed,
}
_TEXTS: Mapping[str, Callable[[UsageRecord], Any]] = {
    "unique_id": lambda r: unique_id(r.customer_identifier, r.id),
    "customer_identifier": lambda r: r.customer_identifier or None,
    "model": lambda r: r.usage.model,
    "provider_id": lambda r: r.usage.provider,
    "status": _status,
    "log_type": _log_type,
    "log_method": lambda r: "logging_api" if r.source == "api" else r.source,
    "environment": lambda r: ENVIRONMENT,
    "trace_unique_id": lambda r: r.usage.trace_id,
    "span_unique_id": lambda r: r.usage.span_id,
    **{
        name: _kept_field(name)
        for name in (
            "span_name", "span_parent_id", "span_workflow_name", "thread_identifier", "custom_identifier",
            "group_identifier", "prompt_id", "prompt_name", "error_message", "error_code",
        )
    },
}  # fmt: skip
_FLAGS: Mapping[str, Callable[[UsageRecord], Any]] = {
    "stream": _kept_field("stream"),
    "positive_feedback": _kept_field("positive_feedback"),
}
_FIELDS = {**_TEXTS, **_NUMBERS, **_FLAGS}

LOG_KINDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(_TEXTS, "text"),
    **dict.fromkeys(_NUMBERS, "number"),
    **dict.fromkeys(_FLAGS, "flag"),
}
"""What a log can be filtered and sorted by."""


def log_field(record: UsageRecord, name: str) -> Any:
    """One field of a log."""
    if name.startswith("metadata__"):
        value = (record.usage.metadata or {}).get(name.removeprefix("metadata__"))
        return None if value is None else text_of(value)  # the app itself may have noted anything
    return _FIELDS[name](record)


def log_row(record: UsageRecord, organization: str, markup: Decimal | None = None) -> dict[str, Any]:
    """A log as lists show it; its cost also with a markup, in percent."""
    row: dict[str, Any] = {"id": unique_id(record.customer_identifier, record.id)}
    row |= {name: get(record) for name, get in _FIELDS.items()}
    latency = timedelta(milliseconds=size_of(record, "latency_ms") or 0)
    kept = _kept(record)
    warnings = [kept["warnings"]] if kept.get("warnings") else []
    if record.usage.estimated:
        warnings.append("the tokens were estimated from the text")
    if record.unpriced:
        warnings.append("no price is known, so the cost is unknown; it is not zero")
    return row | {
        "cost_with_markup": None if record.cost is None else with_markup(record.cost, markup),
        "timestamp": record.time,
        "start_time": record.time - latency,
        "organization_id": organization,
        "unique_organization_id": organization,
        "warnings": "; ".join(map(str, warnings)) or None,
        "metadata": {n: v for n, v in (record.usage.metadata or {}).items() if not n.startswith("_")} or None,
        "properties": kept.get("properties"),
        "input": kept.get("input"),
        "output": kept.get("output"),
        "session_identifier": kept.get("thread_identifier"),
        "kind": record.kind,
        "record_id": record.id,
    }
