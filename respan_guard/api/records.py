"""Which records a request is about: a range of time and filters, for storage and for what storage can't tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from respan_guard.api.fields import Anything, Environment, Instant
from respan_guard.api.filters import Filters, read_filters
from respan_guard.api.log import custom_record_id
from respan_guard.api.rows import LOG_KINDS, log_field, read_unique_id
from respan_guard.backends.base import RecordQuery
from respan_guard.usage import UsageRecord

__all__ = [
    "LOG_ALIASES",
    "FilteredBy",
    "LogRange",
    "instant_ms",
    "read_log_filters",
    "records_wanted",
    "with_condition",
    "within",
]

LOG_ALIASES: Final[Mapping[str, str]] = {
    "id": "unique_id",
    "total_cost": "cost",
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "total_tokens": "total_request_tokens",
    "trace_id": "trace_unique_id",
    "span_id": "span_unique_id",
    "session_identifier": "thread_identifier",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_STORED_STATUS = {"failed": "error", "success": "ok", "warning": "ok"}


class FilteredBy(BaseModel):
    """What to filter by: `{"field": {"operator": "gte", "value": [1]}}`."""

    filters: Anything = None


class LogRange(BaseModel):
    """Which records."""

    model_config = ConfigDict(extra="forbid")

    start_time: Instant = Field(None, description="Only calls that ended at or after it.")
    end_time: Instant = Field(None, description="Only calls that ended before it.")
    environment: Environment = Field(None, description='All here is "prod".')


def instant_ms(moment: datetime) -> int:
    """Milliseconds since the epoch, exactly."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def read_log_filters(query: LogRange, given: Mapping[str, Any]) -> Filters[UsageRecord]:
    """The filters of a request for records, with what its query says besides.

    Raises:
        InvalidInput: A field, an operator or a value is not known here.
    """
    if query.environment is not None:
        given = with_condition(given, "environment", query.environment)
    return read_filters(given, LOG_KINDS, log_field, LOG_ALIASES, metadata=True)


def with_condition(given: Mapping[str, Any], field: str, value: str) -> dict[str, Any]:
    """Filters with one more condition: a field has this value."""
    there = given.get(field)
    return {**given, field: [{"value": [value]}, *(there if isinstance(there, list) else [there])]}


def records_wanted(query: LogRange, filters: Filters[UsageRecord]) -> RecordQuery:
    """What storage can filter by."""
    return RecordQuery(
        customer=filters.only("customer_identifier"),
        model=filters.only("model"),
        provider=filters.only("provider_id"),
        trace_id=filters.only("trace_unique_id"),
        status=_STORED_STATUS.get(filters.only("status") or ""),
        since_ms=None if query.start_time is None else instant_ms(query.start_time),
        until_ms=None if query.end_time is None else instant_ms(query.end_time),
    )


def named(filters: Filters[UsageRecord]) -> tuple[str, str] | None:
    """Customer and id of the record that filters name; None if they name none.

    A custom identifier is no record's id where the call's reply has one: it may have to be looked for.
    """
    by_name = filters.only("unique_id")
    if by_name is not None:
        return read_unique_id(by_name) or ("", "")
    customer, custom = filters.only("customer_identifier"), filters.only("custom_identifier")
    return None if customer is None or custom is None else (customer, custom_record_id(custom))


def within(base: RecordQuery, filters: Filters[UsageRecord]) -> Callable[[UsageRecord], bool]:
    """Whether a record is wanted, whatever storage looked at."""

    def wanted(record: UsageRecord) -> bool:
        ms = instant_ms(record.time)
        return (
            (base.since_ms is None or ms >= base.since_ms)
            and (base.until_ms is None or ms < base.until_ms)
            and filters(record)
        )

    return wanted
