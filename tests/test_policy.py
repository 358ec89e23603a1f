"""Params as limits at an instant, and what a change of params makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timedelta
from itertools import count
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respan_guard.backends.base import Limit
from respan_guard.customer import Customer
from respan_guard.decision import BLOCKED
from respan_guard.errors import InvalidInput
from respan_guard.periods import DURATIONS, local_day, start_of_day
from respan_guard.policy import (
    Budgets,
    Today,
    compile_policy,
    current_period,
    customer_at,
    fix_period_start,
    merge_params,
    update_params,
)

USD = 1_000_000_000


def at(text: str, zone: str = "UTC") -> int:
    """Milliseconds of a local time."""
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def day(text: str) -> int:
    """Ordinal of a date."""
    return date.fromisoformat(text).toordinal()


def on(today: date) -> Today:
    """Tells this date for every customer."""
    return lambda params: today


NOW = at("2026-10-15T12:00")  # a Thursday
TODAY = date(2026, 10, 15)


# --- limits


def test_no_params_no_limits() -> None:
    """A customer without params has no limits, but a local date."""
    terms = compile_policy(None).at(NOW)
    assert (terms.limits, terms.resets, terms.period, terms.money) == ((), (), None, False)
    assert (terms.day, terms.day_from_ms, terms.day_to_ms) == (day("2026-10-15"), at("2026-10-15"), at("2026-10-16"))


def test_every_limit_in_order() -> None:
    """A block comes first, then rates with the shortest window first, then the period's budget, then the total."""
    policy = compile_policy(
        {
            "rate_limit": "2000/hour; 100/minute; 5 per 90 seconds",
            "period_budget": "25",
            "budget_duration": "monthly",
            "period_start": "2026-01-31",
            "total_budget": 200,
            "blocked": True,
        }
    )
    terms = policy.at(NOW)
    assert terms.limits == (
        Limit(BLOCKED, "total", "cost", 0),
        Limit("rate_limit", "rate", "requests", 100, window_ms=60_000),
        Limit("rate_limit:90second", "rate", "requests", 5, window_ms=90_000),
        Limit("rate_limit:hour", "rate", "requests", 2000, window_ms=3_600_000),
        Limit("period_budget", "span", "cost", 25 * USD, first_day=day("2026-09-30"), end_day=day("2026-10-31")),
        Limit("total_budget", "total", "cost", 200 * USD),
    )
    assert terms.resets == (None, None, None, None, at("2026-10-31"), None)
    assert terms.period == (date(2026, 9, 30), date(2026, 10, 31))
    assert terms.money


def test_what_all_share_stands_behind_the_customers_own() -> None:
    """Periods are of the customer's own date; budgets of models are for who says one; each makes it about money."""
    app = Budgets(Customer.from_params("app", {"period_budget": 9, "budget_duration": "daily"}), "app_", "all")
    models = Budgets(Customer.from_params("app", {"period_budget": 5, "total_budget": 7}), "model_", "model")
    terms = compile_policy({"rate_limit": 5, "time_zone": "Asia/Tokyo"}, app=app, models=models).at(at("2026-10-31T20"))
    first = day("2026-11-01")  # it is Sunday there already
    shared = Limit("app_period_budget", "span", "cost", 9 * USD, first_day=first, end_day=first + 1, scope="all")
    assert terms.limits[1:] == (shared,)
    assert terms.resets == (None, at("2026-11-02", "Asia/Tokyo"))
    assert terms.period is None, "the period is that of the customer's own budget"
    assert terms.money
    named = terms.per_model
    assert named is not None
    assert named.limits == (
        *terms.limits,
        Limit("model_period_budget", "span", "cost", 5 * USD, first_day=first, end_day=first + 30, scope="model"),
        Limit("model_total_budget", "total", "cost", 7 * USD, scope="model"),
    )
    assert named.resets == (*terms.resets, at("2026-12-01", "Asia/Tokyo"), None)
    assert (named.day, named.day_to_ms, named.per_model) == (terms.day, terms.day_to_ms, None)
    assert [limit.shared for limit in named.limits] == [False, True, True, True]
    alone = compile_policy({"rate_limit": 5}, models=models).at(NOW)
    assert not alone.money
    assert alone.per_model is not None
    assert alone.per_model.money


@pytest.mark.parametrize(
    ("params", "limits", "money"),
    [
        ({"rate_limit": 100}, (Limit("rate_limit", "rate", "requests", 100, window_ms=60_000),), False),
        ({"rate_limit": 0}, (Limit("rate_limit", "rate", "requests", 0, window_ms=60_000),), False),
        ({"total_budget": 0}, (Limit("total_budget", "total", "cost", 0),), True),
        ({"blocked": True}, (Limit(BLOCKED, "total", "cost", 0),), True),
        ({"budget_duration": "daily", "period_start": "2026-01-01", "name": "no budget"}, (), False),
    ],
    ids=count(),
)
def test_single_limits(params: dict[str, Any], limits: tuple[Limit, ...], money: bool) -> None:
    """Each field makes its limit; 0 is a limit, and a duration without a budget is none."""
    terms = compile_policy(params).at(NOW)
    assert terms.limits == limits
    assert terms.money is money


def test_limits_have_unique_printable_names() -> None:
    """Names tell limits apart in headers and status, also for eight rates at once."""
    rates = "; ".join(f"1/{n} seconds" for n in (1, 2, 30, 60, 120, 3600, 7200, 86400))
    names = [limit.name for limit in compile_policy({"rate_limit": rates}).at(NOW).limits]
    assert len(set(names)) == 8
    assert all(name.isascii() and name.isprintable() and name.startswith("rate_limit") for name in names)


@pytest.mark.parametrize(
    ("params", "first", "end"),
    [
        ({}, "2026-10-01", "2026-11-01"),
        ({"budget_duration": "monthly"}, "2026-10-01", "2026-11-01"),
        ({"budget_duration": "yearly"}, "2026-01-01", "2027-01-01"),
        ({"budget_duration": "weekly"}, "2026-10-12", "2026-10-19"),
        ({"budget_duration": "daily"}, "2026-10-15", "2026-10-16"),
        ({"period_start": "2026-03-09"}, "2026-10-09", "2026-11-09"),
        ({"budget_duration": "weekly", "period_start": "2026-10-15"}, "2026-10-15", "2026-10-22"),
        ({"budget_duration": "yearly", "period_start": "2024-02-29"}, "2026-02-28", "2027-02-28"),
        ({"period_start": "2026-10-01", "period_end": "2026-10-11"}, "2026-10-11", "2026-10-21"),
        ({"period_start": "2026-11-01", "period_end": "2026-11-11"}, "2026-10-12", "2026-10-22"),
        ({"budget_duration": "monthly", "period_start": "2027-01-31"}, "2026-09-30", "2026-10-31"),
    ],
    ids=count(),
)
def test_periods_of_a_budget(params: dict[str, Any], first: str, end: str) -> None:
    """Without a start periods follow the calendar, with one they are counted from it both ways; custom ones roll."""
    params = {"period_budget": 5, **params}
    limit = compile_policy(params).at(NOW).limits[0]
    assert (limit.first_day, limit.end_day) == (day(first), day(end))
    assert current_period(params, TODAY) == (date.fromisoformat(first), date.fromisoformat(end))


def test_without_a_budget_there_is_no_period() -> None:
    """A rate or a total has no period."""
    assert current_period({"rate_limit": 5, "total_budget": 5, "period_start": "2026-01-01"}, TODAY) is None


# --- instants


def test_terms_are_kept_within_a_day() -> None:
    """The same object is answered until the local date changes, then another, and a clock set back finds its date."""
    policy = compile_policy({"period_budget": 5, "budget_duration": "daily"}, time_zone="Europe/Berlin")
    first = policy.at(at("2026-10-15T00:00", "Europe/Berlin"))
    assert policy.at(at("2026-10-15T23:59:59.999", "Europe/Berlin")) is first
    second = policy.at(at("2026-10-16T00:00", "Europe/Berlin"))
    assert (first.day, second.day) == (day("2026-10-15"), day("2026-10-16"))
    assert second.limits[0].first_day == first.limits[0].end_day
    assert policy.at(NOW) == first


def test_a_month_rolls_at_local_midnight() -> None:
    """In New York, October ends at 04:00 UTC, and the reset names that instant."""
    policy = compile_policy({"period_budget": 5}, time_zone="America/New_York")
    before, after = policy.at(at("2026-11-01T03:59:59.999")), policy.at(at("2026-11-01T04:00"))
    assert before.resets == (at("2026-11-01T04:00"),)
    assert before.period == (date(2026, 10, 1), date(2026, 11, 1))
    assert after.period == (date(2026, 11, 1), date(2026, 12, 1))
    assert after.resets == (at("2026-12-01T05:00"),)  # an hour later: clocks went back


def test_the_customers_zone_beats_the_guards() -> None:
    """Days are those of the customer's own zone, where it has one."""
    now = at("2026-10-15T23:00")
    assert compile_policy({"time_zone": "Asia/Tokyo"}, time_zone="America/New_York").at(now).day == day("2026-10-16")
    assert compile_policy({}, time_zone="America/New_York").at(now).day == day("2026-10-15")


def test_day_of_any_instant() -> None:
    """Past and future instants have their own date, whatever day the policy was last asked for."""
    policy = compile_policy({"time_zone": "Asia/Tokyo"})
    policy.at(NOW)
    assert policy.day_of(NOW) == day("2026-10-15")
    assert policy.day_of(at("2026-10-14T14:59:59.999")) == day("2026-10-14")
    assert policy.day_of(at("2027-01-01T00:00", "Asia/Tokyo")) == day("2027-01-01")


def test_unusable_params_do_not_compile() -> None:
    """A policy is made of sound params only, and of a zone that exists."""
    with pytest.raises(InvalidInput, match="period_budget"):
        compile_policy({"period_budget": -1})
    with pytest.raises(InvalidInput, match="time_zone"):
        compile_policy(None, time_zone="Mars/Olympus")


ZONES = ["UTC", "Europe/Berlin", "Pacific/Apia", "America/St_Johns", "Africa/Cairo", "Australia/Lord_Howe"]
starts = st.dates(date(1970, 1, 1), date(2100, 12, 31))


@st.composite
def periods(draw: st.DrawFn) -> dict[str, Any]:
    """Params of a budget: each way to say its period."""
    params: dict[str, Any] = {"period_budget": "5"}
    start = draw(starts)
    kind = draw(st.sampled_from(["duration", "custom", "start"]))
    params["period_start"] = start.isoformat()
    if kind == "duration":
        params["budget_duration"] = draw(st.sampled_from(DURATIONS))
    elif kind == "custom":
        params["period_end"] = (start + timedelta(days=draw(st.integers(1, 800)))).isoformat()
    return params


@settings(max_examples=200, deadline=None)
@given(periods(), st.sampled_from(ZONES), st.integers(at("1970-01-02"), at("2100-12-31")))
def test_terms_hold_the_day_and_the_reset_ends_the_period(params: dict[str, Any], zone: str, now: int) -> None:
    """At any instant the day lies in the span, the instant before the reset too, and the reset begins the next span."""
    policy = compile_policy(params, time_zone=zone)
    terms = policy.at(now)
    (limit,), (reset,) = terms.limits, terms.resets
    assert reset is not None
    assert terms.day_from_ms <= now < terms.day_to_ms
    assert limit.first_day <= terms.day < limit.end_day
    assert reset == start_of_day(limit.end_day, policy.zone) > now
    assert policy.at(reset - 1).limits == terms.limits
    assert policy.at(reset).limits[0].first_day >= limit.end_day
    assert terms.day == local_day(now, policy.zone)


# --- merging


def put(**fields: Any) -> Mapping[str, Any]:
    """What is stored of fields put today."""
    return fix_period_start(fields, on(TODAY))


def test_the_first_budget_fixes_its_start() -> None:
    """A budget without period_start is counted from today, in months; other fields fix nothing."""
    assert put(period_budget=25) == {
        "period_budget": "25",
        "budget_duration": "monthly",
        "period_start": "2026-10-15",
    }
    assert put(period_budget=25, period_start="2026-01-01", period_end="2026-01-11") == {
        "period_budget": "25",
        "period_start": "2026-01-01",
        "period_end": "2026-01-11",
    }
    assert put(period_budget=25, period_start="2026-01-31")["period_start"] == "2026-01-31"
    assert put(budget_duration="monthly", total_budget=5) == {"budget_duration": "monthly", "total_budget": "5"}


def test_a_request_that_repeats_its_params_never_restarts_a_period() -> None:
    """The snippet of Respan's docs, sent again for months, changes and writes nothing."""
    given_params = {
        "customer_identifier": "customer_1",
        "budget_duration": "monthly",
        "period_budget": 1000,
        "total_budget": 10000.0,
        "rate_limit": "100",
        "name": None,
    }
    stored = merge_params(None, given_params, on(date(2026, 1, 31)))
    assert stored == {
        "budget_duration": "monthly",
        "period_budget": "1000",
        "total_budget": "10000",
        "rate_limit": 100,
        "period_start": "2026-01-31",
    }
    for later in range(800):
        assert merge_params(stored, given_params, on(date(2026, 1, 31) + timedelta(days=later))) is stored


def test_given_fields_replace_absent_and_null_ones_stay() -> None:
    """A merge changes what is given and not null."""
    stored = put(name="Old", rate_limit=60, period_budget=5)
    merged = merge_params(stored, {"name": "New", "rate_limit": None, "period_budget": 6}, on(date(2026, 12, 24)))
    assert merged == {**stored, "name": "New", "period_budget": "6"}
    assert stored["name"] == "Old"


def test_nothing_given_to_nobody_is_nothing() -> None:
    """Params that only name the customer store nothing."""
    assert merge_params(None, {"customer_identifier": "c", "name": None}, on(TODAY)) == {}
    stored: Mapping[str, Any] = {}
    assert merge_params(stored, {"blocked": False}, on(TODAY)) is stored


def test_a_budget_for_a_known_customer_starts_when_it_is_given() -> None:
    """A customer without a budget gets the period_start of the day its first budget comes."""
    stored = merge_params({"name": "n"}, {"period_budget": 5, "budget_duration": "daily"}, on(date(2026, 12, 24)))
    assert stored == {
        "name": "n",
        "period_budget": "5",
        "budget_duration": "daily",
        "period_start": "2026-12-24",
    }


MARCH = date(2026, 3, 5)
ANCHORED: dict[str, Any] = {"budget_duration": "monthly", "period_budget": "25", "period_start": "2026-01-31"}


@pytest.mark.parametrize(
    "given_params",
    [
        {"period_start": "2026-02-28", "period_end": "2026-03-31"},
        {"period_start": "2026-02-28"},
        {"period_end": "2026-03-31"},
        {"period_start": date(2026, 2, 28), "period_end": date(2026, 3, 31), "period_anchor": date(2026, 1, 31)},
        {"period_start": "2026-02-28", "period_end": "2026-03-31", "budget_duration": "monthly", "period_budget": 25},
        {"period_start": "2026-01-31"},
        {"period_start": "2026-01-31", "period_end": "2026-02-28"},
        # read in the period before, written in this one
        {"period_start": "2026-01-31", "period_end": "2026-02-28", "period_anchor": "2026-01-31"},
    ],
    ids=count(),
)
def test_writing_back_the_current_period_is_no_change(given_params: dict[str, Any]) -> None:
    """What reads show of the period, whole or in part, does not become the anchor: 31 stays 31."""
    assert merge_params(ANCHORED, given_params, on(MARCH)) is ANCHORED
    assert update_params(ANCHORED, given_params, on(MARCH)) is ANCHORED


def test_reads_show_the_current_period_and_the_anchor() -> None:
    """A read in March of a budget that began on 31 January shows 28 February to 31 March."""
    found = customer_at("c", ANCHORED, MARCH)
    assert (found.period_start, found.period_end) == (date(2026, 2, 28), date(2026, 3, 31))
    assert found.period_anchor == date(2026, 1, 31)
    assert found.to_params() == ANCHORED


def test_what_a_read_shows_compiles_to_the_same_limits() -> None:
    """The anchor counts, not the start that is shown: from 28 February, April would begin on the 28th."""
    shown = customer_at("c", ANCHORED, MARCH).model_dump(exclude={"customer_identifier"})
    later = at("2026-05-15")
    assert compile_policy(shown).at(later) == compile_policy(ANCHORED).at(later)


def test_a_customer_without_a_budget_is_shown_as_stored() -> None:
    """Without a budget there is no current period to show."""
    stored = {"name": "n", "period_start": "2026-01-31"}
    assert customer_at("c", stored, MARCH) == Customer.from_params("c", stored)
    assert customer_at("c", None, MARCH) == Customer(customer_identifier="c")


def test_a_read_customer_may_be_changed_and_put() -> None:
    """A changed amount or duration of what was read keeps the anchor."""
    read = customer_at("c", ANCHORED, MARCH)
    assert read.model_copy(update={"period_budget": 40}).to_params() == {**ANCHORED, "period_budget": "40"}
    weekly = read.model_copy(update={"budget_duration": "weekly"}).to_params()
    assert weekly == {**ANCHORED, "budget_duration": "weekly"}
    moved = read.model_copy(update={"period_start": date(2026, 3, 1), "period_end": None}).to_params()
    assert moved == {**ANCHORED, "period_start": "2026-03-01"}


@settings(max_examples=200, deadline=None)
@given(periods(), starts, st.integers(0, 400))
def test_what_was_read_can_always_be_written_back(params: dict[str, Any], today: date, later: int) -> None:
    """A read, written back as a customer or as fields, now or later, is no change, for any anchor and length."""
    stored = fix_period_start(params, on(today))
    read = customer_at("c", stored, today)
    assert read.to_params() == stored
    fields = read.model_dump(exclude_none=True, exclude={"customer_identifier"})
    assert update_params(stored, fields, on(today)) is stored
    assert update_params(stored, fields, on(today + timedelta(days=later))) is stored
    fields.pop("period_anchor")
    assert merge_params(stored, fields, on(today)) is stored
    first, end = current_period(stored, today) or (None, None)
    assert (read.period_start, read.period_end) == (first, end)


def test_a_new_duration_keeps_the_anchor() -> None:
    """Monthly to weekly: weeks are counted from the same day."""
    merged = merge_params(ANCHORED, {"budget_duration": "weekly"}, on(MARCH))
    assert merged == {**ANCHORED, "budget_duration": "weekly"}
    assert current_period(merged, MARCH) == (date(2026, 2, 28), date(2026, 3, 7))


def test_a_new_start_is_a_new_anchor() -> None:
    """A start that is not the current period's moves the periods."""
    merged = merge_params(ANCHORED, {"period_start": "2026-03-01"}, on(MARCH))
    assert merged == {**ANCHORED, "period_start": "2026-03-01"}


def test_a_custom_period_takes_the_place_of_a_duration_and_back() -> None:
    """Start and end that contradict the stored duration replace it, a duration replaces the stored end."""
    custom = merge_params(ANCHORED, {"period_start": "2026-02-28", "period_end": "2026-03-10"}, on(MARCH))
    assert custom == {"period_budget": "25", "period_start": "2026-02-28", "period_end": "2026-03-10"}
    assert merge_params(custom, {"period_start": "2026-02-28", "period_end": "2026-03-10"}, on(MARCH)) is custom
    assert (
        merge_params(custom, {"period_start": "2026-03-10", "period_end": "2026-03-20"}, on(date(2026, 3, 12)))
        is custom
    )
    monthly = merge_params(custom, {"budget_duration": "monthly"}, on(MARCH))
    assert monthly == {**ANCHORED, "period_start": "2026-02-28"}


@pytest.mark.parametrize(
    "changes",
    [
        {"period_end": "2026-01-30"},
        {"period_end": "2026-04-01"},
        {"period_start": "2026-03-01", "period_end": "2026-04-02", "budget_duration": "monthly"},
        {"period_start": "2026-03-02", "period_end": "2026-03-01"},
        {"period_budget": -1},
        {"rate_limit": "5/year"},
        {"budget_duration": "hourly"},
        {"bugdet": 5},
        {"time_zone": "Mars/Olympus"},
        {"metadata": []},
    ],
    ids=count(),
)
def test_bad_changes_store_nothing(changes: dict[str, Any]) -> None:
    """What is unusable by itself or with what is stored is refused; what is stored stays."""
    before = dict(ANCHORED)
    for change in (merge_params, update_params):
        with pytest.raises(InvalidInput):
            change(ANCHORED, changes, on(MARCH))
    assert before == ANCHORED


def test_update_removes_with_none() -> None:
    """By hand, None removes a field; removing what is not there is no change."""
    stored = put(rate_limit=60, total_budget=200, name="n")
    assert update_params(stored, {"rate_limit": None, "name": None}, on(TODAY)) == {"total_budget": "200"}
    assert update_params(stored, {"email": None}, on(TODAY)) is stored
    assert update_params(None, {"email": None}, on(TODAY)) == {}


def test_removing_a_budget_leaves_its_period() -> None:
    """A budget that is removed and set again goes on with its periods."""
    without = update_params(ANCHORED, {"period_budget": None}, on(MARCH))
    assert without == {"budget_duration": "monthly", "period_start": "2026-01-31"}
    assert update_params(without, {"period_budget": 25}, on(date(2026, 7, 1))) == ANCHORED


def test_removing_the_start_lets_periods_start_today() -> None:
    """Without a stored start, a budget is counted from the day of the change."""
    assert update_params(ANCHORED, {"period_start": None}, on(MARCH)) == {**ANCHORED, "period_start": "2026-03-05"}


def test_a_block_is_set_and_lifted() -> None:
    """Blocked false is the same as not blocked."""
    stored = put(rate_limit=5)
    blocked = update_params(stored, {"blocked": True}, on(TODAY))
    assert blocked == {"rate_limit": 5, "blocked": True}
    assert update_params(blocked, {"blocked": False}, on(TODAY)) == stored
    assert update_params(blocked, {"blocked": None}, on(TODAY)) == stored


def test_the_identifier_can_not_be_updated() -> None:
    """A customer is not renamed by an update that happens to name another."""
    with pytest.raises(InvalidInput, match="customer_identifier can't be changed"):
        update_params(ANCHORED, {"customer_identifier": "other"}, on(MARCH))
