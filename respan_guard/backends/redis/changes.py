"""What is written beside the batches: params, deletions, refusals, audit, pruning."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

from respan_guard.backends.base import ANY, AuditRow, Conflict, Expected, Params, Put, RefusalRow
from respan_guard.backends.cells import amounts_of
from respan_guard.backends.facts import check_fact, check_page
from respan_guard.backends.redis.rows import (
    amounts_list,
    audit_from,
    entry_from,
    params_text,
    row_text,
    text,
)
from respan_guard.backends.redis.shelf import Shelf
from respan_guard.backends.texts import params_from

__all__ = [
    "add_audit",
    "add_refusals",
    "audit",
    "delete",
    "fact",
    "facts",
    "prune",
    "put",
    "refusal_sums",
    "refusals",
    "set_fact",
]

_EPOCH_DAY = 719_163  # ordinal of 1970-01-01
_PAGE = 500


async def put(
    shelf: Shelf, customer: str, params: Params, if_revision: str | None, actor: str, now: int | None
) -> Put | Conflict:
    """Store a customer's params; see `Backend.put`.

    Whether two are equal is Python's to say, so they are read first, and written if nobody else did meanwhile.
    """
    after = json.loads(params_text(params))
    part = shelf.parts.of(customer)
    while True:
        (row,) = await shelf.run("rows", part, customer)
        revision, before = ("", None) if row is None else (row[1], params_from(row[2]))
        if if_revision is not None and if_revision != revision:
            return Conflict(revision, before)
        if before == after:
            return Put(revision, False)
        fresh = secrets.token_hex(8)
        noted = row_text(AuditRow(0, customer, "put", actor, before, after))
        at, name = "" if now is None else now, str(after.get("name") or "")
        given = (
            at,
            customer,
            revision,
            fresh,
            text(after),
            name,
            noted,
            shelf.timed,
            "1" if after.get("blocked") else "0",
        )
        if await shelf.run("put", part, *given):
            return Put(fresh, True)


async def delete(shelf: Shelf, customer: str, actor: str, now: int | None) -> bool:
    """Forget who a customer was; see `Backend.delete`. Its number stays, so sums and entries stay where they are."""
    part = shelf.parts.of(customer)
    label = f"deleted-{secrets.token_hex(8)}"
    while shelf.parts.of(label) != part:  # what comes later for the label must find it where the customer was
        label = f"deleted-{secrets.token_hex(8)}"
    noted = row_text(AuditRow(0, label, "delete", actor, None, None))
    return bool(await shelf.run("delete", part, "" if now is None else now, customer, label, noted, shelf.timed))


# -- refusals --------------------------------------------------------------------------------------


async def add_refusals(shelf: Shelf, rows: Sequence[RefusalRow]) -> None:
    """Add counts; the same customer, reason and minute are summed."""
    by_part: dict[int, list[Any]] = {}
    for row in rows:
        given = (row.customer, row.minute, text([row.customer, row.reason, row.minute]), row.reason, row.count)
        by_part.setdefault(shelf.parts.of(row.customer), []).extend(given)
    for part, arguments in by_part.items():
        for start in range(0, len(arguments), 5 * _PAGE):
            await shelf.run("refuse", part, *arguments[start : start + 5 * _PAGE])


async def refusals(
    shelf: Shelf, customer: str | None, since_minute: int, until_minute: int, limit: int
) -> list[RefusalRow]:
    """Counts of refusals, newest first."""
    key = "refused" if customer is None else f"r:{customer}"
    parts = range(shelf.parts.count) if customer is None else (shelf.parts.of(customer),)
    replies = await asyncio.gather(
        *[shelf.run("refusals", part, key, since_minute, until_minute, limit) for part in parts]
    )
    found = []
    for reply in replies:
        for row, count in zip(reply[::2], reply[1::2], strict=True):
            who, reason, minute = json.loads(row)
            found.append(RefusalRow(who, reason, minute, int(count)))
    return sorted(found, key=lambda row: (-row.minute, row.customer, row.reason))[:limit]


async def refusal_sums(shelf: Shelf, customer: str | None, since_minute: int, until_minute: int) -> dict[str, int]:
    """Refusals by reason."""
    given = ("", "0") if customer is None else (customer, "1")
    parts = range(shelf.parts.count) if customer is None else (shelf.parts.of(customer),)
    found: Counter[str] = Counter()
    for part in parts:
        reply = await shelf.run("refused", part, *given, since_minute, until_minute)
        found.update({reason: int(count) for reason, count in zip(reply[::2], reply[1::2], strict=True)})
    return dict(found)


# -- facts -----------------------------------------------------------------------------------------


async def set_fact(shelf: Shelf, space: str, key: str, value: str | None, expected: Expected) -> bool:
    """Compare and set a fact; see `Backend.set_fact`."""
    check_fact(space, key, value, expected)
    compared = ("", "0", "") if expected is ANY else ("=", "0", "") if expected is None else ("=", "1", expected)
    given = ("0", "") if value is None else ("1", value)
    return bool(await shelf.run("fact", shelf.parts.of(space), space, key, *compared, *given))


async def fact(shelf: Shelf, space: str, key: str) -> str | None:
    """One fact."""
    check_fact(space, key)
    value: str | None = await shelf.ask(shelf.parts.of(space), "HGET", f"k:{space}", key)
    return value


async def facts(shelf: Shelf, space: str, after: str, limit: int) -> list[tuple[str, str]]:
    """A page of facts, by key."""
    check_page(space, after)
    found = await shelf.run("facts", shelf.parts.of(space), space, after, max(limit, 0))
    return list(zip(found[::2], found[1::2], strict=True))


# -- audit -----------------------------------------------------------------------------------------


async def add_audit(shelf: Shelf, row: AuditRow) -> None:
    """Add a row to the audit."""
    await shelf.run("audit", shelf.parts.of(row.customer), shelf.timed, row.customer, row.at_ms, row_text(row))


async def audit(shelf: Shelf, customer: str | None, before: int | None, limit: int) -> list[AuditRow]:
    """The audit, newest first."""
    parts = range(shelf.parts.count) if customer is None else (shelf.parts.of(customer),)
    pages = await asyncio.gather(*[_audit_of(shelf, part, customer, before, limit) for part in parts])
    rows = [row for page in pages for row in page]
    return sorted(rows, key=lambda row: -row.seq)[:limit]


async def _audit_of(shelf: Shelf, part: int, customer: str | None, before: int | None, limit: int) -> list[AuditRow]:
    key = "audits" if customer is None else f"u:{customer}"
    highest = "+inf" if before is None else f"({shelf.parts.before(before, part)}"
    places = await shelf.ask(part, "ZREVRANGEBYSCORE", key, highest, "-inf", "LIMIT", 0, limit)
    if not places:
        return []
    rows = await shelf.ask(part, "HMGET", "audit", *places)
    return [
        audit_from(row, shelf.parts.outer(int(place), part))
        for place, row in zip(places, rows, strict=True)
        if row is not None
    ]


# -- pruning ---------------------------------------------------------------------------------------


async def prune(shelf: Shelf, before_day: int, limit: int) -> int:
    """Delete old entries and keep what they summed up to; see `Backend.prune`. Old counts of refusals go with them."""
    cursors = await shelf.ask(0, "HVALS", "cursors")
    read_by_all = min(map(int, cursors), default=None)
    gone = 0
    for part in range(shelf.parts.count):
        minute = (before_day - _EPOCH_DAY) * 1440
        while await shelf.run("forget", part, minute, _PAGE) == _PAGE:
            pass
        gone += await _prune_part(shelf, part, before_day, limit - gone, read_by_all)
    return gone


async def _prune_part(shelf: Shelf, part: int, before_day: int, limit: int, read_by_all: int | None) -> int:
    pruned, prune_at, seq = map(int, await shelf.run("mark", part, before_day - 1))
    newest = pruned == before_day - 1  # an earlier day than before finds no place to go on from
    place, end = prune_at if newest else 0, seq
    if read_by_all is not None:
        end = min(end, shelf.parts.behind(read_by_all, part))
    gone = 0
    while gone < limit and place < end:
        _, rows = await shelf.run("entries", part, "", "0", place, "0", _PAGE, "", shelf.timed)
        going: list[list[Any]] = []
        for row in rows:
            if row[0] > end or gone + len(going) >= limit:
                break
            place = row[0]
            entry = entry_from(row, place).entry
            if entry.day < before_day:
                amounts = amounts_list(amounts_of(entry))
                going.append([place, int(row[1]), entry.id, f"{entry.day}:{entry.model}", amounts, entry.at_ms])
        else:
            place = rows[-1][0] if len(rows) == _PAGE else end
        gone += await shelf.run("fold", part, place if newest else "", text(going))
        if gone >= limit or (rows and rows[-1][0] > end):
            break
    return gone
