"""A customer's params as limits at an instant, and how params change.

Params are the JSON values of `Customer.to_params`. `compile_policy` turns them into a `Policy`, whose
`at` is asked once for each admission; the functions below say what a change of params makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, tzinfo
from typing import Any, Final, TypeAlias

from respan_guard.backends.base import Limit
from respan_guard.customer import Customer
from respan_guard.decision import BLOCKED
from respan_guard.errors import InvalidInput
from respan_guard.money import to_nano
from respan_guard.periods import ALIGNED, Duration, day_bounds, load_zone, local_day, period, start_of_day
from respan_guard.rates import parse_rates, rate_unit

__all__ = [
    "Budgets",
    "Policy",
    "Terms",
    "Today",
    "assign_customer",
    "compile_policy",
    "current_period",
    "customer_at",
    "fix_period_start",
    "merge_params",
    "update_params",
]

Today: TypeAlias = Callable[[Mapping[str, Any]], date]
"""Tells the local date of a customer with these params: what changes may be its zone."""
_NOBODY: Final = "customer"  # stands for the identifier where only the limits matter


@dataclass(frozen=True, slots=True)
class Terms:
    """What a policy says on one local date. Valid from `day_from_ms` until before `day_to_ms`.

    Attributes:
        limits: Block, rates, period budget, total budget, as far as there are any, and behind the customer's own what
            all customers together may spend.
        resets: For each limit the instant (ms) when its period ends; None for rates and totals.
        day: Ordinal of the local date, on which amounts are booked.
        period: First day of the current budget period and the day after its last; None without a period budget.
        money: Whether any limit caps cost.
        per_model: The same for who says a model, with what all together may spend on it; None without such budgets.
    """

    limits: tuple[Limit, ...]
    resets: tuple[int | None, ...]
    day: int
    day_from_ms: int
    day_to_ms: int
    period: tuple[date, date] | None
    money: bool
    per_model: Terms | None = None


_NEVER = Terms((), (), 0, 0, 0, None, False)


class Budgets:
    """What may be spent, in each period and in all: by a customer, or by all customers together.

    A period is a run of dates, and the date is always that of the customer who asks. So where customers have zones of
    their own, budgets that they share begin a new period for each of them at its own midnight; what each spends counts
    for the period that its own date is in, and the sum of those never passes the budget.

    Args:
        customer: Whose fields say how much, and when periods begin.
        prefix: What the limits' names begin with.
        scope: Who counts: see `Limit`.
    """

    __slots__ = ("_amount", "_grid", "_name", "_scope", "_total")

    def __init__(self, customer: Customer, prefix: str = "", scope: str = "customer") -> None:
        self._name = f"{prefix}period_budget"
        self._scope = scope
        self._grid = _grid(customer)
        self._amount = None if customer.period_budget is None else to_nano(customer.period_budget)
        self._total: tuple[Limit, ...] = ()
        if customer.total_budget is not None:
            amount = to_nano(customer.total_budget)
            self._total = (Limit(f"{prefix}total_budget", "total", "cost", amount, scope=scope),)

    def on(self, day: int) -> tuple[Limit, ...]:
        """The limits on a date: that of its period, that of all time, as far as there are any."""
        if self._amount is None:
            return self._total
        first, end = period(*self._grid, day)
        span = Limit(self._name, "span", "cost", self._amount, first_day=first, end_day=end, scope=self._scope)
        return (span, *self._total)


class Policy:
    """Compiled params. Safe to share between threads."""

    __slots__ = ("_app", "_before", "_models", "_own", "_terms", "zone")

    def __init__(
        self, customer: Customer, zone: tzinfo, app: Budgets | None = None, models: Budgets | None = None
    ) -> None:
        self.zone = zone
        self._terms = _NEVER
        self._before: tuple[Limit, ...] = (*_block(customer), *_rates(customer))
        self._own = Budgets(customer)
        self._app = app
        self._models = models

    def at(self, now_ms: int) -> Terms:
        """The terms in force at an instant. Costs a comparison, but for the first call on a new date."""
        terms = self._terms
        if terms.day_from_ms <= now_ms < terms.day_to_ms:
            return terms
        terms = self._terms = self._compile(now_ms)
        return terms

    def day_of(self, ms: int) -> int:
        """The local date of an instant, as an ordinal."""
        terms = self._terms
        return terms.day if terms.day_from_ms <= ms < terms.day_to_ms else local_day(ms, self.zone)

    def _compile(self, now_ms: int) -> Terms:
        bounds = day_bounds(now_ms, self.zone)
        day = bounds[0]
        own = self._own.on(day)
        dates = next((_dates(limit.first_day, limit.end_day) for limit in own if limit.kind == "span"), None)
        limits = self._before + own
        if self._app is not None:
            limits += self._app.on(day)
        per_model: Terms | None = None
        if self._models is not None:
            per_model = self._say(limits + self._models.on(day), bounds, dates, None)
        return self._say(limits, bounds, dates, per_model)

    def _say(
        self,
        limits: tuple[Limit, ...],
        bounds: tuple[int, int, int],
        dates: tuple[date, date] | None,
        per_model: Terms | None,
    ) -> Terms:
        resets = tuple(start_of_day(limit.end_day, self.zone) if limit.kind == "span" else None for limit in limits)
        return Terms(limits, resets, *bounds, dates, any(limit.metric == "cost" for limit in limits), per_model)


def compile_policy(
    params: Mapping[str, Any] | None,
    *,
    time_zone: str = "UTC",
    app: Budgets | None = None,
    models: Budgets | None = None,
) -> Policy:
    """Turn params into a policy. A budget without `period_start` follows the calendar: 1 January, the 1st, Mondays.

    Args:
        params: Fields of a `Customer`; None for no limits.
        time_zone: Where days begin, unless the params name a zone.
        app: What all customers together may spend.
        models: What all together may spend on each model.

    Raises:
        InvalidInput: The params are no sound fields of a customer.
    """
    customer = Customer.from_params(_NOBODY, params)
    return Policy(customer, load_zone(customer.time_zone or time_zone), app, models)


def _block(customer: Customer) -> tuple[Limit, ...]:
    return (Limit(BLOCKED, "total", "cost", 0),) if customer.blocked else ()


def _rates(customer: Customer) -> tuple[Limit, ...]:
    if customer.rate_limit is None:
        return ()
    return tuple(
        Limit(f"rate_limit:{rate_unit(seconds)}" if i else "rate_limit", "rate", "requests", amount, seconds * 1000)
        for i, (amount, seconds) in enumerate(parse_rates(customer.rate_limit))
    )


def _grid(customer: Customer) -> tuple[date, Duration | int]:
    """What periods are counted from, and how long they are."""
    start, end = customer.period_start, customer.period_end
    if start is not None and end is not None and customer.budget_duration is None:
        return customer.anchor or start, (end - start).days
    return customer.anchor or ALIGNED, customer.budget_duration or "monthly"


def _dates(first: int, end: int) -> tuple[date, date]:
    return date.fromordinal(first), date.fromordinal(end)


def current_period(params: Mapping[str, Any], today: date) -> tuple[date, date] | None:
    """First day of the budget period that `today` is in, and the day after its last; None without a period budget."""
    customer = Customer.from_params(_NOBODY, params)
    return _dates(*period(*_grid(customer), today.toordinal())) if customer.period_budget is not None else None


def customer_at(identifier: str, params: Mapping[str, Any] | None, today: date) -> Customer:
    """A customer as reads show it: the current period's start and end, and the `period_anchor` they are counted from.

    Storing it again changes nothing.
    """
    found = Customer.from_params(identifier, params)
    bounds = current_period(params or {}, today)
    if bounds is None or found.period_start is None:
        return found
    return found.model_copy(
        update={"period_start": bounds[0], "period_end": bounds[1], "period_anchor": found.period_start}
    )


def fix_period_start(params: Mapping[str, Any], today: Today) -> dict[str, Any]:
    """Check params that are about to be stored, and say what a budget's periods are where they don't.

    They are months, and counted from today.

    Args:
        params: All fields of the customer.
        today: Tells the local date.

    Raises:
        InvalidInput: The params are no sound fields of a customer.
    """
    found = Customer.canonical(params)
    if "period_budget" in found:
        if "period_end" not in found:
            found.setdefault("budget_duration", "monthly")
        found.setdefault("period_start", today(found).isoformat())
    return found


def merge_params(stored: Mapping[str, Any] | None, given: Mapping[str, Any], today: Today) -> Mapping[str, Any]:
    """Merge params that came with a request into those of the customer.

    Given fields replace stored ones, absent and null ones leave them. The same params again change nothing, nor does
    the current period written back. A duration takes the place of a stored `period_end`; a new start and end take
    the place of a stored duration they contradict.

    Args:
        stored: What the customer has; None for a customer without params.
        given: Any fields of a `Customer`; `customer_identifier` is left out.
        today: Tells the local date.

    Returns:
        What to store; `stored` itself (nothing for None) if nothing changes.

    Raises:
        InvalidInput: A field is unusable, or the fields contradict each other once merged.
    """
    changes = {name: value for name, value in given.items() if value is not None and name != "customer_identifier"}
    return _changed(stored, changes, today)


def update_params(stored: Mapping[str, Any] | None, changes: Mapping[str, Any], today: Today) -> Mapping[str, Any]:
    """Change a customer's params by hand: as `merge_params`, but None removes a field.

    Removing `period_budget` leaves the period fields for a later one. Removing `period_start` lets a budget's periods
    start anew today.

    Raises:
        InvalidInput: As `merge_params`, or `customer_identifier` is among the changes: it can't change.
    """
    if "customer_identifier" in changes:
        raise InvalidInput("customer_identifier can't be changed; put another customer", field="customer_identifier")
    return _changed(stored, changes, today)


def assign_customer(stored: Mapping[str, Any], customer: Customer, today: Today) -> Mapping[str, Any]:
    """Take over the fields that were set on a customer, None and False too; the others stay. Else as `merge_params`.

    Only `period_start=None` leaves what is stored: said again with each request, it would start a budget anew each day.
    """
    params = customer.to_params()
    cleared = {name for name in stored if name in customer.model_fields_set and name not in params}
    return _changed(stored, params | dict.fromkeys(cleared - {"period_start"}), today)


def _changed(stored: Mapping[str, Any] | None, changes: Mapping[str, Any], today: Today) -> Mapping[str, Any]:
    base = stored if stored is not None else {}
    if all(name in base and base[name] == value for name, value in changes.items()):
        return base  # the common case of a request that repeats its params
    merged = fix_period_start(_overlay(base, changes, today(base)), today)
    return base if merged == base else merged


def _overlay(base: Mapping[str, Any], changes: Mapping[str, Any], today: date) -> dict[str, Any]:
    changes = dict(changes)
    given = {name: str(changes[name]) for name in _BOUNDS if changes.get(name) is not None}
    if given and given.items() <= _shown_bounds(base, today).items():
        for name in given:  # what reads say of the period must not become the anchor
            del changes[name]
        given = {}
    kept = dict(base)
    if changes.get("budget_duration") is not None and "period_end" not in given:
        kept.pop("period_end", None)
    elif len(given) == len(_BOUNDS) and "budget_duration" not in changes and "period_anchor" not in changes:
        kept = _without_contradicted_duration(kept, given)
    return kept | changes


def _shown_bounds(base: Mapping[str, Any], today: date) -> dict[str, str]:
    current = current_period(base, today) if "period_start" in base else None
    return {name: str(bound) for name, bound in zip(_BOUNDS, current, strict=True)} if current else {}


def _without_contradicted_duration(kept: dict[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    if "budget_duration" not in kept:
        return kept
    try:
        Customer.from_params(_NOBODY, {**given, "budget_duration": kept["budget_duration"]})
    except InvalidInput:
        return {name: value for name, value in kept.items() if name != "budget_duration"}
    return kept


_BOUNDS = ("period_start", "period_end")
