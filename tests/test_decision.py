"""What a decision says: where every limit stands, the hardest reason, and when to ask again."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from respan_guard.backends.base import Allowed, Limit, Refused, Window
from respan_guard.decision import BLOCKED, Decision, LimitStatus, Status, as_datetime, rate_wait_ms
from respan_guard.refusal import render

NOW = 1_768_478_400_000  # 2026-01-15T12:00:00Z
MIDNIGHT = NOW + 43_200_000
RATE = Limit("rate_limit", "rate", "requests", 100, 60_000)
PERIOD = Limit("period_budget", "span", "cost", 50_000_000_000, first_day=1, end_day=2)
TOTAL = Limit("total_budget", "total", "cost", 1_000_000_000)
TOKENS = Limit("token_budget", "span", "tokens", 1000, first_day=1, end_day=2)
BLOCK = Limit(BLOCKED, "total", "requests", 0)


def refused(*why: tuple[Limit, str | None], windows: tuple[Window, ...] = (), requests: int = 1) -> Decision:
    """A refusal for those reasons; periods end at midnight."""
    limits = tuple(limit for limit, _ in why)
    outcome = Refused(
        NOW, tuple(reason for _, reason in why), tuple(limit.amount for limit in limits), (0,) * len(limits), windows
    )
    return Decision(
        "c1", limits, tuple(MIDNIGHT if limit.kind == "span" else None for limit in limits), outcome, requests
    )


def test_amounts_are_named_in_their_units() -> None:
    """Money is USD as Decimal, tokens and requests are ints; a rate resets when its window ends."""
    limits = (RATE, PERIOD, TOTAL, TOKENS)
    outcome = Allowed(NOW, (7, 10**9, 0, 400), (0, 5 * 10**8, 0, 100), ((NOW - 1000, 0, 7),))
    decision = Decision("c1", limits, (None, MIDNIGHT, None, MIDNIGHT), outcome)
    assert decision.allowed
    assert decision.limits == (
        LimitStatus("rate_limit", "requests", 7, 0, 100, 93, as_datetime(NOW + 59_000), 60),
        LimitStatus(
            "period_budget", "cost", Decimal(1), Decimal("0.5"), Decimal(50), Decimal("48.5"), as_datetime(MIDNIGHT)
        ),
        LimitStatus("total_budget", "cost", Decimal(0), Decimal(0), Decimal(1), Decimal(1)),
        LimitStatus("token_budget", "tokens", 400, 100, 1000, 500, as_datetime(MIDNIGHT)),
    )
    assert {type(status.used) for status in decision.limits if status.metric == "cost"} == {Decimal}


def test_nothing_remains_of_an_overrun_budget() -> None:
    """What is left is never below 0."""
    decision = Decision("c1", (TOTAL,), (None,), Allowed(NOW, (2 * 10**9,), (0,)))
    assert decision.limits[0].remaining == 0


def test_an_admission_has_no_reason() -> None:
    """Nothing is violated, nothing to wait for."""
    decision = Decision("c1", (TOTAL,), (None,), Allowed(NOW, (0,), (0,)))
    assert (decision.reason, decision.violated, decision.transient) == (None, (), False)
    assert (decision.retry_after, decision.resets_at) == (None, None)
    assert decision.detail == "Allowed."


@pytest.mark.parametrize(
    ("decision", "reason", "transient"),
    [
        (refused((BLOCK, "exhausted"), (PERIOD, "exhausted")), "blocked", False),
        (refused((RATE, "rate"), (PERIOD, "exhausted"), windows=((NOW, 0, 100),)), "exhausted", False),
        (refused((PERIOD, "held"), (RATE, "rate"), windows=((NOW, 0, 100),)), "rate", True),
        (refused((PERIOD, "held"), (TOTAL, None)), "held", True),
        (refused((PERIOD, "held"), (TOTAL, "exhausted")), "exhausted", False),
    ],
)
def test_the_hardest_reason_counts(decision: Decision, reason: str, transient: bool) -> None:
    """Blocked before exhausted before rate before held; only rate and held pass by waiting a while."""
    assert (decision.allowed, decision.reason, decision.transient) == (False, reason, transient)


def test_violated_limits_come_hardest_first() -> None:
    """Only those that refuse, and a block before all."""
    decision = refused(
        (PERIOD, "held"), (RATE, "rate"), (TOKENS, None), (TOTAL, "exhausted"), (BLOCK, "exhausted"),
        windows=((NOW, 0, 100),),
    )  # fmt: skip
    assert [status.name for status in decision.violated] == [BLOCKED, "total_budget", "rate_limit", "period_budget"]
    assert decision.violated[0].reason == "exhausted"


def test_retry_after_a_rate_is_the_wait_until_it_fits() -> None:
    """100 hits at the start of a window of 60 s: the first of them weighs less than 1 after 60.001 s."""
    decision = refused((RATE, "rate"), windows=((NOW, 0, 100),))
    assert decision.retry_after == pytest.approx(60.001, abs=1e-9)
    assert decision.resets_at == as_datetime(NOW + 60_001)


def test_retry_after_covers_every_transient_reason() -> None:
    """The longest wait of the rates that refuse, not of those that would allow; held budgets ask for a second."""
    day = Limit("daily", "rate", "requests", 10, 86_400_000)
    other = Limit("hourly", "rate", "requests", 500, 3_600_000)
    windows = ((NOW, 0, 100), (NOW, 0, 100), (NOW, 0, 10))
    decision = refused((RATE, "rate"), (other, None), (day, "rate"), (PERIOD, "held"), windows=windows)
    assert decision.retry_after == pytest.approx(86_400.001, abs=1e-9)
    assert refused((PERIOD, "held")).retry_after == 1.0
    soon = refused((RATE, "rate"), (PERIOD, "held"), windows=((NOW - 60_000, 100, 0),))
    assert soon.retry_after == 1.0


def test_no_retry_where_waiting_does_not_help() -> None:
    """Not when spent, not when blocked, and not for more requests than the rate ever allows."""
    assert refused((PERIOD, "exhausted"), (RATE, "rate"), windows=((NOW, 0, 100),)).retry_after is None
    assert refused((BLOCK, "exhausted")).retry_after is None
    never = refused((RATE, "rate"), windows=((NOW, 0, 0),), requests=101)
    assert (never.retry_after, never.resets_at) == (None, None)


def test_resets_at_of_a_budget_is_the_end_of_its_period() -> None:
    """A total budget has none."""
    assert refused((PERIOD, "exhausted")).resets_at == datetime(2026, 1, 16, tzinfo=UTC)
    assert refused((TOTAL, "exhausted")).resets_at is None


@pytest.mark.parametrize(
    ("decision", "says"),
    [
        (refused((BLOCK, "exhausted")), "The customer is blocked."),
        (refused((RATE, "rate"), windows=((NOW, 0, 100),)), "Too many requests: 100 per 60 seconds."),
        (
            refused((PERIOD, "exhausted")),
            "The budget of this period is used up. It resets on 2026-01-16 at 00:00 UTC.",
        ),
        (refused((TOTAL, "exhausted")), "The total budget is used up."),
        (refused((TOTAL, "held")), "The total budget is full because of calls in flight. Try again shortly."),
        (
            refused((TOKENS, "exhausted")),
            "The limit token_budget is used up. It resets on 2026-01-16 at 00:00 UTC.",
        ),
    ],
)
def test_the_detail_is_one_plain_sentence_without_amounts(decision: Decision, says: str) -> None:
    """What a customer of the app may read: no money, no id."""
    assert decision.detail == says
    assert "c1" not in decision.detail


def test_a_budget_that_is_not_spent_is_not_said_to_be() -> None:
    """A call that could cost more than what is left is refused for that, and the answer says so."""
    outcome = Refused(NOW, ("exhausted",), (4 * 10**8,), (0,))
    decision = Decision("c1", (TOTAL,), (None,), outcome)
    assert decision.detail == "The total budget has less left than this could cost."
    assert render(decision).title == "Budget too small"
    spent = Decision("c1", (TOTAL,), (None,), Refused(NOW, ("exhausted",), (10**9,), (0,)))
    assert render(spent).title == "Budget used up"


def test_repr_says_who_and_why() -> None:
    """For logs and debuggers."""
    assert repr(refused((TOTAL, "exhausted"))) == "<Decision refused: exhausted for 'c1'>"
    assert repr(Decision("c1", (), (), Allowed(NOW))) == "<Decision allowed for 'c1'>"


@pytest.mark.parametrize(
    ("window", "amount", "requests", "wait"),
    [
        ((NOW, 0, 0), 1, 1, 0),  # room now
        ((NOW, 0, 0), 1, 2, None),  # never
        ((NOW, 0, 1), 1, 1, 1_001),  # the window must end, and its hit weigh less than 1
        ((NOW - 400, 0, 10), 10, 1, 601),  # 600 ms until the end, then 10 weigh less than 10 at once
        ((NOW - 500, 10, 5), 10, 1, 1),  # 10 weigh 5 now, 4 in a millisecond
        ((NOW - 500, 10, 5), 10, 3, 201),  # 2.99 of 10 are left 701 ms after the start
        ((NOW - 500, 10, 5), 10, 6, 501),  # not in this window; in the next, 5 weigh less than 5 after 1 ms
        ((NOW - 1_000, 0, 10), 10, 10, 901),  # the window is over: its 10 must weigh less than 1
        ((NOW - 3_000, 9, 10), 10, 10, 0),  # long over
    ],
)
def test_waits_by_hand(window: Window, amount: int, requests: int, wait: int | None) -> None:
    """Windows of 1 s, with the figures worked out on paper."""
    assert rate_wait_ms(window, 1_000, amount, requests, NOW) == wait


def test_a_status_finds_its_limits_by_name() -> None:
    """The limit of that name, or None."""
    limit = LimitStatus("rate_limit", "requests", 1, 0, 2, 1)
    status = Status("c1", (limit,), None, Decimal(0), 1, 0)
    assert status.limit("rate_limit") is limit
    assert status.limit("period_budget") is None
