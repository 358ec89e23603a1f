"""The right to do one piece of work: taken before, ended after."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING, Literal

from respan_guard.backends.base import Record, Release, Renew

if TYPE_CHECKING:
    from respan_guard.backends.base import Entry, Op
    from respan_guard.context import Slot
    from respan_guard.decision import Decision
    from respan_guard.guard import Guard
    from respan_guard.lanes import Lane
    from respan_guard.providers import Call
    from respan_guard.usage import Usage

__all__ = ["Admission", "Claim", "Refusal"]

_claiming = threading.RLock()  # a finalizer may settle a call while its own thread claims for another
_forks = 0  # between this process and the first one


def _forget() -> None:
    """After a fork: another thread's lock would be held for ever in the child, and holds are the parent's."""
    global _claiming, _forks
    _claiming = threading.RLock()
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Claim:
    """What one call took of a hold for itself, nano-USD, until it is settled."""

    __slots__ = ("amount",)

    def __init__(self, amount: int) -> None:
        self.amount = amount


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
        scope: Where it is in force: the "request" that it is bound to, or the code in its "block". A "thread" that is
            in its block need not stay there, as a dependency that yields doesn't: the request's code may be meant, too.
    """

    __slots__ = (
        "_born",
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
        "scope",
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
        self.scope: Literal["request", "block", "thread"] = "block"
        self.slot: Slot | None = None
        self._guard = guard
        self._lane = lane  # None: nothing is stored (mode "off")
        self._local = local  # the lane counts what is recorded
        self._stored = stored  # False: let in against storage's word, or without it; there is no hold
        self._born = _forks
        self._numbers = itertools.count()  # threads may record at the same time
        self._counted: set[str] | None = None  # ids that may come again
        self._spent = 0
        self._claims: set[Claim] | None = None

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

    def claim(self, cost: int) -> Claim | None:
        """Take `cost` (nano-USD) of what the hold still has, for one call made under it; see `settle`.

        A call that costs more takes the whole of a hold that is untouched, and has to hold the rest itself: whatever it
        costs is drawn from here first, so that nothing of what another call counts on may be here.

        Returns:
            The claim, maybe for less; None if there is nothing to take.
        """
        with _claiming:
            free = self.free
            if self.ended or self._inherited or not free or (cost > free and free < self.held):
                return None
            claim = Claim(min(cost, free))
            if self._claims is None:
                self._claims = set()
            self._claims.add(claim)
            return claim

    def settle(self, claim: Claim | None, *last: Entry, ending: Admission | None = None) -> None:
        """Book what a call cost and give back what it claimed; as `end`, but that it may be done twice.

        Args:
            claim: What the call claimed here.
            last: Its entries.
            ending: The call's own admission, this one or what held the rest, which ends with it.
        """
        with _claiming:
            if claim is not None and self._claims is not None:
                self._claims.discard(claim)
        if ending is not None:
            ending.ended = True
        self._post(last, ending)

    def _post(self, last: tuple[Entry, ...], ending: Admission | None = None) -> None:
        if self._lane is None or self._inherited:
            return
        ops: list[Op] = [Record(entry) for entry in last]
        for admission in (self,) if ending is None or ending is self else (ending, self):
            if admission.ended and not admission._claims:
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
        """Let the hold live for `ttl_ms` more, also of one that ended while calls that claimed of it go on."""
        if self._lane is not None and (not self.ended or self._claims) and not self._inherited:
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
            admission=self.hold_id,
            number=f"{guard.fork_mark}{next(self._numbers)}",
            entry_id=entry_id,
            held_day=self.day if self.held else None,
        )
        if self.slot is not None and (source != "manual" or usage.total_tokens):
            self.slot.recorded = True
        self.spend(entry.cost or 0 if self._is_new(entry.id) else 0)  # of what comes again the store keeps the first
        return entry

    def spend(self, cost: int) -> None:
        """Count what a call cost, nano-USD: storage will draw it from the hold, nothing else may be paid with it."""
        with _claiming:
            self._spent += cost
        if self.slot is not None and self.slot.costs is not None:
            self.slot.costs.append(cost)

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
    def hold_id(self) -> str | None:
        """Its id, where storage knows its hold and this process may draw from that."""
        return self.id if self._stored and not self._inherited else None

    @property
    def claimed(self) -> bool:
        """Whether calls are on their way that claimed of it: each of them books itself."""
        return bool(self._claims)

    @property
    def free(self) -> int:
        """What of the hold is neither spent nor claimed, nano-USD, as far as this process knows."""
        with _claiming:
            return max(0, self.held - self._spent - sum(claim.amount for claim in self._claims or ()))

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
