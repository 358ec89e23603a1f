"""The RateLimit fields, read back by an independent parser of structured fields."""

from __future__ import annotations

from typing import Any

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from respan_guard.backends.base import Allowed, Limit, Refused
from respan_guard.decision import Decision
from respan_guard.errors import InvalidInput
from respan_guard.middleware.headers import RateLimitFields, header, is_preflight

NOW = 1_764_547_200_000
MINUTE = Limit("rate_limit", "rate", "requests", 100, window_ms=60_000)
HOUR = Limit("rate_limit:hour", "rate", "requests", 2000, window_ms=3_600_000)
PERIOD = Limit("period_budget", "span", "cost", 5_000_000_999, first_day=1, end_day=31)
TOTAL = Limit("total_budget", "total", "cost", 50_000_000_000)


def parsed(decision: Decision, *, show_amounts: bool = False, held: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Both fields, parsed: field name, policy name, parameters."""
    found = {}
    for name, value in RateLimitFields(show_amounts=show_amounts).of(decision, held):
        items: Any = http_sf.parse(value, tltype="list")
        found[name.decode()] = dict(items)
        assert len(found[name.decode()]) == len(items), "each policy once"
    return found


def allowed(*windows: tuple[int, int, int], used: tuple[int, ...], held: tuple[int, ...] = (0, 0, 0, 0)) -> Decision:
    """An admission of a customer with two rates and two budgets."""
    resets = (None, None, NOW + 86_400_000, None)
    return Decision("org_1", (MINUTE, HOUR, PERIOD, TOTAL), resets, Allowed(NOW, used, held, windows))


def test_an_admission_shows_what_is_left_after_it() -> None:
    """Quota and window are constant; `r` counts this request, `t` ends with the window."""
    found = parsed(allowed((NOW - 20_000, 0, 4), (NOW - 20_000, 0, 40), used=(4, 40, 0, 0)))
    assert found["ratelimit-policy"] == {
        "rate_limit": {"q": 100, "w": 60},
        "rate_limit:hour": {"q": 2000, "w": 3600},
    }
    assert found["ratelimit"] == {"rate_limit": {"r": 95, "t": 40}, "rate_limit:hour": {"r": 1959, "t": 3580}}


def test_a_refusal_shows_nothing_left() -> None:
    """A refused request is not counted, and nothing is left of the limit that refused it."""
    outcome = Refused(NOW, ("rate",), (100,), (0,), ((NOW - 59_001, 0, 100),))
    found = parsed(Decision("org_1", (MINUTE,), (None,), outcome))
    assert found["ratelimit"] == {"rate_limit": {"r": 0, "t": 1}}


def test_t_ends_when_more_falls_free() -> None:
    """Within `t` no more than `r` fits: the window before still weighs and falls off bit by bit."""
    decision = allowed((NOW - 30_000, 60, 10), (NOW, 0, 0), used=(40, 0, 0, 0))
    assert parsed(decision)["ratelimit"]["rate_limit"] == {"r": 59, "t": 1}


def test_money_is_shown_only_on_request() -> None:
    """Budgets appear only with `show_amounts`, in whole micro-USD with a unit of their own, rounded down."""
    windows = (NOW, 0, 0), (NOW, 0, 0)
    decision = allowed(*windows, used=(0, 0, 1_000_001_500, 0), held=(0, 0, 500, 0))
    assert "period_budget" not in parsed(decision)["ratelimit"]
    found = parsed(decision, show_amounts=True, held=1_000_000)
    assert found["ratelimit-policy"]["period_budget"] == {"q": 5_000_000, "respan-unit": "usd-micros"}
    assert found["ratelimit"]["period_budget"] == {
        "r": (5_000_000_999 - 1_000_001_500 - 500 - 1_000_000) // 1000,
        "t": 86_400,
        "respan-unit": "usd-micros",
    }
    assert "t" not in found["ratelimit"]["total_budget"]


def test_a_customer_without_limits_has_no_fields() -> None:
    """No empty field is sent."""
    assert RateLimitFields().of(Decision("org_1", (), (), Allowed(NOW))) == []


def test_fields_are_of_the_limits_at_hand() -> None:
    """What is remembered of one customer's limits never shows up on another's, however many there are."""
    fields = RateLimitFields()
    for amount in range(5_000):
        limit = Limit("rate_limit", "rate", "requests", amount, window_ms=60_000)
        found = fields.of(Decision("c", (limit,), (None,), Allowed(NOW, (0,), (0,), ((NOW, 0, 0),))))
        assert found[0][1] == b'"rate_limit";q=%d;w=60' % amount


@given(
    amount=st.integers(0, 3_000_000),
    width=st.sampled_from([1, 60, 3600, 86_400]),
    before=st.integers(0, 3_000_000),
    hits=st.integers(0, 3_000_000),
    age=st.integers(0, 86_399_999),
)
def test_any_state_is_a_legal_field(amount: int, width: int, before: int, hits: int, age: int) -> None:
    """Whatever the counters hold, the field parses, and its numbers are integers from 0."""
    limit = Limit("rate_limit", "rate", "requests", amount, window_ms=width * 1000)
    start = NOW - age % (width * 1000)
    used = hits + before * (width * 1000 - (NOW - start)) // (width * 1000)
    for outcome in (
        Allowed(NOW, (used,), (0,), ((start, before, hits),)),
        Refused(NOW, ("rate",), (used,), (0,), ((start, before, hits),)),
    ):
        found = parsed(Decision("c", (limit,), (None,), outcome))
        assert found["ratelimit-policy"]["rate_limit"] == {"q": amount, "w": width}
        standing = found["ratelimit"]["rate_limit"]
        assert 0 <= standing["r"] <= amount
        assert 0 <= standing["t"] <= width


def test_a_header_that_comes_twice_is_refused() -> None:
    """Two values of one name are refused rather than picked from; other spellings are other headers."""
    headers = [(b"x-customer", b"a"), (b"x_customer", b"b"), (b"x-customer-id", b"c")]
    assert header(headers, b"x-customer") == b"a"
    assert header(headers, b"x-none") is None
    with pytest.raises(InvalidInput, match="x-customer must be sent once"):
        header([*headers, (b"x-customer", b"a")], b"x-customer")


@pytest.mark.parametrize(
    ("method", "names", "expected"),
    [
        ("OPTIONS", [b"origin", b"access-control-request-method"], True),
        ("OPTIONS", [b"origin"], False),
        ("OPTIONS", [b"access-control-request-method"], False),
        ("POST", [b"origin", b"access-control-request-method"], False),
    ],
)
def test_preflights(method: str, names: list[bytes], expected: bool) -> None:
    """Only a browser's preflight passes: OPTIONS with both of its headers."""
    assert is_preflight({"method": method, "headers": [(name, b"x") for name in names]}) is expected
