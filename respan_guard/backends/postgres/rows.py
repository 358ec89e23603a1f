"""Values of the contract as columns, and back."""

from __future__ import annotations

import json
from typing import Any

from respan_guard.backends.base import AMOUNTS, Amounts, CustomerRow, Entry, StoredEntry
from respan_guard.backends.texts import params_from
from respan_guard.usage import Usage

__all__ = [
    "CUSTOMER",
    "ENTRY",
    "EVER",
    "FROM_ENTRIES",
    "amounts_from",
    "customer_from",
    "entry_from",
]

EVER = (1 << 31) - 1
"""A day after all days, as the columns have it."""
FROM_ENTRIES = {
    "calls": "(kind <> 'adjustment')::integer",
    "cost": "coalesce(cost, 0)",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cache_read_tokens": "cache_read_tokens",
    "unpriced": "(cost IS NULL)::integer",
    "errors": "(status = 'error')::integer",
    "latency_ms": "coalesce(latency_ms, 0)",
    "timed": "(latency_ms IS NOT NULL)::integer",
    "ttft_ms": "coalesce(ttft_ms, 0)",
    "ttft_calls": "(ttft_ms IS NOT NULL)::integer",
}
"""What an entry adds to each of them but `requests`."""
CUSTOMER = f"customer, revision, params, first_seen, last_seen, active_days, {', '.join(AMOUNTS)}"
ENTRY = "e.seq, e.rev, e.id, k.customer, e.day, e.at_ms, e.cost, e.input_tokens, e.output_tokens, e.model, \
e.admission, e.kind, e.source, e.late, e.body"


def amounts_from(row: tuple[Any, ...], start: int = 0) -> Amounts:
    """`Amounts` from columns that begin at `start`."""
    return Amounts(*map(int, row[start : start + len(AMOUNTS)]))


def customer_from(row: tuple[Any, ...]) -> CustomerRow:
    """A row of `CUSTOMER` columns."""
    customer, revision, params, first_seen, last_seen, active_days = row[:6]
    return CustomerRow(
        customer, revision, params_from(params), first_seen, last_seen, amounts_from(row, 6), active_days
    )


def entry_from(row: tuple[Any, ...]) -> StoredEntry:
    """A row of `ENTRY` columns."""
    seq, rev, entry_id, customer, day, at_ms, cost, read, written, model, admission, kind, source, late, body = row
    usage = Usage.from_dict(json.loads(body))
    entry = Entry(entry_id, customer, day, at_ms, cost, read, written, model, admission, kind, source, usage)
    return StoredEntry(seq, rev, entry, late)
