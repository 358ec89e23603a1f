"""What is known of one customer while it is worked on: rates, holds, and sums that were worked out before."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from respan_guard.backends.base import Allowed, Amounts, Entry, Limit, Params, Window

__all__ = ["EVER", "Cell", "Hold", "Planned", "Span", "amounts_of", "roll"]

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


class Hold:
    """The row of one admission. `cost` and `tokens` are what is left of the hold."""

    __slots__ = ("cost", "counted", "day", "ended", "expires", "id", "model", "outcome", "tokens")

    def __init__(
        self,
        hold_id: str,
        day: int,
        model: str,
        cost: int,
        tokens: int,
        expires: int,
        outcome: Allowed,
        ended: int | None = None,
    ) -> None:
        self.id = hold_id
        self.day = day
        self.model = model
        self.cost = cost
        self.tokens = tokens
        self.expires = expires
        self.outcome = outcome
        self.ended = ended
        self.counted = False  # it is part of the cell's live sums


class Span:
    """The sum of one metric over a run of days, kept up with every change."""

    __slots__ = ("amount", "end", "first", "metric", "model")

    def __init__(self, metric: str, first: int, end: int, model: str | None, amount: int) -> None:
        self.metric = metric
        self.first = first
        self.end = end
        self.model = model
        self.amount = amount


Planned: TypeAlias = tuple[int, str, int, Span | None, Limit]
"""A limit as evaluations want it: amount, metric, width of a rate, the customer's own sum, the limit."""


class Cell:
    """What is known of one customer: all that admissions, records and releases of it touch."""

    __slots__ = (
        "counts_requests",
        "customer",
        "expiry",
        "holds",
        "limits",
        "live",
        "model",
        "params",
        "plan",
        "rates",
        "revision",
        "spans",
        "wide",
        "widths",
    )

    def __init__(self, customer: str, revision: str = "", params: Params | None = None) -> None:
        self.customer = customer
        self.revision = revision
        self.params = params
        self.rates: dict[int, Window] | None = None
        self.holds: dict[str, Hold] = {}
        self.live: dict[tuple[int, str], list[int]] | None = None  # (day, model) -> [cost, tokens] held
        self.expiry: list[tuple[int, str]] | None = None  # heap of (expires, id) of holds that are counted
        self.spans: dict[str, Span] | None = None  # sums worked out before
        self.counts_requests = False  # one of them is of requests; most customers have none
        self.limits: tuple[Limit, ...] | None = None  # those that the plan below is made for
        self.model: str | None = None  # and the model, where a limit asks for it
        self.plan: Sequence[Planned] = ()
        self.wide = False  # a limit of the plan spans customers
        self.widths: tuple[int, ...] = ()  # of the plan's rates

    def add_hold(self, hold: Hold) -> None:
        """Take a hold into the working set."""
        self.holds[hold.id] = hold
        if hold.ended is None and (hold.cost or hold.tokens):
            if self.live is None or self.expiry is None:
                self.live, self.expiry = {}, []
            hold.counted = True
            key = (hold.day, hold.model)
            sums = self.live.get(key)
            if sums is None:
                self.live[key] = [hold.cost, hold.tokens]
            else:
                sums[0] += hold.cost
                sums[1] += hold.tokens
            if len(self.expiry) > 2 * len(self.holds) + 64:
                # What ended early lies in the heap until it would have expired; a busy customer's must not grow by it.
                self.expiry = [(held.expires, held.id) for held in self.holds.values() if held.counted]
                heapify(self.expiry)
            else:
                heappush(self.expiry, (hold.expires, hold.id))

    def drop(self, hold: Hold, cost: int, tokens: int) -> None:
        """A hold that is counted holds less from now on."""
        if self.live is not None and hold.counted and (cost or tokens):
            key = (hold.day, hold.model)
            sums = self.live[key]
            sums[0] -= cost
            sums[1] -= tokens
            if not (sums[0] or sums[1]):
                del self.live[key]

    def expire(self, now: int) -> None:
        """Stop counting holds that expired; their rows keep what they never spent."""
        heap = self.expiry
        while heap and heap[0][0] <= now:
            _, hold_id = heappop(heap)
            hold = self.holds.get(hold_id)
            if hold is None or not hold.counted:
                continue
            if hold.expires > now:  # renewed, or the id was used again
                heappush(heap, (hold.expires, hold_id))
            else:
                self.drop(hold, hold.cost, hold.tokens)
                hold.counted = False

    def held(self, metric: str, first: int, end: int, model: str | None) -> int:
        """What live holds hold of a metric on a run of days, of one model or (None) of all."""
        held, index = 0, 0 if metric == "cost" else 1
        if self.live:
            for (day, of_model), sums in self.live.items():
                if first <= day < end and (model is None or model == of_model):
                    held += sums[index]
        return held
