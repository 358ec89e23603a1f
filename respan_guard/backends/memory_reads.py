"""Reading a store in memory: pages, sums, and the proof that they agree."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from respan_guard.backends.base import (
    Amounts,
    AuditRow,
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
from respan_guard.backends.ledger import amounts_of

if TYPE_CHECKING:
    from respan_guard.backends.memory import Account, MemoryStore

_AMOUNT_FIELDS = tuple(Amounts.__dataclass_fields__)


def moved(entry: Entry, customer: str) -> Entry:
    """The entry under another customer."""
    found = copy(entry)
    found.customer = customer
    return found


def numbered(row: AuditRow, seq: int) -> AuditRow:
    """The row at its place in the audit."""
    return replace(row, seq=seq)


def customer_row(account: Account) -> CustomerRow:
    """A customer with its sums of all time."""
    totals = Amounts()
    for amounts in (account.sums or {}).values():
        totals.add(amounts)
    days = {day for _, day in account.sums or {}}
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


def customers(store: MemoryStore, query: CustomerQuery) -> list[CustomerRow]:
    """A page of customers."""
    wanted = query.search.casefold()

    def matches(row: CustomerRow) -> bool:
        params = row.params or {}
        return any(
            wanted in str(text).casefold() for text in (row.customer, params.get("name"), params.get("email")) if text
        )

    rows = [row for row in map(customer_row, store.accounts.values()) if not wanted or matches(row)]
    keyed: list[tuple[Any, str, CustomerRow]] = [(sort_value(row, query.sort), row.customer, row) for row in rows]
    keyed.sort(key=lambda item: item[:2], reverse=query.descending)
    if query.after is not None:
        after: Any = tuple(query.after)
        keyed = [item for item in keyed if (item[:2] < after if query.descending else item[:2] > after)]
    return [row for _, _, row in keyed[: query.limit]]


def usage(store: MemoryStore, query: UsageQuery) -> list[UsageRow]:
    """Sums of the daily rollups."""
    groups: dict[tuple[Any, ...], Amounts] = {}
    accounts = store.accounts.values()
    if query.customer is not None:
        accounts = [store.accounts[query.customer]] if query.customer in store.accounts else []  # type: ignore[assignment]
    for account in accounts:
        for (model, day), amounts in (account.sums or {}).items():
            if query.first_day <= day < query.end_day and query.model in (None, model):
                values = {"customer": account.customer, "model": model, "day": day}
                groups.setdefault(tuple(values[name] for name in query.by), Amounts()).add(amounts)
    keys = sorted(groups)[: query.limit]
    return [UsageRow(groups[key], **dict(zip(query.by, key, strict=True))) for key in keys]


def entries(store: MemoryStore, query: RecordQuery) -> list[StoredEntry]:
    """Entries in order of the log."""
    places: Iterator[int] = reversed(store.log) if query.descending else iter(store.log)
    found = []
    for seq in places:
        if query.after is not None and (seq >= query.after if query.descending else seq <= query.after):
            continue
        stored = store.entries[store.log[seq]]
        if _wanted(stored.entry, query):
            found.append(stored)
            if len(found) >= query.limit:
                break
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
    found = []
    for account in store.accounts.values():
        if customer not in (None, account.customer):
            continue
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


def rename(store: MemoryStore, customer: str, label: str) -> None:
    """Book a deleted customer's entries under its label."""
    for key in [key for key in store.entries if key[0] == customer]:
        stored = store.entries.pop(key)
        usage_ = copy(stored.entry.usage)
        usage_.metadata = None  # it may say who the customer was
        entry = moved(stored.entry, label)
        entry.usage = usage_
        store.entries[label, key[1]] = replace(stored, entry=entry)
        store.log[stored.seq] = (label, key[1])
    for base in [key for key in store.base if key[0] == customer]:
        store.base[label, base[1], base[2]] = store.base.pop(base)


def prune(store: MemoryStore, before_day: int, read_by_all: int, limit: int) -> int:
    """Delete old entries that every reader has read; what they summed up to is kept."""
    store.pruned = max(store.pruned, before_day - 1)
    gone = 0
    for seq in list(store.log):
        if seq > read_by_all or gone >= limit:
            break
        stored = store.entries[store.log[seq]]
        if stored.entry.day < before_day:
            key = (stored.entry.customer, stored.entry.model, stored.entry.day)
            store.base.setdefault(key, Amounts()).add(amounts_of(stored.entry))
            del store.entries[store.log.pop(seq)]
            gone += 1
    return gone


def verify(store: MemoryStore) -> list[Discrepancy]:
    """Recompute every sum from the entries and compare."""
    found: list[Discrepancy] = []
    right: dict[tuple[str, str, int], Amounts] = {key: copy(amounts) for key, amounts in store.base.items()}
    for (customer, _), stored in store.entries.items():
        entry = stored.entry
        right.setdefault((customer, entry.model, entry.day), Amounts()).add(amounts_of(entry))
    for account in store.accounts.values():
        total = 0
        for (model, day), amounts in (account.sums or {}).items():
            total += amounts.cost
            expected = right.pop((account.customer, model, day), Amounts())
            found += _compare(f"{account.customer} {model} {day}", amounts, expected)
        if total != account.total:
            found.append(Discrepancy("total cost", account.customer, account.total, total))
        for hold in account.holds.values():
            if hold.cost < 0 or hold.tokens < 0:
                found.append(Discrepancy("hold below 0", f"{account.customer} {hold.id}", hold.cost, 0))
    for (customer, model, day), amounts in right.items():
        found += _compare(f"{customer} {model} {day}", Amounts(), amounts)
    for seq, key in store.log.items():
        if key not in store.entries or store.entries[key].seq != seq:
            found.append(Discrepancy("log without entry", f"{key[0]} {key[1]}", seq, 0))
    if len(store.log) != len(store.entries):
        found.append(Discrepancy("log length", "", len(store.log), len(store.entries)))
    return found


def _compare(where: str, stored: Amounts, right: Amounts) -> list[Discrepancy]:
    return [
        Discrepancy(name, where, getattr(stored, name), getattr(right, name))
        for name in _AMOUNT_FIELDS
        if name != "requests" and getattr(stored, name) != getattr(right, name)  # requests have no entries
    ]
