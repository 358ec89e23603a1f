"""What `Guard` takes by keyword, as types: a typo is a type error, too."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

from respan_guard.clock import Clock

__all__ = ["FailureMode", "GuardOptions", "Mode", "RateLimitStrategy"]

Mode: TypeAlias = Literal["enforce", "shadow", "off"]
FailureMode: TypeAlias = Literal["closed", "open", "local"]
RateLimitStrategy: TypeAlias = Literal["sliding-window-counter", "moving-window", "fixed-window"]
Money: TypeAlias = Decimal | int | float | str


class GuardOptions(TypedDict, total=False):
    """The keywords of `Guard`, beside `storage`. See `Settings` for what each means."""

    mode: Mode
    default_limits: Mapping[str, Any] | None
    app_budgets: Mapping[str, Any] | None
    model_budgets: Mapping[str, Any] | None
    hold: Literal["upper_bound", "none"] | Money
    default_hold: Money
    default_max_output_tokens: int
    prices: Mapping[str, Any]
    unknown_price: Literal["reject", "flag"]
    time_zone: str
    namespace: str
    retention: int | str | None
    storage_timeout: float | None
    budget_failure: FailureMode
    rate_limit_failure: FailureMode
    local_share: float
    rate_limit_storage: str | None
    rate_limit_strategy: RateLimitStrategy
    hold_ttl: float
    budget_status_code: int
    show_amounts: bool
    unknown_customers: Literal["admit", "refuse"]
    trust_customer_params: bool
    missing_usage: Literal["hold", "estimate", "flag"]
    store_content: bool
    journal_dir: str | Path | None
    max_cached_customers: int
    clock: Clock
