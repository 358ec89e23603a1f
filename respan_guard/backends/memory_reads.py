"""Reading a store in memory: pages, sums, and the proof that they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from copy import copy
from heapq import nlargest, nsmallest
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from respan_guard.backends.base import (
    AMOUNTS,
    HOUR_MS,
    HOURS_KEPT,
    Amounts,
    CustomerQuery,
    CustomerRow,
    Discrepancy,
    Entry,
    HoldRow,
    RecordQuery,
    StoredEntry,
    UsageQuery,
    UsageRow,
)
from respan_guard.backends.cells import amounts_of
from respan_guard.backends.groups import grouped
from respan_guard.backends.memory_accounts import Account, sum_of
from respan_guard.backends.rows import names_of
from respan_guard.errors import InvalidInput

if TYPE_CHECKING:
    from respan_guard.backends.memory_store import MemoryStore

_SORTS = ("customer", "name", "first_seen", "last_seen", "requests", "calls", "cost", "tokens")


def customer_row(account: Account) -> CustomerRow:
    """A customer with its sums of all time."""
    totals = Amounts()
    for amounts in account.sums.values():
        totals.add(amounts)
    days = {day for _, day in account.sums}
    return CustomerRow(
        account.customer,
        account.revision,
        account.params,
        account.first_seen,
        account.last_seen,
        totals,
        len(days),
    )


def sort_value(row: CustomerRow, sort: str) -> str | int:
    """What customers are sorted by."""
    if sort == "customer":
        return row.customer
    if sort == "name":
        return str((row.params or {}).get("name") or "")
    if sort == "first_seen":
        return row.first_seen_ms
    if sort == "last_seen":
        return row.last_seen_ms
    if sort == "tokens":
        return row.totals.input_tokens + row.totals.output_tokens
    value: int = getattr(row.totals, sort)
    return value


def _accounts(store: MemoryStore, customer: str | None) -> Iterable[Account]:
    if customer is None:
        return store.each()
    account = store.peek(customer)
    return () if account is None else (account,)


def _some(store: MemoryStore, among: tuple[str, ...] | None) -> Iterable[Account]:
    if among is None:
        return store.each()
    return [account for name in names_of(among) if (account := store.peek(name)) is not None]


def _in_order(store: MemoryStore, query: CustomerQuery) -> Iterator[Account]:
    """Customers by identifier, from where the page begins."""
    names: Iterable[str] = chain(store.cells, store.resting)
    if query.after is not None:
        last = query.after[1]
        names = [name for name in names if (name < last if query.descending else name > last)]
    for name in sorted(names, reverse=query.descending):
        if (account := store.peek(name)) is not None:
            yield account


def customers(store: MemoryStore, query: CustomerQuery) -> list[CustomerRow]:
    """A page of customers."""
    if query.sort not in _SORTS:
        raise InvalidInput(f"sort must be one of {', '.join(_SORTS)}; got {query.sort!r}", field="sort")
    wanted = query.search.casefold()

    def matches(row: CustomerRow) -> bool:
        params = row.params or {}
        return any(
            wanted in str(text).casefold() for text in (row.customer, params.get("name"), params.get("email")) if text
        )

    def place(row: CustomerRow) -> Any:
        return (sort_value(row, query.sort), row.customer)

    def rows_of(accounts: Iterable[Account]) -> Iterator[CustomerRow]:
        for account in accounts:
            if is_one(account, seen_since_ms=query.seen_since_ms, blocked=query.blocked):
                row = customer_row(account)
                if not wanted or matches(row):
                    yield row

    if query.sort == "customer" and query.among is None:  # then nobody is looked at but who is on the page
        return list(islice(rows_of(_in_order(store, query)), query.limit))
    rows: Iterable[CustomerRow] = rows_of(_some(store, query.among))
    if query.after is not None:
        after = query.after
        rows = [row for row in rows if (place(row) < after if query.descending else place(row) > after)]
    return (nlargest if query.descending else nsmallest)(query.limit, rows, key=place)


def is_one(account: Account, *, seen_since_ms: int | None, blocked: bool | None) -> bool:
    """Whether a customer passes the filters."""
    if seen_since_ms is not None and account.last_seen < seen_since_ms:
        return False
    return blocked is None or blocked == bool((account.params or {}).get("blocked"))


def usage(store: MemoryStore, query: UsageQuery) -> list[UsageRow]:
    """Sums of the rollups."""
    query.check()
    return grouped(query, _rollups(store, query), store.totals.customers)


def _rollups(store: MemoryStore, query: UsageQuery) -> Iterator[tuple[str, str, int, Amounts]]:
    """What a query is about: customer ("" in totals), model, day or hour, amounts."""
    hourly = "hour" in query.by
    first, end = (query.first_hour, query.end_hour) if hourly else (query.first_day, query.end_day)
    together = query.of_all and (query.by_day_alone or not query.distinct)
    if hourly and query.among is not None:
        yield from _hours_of(store, set(query.among), query)
        return
    if hourly or together:
        store.totals.catch_up(store)
        for (when, model), amounts in (store.totals.hours if hourly else store.totals.days).items():
            if first <= when < end and query.model in (None, model):
                yield "", model, when, amounts
        return
    accounts = _some(store, query.among) if query.customer is None else _accounts(store, query.customer)
    for account in accounts:
        if query.among is not None and account.customer not in query.among:
            continue
        for (model, when), amounts in account.sums.items():
            if first <= when < end and query.model in (None, model):
                yield account.customer, model, when, amounts


def _hours_of(store: MemoryStore, among: set[str], query: UsageQuery) -> Iterator[tuple[str, str, int, Amounts]]:
    """What entries of some customers add to hours."""
    for entry in store.log:
        if entry is None or entry.customer not in among or query.model not in (None, entry.model):
            continue
        if query.first_hour <= (hour := entry.at_ms // HOUR_MS) < query.end_hour:
            yield entry.customer, entry.model, hour, amounts_of(entry)


def entries(store: MemoryStore, query: RecordQuery) -> list[StoredEntry]:
    """Entries in order of the log."""
    start, end = store.log_start + store.gone, store.seq + 1
    if query.after is not None:
        start, end = (start, min(end, query.after)) if query.descending else (max(start, query.after + 1), end)
    if query.stop is not None:
        start, end = (max(start, query.stop), end) if query.descending else (start, min(end, query.stop + 1))
    found: list[StoredEntry] = []
    for seq in reversed(range(start, end)) if query.descending else range(start, end):
        if len(found) >= query.limit:
            break
        entry = store.log[seq - store.log_start]
        if entry is not None and _wanted(entry, query):
            found.append(store.stored(seq, entry))
    return found


def _wanted(entry: Entry, query: RecordQuery) -> bool:
    usage_ = entry.usage
    return (
        query.customer in (None, entry.customer)
        and query.model in (None, entry.model)
        and query.provider in (None, usage_.provider)
        and query.kind in (None, entry.kind)
        and query.source in (None, entry.source)
        and query.status in (None, usage_.status)
        and query.trace_id in (None, usage_.trace_id)
        and query.unpriced in (None, entry.cost is None)
        and (query.since_ms is None or entry.at_ms >= query.since_ms)
        and (query.until_ms is None or entry.at_ms < query.until_ms)
    )


def holds(store: MemoryStore, customer: str | None, state: str, now: int) -> list[HoldRow]:
    """Holds that are live, or that expired with something unspent."""
    if state not in ("live", "expired"):
        raise InvalidInput(f"state must be live or expired, got {state!r}", field="state")
    found = []
    for account in _accounts(store, customer):
        for hold in account.holds.values():
            live = hold.ended is None and hold.expires > now
            expired = not live and (hold.ended is None or hold.ended == hold.expires) and (hold.cost or hold.tokens)
            if live if state == "live" else expired:
                found.append(
                    HoldRow(
                        account.customer, hold.id, hold.day, hold.model, hold.cost, hold.tokens, hold.expires, state
                    )
                )
    return sorted(found, key=lambda row: (row.expires_ms, row.customer, row.id))


def verify(store: MemoryStore) -> list[Discrepancy]:
    """Recompute every sum from the entries and compare."""
    found: list[Discrepancy] = []
    right: dict[tuple[str, str, int], Amounts] = {key: copy(amounts) for key, amounts in store.base.items()}
    for entry in store.log:
        if entry is not None:
            right.setdefault((entry.customer, entry.model, entry.day), Amounts()).add(amounts_of(entry))
    days: dict[tuple[int, str], Amounts] = {}
    customers_of: Counter[int] = Counter()
    for account in store.each():
        for (model, day), amounts in account.sums.items():
            expected = right.pop((account.customer, model, day), Amounts())
            found += _compare(f"{account.customer} {model} {day}", amounts, expected)
            days.setdefault((day, model), Amounts()).add(amounts)
        customers_of.update({day for _, day in account.sums})
        found += _verify_account(store, account)
    store.totals.catch_up(store)
    for day, model in days.keys() | store.totals.days.keys():
        stored_sums = store.totals.days.get((day, model), Amounts())
        found += _compare(f"all {model} {day}", stored_sums, days.get((day, model), Amounts()))
    found += _verify_hours(store)
    for day in customers_of.keys() | store.totals.customers.keys():
        if store.totals.customers[day] != customers_of[day]:
            found.append(Discrepancy("customers", f"day {day}", store.totals.customers[day], customers_of[day]))
    for (customer, model, day), amounts in right.items():
        found += _compare(f"{customer} {model} {day}", Amounts(), amounts)
    places = {seq: entry for seq, entry in enumerate(store.log, store.log_start) if entry is not None}
    for seq, entry in places.items():
        if store.places.get((entry.customer, entry.id)) != seq:
            found.append(Discrepancy("entry out of place", f"{entry.customer} {entry.id}", seq, 0))
    if len(places) != len(store.places):
        found.append(Discrepancy("log length", "", len(places), len(store.places)))
    return found


def _verify_hours(store: MemoryStore) -> list[Discrepancy]:
    """The sums of hours, of those after the last that has lost an entry, and that are not too old to be kept."""
    first = max(store.now // HOUR_MS - HOURS_KEPT, store.pruned_ms // HOUR_MS + 1)
    right: dict[tuple[int, str], Amounts] = {}
    for entry in store.log:
        if entry is not None and entry.at_ms // HOUR_MS >= first:
            right.setdefault((entry.at_ms // HOUR_MS, entry.model), Amounts()).add(amounts_of(entry))
    stored = {key: amounts for key, amounts in store.totals.hours.items() if key[0] >= first}
    found: list[Discrepancy] = []
    for key in stored.keys() | right.keys():
        where = f"all {key[1]} hour {key[0]}"
        found += _compare(where, stored.get(key, Amounts()), right.get(key, Amounts()))
    return found


def _verify_account(store: MemoryStore, account: Account) -> list[Discrepancy]:
    """What a customer's cell has at hand: totals, sums worked out before, live holds."""
    account.expire(store.now)
    totals = customer_row(account).totals
    held = [0, 0]
    for hold in account.holds.values():
        if hold.ended is None and hold.expires > store.now:
            held[0] += hold.cost
            held[1] += hold.tokens
    pools = account.live.values()
    pairs = [
        ("total requests", account.requests, totals.requests),
        ("total cost", account.cost, totals.cost),
        ("total tokens", account.tokens, totals.input_tokens + totals.output_tokens),
        ("held cost", sum(pool.cost for pool in pools), held[0]),
        ("held tokens", sum(pool.tokens for pool in pools), held[1]),
        ("hold below 0", min((min(h.cost, h.tokens) for h in account.holds.values()), default=0) < 0, False),
    ]
    for key, span in account.spans.items():
        amount = sum_of(account, span.model, span.metric, span.first, span.end)
        pairs.append((f"sum {key}", span.amount, amount))
    return [Discrepancy(what, account.customer, stored, right) for what, stored, right in pairs if stored != right]


def _compare(where: str, stored: Amounts, right: Amounts) -> list[Discrepancy]:
    return [
        Discrepancy(name, where, getattr(stored, name), getattr(right, name))
        for name in AMOUNTS
        if name != "requests" and getattr(stored, name) != getattr(right, name)  # requests have no entries
    ]
