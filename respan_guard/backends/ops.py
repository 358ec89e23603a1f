"""What storage is asked, and what it answers: the operations of `Backend.apply`, rule by rule.

The numbered rules in the docstrings are the contract; `respan_guard.testing.BackendContract` holds a backend to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from respan_guard.usage import Usage

__all__ = [
    "REPLAY_MS",
    "Admit",
    "Allowed",
    "Conflict",
    "Ended",
    "Entry",
    "Limit",
    "Op",
    "Outcome",
    "Params",
    "Put",
    "Record",
    "Recorded",
    "Refused",
    "Release",
    "Renew",
    "Stale",
    "TooLate",
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

    @property
    def shared(self) -> bool:
        """Whether it counts all customers together."""
        return self.scope in ("model", "all")


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
           took the customer's place then, without its metadata, which may say who that was.
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
