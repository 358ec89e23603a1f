"""What a storage backend is asked, and what it must answer.

Storage sees none of the library's words: money is an int of nano-USD, time an int of milliseconds
UTC, a day the ordinal of a local date (`datetime.date.toordinal`), a customer's params are compiled
to a tuple of `Limit`. An answer is a function of the stored state, the operation and `now`, so
every backend gives the same one. The numbered rules in the docstrings are the contract;
`respan_guard.testing.BackendContract` holds a backend to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

from respan_guard.backends.facts import ANY, Expected
from respan_guard.backends.ops import (
    REPLAY_MS,
    Admit,
    Allowed,
    Conflict,
    Ended,
    Entry,
    Limit,
    Op,
    Outcome,
    Params,
    Put,
    Record,
    Recorded,
    Refused,
    Release,
    Renew,
    Stale,
    TooLate,
    Window,
)
from respan_guard.backends.rows import (
    AMOUNTS,
    HOUR_MS,
    HOURS_KEPT,
    Amounts,
    AuditRow,
    CustomerQuery,
    CustomerRow,
    Discrepancy,
    HoldRow,
    RecordQuery,
    RefusalRow,
    StoredEntry,
    StoreInfo,
    UsageQuery,
    UsageRow,
)

__all__ = [
    "AMOUNTS",
    "ANY",
    "HOURS_KEPT",
    "HOUR_MS",
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
    "Expected",
    "HoldRow",
    "Limit",
    "Op",
    "Outcome",
    "Params",
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
    "Told",
    "TooLate",
    "UsageQuery",
    "UsageRow",
    "Window",
]

Told: TypeAlias = Callable[[Sequence[Op], Sequence[Outcome]], None]
"""Who is told what became of operations that nobody waited for. It must not raise."""


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
    at_once: int = 1
    """How many batches a caller may have under way, without waiting for the first; they apply in the order given."""
    identity: str | None = None
    """Set by `open`: tells this store from another one under the same URL. None where nothing outlives a process."""
    place: str | None = None
    """Set by the constructor: names this store, its namespace too, alike however its URL is spelt, and no other one.
    Records that the store did not take wait under this name on disk. None: they wait under the URL as it is written."""
    default_timeout: ClassVar[float] = 0.25
    """Seconds that an operation may take where the user sets no `storage_timeout`."""

    def check_limits(self, limits: Sequence[Limit]) -> None:  # noqa: B027 - most stores keep them all
        """Refuse limits that this store can't keep. Called before `open` with those that the settings ask for.

        Raises:
            ConfigurationError: It can't keep one of them; the message says why, and what to use instead.
        """

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
        """What `apply` does, without a loop, from any thread. Only where `shared` is set.

        Raises:
            StorageUnavailable: The caller is a finalizer, and interrupted the store's own work on this thread.
        """
        raise TypeError(f"{type(self).__name__} is not a shared backend")

    def post_now(self, ops: Sequence[Op], now: int, told: Told | None = None) -> None:
        """Apply operations that nobody waits for, in order, from any thread and out of any finalizer.

        It never waits and never raises: what the store can't count is logged. Whoever asks the store after it sees
        it applied. Only where `shared` is set. `told` is called with what was applied and how it came out.
        """
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
        ended before is booked under the label, without its metadata. The same id later is a customer never seen.
        False if unknown.
        """

    @abstractmethod
    async def get(self, customer: str) -> CustomerRow | None:
        """One customer, or None if it was never put, admitted or booked on."""

    @abstractmethod
    async def customers(self, query: CustomerQuery) -> list[CustomerRow]:
        """A page of customers. Costs the page, not the customers, for every sort key; filters may cost more."""

    @abstractmethod
    async def count_customers(self, *, seen_since_ms: int | None = None, blocked: bool | None = None) -> int:
        """How many customers there are, or were seen since, or are (not) blocked. Reads no customer."""

    @abstractmethod
    async def standing(
        self, customer: str, limits: Sequence[Limit], model: str = "", now: int | None = None
    ) -> Allowed:
        """`used`, `held` and `windows` of the limits as an admit would see them. Changes nothing."""

    @abstractmethod
    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """Sums from the rollups, ordered by the fields of `by` or by `top`. Costs rollups, never entries.

        Totals over all customers, by day and by hour, and the customers of each day are kept in the transaction that
        keeps the customers' sums. A store whose writers must not wait for each other there may keep them in parts
        that are added up here.
        """

    @abstractmethod
    async def entries(self, query: RecordQuery) -> list[StoredEntry]:
        """Entries in order of the log, gap-free: none that commits later has a smaller `seq`.

        An entry that was revised stands at its newest place only.
        """

    @abstractmethod
    async def entry(self, customer: str, entry_id: str) -> StoredEntry | None:
        """One entry by its id, as the log has it now; None if it was never booked, or pruned. Costs one lookup."""

    @abstractmethod
    async def booked_on(self, customer: str, at_ms: int) -> str:
        """Under whom usage that ended at `at_ms` is booked: the customer, or its label if it was deleted since."""

    @abstractmethod
    async def holds(
        self, customer: str | None = None, *, state: str = "live", now: int | None = None, limit: int = 1000
    ) -> list[HoldRow]:
        """Holds that are "live" or "expired" (unspent and never ended), oldest expiry first."""

    @abstractmethod
    async def add_refusals(self, rows: Sequence[RefusalRow]) -> None:
        """Add counts of refusals; the same customer, reason and minute are summed.

        Those of a customer that was deleted in that minute or later are counted under the label.
        """

    @abstractmethod
    async def refusals(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40, limit: int = 10_000
    ) -> list[RefusalRow]:
        """Counts of refusals, by minute, newest first."""

    @abstractmethod
    async def refusal_sums(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40
    ) -> dict[str, int]:
        """Refusals by reason; `since_minute <= minute < until_minute`. For all customers it costs hours."""

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
    async def set_fact(self, space: str, key: str, value: str | None, *, expected: Expected = ANY) -> bool:
        """Compare and set a fact: a small text that is kept under a key, for leases, markers, switches.

        If what is stored under the key of that space equals `expected` (None: nothing is), store `value`
        instead (None: nothing) and answer True; else change nothing and answer False. With `ANY` it always
        is True. One atomic step: of several that expect the same at once, one finds it. Durable when answered,
        like a batch. After a failure it is unknown whether it was written, and to ask again with the same
        `expected` may answer False to the one who wrote it: compare what is there then.

        Facts belong to who writes them: nothing else here reads, prunes or deletes them (a key that names a
        customer outlives the customer, so name it by something that says nothing).

        Args:
            space: Whose facts, 1 to 64 bytes of UTF-8; a key in one space is none in another.
            key: 1 to 512 bytes of UTF-8, taken literally.
            value: Up to 262,144 bytes of UTF-8; None deletes.
            expected: What must be there now.

        Raises:
            InvalidInput: A text is too long, empty where it may not be, or has U+0000 or a lone surrogate in it.
        """

    @abstractmethod
    async def fact(self, space: str, key: str) -> str | None:
        """What is stored under the key now, and was acknowledged; None if nothing is.

        Raises:
            InvalidInput: As `set_fact`.
        """

    @abstractmethod
    async def facts(self, space: str, *, after: str = "", limit: int = 1000) -> list[tuple[str, str]]:
        """Up to `limit` keys and values of a space, keys above `after` in order of code points.

        The last key is the next page's `after`; that page costs its size. To read the keys that begin with
        something, begin after it and stop at the first that does not.

        Raises:
            InvalidInput: As `set_fact`.
        """

    @abstractmethod
    async def prune(self, before_day: int, *, limit: int = 1000) -> int:
        """Delete up to `limit` entries booked before `before_day`, only those behind every cursor; sums stay.

        The guard keeps records of 40 days, so no day that usage may still be booked on is ever asked for.

        Returns how many went; 0 when done. From the first call on, entries for days before it are `TooLate`.
        """

    @abstractmethod
    async def verify(self) -> list[Discrepancy]:
        """Recompute every sum from the entries, and compare. Empty if all is right.

        Checked: sums of each customer, model and day == what pruning kept + entries; a customer's totals == its
        days; a day's totals and number of customers == its customers'; an hour's totals == its entries, but for
        `requests`, which no entry has, and but for hours up to the last that lost an entry to pruning or that are
        older than `HOURS_KEPT`; the log covers the entries; no hold below 0; no hold that lives beyond its expiry by
        7 days.
        """

    @abstractmethod
    async def info(self) -> StoreInfo:
        """Facts and warnings about the store, for people."""
