"""What limits say of an ask at an instant: used, held, and whether it fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from respan_guard.backends.base import Admit, Allowed, Limit, Window
from respan_guard.backends.cells import EVER, Cell, Planned, Span, roll

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
        op = Admit("", cell.customer, "", 0, 0, 0, (), model)
        _, used, held, windows = self.evaluate(cell, tuple(limits), now, op)
        return Allowed(now, tuple(used), tuple(held), tuple(windows))

    def evaluate(
        self, cell: C, limits: tuple[Limit, ...], now: int, op: Admit
    ) -> tuple[bool, list[int], list[int], list[Window]]:
        """Whether `op` fits all limits at `now`, and used, held and rate states. Changes nothing that is stored."""
        if limits is not cell.limits or (cell.model is not None and cell.model != op.model):
            self._plan(cell, limits, op.model)
        if cell.expiry:
            cell.expire(now)
        any_held = cell.live or cell.wide
        used: list[int] = []
        held: list[int] = []
        windows: list[Window] = []
        fits = True
        for amount, metric, width, span, limit in cell.plan:
            holding = 0
            if width:
                window = cell.rates.get(width) if cell.rates else None
                if window is None or not 0 <= now - window[0] < width:
                    window = roll(window, width, now)
                windows.append(window)
                start, prev, spent = window
                if prev:
                    spent += prev * (width - max(0, now - start)) // width
                if spent + op.requests > amount:
                    fits = False
            else:
                spent = self._wide_sum(limit, op.model) if span is None else span.amount
                if metric == "requests":
                    if spent + op.requests > amount:
                        fits = False
                else:
                    if any_held:
                        holding = self._held(cell, limit, op.model, now)
                    asked = op.cost if metric == "cost" else op.tokens
                    if (asked or not op.free) and (spent + holding + asked > amount or spent + holding >= amount):
                        fits = False
            used.append(spent)
            held.append(holding)
        return fits, used, held, windows

    def _plan(self, cell: C, limits: tuple[Limit, ...], model: str) -> None:
        """Look up once what every evaluation of these limits needs."""
        if cell.spans is None or len(cell.spans) + len(limits) > _MAX_SPANS:
            cell.spans = {}
        plan: list[Planned] = []
        for limit in limits:
            span = None
            if not limit.window_ms and limit.scope in ("customer", "customer+model"):
                only = model if limit.scope == "customer+model" else None
                key = limit.key if only is None else f"{limit.key}:{only}"
                span = cell.spans.get(key)
                if span is None:
                    first, end = _days(limit)
                    amount = self.sum(cell.customer, only, limit.metric, first, end)
                    span = cell.spans[key] = Span(limit.metric, first, end, only, amount)
                    cell.counts_requests |= limit.metric == "requests"
            plan.append((limit.amount, limit.metric, limit.window_ms, span, limit))
        cell.plan, cell.limits = plan, limits
        cell.model = model if any(limit.scope == "customer+model" for limit in limits) else None
        cell.wide = any(span is None and not width for _, _, width, span, _ in plan)
        cell.widths = tuple(width for _, _, width, _, _ in plan if width)

    def _wide_sum(self, limit: Limit, model: str) -> int:
        first, end = _days(limit)
        return self.sum(None, model if limit.scope == "model" else None, limit.metric, first, end)

    def _held(self, cell: C, limit: Limit, model: str, now: int) -> int:
        first, end = _days(limit)
        only = model if limit.scope in ("customer+model", "model") else None
        if limit.scope in ("model", "all"):
            return self.held(only, limit.metric, first, end, now)
        return cell.held(limit.metric, first, end, only)
