"""Values of the contract as columns, and back."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from respan_guard.backends.base import AMOUNTS, Allowed, Amounts, CustomerRow, Entry, StoredEntry
from respan_guard.backends.texts import params_from
from respan_guard.usage import Usage

__all__ = [
    "COLUMNS",
    "CUSTOMER",
    "ENTRY",
    "FROM_ENTRIES",
    "adding",
    "amounts_from",
    "answer_from",
    "answer_text",
    "customer_from",
    "entry_from",
    "hash_of",
]

COLUMNS = ", ".join(AMOUNTS)
"""Columns of `Amounts`, in the order of its fields."""
FROM_ENTRIES = {
    "calls": "kind <> 'adjustment'",
    "cost": "coalesce(cost, 0)",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cache_read_tokens": "cache_read_tokens",
    "unpriced": "cost IS NULL",
    "errors": "status = 'error'",
    "latency_ms": "coalesce(latency_ms, 0)",
    "timed": "latency_ms IS NOT NULL",
    "ttft_ms": "coalesce(ttft_ms, 0)",
    "ttft_calls": "ttft_ms IS NOT NULL",
}
"""What an entry adds to each of them but `requests`."""
CUSTOMER = f"customer, revision, params, first_seen, last_seen, active_days, {COLUMNS}"
ENTRY = (
    "entries.seq, entries.rev, entries.id, customers.customer, entries.day, entries.at_ms, entries.cost, "
    "entries.input_tokens, entries.output_tokens, entries.model, entries.admission, entries.kind, entries.source, "
    "entries.late, entries.body"
)


def amounts_from(row: tuple[Any, ...], start: int = 0) -> Amounts:
    """`Amounts` from columns that begin at `start`."""
    return Amounts(*row[start : start + len(AMOUNTS)])


def adding(table: str, key: str, columns: str = COLUMNS) -> str:
    """The statement that adds sums to a table's row, or makes it: of the columns of `key`, then `columns`."""
    places = ", ".join(["?"] * len(f"{key}, {columns}".split(", ")))
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in columns.split(", "))
    return f"INSERT INTO {table} ({key}, {columns}) VALUES ({places}) ON CONFLICT ({key}) DO UPDATE SET {sums}"  # noqa: S608


def answer_text(outcome: Allowed) -> str:
    """An admission's answer, for when it is asked again."""
    # Lists of integers print as JSON: a third of the encoder's time, twice for each admission.
    windows = [list(window) for window in outcome.windows]
    return f"[{outcome.now}, {list(outcome.used)}, {list(outcome.held)}, {windows}]"


def answer_from(text: str) -> Allowed:
    """What `answer_text` wrote."""
    now, used, held, windows = json.loads(text)
    return Allowed(now, tuple(used), tuple(held), tuple((start, prev, cur) for start, prev, cur in windows))


def customer_from(row: tuple[Any, ...]) -> CustomerRow:
    """A row of `CUSTOMER` columns."""
    customer, revision, params, first_seen, last_seen, active_days = row[:6]
    return CustomerRow(
        customer, revision, params_from(params), first_seen, last_seen, amounts_from(row, 6), active_days
    )


def entry_from(row: tuple[Any, ...]) -> StoredEntry:
    """A row of `ENTRY` columns."""
    seq, rev, entry_id, customer, day, at_ms, cost, tokens_in, tokens_out, model, admission, kind, source, late = row[
        :14
    ]
    usage = Usage.from_dict(json.loads(row[14]))
    return StoredEntry(
        seq,
        rev,
        Entry(entry_id, customer, day, at_ms, cost, tokens_in, tokens_out, model, admission, kind, source, usage),
        bool(late),
    )


def hash_of(epoch: str, customer: str) -> str:
    """A deleted customer's identifier, recognisable but not readable. Keyed, so that files can't be compared."""
    return hashlib.blake2b(customer.encode(), key=epoch.encode(), digest_size=16).hexdigest()
