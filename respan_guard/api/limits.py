"""Respan's `limit_info`."""

from __future__ import annotations

from typing import Any

from respan_guard.decision import BLOCKED, Status

__all__ = ["limit_info"]

_NAMES = {"period_budget": "customer_budget", "total_budget": "customer_total_budget"}


def limit_info(status: Status) -> dict[str, Any]:
    """Where a customer's limits stand: always what is spent so far, then with what calls in flight may still spend.

    Budgets that all customers share are not listed, as this may be handed on to the customer; they count for
    `is_allowed`.
    """
    room = all(limit.used + limit.held < limit.limit for limit in status.limits if limit.name != BLOCKED)
    limits = [
        {
            "name": _NAMES.get(limit.name, f"customer_{limit.name}"),
            "current_value": limit.used,
            "new_value": limit.used + limit.held,
            "limit_value": limit.limit,
            "is_within_limit": limit.used + limit.held < limit.limit,
        }
        for limit in status.limits
        if limit.name != BLOCKED and not limit.shared
    ]
    return {"is_allowed": not status.blocked and room, "limits": limits}
