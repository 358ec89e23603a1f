"""A usage record as our own formats write it: money as exact decimal strings, what is unknown as null."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC
from decimal import Decimal
from typing import Any, Final

from respan_guard.usage import TOKEN_KINDS, UsageRecord

__all__ = ["COLUMNS", "csv_header", "csv_lines", "json_line", "record_row"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_LINE_ENDS = {ord("\r"): "\\r", ord("\n"): "\\n"}

COLUMNS: Final = (
    "id", "revision", "customer_identifier", "time", "day", "kind", "source", "provider", "model", "response_model",
    "operation", *TOKEN_KINDS, "cost", "cost_with_markup", "unpriced", "estimated", "late", "status", "latency_ms",
    "ttft_ms", "service_tier", "response_id", "admission_id", "trace_id", "span_id", "sequence", "metadata",
)  # fmt: skip
"""The fields of a row, in order."""


def _usd(amount: Decimal | None) -> str | None:
    return None if amount is None else f"{amount:f}"


def record_row(record: UsageRecord) -> dict[str, Any]:
    """JSON values by `COLUMNS`."""
    usage = record.usage
    row: dict[str, Any] = {
        "time": record.time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "cost": _usd(record.cost),
        "cost_with_markup": _usd(record.cost_with_markup),
        "metadata": dict(usage.metadata) if usage.metadata else None,
    }
    found = {}
    for name in COLUMNS:
        found[name] = (
            row[name] if name in row else getattr(record, name) if hasattr(record, name) else getattr(usage, name)
        )
    return found


def json_line(record: UsageRecord) -> str:
    """One line of JSON, without its end."""
    return json.dumps(record_row(record), separators=(",", ":"), allow_nan=False)


def csv_header() -> str:
    """The first line of a file."""
    return ",".join(COLUMNS) + "\r\n"


def csv_lines(batch: Sequence[UsageRecord]) -> str:
    """Lines of CSV (RFC 4180). Text that a spreadsheet would run as a formula gets an apostrophe in front.

    The rule is OWASP's (CSV injection). Numbers of ours are no text: a credit of -5 stays a number. Line ends within
    a text are written as a backslash and a letter, so that a record is a line and one that was cut off can be told.
    """
    out = io.StringIO()
    writer = csv.writer(out)
    for record in batch:
        row = record_row(record)
        numbers = {"cost": row["cost"], "cost_with_markup": row["cost_with_markup"]}
        writer.writerow([numbers[name] if name in numbers else _cell(row[name]) for name in COLUMNS])
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, str):
        text = f"'{value}" if value.startswith(_FORMULA) else value
        return text.translate(_LINE_ENDS)
    return value
