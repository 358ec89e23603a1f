"""What is told of budgets."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

__all__ = ["REACHED", "SHARE_REACHED", "BudgetEvent"]

REACHED: Final = "customer_budget_limit_reached"
SHARE_REACHED: Final = "customer_budget_share_reached"


@dataclass(frozen=True, slots=True)
class BudgetEvent:
    """A customer has used so much of a budget.

    Attributes:
        id: The same each time the same thing is told.
        type: "customer_budget_limit_reached", or below 100 % "customer_budget_share_reached".
        customer_identifier: Whose budget.
        limit: "period_budget" or "total_budget".
        threshold: The share that was reached, in percent.
        used: What is used of it, USD.
        budget: The budget, USD.
        period_start: First day of the period, ISO format; None for a total budget.
        period_end: The day after its last.
        resets_at: When it begins anew.
        time: When it was noticed.
    """

    id: str
    type: str
    customer_identifier: str
    limit: str
    threshold: Decimal
    used: Decimal
    budget: Decimal
    period_start: str | None
    period_end: str | None
    resets_at: datetime | None
    time: datetime

    def to_dict(self) -> dict[str, Any]:
        """JSON values; money as decimal strings."""
        return {
            "id": self.id,
            "customer_identifier": self.customer_identifier,
            "limit": self.limit,
            "threshold_percent": f"{self.threshold:f}",
            "used": f"{self.used:f}",
            "budget": f"{self.budget:f}",
            "period_start": self.period_start,
            "period_end": self.period_end,
            "resets_at": None if self.resets_at is None else self.resets_at.isoformat().replace("+00:00", "Z"),
        }
