"""The guard: who may go on, what it cost, and where everybody stands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from respan_guard.admission import Admission, Refusal
from respan_guard.admitting import Admissions
from respan_guard.backends.base import Entry, Record
from respan_guard.bookings import Bookings
from respan_guard.clock import store_counts
from respan_guard.context import Slot, slot_of
from respan_guard.customer import Customer, normalise_identifier
from respan_guard.customers import Customers
from respan_guard.decision import Status
from respan_guard.entering import Admitting, entered
from respan_guard.errors import LimitExceeded
from respan_guard.estimates import Estimator
from respan_guard.exporting import Exporting
from respan_guard.failover import Failover
from respan_guard.homes import make_homes
from respan_guard.observing import Gauges
from respan_guard.opening import Opening
from respan_guard.policies import Policies
from respan_guard.pricing import PriceBook
from respan_guard.recorder import Ids, Recorder
from respan_guard.renewal import Renewer
from respan_guard.reports import CustomerReport, RefusalLog, Reports, UsageReport
from respan_guard.settings import GuardOptions, Settings, mask_url
from respan_guard.switch import Switch
from respan_guard.usage import Usage, UsageRecord

if TYPE_CHECKING:
    from respan_guard.backends.base import Backend, Discrepancy, StoreInfo
    from respan_guard.blocking import BlockingGuard
    from respan_guard.lanes import Lane

__all__ = ["Guard"]

C = TypeVar("C")


class Guard(Opening, Exporting):
    """Enforces each customer's rate limits and budgets, and keeps one priced record of every call.

    One guard works from any event loop and any thread. `async with guard:` opens and closes it, the middleware
    does so through the app's lifespan, and a guard that was never opened opens itself on first use.

    Args:
        storage: Where everything is kept: "memory://", "sqlite:///guard.db", ...
        **options: See `GuardOptions`. Keyword, else environment `RESPAN_GUARD_*`, else `respan_guard.toml`.

    Raises:
        ConfigurationError: An option is unknown or its value can't work.
    """

    def __init__(self, storage: str | None = None, **options: Unpack[GuardOptions]) -> None:
        self.settings = settings = Settings.load(storage=storage, **options)
        self.clock = settings.clock
        self.prices = PriceBook(settings.prices, clock=settings.clock)
        self.ids, self.renewer = Ids(), Renewer(self.clock, int(settings.hold_ttl * 1000))
        self.policies = Policies(settings)
        self.estimator, self.recorder = Estimator(settings, self.prices), Recorder(self.prices, self.ids)
        self._off, self._offset = settings.mode == "off", 0
        self.switch = Switch(self)
        self._homes = make_homes(settings, self.policies.limits(self.now_ms()), self._on_open, self._on_fork)
        self.journal = self._homes.journal
        self.storage_timeout = settings.storage_timeout or self._homes.backend_class.default_timeout
        self.fork_mark = ""  # tells what this process numbers from what its parent does, if it was forked
        self.refusals, self.failover = RefusalLog(self.clock, self._homes.lane), Failover(self, self._homes)
        self.admissions = Admissions(self)
        self.customers, self.bookings = Customers(self), Bookings(self)
        self._gauges, self._reports = Gauges(self._homes, self.renewer), Reports(self)
        Exporting.__init__(self)

    async def flush(self) -> None:
        """Return when everything recorded so far is stored.

        Raises:
            StorageUnavailable: Storage did not take it in time; it is kept and tried again.
        """
        if not self._off:
            self.recorder.hand_on()
            await self.refusals.flush()
            await self._homes.flush()

    @cached_property
    def sync(self) -> BlockingGuard:
        """The same methods, blocking, for threads and scripts."""
        from respan_guard.blocking import BlockingGuard  # one layer up

        return BlockingGuard(self, self._homes)

    def admit(self, customer_identifier: str | int, *, estimate: Decimal | Usage | None = None) -> Admitting:
        """Let a customer in, or raise.

        `async with guard.admit(id) as admission:` ends with the block. `await guard.admit(id)` inside a request
        binds the admission to the request: the middleware ends it, adds the headers and renders the refusal.
        Inside another admission of the same customer, only the outermost counts against the rate.

        Args:
            customer_identifier: Whom the work is done for.
            estimate: What it may cost at most: USD, or a usage to be priced. It is held until the end.

        Raises:
            RateLimitExceeded: Too many requests; `.retry_after` says when to try again.
            BudgetExceeded: The budget is spent, or full because of calls in flight (`.decision.transient`).
            CustomerBlocked: The customer is blocked.
            CustomerUnknown: The customer was never put, and `unknown_customers="refuse"`.
            InvalidIdentifier: It is no usable identifier.
            UnpricedModel: The estimate is for a model without a price, and a budget applies.
            StorageUnavailable: Storage gave no answer, and the customer has limits that then fail closed.
        """
        return Admitting(self, customer_identifier, estimate)

    async def try_admit(
        self, customer_identifier: str | int, *, estimate: Decimal | Usage | None = None
    ) -> Admission | Refusal:
        """What `await admit(...)` does, but a refusal is returned, not raised."""
        try:
            return await self.admit(customer_identifier, estimate=estimate)
        except LimitExceeded as refused:
            return Refusal(refused.decision)

    def current(self) -> Admission | None:
        """The admission in force here, or None."""
        return None if (slot := slot_of(self)) is None else slot.in_force

    @contextmanager
    def on_behalf_of(self, customer_identifier: str | int) -> Generator[None]:
        """Name the customer for the code inside: what it records is charged to it, or to its admission around.

        Tasks (and `asyncio.to_thread`) started inside keep the name for good: start workers that serve others outside.
        Other threads and executors begin with nobody, as context variables do: enter it in them. Do not yield
        inside: others run in the context of a generator that waits, and endpoints never see that of a sync dependency.

        Raises:
            InvalidIdentifier: It is no usable identifier.
        """
        with entered(Slot(self, customer=self.admissions.named(customer_identifier))):
            yield

    def wrap(self, client: C, *, customer: str | int | None = None, include_usage: bool = True) -> C:
        """The same client of `openai` or `anthropic`, guarded call by call; see `respan_guard.clients`.

        Args:
            client: `OpenAI`, `AsyncOpenAI`, `Anthropic`, `AsyncAnthropic`, or Azure's.
            customer: Whose all its calls are; None for whoever is admitted or named where each is made.
            include_usage: Whether chat streams are asked for usage; who did not ask for it does not see it.

        Raises:
            ConfigurationError: It is no such client.
        """
        from respan_guard.clients import wrap

        return wrap(self, client, customer, include_usage=include_usage)

    def transport(self, inner: Any = None, **options: Any) -> Any:
        """A guarded transport around `inner`, for an HTTP client of your own; options as in `wrap`."""
        from respan_guard.clients import make_transport

        return make_transport(self, inner, sync=True, **options)

    def async_transport(self, inner: Any = None, **options: Any) -> Any:
        """What `transport` is, for event loops."""
        from respan_guard.clients import make_transport

        return make_transport(self, inner, sync=False, **options)

    async def record(
        self, usage: Usage, customer_identifier: str | int | None = None, *, entry_id: str | None = None
    ) -> None:
        """Record a call. Inside an admission it is charged to it. It is safe once this returns.

        Args:
            usage: What the call consumed; priced if it has no cost.
            customer_identifier: Whose it is; None for the customer in force here, else nobody's (unattributed).
            entry_id: An id of your own; recording it again for the same customer changes nothing.

        Raises:
            StorageUnavailable: Neither storage nor the journal took it at once; it is still tried.
        """
        if await self.switch.is_off():
            return
        entry, _ = self._entry_here(usage, customer_identifier, entry_id)
        await self._homes.lane().record(entry)

    def record_soon(
        self, usage: Usage, customer_identifier: str | int | None = None, *, entry_id: str | None = None
    ) -> None:
        """What `record` does, without waiting: from any thread, never blocks. `flush` tells when it is stored."""
        if not self.switch.off:
            entry, admission = self._entry_here(usage, customer_identifier, entry_id)
            if admission is not None:
                admission.book(entry)  # in its own inbox, where its release follows; this may be another thread
            else:
                self._homes.lane().post(Record(entry))

    def _entry_here(
        self, usage: Usage, customer_identifier: str | int | None, entry_id: str | None
    ) -> tuple[Entry, Admission | None]:
        admission = self.current()
        customer = None if customer_identifier is None else normalise_identifier(customer_identifier)
        own_id = None if entry_id is None else f"own:{entry_id}"
        if admission is not None and customer in (None, admission.customer_identifier):
            return admission.entry(usage, "manual", entry_id=own_id), admission
        if customer is None:
            customer = ((slot := slot_of(self)) and slot.customer_identifier) or ""
        return self.make_entry(usage, customer, source="manual", entry_id=own_id), None

    def make_entry(self, usage: Usage, customer: str, **how: Any) -> Entry:
        """The ledger's entry of a call; see `Recorder.entry`."""
        return self.recorder.entry(usage, customer, self.policies.get(customer).policy, self.now_ms(), **how)

    async def put_customer(self, customer: Customer, *, actor: str = "") -> Customer:
        """Store a customer's limits and profile. They hold from the next admission on, in every process.

        Raises:
            StorageUnavailable: Storage gave no answer; it may still be stored, and it is safe to ask again.
        """
        return await self.customers.put(customer, actor=actor)

    async def get_customer(self, customer_identifier: str | int) -> Customer | None:
        """A customer as stored; None if it was never put or seen."""
        return await self.customers.get(customer_identifier)

    async def update_customer(self, customer_identifier: str | int, *, actor: str = "", **changes: Any) -> Customer:
        """Change single fields of a customer; None removes one.

        Raises:
            InvalidInput: A field is unknown or its value can't work; nothing was changed.
        """
        return await self.customers.update(customer_identifier, changes, actor=actor)

    async def delete_customer(self, customer_identifier: str | int, *, actor: str = "") -> bool:
        """Erase who a customer was and keep the sums under a random label. False if there is none."""
        return await self.customers.delete(customer_identifier, actor=actor)

    async def list_customers(
        self,
        *,
        search: str = "",
        sort: str = "customer",
        descending: bool = False,
        limit: int = 50,
        after: CustomerReport | None = None,
    ) -> list[CustomerReport]:
        """A page of customers with what they used. `after` is the last of the page before."""
        return await self._reports.customers(search, sort, descending, limit, after)

    async def adjust(self, customer_identifier: str | int, amount: Decimal, reason: str, *, actor: str = "") -> None:
        """Book a correction: negative gives budget back, positive takes it. An entry of its own, and audited."""
        await self.customers.adjust(customer_identifier, amount, reason, actor=actor)

    async def status(self, customer_identifier: str | int) -> Status:
        """Where a customer stands: every limit with used, held, remaining and when it resets."""
        return await self._reports.status(normalise_identifier(customer_identifier))

    def records(
        self,
        customer_identifier: str | int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        **filters: Any,
    ) -> AsyncIterator[UsageRecord]:
        """Usage records, oldest first in the order they were stored.

        Args:
            customer_identifier: Only this customer's.
            since: Only calls that ended at or after it (aware).
            until: Only calls that ended before it (aware).
            **filters: Any of model, provider, kind, source, status, trace_id, unpriced.
        """
        return self._reports.records(customer_identifier, since, until, filters)

    async def usage(
        self,
        *by: str,
        customer_identifier: str | int | None = None,
        model: str | None = None,
        since: date | None = None,
        until: date | None = None,
    ) -> list[UsageReport]:
        """Sums of the daily rollups by any of "customer", "model", "day"; `until` is the day after the last."""
        return await self._reports.usage(by or ("customer",), customer_identifier, model, since, until)

    async def verify(self) -> list[Discrepancy]:
        """Recompute every sum from the records and compare. Empty if all is right."""
        return await self.lane().call(lambda backend: backend.verify(), None)

    async def prune(self, before: date, progress: Callable[[int], None] | None = None) -> int:
        """Delete records booked before a day, at least 40 days ago; sums stay. Returns how many went."""
        return await self._reports.prune(before, progress)

    async def info(self) -> StoreInfo:
        """Facts and warnings about the store."""
        return await self.lane().call(lambda backend: backend.info())

    def now_ms(self) -> int:
        """The store's time, as well as it is known."""
        return self.clock.now_ms() + self._offset

    def time_of_change(self, backend: Backend) -> int | None:
        """What a change of a customer is timed with; None where the store's own clock counts: this one may be wrong."""
        return None if store_counts(self.clock, backend.server_clock) else self.now_ms()

    def follow(self, store_ms: int) -> None:
        """Take the store's time for this process's: limits are compiled for the moment they are judged at."""
        self._offset = store_ms - self.clock.now_ms()

    def _on_open(self, lane: Lane) -> None:
        self.switch.attach(lane)
        self.outbox.start()
        if self.settings.retention is not None:
            self._reports.keep_pruned(lane, self.settings.retention)

    def _on_fork(self) -> None:
        self.ids.begin()
        self.fork_mark = f"{self.ids()}."
        for part in (self.renewer, self.refusals, self.outbox, self.policies, self.prices, self.failover):
            part.forget()

    def __repr__(self) -> str:
        return f"<Guard {mask_url(self.settings.storage)} mode={self.settings.mode}>"
