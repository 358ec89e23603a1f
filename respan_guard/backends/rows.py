"""What storage tells: rows, and the queries they answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from respan_guard.backends.ops import Entry, Params
from respan_guard.errors import InvalidInput

__all__ = [
    "AMOUNTS",
    "HOURS_KEPT",
    "HOUR_MS",
    "RECORDS_COUNTED",
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
    "names_of",
    "records_text",
]


HOUR_MS = 3_600_000
HOURS_KEPT = 60 * 24
"""Hours that a store keeps sums of, at least; older ones may be gone."""

RECORDS_COUNTED = 100_000
"""Records that a store counts one by one for people; of more it tells how many places its log has."""


@dataclass(slots=True)
class Amounts:
    """Sums over entries and admissions. `cost` leaves unpriced calls out; `unpriced` counts them.

    `latency_ms` and `ttft_ms` are sums over the entries that have one, `timed` and `ttft_calls` count those.
    """

    requests: int = 0
    calls: int = 0
    cost: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    unpriced: int = 0
    errors: int = 0
    latency_ms: int = 0
    timed: int = 0
    ttft_ms: int = 0
    ttft_calls: int = 0

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
        self.latency_ms += other.latency_ms
        self.timed += other.timed
        self.ttft_ms += other.ttft_ms
        self.ttft_calls += other.ttft_calls


AMOUNTS = tuple(Amounts.__dataclass_fields__)
"""Names of the sums, in order: what a store's columns are called."""


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
        blocked: Only those whose params say `blocked` (True), or only the others (False).
        seen_since_ms: Only those last seen at or after it.
        among: Only these, as far as they are known. Costs so many customers.
    """

    search: str = ""
    sort: str = "customer"
    descending: bool = False
    after: tuple[str | int, str] | None = None
    limit: int = 50
    blocked: bool | None = None
    seen_since_ms: int | None = None
    among: tuple[str, ...] | None = None

    @property
    def is_vain(self) -> bool:
        """Whether no customer can match: none has such a text, or a line break in a field."""
        return "\n" in self.search or _odd(self.search)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Rollups, summed over what is not in `by`: daily ones, or hourly ones where `by` has "hour".

    * Daily: `first_day <= day < end_day`, by any of "customer", "model", "day". Neither grouped nor filtered by
      customer, it is read from totals over all customers, which are kept with them: it costs days and models.
    * Hourly: `first_hour <= hour < end_hour`, by "hour" alone or with "model", over all customers. An entry is in
      the UTC hour (`ms // HOUR_MS`) it ended in, requests in the one they were admitted in. At least the last
      `HOURS_KEPT` hours are there.
    * Hourly of some (`among`), and then by "customer", too: no sums of these are kept, so they are added up from the
      entries. Without requests, and without what was pruned; it costs the entries of those hours.

    Attributes:
        by: What to group by.
        among: Only these customers. Costs their rollups, whatever others have.
        top: An amount, or "tokens" (input and output): the largest first, equal ones in order of `by`. None for all
            in order of `by`.
        least: Only groups of which `top` is at least that. Of customers, those who can't have so much, by what they
            used in all time, need not be looked at.
        distinct: Whether rows tell the number of different customers in them. Of a "day" it is kept, like totals;
            any other costs the customers of those days. Not for hours.
    """

    first_day: int = 0
    end_day: int = 1 << 40
    customer: str | None = None
    model: str | None = None
    by: tuple[str, ...] = ("customer",)
    limit: int = 10_000
    top: str | None = None
    distinct: bool = False
    first_hour: int = 0
    end_hour: int = 1 << 40
    among: tuple[str, ...] | None = None
    least: int | None = None

    @property
    def of_all(self) -> bool:
        """Whether it is over all customers together."""
        return self.customer is None and self.among is None and "customer" not in self.by

    @property
    def by_day_alone(self) -> bool:
        """Whether it is of days as a whole: of those, the number of different customers is kept."""
        return self.by == ("day",) and self.model is None

    def check(self) -> None:
        """Refuse what can't be asked, for every store alike.

        Raises:
            InvalidInput: `by` or `top` names something else, or hours are asked of a customer.
        """
        hourly = "hour" in self.by
        known = ("customer", "model", "hour" if hourly else "day")
        alone = self.customer is not None or self.distinct or ("customer" in self.by and self.among is None)
        if not set(self.by) <= set(known) or (hourly and alone):
            raise InvalidInput(
                "usage is grouped by customer, model and day, or over all customers or some by hour and model;"
                f" got {', '.join(self.by)}",
                field="by",
            )
        if (self.top is not None or self.least is not None) and self.top not in (*AMOUNTS, "tokens"):
            raise InvalidInput(f"top must be one of {', '.join(AMOUNTS)}, tokens; got {self.top!r}", field="top")


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A group of rollups; what was not asked for in `by` or by `distinct` is None."""

    amounts: Amounts
    customer: str | None = None
    model: str | None = None
    day: int | None = None
    hour: int | None = None
    customers: int | None = None


@dataclass(frozen=True, slots=True)
class RecordQuery:
    """Which entries, newest or oldest first by place in the log.

    Attributes:
        after: Only entries behind (`descending`: before) this place in the log.
        stop: Only entries up to and with (`descending`: from and with) this place, so that a search for what is rare
            looks at so many places and no more.
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
    stop: int | None = None
    descending: bool = False
    limit: int = 100

    @property
    def is_vain(self) -> bool:
        """Whether no entry can match: none has such a text."""
        return _odd(self.customer, self.model, self.provider, self.kind, self.source, self.status, self.trace_id)


def names_of(among: tuple[str, ...]) -> list[str]:
    """Those of some customers whom a store may know, each once and in order."""
    return sorted({name for name in among if not _odd(name)})


def _odd(*texts: str | None) -> bool:
    """Whether a text has what no store keeps: U+0000, or half of a surrogate pair."""
    return any(text is not None and _ODD.search(text) is not None for text in texts)


_ODD = re.compile("[\x00\ud800-\udfff]")


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
    """How often a customer was refused for a reason within a minute.

    Raises:
        InvalidInput: The count is below 1.
    """

    customer: str
    reason: str
    minute: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidInput(f"count must be at least 1, got {self.count!r}", field="count")


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


def records_text(counted: int, places: int) -> str:
    """How many records there are, for people: exact up to `RECORDS_COUNTED`, so that it takes no longer with more."""
    return str(counted) if counted <= RECORDS_COUNTED else f"about {places}"


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
