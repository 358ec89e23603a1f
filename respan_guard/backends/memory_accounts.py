"""Customers of a store in memory: at work an `Account`, all dictionaries; at rest one tuple, a fifth of the size."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeAlias

from respan_guard.backends.base import AMOUNTS, Amounts
from respan_guard.backends.cells import Cell, Hold

__all__ = ["Account", "Everyone", "Packed", "first_busy_window", "pack", "sum_of", "unpack"]

_HEAD = 5  # fields of a packed account before its rates
_SUMS = 2 + len(AMOUNTS)
Packed: TypeAlias = tuple[Any, ...]
"""revision, params, first and last seen, number of rates; 4 fields per rate, `_SUMS` per day and model."""


class Account(Cell):
    """A customer's cell with what other stores keep on disk: its daily sums and when it was seen."""

    __slots__ = ("first_seen", "kept", "last_seen", "sums")

    def __init__(self, customer: str) -> None:
        super().__init__(customer)
        self.first_seen = self.last_seen = 0
        self.kept = False  # it is in the store: something was written to it
        self.sums: dict[tuple[str, int], Amounts] = {}  # (model, day)


class Everyone:
    """Sums and live holds over all customers, for limits that span them. Kept from the first such limit on."""

    def __init__(self) -> None:
        self.spans: dict[tuple[str | None, str, int, int], int] = {}
        self.live: dict[tuple[int, str], list[int]] = {}  # (day, model) -> [cost, tokens]
        self.members: dict[Hold, tuple[int, int]] = {}  # what of a hold is counted above
        self.expiry: list[tuple[int, int, Hold]] = []
        self.number = count()

    def grow(self, model: str, day: int, requests: int, cost: int, tokens: int) -> None:
        """Keep up the sums."""
        for span in self.spans:
            only, metric, first, end = span
            if first <= day < end and (only is None or only == model):
                self.spans[span] += cost if metric == "cost" else requests if metric == "requests" else tokens

    def take(self, hold: Hold, now: int) -> None:
        """Count a hold that was made or changed."""
        before = self.members.pop(hold, None)
        if hold.ended is None and hold.expires > now:
            after = self.members[hold] = (hold.cost, hold.tokens)
            if before is None:
                heappush(self.expiry, (hold.expires, next(self.number), hold))
        else:
            after = (0, 0)
        self._move(hold, before or (0, 0), after)

    def _move(self, hold: Hold, before: tuple[int, int], after: tuple[int, int]) -> None:
        sums = self.live.setdefault((hold.day, hold.model), [0, 0])
        sums[0] += after[0] - before[0]
        sums[1] += after[1] - before[1]
        if not (sums[0] or sums[1]):
            del self.live[hold.day, hold.model]

    def held(self, model: str | None, metric: str, first_day: int, end_day: int, now: int) -> int:
        """What live holds hold."""
        while self.expiry and self.expiry[0][0] <= now:
            _, _, hold = heappop(self.expiry)
            if hold in self.members:
                if hold.expires > now:
                    heappush(self.expiry, (hold.expires, next(self.number), hold))
                else:
                    self._move(hold, self.members.pop(hold), (0, 0))
        index = 0 if metric == "cost" else 1
        return sum(
            sums[index]
            for (day, of_model), sums in self.live.items()
            if first_day <= day < end_day and (model is None or model == of_model)
        )


def sum_of(account: Account, model: str | None, metric: str, first_day: int, end_day: int) -> int:
    """The sum of a metric over days, of one model or (None) of all."""
    found = 0
    for (of_model, day), amounts in account.sums.items():
        if first_day <= day < end_day and (model is None or model == of_model):
            if metric == "tokens":
                found += amounts.input_tokens + amounts.output_tokens
            else:
                found += amounts.cost if metric == "cost" else amounts.requests
    return found


def first_busy_window(account: Account, now: int) -> int | None:
    """The first of the account's windows that still matters, or None."""
    return next((width for width, (start, _, _) in account.rates.items() if now < start + 2 * width), None)


def pack(account: Account, now: int) -> Packed:
    """Put an account to rest."""
    rates = [
        field
        for width, (start, prev, cur) in account.rates.items()
        if now < start + 2 * width
        for field in (width, start, prev, cur)
    ]
    sums = [
        field
        for (model, day), a in account.sums.items()
        for field in (
            model, day, a.requests, a.calls, a.cost, a.input_tokens, a.output_tokens, a.cache_read_tokens, a.unpriced,
            a.errors, a.latency_ms, a.timed, a.ttft_ms, a.ttft_calls,
        )
    ]  # fmt: skip
    head = (account.revision, account.params, account.first_seen, account.last_seen, len(rates))
    return (*head, *rates, *sums)


def unpack(customer: str, row: Packed) -> Account:
    """Bring an account back to work."""
    account = Account(customer)
    account.kept = True
    account.revision, account.params, account.first_seen, account.last_seen, fields = row[:_HEAD]
    for at in range(_HEAD, _HEAD + fields, 4):
        account.rates[row[at]] = row[at + 1 : at + 4]
    for at in range(_HEAD + fields, len(row), _SUMS):
        amounts = account.sums[row[at], row[at + 1]] = Amounts(*row[at + 2 : at + _SUMS])
        account.requests += amounts.requests
        account.cost += amounts.cost
        account.tokens += amounts.input_tokens + amounts.output_tokens
    return account
