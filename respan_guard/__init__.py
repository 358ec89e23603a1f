"""Rate limits, USD budgets and exact usage records per customer, for ASGI apps that call LLMs.

Names load on first use, so that `import respan_guard` costs nothing and needs no optional package.
"""

from __future__ import annotations

import importlib
import sys
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

_NAMES = tuple(__all__)
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
    del __all__  # asked for, it is what can be had: a star import without an extra takes the rest

    def __getattr__(name: str) -> object:
        if name == "__all__":
            return [name for name in _NAMES if hasattr(sys.modules[__name__], name)]
        if name not in _NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value: object = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
        except ImportError as error:
            from respan_guard.errors import MissingExtra, MissingName

            if not isinstance(error, MissingExtra) or sys._getframe(1).f_code.co_name == "_handle_fromlist":
                raise  # `from respan_guard import` would say that there is no such name, not what to install
            raise MissingName(str(error)) from error
        globals()[name] = value  # found once, looked up as any other name from then on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), "__all__", *_NAMES})
