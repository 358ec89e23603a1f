"""What the API answers where it sums up, for its OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, RootModel

from respan_guard.api.schemas import Answer, MaybeNumber, MaybeText, Number, Paged

__all__ = ["ActiveUsers", "Breakdown", "GroupPage", "Summary", "TotalUsers"]


class Summary(Answer):
    """Sums over calls; averages are 0 where no call says."""

    number_of_requests: int
    total_cost: Number
    total_tokens: int
    total_prompt_tokens: int
    total_completion_tokens: int
    avg_latency: Number
    avg_tps: Number
    avg_ttft: Number
    total_cost_with_markup: Number
    unpriced_requests: int
    scores: dict[str, Any]


class Group(Answer):
    """Sums over the calls of one group, which one of the first fields names."""

    model: MaybeText = None
    customer_identifier: MaybeText = None
    provider_id: MaybeText = None
    custom_identifier: MaybeText = None
    prompt_id: MaybeText = None
    trace_unique_id: MaybeText = None
    thread_identifier: MaybeText = None
    span_count: int
    number_of_requests: int
    total_cost: Number
    total_tokens: int
    total_prompt_tokens: int
    total_completion_tokens: int
    error_count: int
    error_percentage: Number
    average_cost: Number
    average_tokens: int
    cache_hit_percentage: Number
    average_latency: MaybeNumber
    average_ttft: MaybeNumber
    average_tps: MaybeNumber
    total_cost_with_markup: Number
    unpriced_requests: int


class GroupPage(Paged):
    """A page of groups."""

    results: list[Group]
    current_filters: dict[str, Any]
    filters_data: dict[str, Any]


class ActiveBucket(Answer):
    """Who was active in a bucket of time."""

    date_group: datetime
    active_users: int
    total_cost: Number
    average_cost_per_user: Number
    total_cost_with_markup: Number


class ActiveSummary(Answer):
    """Who was active at all."""

    active_users: int
    average_cost_per_user: Number
    total_user_cost: Number
    total_user_cost_with_markup: Number


class ActiveUsers(Answer):
    """Active users, bucket by bucket; they are different ones, so buckets do not add up."""

    activity: list[ActiveBucket]
    summary: ActiveSummary


class UsersBucket(Answer):
    """How many users there were in a bucket of time."""

    date_group: datetime
    total_users: int


class UsersSummary(Answer):
    """How many users there were at all."""

    total_users: int


class TotalUsers(Answer):
    """Numbers of users, bucket by bucket."""

    data: list[UsersBucket]
    summary: UsersSummary


class BreakdownBucket(BaseModel):
    """A bucket of time: a number for each model, user, ..."""

    model_config = ConfigDict(extra="allow")

    date_group: datetime


class Breakdown(RootModel[dict[str, list[BreakdownBucket]]]):
    """For each metric its buckets."""
