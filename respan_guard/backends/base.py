"""What a storage backend is asked, and what it must answer.

Storage sees none of the library's words: money is an int of nano-USD, time an int of milliseconds
UTC, a day the ordinal of a local date (`datetime.date.toordinal`), a customer's params are compiled
to a tuple of `Limit`. An answer is a function of the stored state, the operation and `now`, so
every backend gives the same one. The numbered rules in the docstrings are the contract;
`respan_guard.testing.BackendContract` holds a backend to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from respan_guard.usage import Usage

__all__ = [
    "REPLAY_MS",
    "Admit",
    "Allowed",
    "Amounts",
    "AuditRow",
    "Backend",
    "Conflict",
    "CustomerQuery",
    "CustomerRow",
    "Discrepancy",
    "Ended",
    "Entry",
    "HoldRow",
    "Limit",
    "Op",
    "Outcome",
    "Put",
    "Record",
    "RecordQuery",
    "Recorded",
    "RefusalRow",
    "Refused",
    "Release",
    "Renew",
    "Stale",
    "StoreInfo",
    "StoredEntry",
    "TooLate",
    "UsageQuery",
    "UsageRow",
    "Window",
]

REPLAY_MS = 60_000
"""How long after its end an admission's id still answers with its first decision."""

Params: TypeAlias = Mapping[str, Any]
"""A customer's fields as JSON values; two are equal if they compare equal as dicts."""
Window: TypeAlias = tuple[int, int, int]
"""State of a rate: start of the current window (ms), hits in the one before, hits in the current one."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One cap, as storage sees it.

    Attributes:
        name: The field it comes from: "rate_limit", "period_budget", "total_budget", ...
        kind: "rate" (a sliding window), "span" (a run of days) or "total" (all days).
        metric: "requests", "cost" (nano-USD) or "tokens".
        amount: The cap, >= 0.
        window_ms: Of a rate, at most 31 days.
        first_day: Of a span, the first day in it.
        end_day: Of a span, the first day after it.
        scope: "customer", "customer+model", "model" or "all".
        key: Names the sum that counts for a span or total; made from the others.
    """

    name: str
    kind: str
    metric: str
    amount: int
    window_ms: int = 0
    first_day: int = 0
    end_day: int = 0
    scope: str = "customer"
    key: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        days = "" if self.kind == "total" else f"{self.first_day}-{self.end_day}"
        object.__setattr__(self, "key", f"{self.metric}:{days}")


@dataclass(slots=True)
class Admit:
    """Ask to do one piece of work. `id` is the caller's, so it may be sent again after a lost answer.

    Rules (first that applies):
        1. Known id (its hold lives, or ended or expired less than `REPLAY_MS` ago): the first
           answer again, nothing changes.
        2. `revision` is not the customer's: `Stale`, nothing changes.
        3. Not `day_from_ms <= now < day_to_ms`: `Stale`, nothing changes.
        4. All limits are evaluated at `now`. With w = the hold in the limit's metric, a limit refuses iff
           requests: used + requests > amount;
           cost, tokens: used + held + w > amount or used + held >= amount; never if `free` and w is 0.
           The reason is "rate" for a rate, "held" if only others' holds stand in the way
           (used + w <= amount and used < amount), else "exhausted".
        5. Any limit refuses: `Refused`. Nothing changes, nothing is remembered.
        6. Else rates are rolled and counted, requests are added to the day's sum, one hold row is
           written (even if it holds nothing): `Allowed`.
    A hold is never shrunk. Rates are kept per window length, without the amount.
    """

    id: str
    customer: str
    revision: str
    day: int
    day_from_ms: int
    day_to_ms: int
    limits: tuple[Limit, ...]
    model: str = ""
    requests: int = 1
    cost: int = 0
    tokens: int = 0
    ttl_ms: int = 600_000
    free: bool = False


@dataclass(slots=True)
class Entry:
    """An entry of the ledger. Its id is unique per customer.

    Attributes:
        day: The local date it is booked on; fixed by the caller before the first send.
        at_ms: When the call ended.
        cost: nano-USD; None is unknown, adds 0 and is shown as unpriced. Negative only in adjustments.
        model: As it was asked for, normalised.
        admission: The admission whose hold it draws from.
        kind: "usage", "adjustment" or "presumed".
        usage: What is kept for reports beside the amounts.
    """

    id: str
    customer: str
    day: int
    at_ms: int
    cost: int | None
    input_tokens: int = 0
    output_tokens: int = 0
    model: str = ""
    admission: str | None = None
    kind: str = "usage"
    source: str = "manual"
    usage: Usage = field(default_factory=Usage)

    @property
    def tokens(self) -> int:
        """What counts for a limit on tokens."""
        return self.input_tokens + self.output_tokens


@dataclass(slots=True)
class Record:
    """Book an entry.

    Rules (first that applies):
        1. `entry.day` is pruned: `TooLate`, because a replay could not be told from a new one.
        2. The customer was deleted and `entry.at_ms` is not after that: booked under the label that
           took the customer's place then.
        3. The id is known: the first answer again, nothing changes or is drawn; `conflict` is set if
           the amounts differ (cost, input_tokens or output_tokens; a presumed entry never conflicts).
        4. Else the day's sums grow by cost, tokens and one call, and the entry goes to the log.
        5. If the admission's hold lives, the hold shrinks by cost and tokens, not below 0. Else the
           entry is `late`, and if an entry "presumed:ADMISSION" of the customer is stored, that one
           shrinks by the cost, not below 0, in its own day, gets the next `rev` and a new place in the log.
    Never refused by a limit, a revision, a block or a missing customer: the money is spent.
    """

    entry: Entry


@dataclass(slots=True)
class Release:
    """End an admission. Live: "released". Expired and not ended: "expired". Else "gone". Sums never change."""

    customer: str
    id: str


@dataclass(slots=True)
class Renew:
    """Let a live hold live until now + ttl at least: "renewed". Expired, ended or unknown: "gone"."""

    customer: str
    id: str
    ttl_ms: int


Op: TypeAlias = Admit | Record | Release | Renew


@dataclass(slots=True)
class Allowed:
    """Admitted. `used` and `held` are per limit, in the order of the limits, before this admission.

    `windows` has the state of each rate, in the order of the rates, after rolling and before counting.
    """

    now: int
    used: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    windows: tuple[Window, ...] = ()


@dataclass(slots=True)
class Refused:
    """Not admitted. `reasons` has per limit None (it would allow), "rate", "held" or "exhausted"."""

    now: int
    reasons: tuple[str | None, ...]
    used: tuple[int, ...]
    held: tuple[int, ...]
    windows: tuple[Window, ...] = ()


@dataclass(slots=True)
class Stale:
    """The caller's policy or day is out of date: what is stored, and the store's time."""

    now: int
    revision: str
    params: Params | None


@dataclass(slots=True)
class Recorded:
    """Booked: what is stored under the id."""

    new: bool
    cost: int | None
    day: int
    late: bool = False
    conflict: bool = False


@dataclass(slots=True)
class TooLate:
    """The entry's day is pruned; it was not booked."""

    pruned_to: int


@dataclass(slots=True)
class Ended:
    """Answer to release and renew: "released", "expired", "renewed" or "gone"."""

    state: str


Outcome: TypeAlias = Allowed | Refused | Stale | Recorded | TooLate | Ended


@dataclass(frozen=True, slots=True)
class Put:
    """The customer's params are stored under `revision`; `changed` is False if they were equal."""

    revision: str
    changed: bool


@dataclass(frozen=True, slots=True)
class Conflict:
    """`if_revision` is not the stored one."""

    revision: str
    params: Params | None


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
    """What `respan-guard check` says about a store."""

    url: str
    schema: str
    durable: bool
    facts: Mapping[str, str]
    warnings: tuple[str, ...] = ()


class Backend(ABC):
    """Where customers, counters, holds and entries live.

    One instance belongs to one event loop: it is opened, used and closed there. An instance that sets
    `shared` is a locked store without connections and may be used from any thread and loop.

    Errors of the driver are translated once, inside the backend, to `BackendError`s.
    """

    shared: ClassVar[bool] = False
    """Whether one instance serves every loop and thread; `apply_now` is then available."""
    server_clock: ClassVar[bool] = False
    """Whether `now` is read from the server when it is not given."""
    default_timeout: ClassVar[float] = 0.25
    """Seconds that an operation may take where the user sets no `storage_timeout`."""

    @abstractmethod
    async def open(self) -> None:
        """Connect, and bring the schema up to date. Idempotent.

        Raises:
            ConfigurationError: The URL or the environment can't work.
            BackendError: The store is unreachable, damaged, read-only or newer than the code.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give every connection back. Idempotent; an opened instance is always closed."""

    def abandon(self) -> None:  # noqa: B027 - a store without connections has nothing to let go of
        """Let go of connections whose loop is gone or whose process forked; from any thread, never blocks."""

    def apply_now(self, ops: Sequence[Op], now: int) -> list[Outcome]:
        """What `apply` does, without a loop, from any thread. Only where `shared` is set."""
        raise TypeError(f"{type(self).__name__} is not a shared backend")

    @abstractmethod
    async def apply(self, ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        """Apply operations in order, in one transaction, and answer each.

        * Each op applies wholly or not at all; the batch is acknowledged after it is durable.
        * `now` never goes back on one instance: an earlier one counts as the latest seen.
        * A failure fails the whole batch: for each op it is then unknown whether it was applied,
          and the caller may send it again under the same id.

        Args:
            ops: What to do.
            now: Milliseconds; None for the server's own clock (`server_clock`).

        Raises:
            BackendError: Nothing is known about any op of the batch.
            CounterOverflow: A sum would pass 9.0e15; nothing was applied.
        """

    @abstractmethod
    async def put(
        self, customer: str, params: Params, *, if_revision: str | None = None, actor: str = "", now: int | None = None
    ) -> Put | Conflict:
        """Store a customer's params under a new random revision; equal params change and write nothing.

        Sums and holds are never touched. A change adds a row to the audit, action "put".
        """

    @abstractmethod
    async def delete(self, customer: str, *, actor: str = "", now: int | None = None) -> bool:
        """Forget who a customer was, keep the sums: params, rates and holds go, entries and sums move to a
        fresh random label ("deleted-..."), and an audit row without personal data says so. Usage of calls that
        ended before is booked under the label. The same id later is a customer never seen. False if unknown.
        """

    @abstractmethod
    async def get(self, customer: str) -> CustomerRow | None:
        """One customer, or None if it was never put, admitted or booked on."""

    @abstractmethod
    async def customers(self, query: CustomerQuery) -> list[CustomerRow]:
        """A page of customers. Costs the page, not the customers, for every sort key."""

    @abstractmethod
    async def standing(
        self, customer: str, limits: Sequence[Limit], model: str = "", now: int | None = None
    ) -> Allowed:
        """`used`, `held` and `windows` of the limits as an admit would see them. Changes nothing."""

    @abstractmethod
    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """Sums from the daily rollups, ordered by the fields of `by`. Costs days, not entries."""

    @abstractmethod
    async def entries(self, query: RecordQuery) -> list[StoredEntry]:
        """Entries in order of the log, gap-free: none that commits later has a smaller `seq`.

        An entry that was revised stands at its newest place only.
        """

    @abstractmethod
    async def holds(
        self, customer: str | None = None, *, state: str = "live", now: int | None = None, limit: int = 1000
    ) -> list[HoldRow]:
        """Holds that are "live" or "expired" (unspent and never ended), oldest expiry first."""

    @abstractmethod
    async def add_refusals(self, rows: Sequence[RefusalRow]) -> None:
        """Add counts of refusals; the same customer, reason and minute are summed."""

    @abstractmethod
    async def refusals(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40, limit: int = 10_000
    ) -> list[RefusalRow]:
        """Counts of refusals, by minute, newest first."""

    @abstractmethod
    async def add_audit(self, row: AuditRow) -> None:
        """Add a row to the audit (`seq` is given by the store)."""

    @abstractmethod
    async def audit(
        self, *, customer: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[AuditRow]:
        """The audit, newest first, of seq below `before`."""

    @abstractmethod
    async def cursor(self, name: str) -> int | None:
        """How far the reader `name` has read the log; None if it never said."""

    @abstractmethod
    async def set_cursor(self, name: str, seq: int) -> None:
        """Say that the reader `name` has read the log up to and with `seq`."""

    @abstractmethod
    async def prune(self, before_day: int, *, limit: int = 1000) -> int:
        """Delete up to `limit` entries booked before `before_day`, only those behind every cursor; sums stay.

        Returns how many went; 0 when done. From the first call on, entries for days before it are `TooLate`.
        """

    @abstractmethod
    async def verify(self) -> list[Discrepancy]:
        """Recompute every sum from the entries, and compare. Empty if all is right.

        Checked: sums of each customer, model and day == what pruning kept + entries; a customer's totals == its
        days; the log covers the entries; no hold below 0; no hold that lives beyond its expiry by 7 days.
        """

    @abstractmethod
    async def info(self) -> StoreInfo:
        """Facts and warnings about the store, for people."""
