"""What limits say of an ask at an instant: used, held, and whether it fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from respan_guard.backends.base import Admit, Allowed, Limit, Refused, Window
from respan_guard.backends.cells import EVER, Cell, Plan, Span, roll

__all__ = ["Evaluator", "reason"]

C = TypeVar("C", bound=Cell)
_MAX_SPANS = 8


def _days(limit: Limit) -> tuple[int, int]:
    return (0, EVER) if limit.kind == "total" else (limit.first_day, limit.end_day)


def reason(op: Admit, limit: Limit, used: int, held: int) -> str | None:
    """Why a limit refuses, or None if it does not."""
    amount = limit.amount
    if limit.metric == "requests":
        if used + op.requests <= amount:
            return None
        return "rate" if limit.kind == "rate" else "exhausted"
    asked = op.cost if limit.metric == "cost" else op.tokens
    if (op.free and not asked) or (used + held + asked <= amount and used + held < amount):
        return None
    return "held" if used < amount and used + asked <= amount else "exhausted"


class Evaluator(ABC, Generic[C]):
    """Evaluates limits on cells. Subclasses say where the sums come from that no cell has at hand."""

    @abstractmethod
    def sum(self, customer: str | None, model: str | None, metric: str, first_day: int, end_day: int) -> int:
        """A sum over days, of all customers or models where None. Called for what no cell has at hand."""

    @abstractmethod
    def held(self, model: str | None, metric: str, first_day: int, end_day: int, now: int) -> int:
        """What all customers' live holds hold, for limits that span customers."""

    def standing(self, cell: C, limits: Sequence[Limit], model: str, now: int) -> Allowed:
        """Where limits stand at `now`, as an admission would see it."""
        found = self.evaluate(cell, tuple(limits), now, Admit("", cell.customer, "", 0, 0, 0, (), model))
        return Allowed(now, found.used, found.held, found.windows)

    def evaluate(self, cell: C, limits: tuple[Limit, ...], now: int, op: Admit) -> Allowed | Refused:
        """Whether `op` fits all limits at `now`. Changes nothing that is stored."""
        plan = cell.plan
        if plan.limits is not limits or (plan.model is not None and plan.model != op.model):
            plan = self._plan(cell, limits, op.model)
        if cell.counted:
            cell.expire(now)
        used = [0] * plan.size
        held: tuple[int, ...] = plan.nothing  # most of the time nothing else is under way
        windows: tuple[Window, ...] = ()
        fits = True
        requests = op.requests
        for place, amount, width in plan.rates:
            window = cell.rates.get(width)
            if window is None or not 0 <= now - window[0] < width:
                window = roll(window, width, now)
            windows += (window,)
            start, prev, spent = window
            if prev:
                spent += prev * (width - max(0, now - start)) // width
            used[place] = spent
            if spent + requests > amount:
                fits = False
        if cell.counted or plan.wide:
            held = self._held_by_others(cell, plan, op.model, now)
        cost, free = op.cost, op.free
        for place, amount, metric, span in plan.sums:
            used[place] = spent = self._wide_sum(limits[place], op.model) if span is None else span.amount
            if metric == "requests":
                if spent + requests > amount:
                    fits = False
            else:
                asked = cost if metric == "cost" else op.tokens
                spent += held[place]
                if (spent + asked > amount or spent >= amount) and (asked or not free):
                    fits = False
        if fits:
            return Allowed(now, tuple(used), held, windows)
        reasons = tuple([reason(op, *known) for known in zip(limits, used, held, strict=True)])
        return Refused(now, reasons, tuple(used), held, windows)

    def _plan(self, cell: C, limits: tuple[Limit, ...], model: str) -> Plan:
        """Look up once what every evaluation of these limits needs."""
        if len(cell.spans) + len(limits) > _MAX_SPANS:
            cell.spans = {}
        plan = cell.plan = Plan(limits)
        for place, limit in enumerate(limits):
            if limit.window_ms:
                plan.rates.append((place, limit.amount, limit.window_ms))
                continue
            span = None
            if limit.scope in ("customer", "customer+model"):
                only = None
                if limit.scope == "customer+model":
                    only = plan.model = model
                key = limit.key if only is None else f"{limit.key}:{only}"
                span = cell.spans.get(key)
                if span is None:
                    first, end = _days(limit)
                    amount = self.sum(cell.customer, only, limit.metric, first, end)
                    span = cell.spans[key] = Span(limit.metric, first, end, only, amount)
                    cell.counts_requests |= limit.metric == "requests"
            else:
                plan.wide = True
            plan.sums.append((place, limit.amount, limit.metric, span))
        return plan

    def _wide_sum(self, limit: Limit, model: str) -> int:
        first, end = _days(limit)
        return self.sum(None, model if limit.scope == "model" else None, limit.metric, first, end)

    def _held_by_others(self, cell: C, plan: Plan, model: str, now: int) -> tuple[int, ...]:
        held = [0] * plan.size
        for place, _, metric, _ in plan.sums:
            limit = plan.limits[place]
            if metric != "requests":
                first, end = _days(limit)
                only = model if limit.scope in ("customer+model", "model") else None
                if limit.scope in ("model", "all"):
                    held[place] = self.held(only, metric, first, end, now)
                else:
                    held[place] = cell.held(metric, first, end, only)
        return tuple(held)
