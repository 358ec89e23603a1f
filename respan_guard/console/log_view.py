"""What the logs page is asked for by its URL: filters, a span of time, and the place where a page begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from respan_guard.backends.base import RecordQuery, RefusalRow
from respan_guard.console.ranges import Range, range_from
from respan_guard.decision import BUDGETS

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["FIRST", "PILLS", "LogsView", "Place", "Refused", "status_of", "view_from"]

PILLS = {
    "": "All", "ok": "OK", "rate": "Rate limited", "budget": "Over budget", "error": "Error", "unpriced": "Unpriced"
}  # fmt: skip
_HIDDEN_PILLS = ("refused",)
Refused = tuple[int, str, str]
"""A row of refusals: minute, customer, reason."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page begins: records and refusals are each gone through in an order of their own.

    Attributes:
        before: Records before this place of the log; None for all.
        late: What is left are records from this place of the log on, which were logged long after they ended.
        refused: The last row of refusals that was shown; None for none.
    """

    before: int | None = None
    late: int | None = None
    refused: Refused | None = None

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Place:
        """Read a URL; what makes no sense is left out."""

        def number(name: str) -> int | None:
            text = query.get(name, "")
            return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None

        return cls(number("before"), number("late"), _refused(query.get("refused", "")))

    def to_query(self) -> dict[str, str]:
        """The parts of a URL that say it."""
        refused = "" if self.refused is None else json.dumps(self.refused)
        return {"before": str(self.before or ""), "late": str(self.late or ""), "refused": refused}


FIRST = Place()


def _refused(text: str) -> Refused | None:
    try:
        minute, customer, reason = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    known = type(minute) is int and -1 <= minute < 1 << 40 and isinstance(customer, str) and isinstance(reason, str)
    return (minute, customer, reason) if known else None


@dataclass(frozen=True, slots=True)
class LogsView:
    """What the URL asks for."""

    customer: str = ""
    status: str = ""
    model: str = ""
    provider: str = ""
    source: str = ""
    trace: str = ""
    range: str = "range=30d"
    place: Place = FIRST
    live: bool = False

    @classmethod
    def from_query(cls, query: Mapping[str, str], span: Range) -> LogsView:
        """Read a URL; what makes no sense is left out."""

        def text(name: str) -> str:
            return query.get(name, "").replace("\0", "").strip()  # which databases take in no text

        status = query.get("status", "")
        return cls(
            customer=text("customer"),
            status=status if status in PILLS or status in _HIDDEN_PILLS else "",
            model=text("model"),
            provider=text("provider"),
            source=text("source"),
            trace=text("trace"),
            range=span.query,
            place=Place.from_query(query),
            live=query.get("live") == "1",
        )

    def link(self, **changes: Any) -> str:
        """The query of a link that asks for the same but for some changes, from the newest on."""
        view = replace(self, **{"place": FIRST, "live": False, **changes})
        pairs = {
            "customer": view.customer, "status": view.status, "model": view.model, "provider": view.provider,
            "source": view.source, "trace": view.trace, "live": "1" if view.live else "",
            **view.place.to_query(),
        }  # fmt: skip
        text = urlencode({name: value for name, value in pairs.items() if value})
        return f"{text}&{view.range}" if text else view.range

    @property
    def detailed(self) -> bool:
        """Whether records are filtered by what refusals and sums do not know."""
        return bool(self.provider or self.source or self.trace)

    @property
    def of_records(self) -> bool:
        """Whether records are shown."""
        return self.status not in ("rate", "budget", "refused")

    @property
    def of_refusals(self) -> bool:
        """Whether refusals are shown."""
        return self.status in ("", "rate", "budget", "refused") and not (self.detailed or self.model)

    def to_query(self, span: Range) -> RecordQuery:
        """What to ask the store for records."""
        return RecordQuery(
            customer=self.customer or None,
            model=self.model or None,
            provider=self.provider or None,
            source=self.source or None,
            trace_id=self.trace or None,
            status=self.status if self.status in ("ok", "error") else None,
            unpriced=True if self.status == "unpriced" else None,
            since_ms=span.since_ms,
            until_ms=span.until_ms if span.name == "custom" else None,
            descending=True,
        )

    def takes(self, row: RefusalRow) -> bool:
        """Whether a refusal is of the kind that is asked for."""
        return self.status not in ("rate", "budget") or status_of(row) == self.status


def status_of(row: RefusalRow) -> str:
    """The pill that a refusal belongs to, or "blocked"."""
    return "budget" if row.reason in BUDGETS else "blocked" if row.reason == "blocked" else "rate"


def view_from(query: Mapping[str, str], guard: Guard) -> tuple[LogsView, Range]:
    """The page that a URL asks for."""
    span = range_from(query, guard)
    return LogsView.from_query(query, span), span
