"""Records that an exporter's other side won't take: kept by their place in the log, listed, sent again."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from respan_guard.backends.base import Backend, RecordQuery
from respan_guard.decision import as_datetime
from respan_guard.lease import SPACE as OUTBOX
from respan_guard.recorder import record_from_entry
from respan_guard.usage import UsageRecord

__all__ = ["DONE", "SPACE", "DeadLetter", "DeadLetters", "redacted"]

SPACE = "dead-letters"
DONE = (1 << 53) - 1
"""A cursor behind everything: that of a reader that waits for nothing."""
_PAGE = 500
_SHORTEST = 3  # texts below that are everywhere
_LEAST = 10_000  # smaller numbers are, too


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that was not taken.

    Attributes:
        exporter: The exporter's name.
        sequence: The record's place in the log.
        reason: Why it was not taken.
        at_ms: When.
    """

    exporter: str
    sequence: int
    reason: str
    at_ms: int

    @property
    def at(self) -> datetime:
        """When it was not taken."""
        return as_datetime(self.at_ms)


class DeadLetters:
    """Those of one exporter.

    A letter names the record's place in the log and holds nothing of it, so that who is deleted leaves nothing
    behind. A cursor of their own keeps the oldest one's record from being pruned.

    Args:
        name: The exporter's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._cursor = f"dead-letters:{name}"

    async def bury(self, backend: Backend, record: UsageRecord, reason: str, now_ms: int) -> None:
        """Keep a record as a dead letter; again changes nothing but the reason."""
        first = await self._first(backend)
        if first is None or record.sequence < first.sequence:  # one that was put off may be older than others
            await backend.set_cursor(self._cursor, record.sequence - 1)
        text = json.dumps({"reason": redacted(reason, record)[:300], "at_ms": now_ms})
        await backend.set_fact(SPACE, self._key(record.sequence), text)

    async def page(self, backend: Backend, after: int = 0, limit: int = _PAGE) -> list[DeadLetter]:
        """The next ones behind a place in the log."""
        rows = await backend.facts(SPACE, after=self._key(after), limit=limit)
        return [self._letter(key, text) for key, text in rows if key.startswith(f"{self.name}/")]

    async def all(self, backend: Backend) -> AsyncIterator[DeadLetter]:
        """All of them, oldest record first."""
        after = 0
        while page := await self.page(backend, after):
            for letter in page:
                yield letter
            after = page[-1].sequence

    async def count(self, backend: Backend, most: int = 100_000) -> int:
        """How many there are, at most `most`."""
        found = after = 0
        while found < most and (page := await self.page(backend, after)):
            found, after = found + len(page), page[-1].sequence
        return found

    async def record(self, backend: Backend, letter: DeadLetter) -> UsageRecord | None:
        """A letter's record; None if it was revised since, for then it stands, and is exported, at a later place."""
        query = RecordQuery(after=letter.sequence - 1, stop=letter.sequence, limit=1)
        rows = await backend.entries(query)
        return record_from_entry(rows[0]) if rows and rows[0].seq == letter.sequence else None

    async def remove(self, backend: Backend, letter: DeadLetter) -> None:
        """Forget one; and what was kept from pruning for it."""
        await backend.set_fact(SPACE, self._key(letter.sequence), None)
        first = await self._first(backend)
        await backend.set_cursor(self._cursor, DONE if first is None else first.sequence - 1)

    async def replay(self, backend: Backend) -> int:
        """Have whoever exports send all that there are now again, as soon as it can; how many that is."""
        last = 0
        count = 0
        async for letter in self.all(backend):
            last, count = letter.sequence, count + 1
        if count:
            await backend.set_fact(OUTBOX, self._asked, str(last))
        return count

    async def asked(self, backend: Backend) -> int | None:
        """Up to which place in the log they shall be sent again; None if nobody asked."""
        text = await backend.fact(OUTBOX, self._asked)
        return int(text) if text is not None and text.isdecimal() else None

    async def answered(self, backend: Backend) -> None:
        """They were."""
        await backend.set_fact(OUTBOX, self._asked, None)

    @property
    def _asked(self) -> str:
        return f"replay:{self.name}"

    def _key(self, sequence: int) -> str:
        return f"{self.name}/{sequence:019d}"

    async def _first(self, backend: Backend) -> DeadLetter | None:
        page = await self.page(backend, limit=1)
        return page[0] if page else None

    def _letter(self, key: str, text: str) -> DeadLetter:
        try:
            found = json.loads(text)
            reason, at_ms = str(found["reason"]), int(found["at_ms"])
        except (ValueError, KeyError, TypeError):
            reason, at_ms = "", 0
        return DeadLetter(self.name, int(key.rpartition("/")[2]), reason, at_ms)


def redacted(reason: str, record: UsageRecord) -> str:
    """Why a record was not taken, without what it says of its customer: an answer may quote the row.

    What is noted of a dead letter, and in logs, outlives the customer.
    """
    texts = {record.customer_identifier, *_texts(record.usage.metadata)}
    spelled = {form for text in texts for form in (text, json.dumps(text)[1:-1], repr(text)[1:-1])}
    for text in sorted(spelled, key=len, reverse=True):
        if len(text) < _SHORTEST and text != record.customer_identifier:
            continue
        reason = re.sub(re.escape(text), "...", reason, flags=re.IGNORECASE) if text else reason
        # A long answer is cut off, maybe within the text.
        cut = next((n for n in range(len(text) - 1, _SHORTEST, -1) if reason.endswith(text[:n])), 0)
        reason = f"{reason[: len(reason) - cut]}..." if cut else reason
    return reason


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) >= _LEAST):
        yield str(value)
