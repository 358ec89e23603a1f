"""From a sighting to an entry of the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from respan_guard.backends.base import Record
from respan_guard.decision import as_datetime
from respan_guard.providers import Call

if TYPE_CHECKING:
    from respan_guard.admission import Admission
    from respan_guard.backends.base import Entry
    from respan_guard.guard import Guard
    from respan_guard.otel.dedupe import Seen
    from respan_guard.otel.enforcement import Standing

__all__ = ["Books"]

_MOST_PROFILES = 4_096


class Books:
    """Books what was seen. Nothing here waits for storage.

    Args:
        guard: Keeps the records.
        standing: Is told whose spending has changed.
    """

    def __init__(self, guard: Guard, standing: Standing | None) -> None:
        self._guard = guard
        self._standing = standing
        self._profiles: dict[str, tuple[tuple[str, str], ...]] = {}

    def owe(self, admission: Admission, seen: Seen) -> Entry:
        """The entry of a call of unknown usage, made of what its admission's hold still has."""
        seen.recorded = True
        if seen.slot is not None:
            seen.slot.recorded = True
        entry = self._guard.admissions.presume(admission, self._call(seen), metadata=seen.usage.metadata)
        seen.presumed = entry
        seen.let_go()
        return entry

    def record(self, seen: Seen) -> None:
        """Record a call whose usage is known."""
        seen.recorded = True
        seen.due = None
        seen.usage.time = as_datetime(seen.at_ms)
        usage, admission = seen.usage, seen.admission
        if admission is not None:
            admission.book(admission.entry(usage, "span"))
        else:
            if seen.slot is not None:
                seen.slot.recorded = True
            self._guard.lane().post(Record(self._guard.make_entry(usage, seen.customer or "", source="span")))
        seen.let_go()
        if self._standing is not None and seen.customer is not None:
            self._standing.ask(seen.customer)

    def presume(self, seen: Seen) -> None:
        """Record a call whose usage stayed unknown: by its texts, where the span has them, else by `missing_usage`."""
        seen.recorded = True
        guard, usage = self._guard, seen.usage
        usage.estimated = True
        usage.cost = cost = None
        policy = guard.settings.missing_usage
        if policy != "flag" and seen.estimate is not None:
            usage.input_tokens, usage.output_tokens = seen.estimate
            cost = guard.prices.cost(usage)
        elif policy == "estimate":
            cost, guess = guard.estimator.presume(self._call(seen), 0)
            usage.input_tokens, usage.output_tokens = guess.input_tokens, guess.output_tokens
        if cost is None:
            usage.metadata = {**(usage.metadata or {}), "usage": "missing"}
        admission = seen.admission
        customer = seen.customer or ""
        day = guard.policies.get(customer).policy.day_of(seen.at_ms)
        if admission is not None and admission.held:
            day = admission.day
        entry = guard.recorder.presumed(
            f"{usage.trace_id}:{usage.span_id}",
            admission.hold_id if admission is not None else None,
            customer,
            day,
            seen.at_ms,
            cost,
            usage,
        )
        if seen.slot is not None:
            seen.slot.recorded = True
        if admission is not None:
            admission.book(entry)
        else:
            guard.lane().post(Record(entry))
        seen.presumed = entry
        seen.let_go()

    def revise(self, seen: Seen, told: Seen) -> None:
        """Book the usage of a call that has been presumed: the store shrinks what was presumed by as much."""
        entry, seen.presumed, seen.complete = seen.presumed, None, True
        if entry is None:
            return
        usage = told.usage
        usage.time = as_datetime(told.at_ms)
        real = self._guard.make_entry(
            usage,
            entry.customer,
            source="span",
            admission=entry.id.removeprefix("presumed:"),
            held_day=entry.day,
        )
        self._guard.lane().post(Record(real))
        told.let_go()

    def _call(self, seen: Seen) -> Call:
        usage = seen.usage
        return Call(
            provider=usage.provider or "unknown",
            operation=usage.operation or "chat",
            model=usage.model,
            input_tokens_bound=usage.input_tokens * 4,
            max_output_tokens=seen.max_output,
            service_tier=usage.service_tier,
        )

    def learn(self, customer: str, profile: dict[str, Any]) -> None:
        """Put a name and an email where a customer has none."""
        known = tuple(sorted(profile.items()))
        if self._profiles.get(customer) == known:
            return
        if len(self._profiles) >= _MOST_PROFILES:
            self._profiles.clear()
        self._profiles[customer] = known
        guard = self._guard
        guard.lane().post_call(lambda _: guard.customers.merge(customer, profile, trusted=False))
