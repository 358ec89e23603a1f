"""The right to do one piece of work: taken before, ended after."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from typing import TYPE_CHECKING

from respan_guard.backends.base import Record, Release, Renew
from respan_guard.clock import Clock

if TYPE_CHECKING:
    from respan_guard.backends.base import Entry, Op
    from respan_guard.context import Slot
    from respan_guard.decision import Decision
    from respan_guard.guard import Guard
    from respan_guard.lanes import Lane
    from respan_guard.providers import Call
    from respan_guard.usage import Usage

__all__ = ["Admission", "Refusal", "Renewer"]

_claiming = threading.RLock()  # a finalizer may settle a call while its own thread claims for another
_forks = 0  # between this process and the first one


def _forget() -> None:
    """After a fork: another thread's lock would be held for ever in the child, and holds are the parent's."""
    global _claiming, _forks
    _claiming = threading.RLock()
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Admission:
    """A customer was let in. Ends with its `async with` block, its request, or `release`.

    In a forked child it still says whose the work is, and has counted against the rate. Its hold is the parent's, who
    spends it and ends it: what is recorded in the child is booked without it, and calls there hold for themselves.

    Attributes:
        id: The admission's id, in the store too.
        customer_identifier: Whom the work is done for.
        decision: The decision behind it, with every limit's state before it.
        held: What it holds, nano-USD.
        model: The model it holds it for; "" if that was not said.
        ended: Whether it is over; it is nobody's then.
    """

    __slots__ = (
        "_born",
        "_claimed",
        "_claims",
        "_counted",
        "_guard",
        "_lane",
        "_local",
        "_numbers",
        "_spent",
        "_stored",
        "customer_identifier",
        "day",
        "decision",
        "ended",
        "held",
        "id",
        "model",
        "slot",
    )

    def __init__(
        self,
        guard: Guard,
        lane: Lane | None,
        admission_id: str,
        decision: Decision,
        *,
        day: int = 0,
        held: int = 0,
        model: str = "",
        stored: bool = True,
        local: bool = False,
    ) -> None:
        self.id = admission_id
        self.customer_identifier = decision.customer_identifier
        self.decision = decision
        self.day = day
        self.held = held
        self.model = model
        self.ended = False
        self.slot: Slot | None = None
        self._guard = guard
        self._lane = lane  # None: nothing is stored (mode "off")
        self._local = local  # the lane counts what is recorded
        self._stored = stored  # False: let in against storage's word, or without it; there is no hold
        self._born = _forks
        self._numbers = itertools.count()  # threads may record at the same time
        self._counted: set[str] | None = None  # ids that may come again
        self._spent = 0
        self._claims = 0
        self._claimed = 0

    async def record(self, usage: Usage) -> None:
        """Charge a call to this admission. It is safe once this returns, and stays so if the process dies.

        Raises:
            StorageUnavailable: Neither storage nor the journal took it at once; it is still tried.
        """
        if self._lane is not None:
            # By the lane of whoever waits, who may be on another loop: it is stored before a release can be sent.
            lane = self._lane if self._local and not self._inherited else self._guard.lane()
            await lane.record(self.entry(usage, "manual"))

    def record_soon(self, usage: Usage, source: str = "manual", *, entry_id: str | None = None) -> None:
        """Charge a call to this admission without waiting, from any thread; the release travels behind it."""
        if self._lane is not None:
            self.book(self.entry(usage, source, entry_id=entry_id))

    async def release(self) -> None:
        """End the admission. What it held and did not spend is free again; what was recorded stays."""
        self.end()

    def end(self, *last: Entry) -> None:
        """End the admission by an append to the inbox; `last` is booked before. Never waits, never fails.

        What is claimed of its hold stays held until it is settled.
        """
        if self.ended:
            return
        if self._inherited:
            self.ended = True  # here; a call that the parent began is the parent's to book
            return
        witness = self._guard.recorder.witness
        if witness is not None and self._lane is not None:
            last = (*last, *witness.settle(self))
        self.ended = True
        self._post(last)

    def claim(self, cost: int) -> int:
        """Take up to `cost` (nano-USD) of what the hold still has, for one call made under it; see `settle`."""
        with _claiming:
            free = 0 if self.ended or self._inherited else self.unspent - self._claimed
            amount = max(0, min(cost, free))
            if amount:
                self._claims += 1
                self._claimed += amount
            return amount

    def settle(self, amount: int, *last: Entry, beside: Admission | None = None) -> None:
        """Book what a call cost that claimed `amount`, and end the admission that held the rest. As `end` does."""
        with _claiming:
            self._claims -= 1
            self._claimed -= amount
        self._post(last, beside)

    def _post(self, last: tuple[Entry, ...], beside: Admission | None = None) -> None:
        if self._lane is None or self._inherited:
            return
        ops: list[Op] = [Record(entry) for entry in last]
        if beside is not None:
            beside.ended = True
        for admission in (beside, self):
            if admission is not None and admission.ended and not admission._claims:
                self._guard.renewer.unwatch(admission)
                ops.append(Release(self.customer_identifier, admission.id))
        if ops:
            self._lane.post(*ops)

    def watch(self) -> None:
        """Have the hold renewed until the admission ends."""
        self._guard.renewer.watch(self)

    def book(self, *entries: Entry) -> None:
        """Book entries without waiting; also of an admission that has ended."""
        if self._lane is not None:
            lane = self._guard.lane() if self._inherited else self._lane
            lane.post(*[Record(entry) for entry in entries])

    def renew(self, ttl_ms: int) -> None:
        """Let the hold live for `ttl_ms` more."""
        if self._lane is not None and not self.ended and not self._inherited:
            self._lane.post(Renew(self.customer_identifier, self.id, ttl_ms))

    def entry(self, usage: Usage, source: str, *, entry_id: str | None = None, call: Call | None = None) -> Entry:
        """The ledger's entry for a call made under this admission; `call` is what a door saw of its request."""
        guard, customer = self._guard, self.customer_identifier
        if source in ("client", "response"):
            entry_id = guard.recorder.own_id(usage, customer, source, () if call is None else call.request_ids)
        entry = guard.recorder.entry(
            usage,
            customer,
            guard.policies.get(customer).policy,
            guard.now_ms(),
            source=source,
            admission=self.id if self._stored and not self._inherited else None,
            number=f"{guard.fork_mark}{next(self._numbers)}",
            entry_id=entry_id,
            held_day=self.day if self.held else None,
        )
        cost = entry.cost or 0 if self._is_new(entry.id) else 0  # of what comes again the store keeps the first
        self._spent += cost
        if self.slot is not None:
            if source != "manual" or usage.total_tokens:
                self.slot.recorded = True
            if self.slot.costs is not None:
                self.slot.costs.append(cost)
        return entry

    def _is_new(self, entry_id: str) -> bool:
        if entry_id.startswith(self.id):  # numbered: most are
            return True
        if self._counted is None:
            self._counted = {entry_id}
        elif entry_id in self._counted:
            return False
        else:
            self._counted.add(entry_id)
        return True

    @property
    def _inherited(self) -> bool:
        """Whether it was made before a fork, by the parent of this process."""
        return self._born != _forks

    @property
    def stored(self) -> bool:
        """Whether storage let it in; else it has no hold there."""
        return self._stored

    @property
    def unspent(self) -> int:
        """What the hold still has, nano-USD, as far as this process knows."""
        return max(0, self.held - self._spent)

    def __repr__(self) -> str:
        return f"<Admission {self.id} of {self.customer_identifier!r}{', ended' if self.ended else ''}>"


class Refusal:
    """A customer was not let in. False in a condition.

    Attributes:
        decision: Why, and where each limit stands.
    """

    __slots__ = ("decision",)

    def __init__(self, decision: Decision) -> None:
        self.decision = decision

    @property
    def retry_after(self) -> float | None:
        """Seconds until asking again makes sense, or None."""
        return self.decision.retry_after

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<Refusal of {self.decision.customer_identifier!r}: {self.decision.reason}>"


class Renewer:
    """Keeps the holds of long work alive: admissions that end with a block or a request, and no others.

    One timer per loop for all of them; without a loop, later admissions do its work.
    """

    def __init__(self, clock: Clock, ttl_ms: int) -> None:
        self._clock = clock
        self._ttl_ms = ttl_ms
        self._every = ttl_ms / 3000
        self._live: dict[str, Admission] = {}
        self._due = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    def watch(self, admission: Admission) -> None:
        """Renew the admission's hold until it ends."""
        self._live[admission.id] = admission
        if admission.ended:  # by another thread, just now
            self._live.pop(admission.id, None)
            return
        loop = self._loop
        if loop is not None and loop.is_running():
            return
        self._loop = loop = asyncio._get_running_loop()  # None if there is none; an error each time would take longer
        if loop is not None:
            loop.call_later(self._every, self._tick, loop)
        elif self._clock.monotonic() >= self._due:
            self._renew()

    def unwatch(self, admission: Admission) -> None:
        """Forget an admission that ended."""
        self._live.pop(admission.id, None)

    @property
    def live(self) -> list[Admission]:
        """Those in force."""
        return list(self._live.values())

    def forget(self) -> None:
        """Forget all, after a fork: they are the parent's."""
        self._live = {}
        self._loop = None

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not loop:  # it had stopped, and another one took over
            return
        self._loop = None
        if self._live:
            self._loop = loop
            loop.call_later(self._every, self._tick, loop)
            self._renew()  # of those that just came too: it is one op each, and rare

    def _renew(self) -> None:
        self._due = self._clock.monotonic() + self._every
        for admission in list(self._live.values()):
            admission.renew(self._ttl_ms)
