"""Charts: series for the browser, and the same numbers as a table; sparklines and meters drawn here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from respan_guard.backends.base import HOUR_MS
from respan_guard.console.formats import minutes
from respan_guard.console.ranges import Range

__all__ = ["OTHERS", "Chart", "chart", "largest", "sparkline"]

OTHERS = "all others"
NOBODY = "(nobody)"
_NANO = 1_000_000_000
_WIDTH, _HEIGHT = 96, 24


@dataclass(frozen=True, slots=True)
class Chart:
    """Stacked bars over time.

    Attributes:
        title: What it shows.
        unit: "usd" (values are nano-USD) or "count".
        places: The day or hour of each bar.
        labels: What it is called: a date or an hour.
        series: Name and values of each part of the bars, the largest part first.
        marked: What each bar is with markup, for the table; empty where that is not shown.
            None for what there was not when it was counted.
        marked_as_of: When that was, if it is not now.
    """

    title: str
    unit: str
    places: list[int]
    labels: list[str]
    series: list[tuple[str, list[int]]]
    marked: list[Decimal | None] = field(default_factory=list)
    marked_as_of: str = ""

    def marked_up(self, costs: Mapping[int, Decimal], as_of: str = "") -> Chart:
        """The same with what each day or hour costs with markup, and when that was counted if it is not now."""
        return replace(self, marked=[costs.get(place) for place in self.places], marked_as_of=as_of)

    @property
    def empty(self) -> bool:
        """Whether all of it is zero."""
        return not any(any(values) for _, values in self.series)

    @property
    def data(self) -> dict[str, Any]:
        """What the script draws. Money is in USD here, for pixels only; tables have every digit."""
        scale = _NANO if self.unit == "usd" else 1
        return {
            "unit": self.unit,
            "labels": self.labels,
            "series": [[name, [value / scale for value in values]] for name, values in self.series],
        }

    @property
    def rows(self) -> list[tuple[str, list[int], int, Decimal | None]]:
        """Label, values, their sum and that with markup, the newest first."""
        columns = [values for _, values in self.series]
        found = []
        for at in reversed(range(len(self.labels))):
            values = [column[at] for column in columns]
            found.append((self.labels[at], values, sum(values), self.marked[at] if self.marked else None))
        return found


def chart(
    title: str, unit: str, span: Range, zone: ZoneInfo, points: Mapping[str, Mapping[int, int]], *, limit: int = 6
) -> Chart:
    """A chart of a range from values by series, then by day or hour; small series become one, "" is nobody's."""
    if span.hourly:
        places = list(range(span.since_ms // HOUR_MS, span.until_ms // HOUR_MS))
        labels = [minutes(place * HOUR_MS, zone) for place in places]
    else:
        places = list(range(span.first_day, span.end_day))
        labels = [date.fromordinal(place).isoformat() for place in places]
    series = [(name or NOBODY, [values.get(place, 0) for place in places]) for name, values in largest(points, limit)]
    return Chart(title, unit, places, labels, series)


def largest(points: Mapping[str, Mapping[int, int]], limit: int) -> list[tuple[str, Mapping[int, int]]]:
    """The series with the largest sums, and the sum of all others."""
    nonzero = {name: values for name, values in points.items() if any(values.values())}
    ordered = sorted(nonzero.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    kept, rest = ordered[:limit], ordered[limit:]
    if rest:
        others: dict[int, int] = {}
        for _, values in rest:
            for place, value in values.items():
                others[place] = others.get(place, 0) + value
        kept.append((OTHERS, others))
    return kept


def sparkline(values: Sequence[int]) -> str:
    """Points of a polyline in a box of 96 by 24."""
    top = max(values, default=0)
    if top <= 0 or len(values) < 2:
        return ""
    step = _WIDTH / (len(values) - 1)
    return " ".join(
        f"{at * step:.1f},{_HEIGHT - 2 - (_HEIGHT - 4) * max(0, value) / top:.1f}" for at, value in enumerate(values)
    )
