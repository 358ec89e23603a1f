"""Money at the edge: exact, bounded, and refused where it is no money."""

from __future__ import annotations

from decimal import ROUND_DOWN, Context, Decimal, Inexact, Rounded, localcontext
from fractions import Fraction
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respan_guard.errors import InvalidInput
from respan_guard.money import MAX_NANO, from_nano, plus_percent, to_nano
from respan_guard.pricing import PriceBook
from respan_guard.testing import FakeClock
from respan_guard.usage import Usage


@pytest.mark.parametrize(
    ("usd", "nano"),
    [
        (5, 5_000_000_000),
        (0.1, 100_000_000),
        ("0.000000001", 1),
        (Decimal("1e-9"), 1),
        (Decimal("0.0000000005"), 0),  # half to even
        (Decimal("0.0000000015"), 2),
        (9_000_000, MAX_NANO),
        (-0.0, 0),
    ],
)
def test_usd_becomes_nano_usd_exactly(usd: Decimal | float | str, nano: int) -> None:
    """A float is read by its shortest decimal form; what is finer than a nano-dollar goes half to even."""
    assert to_nano(usd) == nano


@pytest.mark.parametrize(
    "bad",
    ["nan", "inf", "-inf", "-1", -1, "twelve", "", True, None, [], 10**30, "1e30", "9000000.000000001", float("nan"),
     float("inf"), 10**5000, "1e999999999"],
    ids=count(),  # the text of some is no name
)  # fmt: skip
def test_what_is_no_amount_is_refused_with_its_field(bad: object) -> None:
    """The error names the field and says what would be right; nothing crashes on numbers of thousands of digits."""
    with pytest.raises(InvalidInput, match="period_budget must") as refused:
        to_nano(bad, "period_budget")  # type: ignore[arg-type]  # what callers do at run time
    assert refused.value.field == "period_budget"
    assert len(str(refused.value)) < 200


def test_holds_round_up_and_adjustments_may_be_negative() -> None:
    """A hold is never below the cost it stands for; a credit is an amount below zero."""
    assert to_nano("0.0000000001", up=True) == 1
    assert to_nano("-0.5", signed=True) == -500_000_000


@given(st.integers(-MAX_NANO, MAX_NANO))
def test_nano_usd_survives_its_way_to_decimal_and_back(nano: int) -> None:
    """Both directions are exact."""
    usd = from_nano(nano)
    assert Fraction(usd) == Fraction(nano, 10**9)
    assert to_nano(usd, signed=True) == nano
    assert to_nano(format(usd, "f"), signed=True) == nano


def test_the_apps_own_arithmetic_plays_no_part() -> None:
    """Whatever precision, rounding and traps the app sets for `decimal`, money stays exact, up and down."""
    with localcontext(Context(prec=3, rounding=ROUND_DOWN, traps=[Inexact, Rounded])):
        assert to_nano("1000.004999") == 1_000_004_999_000
        assert to_nano(Decimal("8999.1234567891"), up=True) == 8_999_123_456_790
        assert f"{from_nano(8_999_123_456_789):f}" == "8999.123456789"
        assert f"{from_nano(8_000_000_000_000_000):f}" == "8000000"
        assert plus_percent(Decimal("1000.004999"), Decimal("12.5")) == Decimal("1125.005623875")
        with pytest.raises(InvalidInput):
            to_nano("9000000.000000001")


def test_prices_are_known_whatever_arithmetic_the_app_sets() -> None:
    """A table is compiled, checked against genai-prices and applied alike under few digits."""
    usage = Usage("gpt-4o", input_tokens=123_457, output_tokens=7_919, provider="openai")
    expected = PriceBook({}, clock=FakeClock()).cost(usage)
    with localcontext(Context(prec=3)):
        assert PriceBook({}, clock=FakeClock()).cost(usage) == expected is not None
