"""What is known of one customer while it is worked on: rates, holds, and sums that were worked out before."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from heapq import heapify, heappop, heappush

from respan_guard.backends.base import Allowed, Amounts, Entry, Limit, Params, Window

__all__ = ["EVER", "Cell", "Held", "Hold", "Plan", "Span", "amounts_of", "nameless", "roll"]

EVER = 1 << 40
"""A day after all days: the end of a total."""


def roll(window: Window | None, width: int, now: int) -> Window:
    """The state of a rate at `now`: a window starts with the first hit after two quiet ones, else behind the last."""
    if window is None:
        return (now, 0, 0)
    start, _, cur = window
    if now < start + width:
        return window if now >= start - width else (now, 0, 0)
    return (start + width, cur, 0) if now < start + 2 * width else (now, 0, 0)


def amounts_of(entry: Entry) -> Amounts:
    """What an entry adds to the sums of its customer, model and day."""
    usage = entry.usage
    return Amounts(
        0,
        1 if entry.kind != "adjustment" else 0,
        entry.cost or 0,
        entry.input_tokens,
        entry.output_tokens,
        usage.cache_read_tokens,
        1 if entry.cost is None else 0,
        1 if usage.status == "error" else 0,
        usage.latency_ms or 0,
        0 if usage.latency_ms is None else 1,
        usage.ttft_ms or 0,
        0 if usage.ttft_ms is None else 1,
    )


def nameless(entry: Entry) -> Entry:
    """An entry without what an app noted on it, which may say who the customer was."""
    if entry.usage.metadata is None:
        return entry
    found = copy(entry)
    found.usage = replace(entry.usage, metadata=None)
    return found


class Held:
    """What the live holds of one day and model hold together."""

    __slots__ = ("cost", "day", "model", "tokens")

    def __init__(self, day: int, model: str) -> None:
        self.day = day
        self.model = model
        self.cost = 0
        self.tokens = 0


class Hold:
    """The row of one admission. `cost` and `tokens` are what is left of the hold."""

    __slots__ = ("cost", "customer", "day", "ended", "expires", "id", "model", "outcome", "pool", "tokens")

    def __init__(
        self,
        customer: str,
        hold_id: str,
        day: int,
        model: str,
        cost: int,
        tokens: int,
        expires: int,
        outcome: Allowed,
        ended: int | None = None,
    ) -> None:
        self.customer = customer
        self.id = hold_id
        self.day = day
        self.model = model
        self.cost = cost
        self.tokens = tokens
        self.expires = expires
        self.outcome = outcome
        self.ended = ended
        self.pool: Held | None = None  # the sum that it is part of, while it counts


class Span:
    """The sum of one metric over a run of days, kept up with every change."""

    __slots__ = ("amount", "end", "first", "metric", "model")

    def __init__(self, metric: str, first: int, end: int, model: str | None, amount: int) -> None:
        self.metric = metric
        self.first = first
        self.end = end
        self.model = model
        self.amount = amount


class Plan:
    """Limits as evaluations want them, for one customer (and model, where a limit asks for it).

    Attributes:
        limits: The limits that it is made of.
        rates: For each rate its place among the limits, its amount and its width (ms).
        sums: For each other limit its place, its amount, its metric and the customer's own sum, if it is one.
        wide: Whether a limit spans customers.
        nothing: What is held if nothing is: as many zeros as there are limits.
    """

    __slots__ = ("limits", "model", "nothing", "rates", "size", "sums", "wide")

    def __init__(self, limits: tuple[Limit, ...]) -> None:
        self.limits = limits
        self.model: str | None = None
        self.rates: list[tuple[int, int, int]] = []
        self.sums: list[tuple[int, int, str, Span | None]] = []
        self.wide = False
        self.size = len(limits)
        self.nothing = (0,) * len(limits)


_NO_PLAN = Plan((Limit("", "total", "cost", 0),))  # no policy's


class Cell:
    """What is known of one customer: all that admissions, records and releases of it touch.

    Attributes:
        requests: Admitted in all time.
        cost: Of all entries, nano-USD.
        tokens: Of all entries.
    """

    __slots__ = (
        "cost",
        "counted",
        "counts_requests",
        "customer",
        "expiry",
        "holds",
        "live",
        "params",
        "plan",
        "rates",
        "requests",
        "revision",
        "spans",
        "tokens",
    )

    def __init__(self, customer: str, revision: str = "", params: Params | None = None) -> None:
        self.customer = customer
        self.revision = revision
        self.params = params
        self.requests = self.cost = self.tokens = 0
        self.rates: dict[int, Window] = {}
        self.holds: dict[str, Hold] = {}
        self.live: dict[tuple[int, str], Held] = {}  # by day and model
        self.counted = 0  # how many holds these are the sums of
        self.expiry: list[tuple[int, str]] = []  # heap of (expires, id) of holds that count
        self.spans: dict[str, Span] = {}  # sums worked out before
        self.counts_requests = False  # one of them is of requests; most customers have none
        self.plan = _NO_PLAN  # for the limits that it was asked about last

    def add_hold(self, hold: Hold) -> None:
        """Take a hold into the working set."""
        self.holds[hold.id] = hold
        if (hold.cost or hold.tokens) and hold.ended is None:
            pool = self.live.get((hold.day, hold.model))
            if pool is None:
                pool = self._new_pool(hold.day, hold.model)
            pool.cost += hold.cost
            pool.tokens += hold.tokens
            hold.pool = pool
            self.counted += 1
            expiry = self.expiry
            heappush(expiry, (hold.expires, hold.id))
            if len(expiry) > 64 and len(expiry) > 2 * len(self.holds) + 64:
                # What ended early lies in the heap until it would have expired; a busy customer's must not grow by it.
                self.expiry = [(held.expires, held.id) for held in self.holds.values() if held.pool is not None]
                heapify(self.expiry)

    def _new_pool(self, day: int, model: str) -> Held:
        for key in [key for key, pool in self.live.items() if not (pool.cost or pool.tokens)]:
            # A hold that was spent to the last may still point there; it takes nothing from it any more.
            del self.live[key]
        pool = self.live[day, model] = Held(day, model)
        return pool

    def expire(self, now: int) -> None:
        """Stop counting holds that expired; their rows keep what they never spent."""
        heap = self.expiry
        while heap and heap[0][0] <= now:
            _, hold_id = heappop(heap)
            hold = self.holds.get(hold_id)
            if hold is None or hold.pool is None:
                continue
            if hold.expires > now:  # renewed, or the id was used again
                heappush(heap, (hold.expires, hold_id))
            else:
                hold.pool.cost -= hold.cost
                hold.pool.tokens -= hold.tokens
                hold.pool = None
                self.counted -= 1

    def held(self, metric: str, first: int, end: int, model: str | None) -> int:
        """What live holds hold of a metric on a run of days, of one model or (None) of all."""
        held = 0
        for pool in self.live.values():
            if first <= pool.day < end and (model is None or model == pool.model):
                held += pool.cost if metric == "cost" else pool.tokens
        return held
