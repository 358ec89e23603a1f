"""The policies this process knows: a cache that the store corrects, so it is never believed when stale."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from respan_guard.customer import Customer
from respan_guard.periods import load_zone, local_day
from respan_guard.policy import Budgets, Policy, Today, compile_policy

if TYPE_CHECKING:
    from respan_guard.backends.base import Limit
    from respan_guard.settings import Settings

__all__ = ["KnownPolicy", "Policies", "has_limits"]


class KnownPolicy:
    """A customer's params under the revision they were stored with, and the policy they compile to."""

    __slots__ = ("params", "policy", "revision")

    def __init__(self, revision: str, params: Mapping[str, Any] | None, policy: Policy) -> None:
        self.revision = revision
        self.params = params
        self.policy = policy


class Policies:
    """Known policies, bounded; a customer that isn't here is tried with the default policy.

    Args:
        settings: Say the limits of customers without their own, what all together may spend, where the days of
            customers without a zone of their own begin, and how many customers to remember.

    Attributes:
        default: The policy of customers without params.
        per_model: Whether there are budgets of single models: then it matters for which model money is held.
    """

    def __init__(self, settings: Settings) -> None:
        self._time_zone = settings.time_zone
        self._size = settings.max_cached_customers
        self._defaults: Mapping[str, Any] = {}
        if settings.default_limits:
            self._defaults = Customer(customer_identifier="default", **settings.default_limits).to_params()
        self._app = _shared(settings.app_budgets, "app_", "all")
        self._models = _shared(settings.model_budgets, "model_", "model")
        self.per_model = self._models is not None
        self.default = KnownPolicy("", None, self._compile(self._defaults))
        self._known: dict[str, KnownPolicy] = {}
        self._lock = threading.Lock()
        self.any_own = False
        """Whether any customer with limits of its own was seen: one that isn't known here may then have some, too."""
        self._heard_at: float | None = None
        self._missed_at: float | None = None

    def forget(self) -> None:
        """After a fork: another thread's lock would be held for ever in the child."""
        self._lock = threading.Lock()

    def heard(self, now: float) -> None:
        """The store said whether any customer has limits of its own."""
        self._heard_at, self._missed_at = now, None

    def missed(self, now: float) -> None:
        """The store gave no answer."""
        if self._missed_at is None:
            self._missed_at = now

    @property
    def none_own(self) -> bool:
        """Whether no customer had limits of its own just before the store was first missed.

        What was heard longer ago says nothing: another process may have put the first one since.
        """
        heard, missed = self._heard_at, self._missed_at
        return not self.any_own and heard is not None and (missed is None or missed - heard <= _FRESH)

    def get(self, customer: str) -> KnownPolicy:
        """What is known of a customer, else the default."""
        return self._known.get(customer, self.default)

    def learn(self, customer: str, revision: str, params: Mapping[str, Any] | None) -> KnownPolicy:
        """Take the store's word."""
        if params is None:
            self._known.pop(customer, None)
            return self.default
        known = KnownPolicy(revision, params, self._compile(self.effective(params)))
        self.any_own = self.any_own or has_limits(params)
        with self._lock:
            if len(self._known) >= self._size and customer not in self._known:
                self._known.pop(next(iter(self._known)), None)  # the one learned first; it is learned again in one trip
            self._known[customer] = known
        return known

    def _compile(self, params: Mapping[str, Any]) -> Policy:
        return compile_policy(params, time_zone=self._time_zone, app=self._app, models=self._models)

    def limits(self, now_ms: int) -> tuple[Limit, ...]:
        """The most that storage is asked for a customer without limits of its own."""
        terms = self.default.policy.at(now_ms)
        return (terms.per_model or terms).limits

    def look(self, customer: str, revision: str, params: Mapping[str, Any]) -> KnownPolicy:
        """What params compile to, for who looks at everybody: nothing is learned, so nobody is forgotten."""
        known = self._known.get(customer)
        if known is not None and known.revision == revision:
            return known
        return KnownPolicy(revision, params, self._compile(self.effective(params)))

    def drop(self, customer: str) -> None:
        """Forget a customer; the store is asked again."""
        self._known.pop(customer, None)

    def effective(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """A customer's params, with the default limits where it has none of its own.

        A budget comes with its period: a customer without a period budget takes the default's, with the default's
        period unless it names one.
        """
        defaults = self._defaults
        if not defaults:
            return params
        merged = {name: value for name, value in defaults.items() if name not in _PERIOD}
        if "period_budget" in defaults and "period_budget" not in params:
            merged["period_budget"] = defaults["period_budget"]
            if not any(name in params for name in _PERIOD):
                merged |= {name: defaults[name] for name in _PERIOD if name in defaults}
        return merged | dict(params)

    def today(self, now_ms: int) -> Today:
        """Tells the local date of customers at an instant, by their params."""

        def today(params: Mapping[str, Any]) -> date:
            zone = load_zone(self.effective(params).get("time_zone", self._time_zone))
            return date.fromordinal(local_day(now_ms, zone))

        return today

    def markup(self, params: Mapping[str, Any] | None) -> Decimal | None:
        """What reports add to the costs of a customer with these params, in percent; None for nothing."""
        found = (params or {}).get("markup_percentage", self._defaults.get("markup_percentage"))
        return None if found is None else Decimal(found)


def has_limits(params: Mapping[str, Any]) -> bool:
    """Whether params have any limit of a customer's own."""
    return any(params.get(name) not in (None, False) for name in _LIMITS)


def _shared(fields: Mapping[str, Any] | None, prefix: str, scope: str) -> Budgets | None:
    return None if fields is None else Budgets(Customer.from_params("app", fields), prefix, scope)


_FRESH = 3.0  # seconds; homes in use look twice a second
_LIMITS = ("rate_limit", "period_budget", "total_budget", "blocked")
_PERIOD = ("period_budget", "budget_duration", "period_start", "period_end")
