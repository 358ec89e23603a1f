"""What the API answers, for its OpenAPI document; the tests hold every answer to it."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, RootModel, WithJsonSchema

__all__ = [
    "Answer", "BulkRefusal", "BulkResult", "CreatedLog", "Error", "LogDetail", "LogPage", "MaybeNumber", "MaybeText",
    "Number", "Paged", "User", "UserPage",
]  # fmt: skip

Number: TypeAlias = Annotated[Decimal, WithJsonSchema({"type": "number"})]
MaybeNumber: TypeAlias = Annotated[Decimal | None, WithJsonSchema({"type": ["number", "null"]})]
MaybeCount: TypeAlias = Annotated[int | None, WithJsonSchema({"type": ["integer", "null"]})]
MaybeText: TypeAlias = Annotated[str | None, WithJsonSchema({"type": ["string", "null"]})]
MaybeFlag: TypeAlias = Annotated[bool | None, WithJsonSchema({"type": ["boolean", "null"]})]
MaybeTime: TypeAlias = Annotated[datetime | None, WithJsonSchema({"type": ["string", "null"], "format": "date-time"})]
MaybeObject: TypeAlias = Annotated[dict[str, Any] | None, WithJsonSchema({"type": ["object", "null"]})]
AnyJSON: TypeAlias = Annotated[Any, WithJsonSchema({})]


class Answer(BaseModel):
    """Base of all answers: nothing comes that is not named here."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """What was wrong, and where."""

    detail: str
    field: MaybeText = None


class BulkError(Answer):
    """A row that was not taken."""

    index: int
    error: str
    retryable: bool


class BulkWarning(Answer):
    """What to know of a row that was taken."""

    index: int
    warning: str


class BulkResult(Answer):
    """How many rows were taken, and which were not; of those, `retryable` ones can be sent again, and are not kept."""

    success_count: int
    error_count: int
    errors: list[BulkError]
    warnings: list[BulkWarning]


class BulkRefusal(RootModel[BulkResult | Error]):
    """No row was taken: what was wrong with each, or with all."""


class CreatedLog(Answer):
    """A log as it was taken."""

    id: MaybeText
    unique_id: MaybeText
    organization_id: str
    customer_identifier: MaybeText
    status: str
    cost: MaybeNumber
    timestamp: datetime
    environment: str
    latency: MaybeNumber
    time_to_first_token: MaybeNumber
    prompt_tokens: int
    completion_tokens: int
    prompt_cache_creation_tokens: int
    prompt_cache_hit_tokens: int
    model: str
    warnings: MaybeText


class LogRow(Answer):
    """A log as lists show it; fewer fields with `include_fields`."""

    id: str
    unique_id: str = ""
    customer_identifier: MaybeText = None
    model: str = ""
    provider_id: MaybeText = None
    status: str = ""
    log_type: str = ""
    log_method: str = ""
    environment: str = ""
    trace_unique_id: MaybeText = None
    span_unique_id: MaybeText = None
    span_name: MaybeText = None
    span_parent_id: MaybeText = None
    span_workflow_name: MaybeText = None
    thread_identifier: MaybeText = None
    session_identifier: MaybeText = None
    custom_identifier: MaybeText = None
    group_identifier: MaybeText = None
    prompt_id: MaybeText = None
    prompt_name: MaybeText = None
    error_message: MaybeText = None
    error_code: MaybeText = None
    warnings: MaybeText = None
    status_code: MaybeCount = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_request_tokens: int = 0
    prompt_cache_hit_tokens: int = 0
    prompt_cache_creation_tokens: int = 0
    reasoning_tokens: int = 0
    cost: MaybeNumber = None
    cost_with_markup: MaybeNumber = None
    latency: MaybeNumber = None
    time_to_first_token: MaybeNumber = None
    tokens_per_second: MaybeNumber = None
    stream: MaybeFlag = None
    positive_feedback: MaybeFlag = None
    timestamp: MaybeTime = None
    start_time: MaybeTime = None
    organization_id: str = ""
    unique_organization_id: str = ""
    metadata: MaybeObject = None
    properties: MaybeObject = None
    input: AnyJSON = None
    output: AnyJSON = None
    kind: str = ""
    record_id: str = ""


class LimitNow(Answer):
    """Where a limit stands: spent so far, with calls in flight, and the cap."""

    name: str
    current_value: Number
    new_value: Number
    limit_value: Number
    is_within_limit: bool


class LimitInfo(Answer):
    """Where the customer's limits stand now."""

    is_allowed: bool
    limits: list[LimitNow]


class LogDetail(LogRow):
    """A log in full."""

    customer_name: MaybeText = None
    customer_email: MaybeText = None
    limit_info: LimitInfo | None = None


class Paged(Answer):
    """A page: `count` is what is on it, `next` is null on the last."""

    count: int
    next: MaybeText
    previous: MaybeText


class LogPage(Paged):
    """A page of logs."""

    results: list[LogRow]


class UserRow(Answer):
    """A user as lists show it."""

    id: str
    customer_identifier: str
    unique_organization_id: str
    environment: str
    name: MaybeText
    email: MaybeText
    first_seen: datetime
    last_active_timeframe: datetime
    active_days: int
    number_of_requests: int
    total_requests: int
    total_tokens: int
    tokens: int
    total_prompt_tokens: int
    total_completion_tokens: int
    total_cost: Number
    cost: Number
    total_cost_with_markup: Number
    average_latency: MaybeNumber
    average_ttft: MaybeNumber
    average_monthly_cost: Number
    period_budget: MaybeNumber
    budget_duration: MaybeText
    total_budget: MaybeNumber
    blocked: bool


class UserPage(Paged):
    """A page of users."""

    results: list[UserRow]


class User(Answer):
    """A user by itself. Without a period budget, `total_period_usage` is that of the calendar month."""

    id: str
    customer_identifier: str
    unique_organization_id: str
    organization_name: str
    environment: str
    name: MaybeText
    email: MaybeText
    metadata: MaybeObject
    group_identifier: MaybeText
    rate_limit: Annotated[Any, WithJsonSchema({"type": ["integer", "string", "null"]})]
    period_budget: MaybeNumber
    budget_duration: MaybeText
    total_budget: MaybeNumber
    period_start: MaybeTime
    period_end: MaybeTime
    period_anchor: MaybeText
    markup_percentage: MaybeNumber
    blocked: bool
    time_zone: MaybeText
    total_period_usage: Number
    total_period_usage_with_markup: Number
    total_usage: Number
    total_usage_with_markup: Number
    total_requests: int
    total_prompt_tokens: int
    total_completion_tokens: int
    total_tokens: int
    average_latency: MaybeNumber
    average_ttft: MaybeNumber
    average_monthly_cost: Number
    active_days: int
    created_at: datetime
    last_active: datetime
    updated_at: MaybeTime
    is_test: bool
    limit_info: LimitInfo
