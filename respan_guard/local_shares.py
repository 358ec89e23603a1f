"""What a process takes of a budget's local share while storage is down, and the lane that counts it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from respan_guard.backends.base import Record, Release

if TYPE_CHECKING:
    from respan_guard.backends.base import Backend, Entry, Limit, Op, Outcome, Recorded, TooLate
    from respan_guard.decision import Decision
    from respan_guard.home import Home
    from respan_guard.home_rates import Counted
    from respan_guard.items import Waits
    from respan_guard.lanes import Lane

__all__ = ["Account", "LocalLane"]

T = TypeVar("T")


class Account:
    """What storage last said of a customer, and what this process took without it since.

    Attributes:
        decision: The last one of the store.
        hold: What it held itself, nano-USD.
        total: Recorded under local admissions, ever, nano-USD.
        stored: How much of it has come to the store.
        known: How much of it the store knew of when it said so.
        sending: How many records are on their way into an inbox.
        held: What local admissions in force hold, nano-USD.
    """

    __slots__ = ("decision", "held", "hold", "known", "sending", "stored", "total")

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self.hold = self.held = self.total = self.stored = self.known = self.sending = 0

    @property
    def spent(self) -> int:
        """What was recorded under local admissions and is not in what the store said."""
        return self.total - self.known

    def left(self, budget: Limit) -> int:
        """What was left of a budget; nothing if it was of another period."""
        decision = self.decision
        if decision is not None:
            outcome = decision.outcome
            for limit, used, held in zip(decision.compiled, outcome.used, outcome.held, strict=True):
                if limit.name == budget.name and limit.key == budget.key:
                    return budget.amount - used - held - (self.hold if decision.allowed else 0)
        return 0


class LocalLane:
    """The lane of an admission that draws from a local allowance: what is recorded under it is counted here, too."""

    def __init__(self, usual: Callable[[], Lane], lane: Lane, account: Account, hold: int) -> None:
        self._usual = usual
        self._lane = lane
        self._account = account
        self._left = hold

    @property
    def home(self) -> Home | None:
        """Where it leads to."""
        return self._lane.home

    @property
    def asleep(self) -> bool:
        """Whether nobody looks at the kill switch there."""
        return self._lane.asleep

    async def submit(self, op: Op) -> Outcome:
        """Apply `op` and return its outcome."""
        return await self._lane.submit(op)

    async def record(self, entry: Entry) -> Recorded | TooLate | None:
        """Book `entry`, by the lane of whoever waits."""
        with self._sending(Record(entry)):
            return await self._usual().record(entry)

    async def book(self, entry: Entry) -> Recorded | TooLate | Waits | None:
        """As `record`, for somebody who reports it again if this raises."""
        with self._sending(Record(entry)):
            return await self._usual().book(entry)

    def post(self, *ops: Op) -> None:
        """Apply `ops` some time soon. Storage knows nothing of the admission; only its records go there."""
        with self._sending(*ops):
            records = [op for op in ops if isinstance(op, Record)]
            if records:
                self._lane.post(*records)

    @contextmanager
    def _sending(self, *ops: Op) -> Generator[None]:
        self._account.sending += 1
        try:
            for op in ops:
                self._note(op)
            yield
        finally:
            self._account.sending -= 1

    def _note(self, op: Op) -> None:
        account = self._account
        if isinstance(op, Record):
            cost = op.entry.cost or 0
            drawn = min(self._left, cost)
            account.total += cost
        elif isinstance(op, Release):
            drawn = self._left
        else:
            return
        self._left -= drawn
        account.held -= drawn

    async def call(self, work: Callable[[Backend], Awaitable[T]], timeout: float | None = 10.0) -> T:  # noqa: ASYNC109
        """Run a read or a change of customers."""
        return await self._lane.call(work, timeout)

    def post_call(self, work: Callable[[Backend], Awaitable[object]], delay: float = 0.0) -> None:
        """Run `work` some time soon."""
        self._lane.post_call(work, delay)

    async def count_rates(self, customer: str, rates: Sequence[Limit], requests: int) -> list[Counted]:
        """Count requests in the storage of rates."""
        return await self._lane.count_rates(customer, rates, requests)

    async def look_at_rates(self, customer: str, rates: Sequence[Limit]) -> list[Counted]:
        """Where rates stand."""
        return await self._lane.look_at_rates(customer, rates)

    async def flush(self) -> None:
        """Return when everything that was sent before is stored."""
        await self._lane.flush()
