"""What storage tells: rows, and the queries they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from respan_guard.backends.ops import Entry, Params

__all__ = [
    "Amounts",
    "AuditRow",
    "CustomerQuery",
    "CustomerRow",
    "Discrepancy",
    "HoldRow",
    "RecordQuery",
    "RefusalRow",
    "StoreInfo",
    "StoredEntry",
    "UsageQuery",
    "UsageRow",
]


@dataclass(slots=True)
class Amounts:
    """Sums over entries and admissions. `cost` leaves unpriced calls out; `unpriced` counts them."""

    requests: int = 0
    calls: int = 0
    cost: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    unpriced: int = 0
    errors: int = 0

    def add(self, other: Amounts) -> None:
        """Add `other`, field by field."""
        self.requests += other.requests
        self.calls += other.calls
        self.cost += other.cost
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cache_read_tokens += other.cache_read_tokens
        self.unpriced += other.unpriced
        self.errors += other.errors


@dataclass(slots=True)
class StoredEntry:
    """An entry as the log has it. Treat it as a value."""

    seq: int
    rev: int
    entry: Entry
    late: bool = False


@dataclass(frozen=True, slots=True)
class CustomerRow:
    """A customer that was put or ever admitted or booked on, with its sums of all time.

    `revision` is "" and `params` None for one that never had params of its own.
    """

    customer: str
    revision: str
    params: Params | None
    first_seen_ms: int
    last_seen_ms: int
    totals: Amounts
    active_days: int


@dataclass(frozen=True, slots=True)
class CustomerQuery:
    """Which customers, and in which order.

    Attributes:
        search: A part of the identifier, name or email, any case; taken literally.
        sort: "customer", "name", "first_seen", "last_seen", "requests", "calls", "cost" or "tokens".
        after: The last row of the page before, as its (sort value, customer); None for the first page.
    """

    search: str = ""
    sort: str = "customer"
    descending: bool = False
    after: tuple[str | int, str] | None = None
    limit: int = 50


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Daily rollups: `first_day <= day < end_day`, summed over what is not in `by`.

    Attributes:
        by: Any of "customer", "model", "day".
    """

    first_day: int = 0
    end_day: int = 1 << 40
    customer: str | None = None
    model: str | None = None
    by: tuple[str, ...] = ("customer",)
    limit: int = 10_000


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A group of rollups; what was not asked for in `by` is None."""

    amounts: Amounts
    customer: str | None = None
    model: str | None = None
    day: int | None = None


@dataclass(frozen=True, slots=True)
class RecordQuery:
    """Which entries, newest or oldest first by place in the log.

    Attributes:
        after: Only entries behind (`descending`: before) this place in the log.
        since_ms: Only entries that ended at or after it.
        until_ms: Only entries that ended before it.
        unpriced: Only entries without a price (True) or with one (False).
    """

    customer: str | None = None
    model: str | None = None
    provider: str | None = None
    kind: str | None = None
    source: str | None = None
    status: str | None = None
    trace_id: str | None = None
    unpriced: bool | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    after: int | None = None
    descending: bool = False
    limit: int = 100


@dataclass(frozen=True, slots=True)
class HoldRow:
    """An admission's hold. `state` is "live", "ended" or "expired"; an expired one shows what it never spent."""

    customer: str
    id: str
    day: int
    model: str
    cost: int
    tokens: int
    expires_ms: int
    state: str


@dataclass(frozen=True, slots=True)
class RefusalRow:
    """How often a customer was refused for a reason within a minute."""

    customer: str
    reason: str
    minute: int
    count: int


@dataclass(frozen=True, slots=True)
class AuditRow:
    """What somebody changed by hand."""

    at_ms: int
    customer: str
    action: str
    actor: str
    before: Params | None
    after: Params | None
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """Something `verify` found: what, where, and the two figures that should be one."""

    what: str
    where: str
    stored: int | str
    recomputed: int | str


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What `respan-guard check` says about a store.

    Attributes:
        durable: What is acknowledged survives a power cut.
        problems: Why no budget can rest on the store; with one, the check fails. They are among the warnings, too.
    """

    url: str
    schema: str
    durable: bool
    facts: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
