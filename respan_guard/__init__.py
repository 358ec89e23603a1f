"""Rate limits, USD budgets and exact usage records per customer, for ASGI apps that call LLMs.

Names load on first use, so that `import respan_guard` costs nothing and needs no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from respan_guard.admission import Admission, Refusal
    from respan_guard.customer import Customer
    from respan_guard.decision import Decision, Status
    from respan_guard.errors import (
        BudgetExceeded,
        CustomerBlocked,
        GuardError,
        LimitExceeded,
        RateLimitExceeded,
        StorageUnavailable,
    )
    from respan_guard.guard import Guard
    from respan_guard.middleware import GuardMiddleware
    from respan_guard.otel import GuardSpanProcessor
    from respan_guard.usage import Usage, UsageRecord

__all__ = [
    "Admission",
    "BudgetExceeded",
    "Customer",
    "CustomerBlocked",
    "Decision",
    "Guard",
    "GuardError",
    "GuardMiddleware",
    "GuardSpanProcessor",
    "LimitExceeded",
    "RateLimitExceeded",
    "Refusal",
    "Status",
    "StorageUnavailable",
    "Usage",
    "UsageRecord",
]

_MODULES = {
    "Admission": "admission",
    "Customer": "customer",
    "Decision": "decision",
    "Guard": "guard",
    "GuardMiddleware": "middleware",
    "GuardSpanProcessor": "otel",
    "Refusal": "admission",
    "Status": "decision",
    "Usage": "usage",
    "UsageRecord": "usage",
}


if not TYPE_CHECKING:  # a type checker that saw it would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
        globals()[name] = value  # found once, looked up as any other name from then on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
