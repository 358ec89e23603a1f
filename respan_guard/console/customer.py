"""One customer: profile, limits and how they stand, usage, what was changed; and the form that changes it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from respan_guard.backends.base import AMOUNTS, AuditRow, Backend, UsageQuery
from respan_guard.console.charts import chart
from respan_guard.console.logs import latest
from respan_guard.console.ranges import Range
from respan_guard.console.standing import meters, policy_of, profile, state_of
from respan_guard.customers import is_shown
from respan_guard.errors import InvalidInput, RevisionConflict
from respan_guard.markups import with_markup
from respan_guard.money import from_nano

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["FIELDS", "ChangedMeanwhile", "Field", "changes_from", "customer", "expect", "history", "shown"]

_LATEST = 10
_HISTORY = 50


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the form."""

    name: str
    label: str
    hint: str = ""
    kind: str = "text"
    unit: str = ""


FIELDS = {
    "Profile": (
        Field("name", "Name"),
        Field("email", "Email"),
        Field("group_identifier", "Group", "reports count the customer to it"),
        Field("time_zone", "Time zone", "such as Europe/Berlin; where its days begin"),
        Field("markup_percentage", "Markup", "added in reports only", unit="%"),
        Field("metadata", "Metadata", "a JSON object", "json"),
    ),
    "Limits": (
        Field("rate_limit", "Rate limit", 'requests per minute, or like "100/minute; 2000/hour"'),
        Field("period_budget", "Period budget", "0 lets nothing through", unit="USD"),
        Field("budget_duration", "Period", kind="duration"),
        Field("period_start", "Periods are counted from", "empty: the day the budget was set", "date"),
        Field("period_end", "Period ends", "only for a length of your own, without a period", "date"),
        Field("total_budget", "Total budget", "for all time", unit="USD"),
    ),
}
DURATIONS = {"": "not set (monthly)", "daily": "daily", "weekly": "weekly", "monthly": "monthly", "yearly": "yearly"}


def shown(params: Mapping[str, Any] | None) -> dict[str, str]:
    """What the form's fields hold, as text."""
    found = {}
    for field in (field for group in FIELDS.values() for field in group):
        value = (params or {}).get(field.name)
        if value is None:
            found[field.name] = ""
        elif field.kind == "json":
            found[field.name] = json.dumps(value, ensure_ascii=False, indent=2)
        else:
            found[field.name] = str(value)
    return found


def changes_from(form: Mapping[str, str], *, all_fields: bool = False) -> dict[str, Any]:
    """What a form changes: the fields that do not hold what they were shown with, so that others' changes stay.

    Raises:
        InvalidInput: Metadata is no JSON, or a field is missing. All else is checked where customers are.
    """
    changes: dict[str, Any] = {}
    for field in (field for group in FIELDS.values() for field in group):
        text = _lines(form.get(field.name, ""))
        if not all_fields:
            if f"was_{field.name}" in form and field.name not in form:
                raise InvalidInput(f"The form came without {field.label}. Nothing was changed.", field=field.name)
            if text == _lines(form.get(f"was_{field.name}", "")):
                continue
        value: Any = text or None
        if value is not None and field.kind == "json":
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                raise InvalidInput(
                    'metadata must be a JSON object, such as {"plan": "pro"}', field="metadata"
                ) from None
        elif value is not None and field.name == "rate_limit" and text.isascii() and text.isdigit() and len(text) < 12:
            value = int(text)
        if value is not None or not all_fields:
            changes[field.name] = value
    return changes


class ChangedMeanwhile(RevisionConflict):
    """Others changed the same fields since the form was shown; `now` is what they hold."""

    def __init__(self, now: Mapping[str, str], typed: Mapping[str, str]) -> None:
        labels = {field.name: field.label for group in FIELDS.values() for field in group}
        both = [f"{labels[name]}: now {_said(text)}, you typed {_said(typed[name])}." for name, text in now.items()]
        super().__init__(f"Changed by somebody else meanwhile. {' '.join(both)} Save again to set what you typed.")
        self.now = now
        self.field = next(iter(now))


def expect(form: Mapping[str, str], changes: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Whether the fields that a form changes hold what they were shown with, or what it changes them to.

    Raises:
        ChangedMeanwhile: They do not.
    """
    now, typed = shown(stored), shown(changes)
    was = {name: _lines(form.get(f"was_{name}", "")) for name in changes}
    if others := {name: now[name] for name in changes if _lines(now[name]) not in (was[name], typed[name])}:
        raise ChangedMeanwhile(others, typed)


def _said(text: str) -> str:
    return f'"{text[:100]}"' if text else "nothing"


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


async def customer(guard: Guard, identifier: str, span: Range) -> dict[str, Any] | None:
    """What the page shows; None if nobody has that identifier."""
    zone = ZoneInfo(guard.settings.time_zone)

    async def work(backend: Backend) -> dict[str, Any] | None:
        row = await backend.get(identifier)
        if row is None:
            return None
        who = profile(row)
        limits = await meters(guard, backend, row, identifier)
        usage = await backend.usage(
            UsageQuery(first_day=span.first_day, end_day=span.end_day, customer=identifier, by=("day", "model"),
                       limit=100_000)
        )  # fmt: skip
        points: dict[str, Counter[int]] = {}
        models: dict[str, Counter[str]] = {}
        for found in usage:
            name = found.model or "no model"
            points.setdefault(name, Counter())[found.day or 0] += found.amounts.cost
            sums = models.setdefault(name, Counter())
            for amount in AMOUNTS:
                sums[amount] += getattr(found.amounts, amount)
        days = Range(span.name, span.first_day, span.end_day, span.since_ms, span.until_ms)
        markup = guard.policies.markup(row.params)
        spend = chart("Spend by model", "usd", days, zone, points)
        if markup:
            paid = Counter[int]()
            for costs in points.values():
                paid.update(costs)
            spend = spend.marked_up({day: with_markup(from_nano(paid[day]), markup) for day in spend.places})
        terms = policy_of(guard, row).at(guard.now_ms())
        return {
            "row": row,
            "who": who,
            "somebody": is_shown(row),
            "own_limits": bool(row.params),
            "markup": markup,
            "with_markup": lambda cost: with_markup(from_nano(cost), markup) if markup else None,
            "state": state_of(who, limits),
            "meters": limits,
            "period": terms.period,
            "chart": spend,
            "models": sorted(
                ((name, sums) for name, sums in models.items() if sums["calls"]),
                key=lambda item: (-item[1]["cost"], item[0]),
            ),
            "latest": await latest(guard, backend, identifier, _LATEST),
            "history": [(one, history(one)) for one in await backend.audit(customer=identifier, limit=_HISTORY)],
        }

    return await guard.lane().call(work, 30.0)


async def standing(guard: Guard, identifier: str) -> dict[str, Any] | None:
    """Where the customer's limits stand now."""

    async def work(backend: Backend) -> dict[str, Any] | None:
        row = await backend.get(identifier)
        if row is None:
            return None
        limits = await meters(guard, backend, row, identifier)
        return {"row": row, "who": profile(row), "meters": limits, "state": state_of(profile(row), limits)}

    return await guard.lane().call(work)


def history(row: AuditRow) -> list[tuple[str, str, str]]:
    """What a change changed: field, before, after."""
    before, after = row.before or {}, row.after or {}

    def text(value: object) -> str:
        return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    names = [*after, *(name for name in before if name not in after)]
    changed = [name for name in names if before.get(name) != after.get(name)]
    return [(name, text(before.get(name)), text(after.get(name))) for name in changed]
