"""Identifiers and customers: what is taken, what is refused, and the one form that is stored."""

from __future__ import annotations

import enum
import json
import unicodedata
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from respan_guard.customer import Customer, normalise_identifier
from respan_guard.errors import InvalidIdentifier, InvalidInput
from respan_guard.rates import canonical_rate, parse_rates


def params(**fields: Any) -> dict[str, Any]:
    """What is stored of a customer with these fields."""
    return Customer.from_params("c", fields).to_params()


class Plan(enum.StrEnum):
    """A string that prints as itself."""

    FREE = "free"


class Name(str, enum.Enum):  # noqa: UP042  # one whose str() is "Name.ACME"
    """A string that prints as something else."""

    ACME = "acme"


class Level(enum.IntEnum):
    """An int with a name."""

    ONE = 1


# --- identifiers


@pytest.mark.parametrize(
    ("value", "identifier"),
    [
        ("customer_1", "customer_1"),
        (5, "5"),
        (0, "0"),
        (-7, "-7"),
        (2**64, "18446744073709551616"),
        ("  padded\u2003 ", "padded"),
        ("Acme Corp", "Acme Corp"),
        ("Case", "Case"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u212b", "\u00c5"),  # the Angstrom sign is the letter
        ("客户-1", "客户-1"),
        ("{a}:b*'; DROP TABLE", "{a}:b*'; DROP TABLE"),
        ("x" * 254, "x" * 254),
        ("é" * 127, "é" * 127),
        ("e\u0301" * 127, "é" * 127),
        (" " * 300 + "x", "x"),
        (Plan.FREE, "free"),
        (Name.ACME, "acme"),
        (Level.ONE, "1"),
    ],
    ids=count(),  # pytest fails to print huge ints
)
def test_identifiers_are_normalised(value: object, identifier: str) -> None:
    """Strings are NFC and stripped with their case kept, ints are their digits."""
    found = normalise_identifier(value)
    assert found == identifier
    assert type(found) is str
    assert normalise_identifier(found) == found


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("\u3000", "empty"),
        ("x" * 255, "254 bytes"),
        ("é" * 128, "254 bytes"),
        ("x" * 10_000_000, "254 bytes"),
        ("e\u0301" * 1_000_000, "254 bytes"),
        (10**5000, "254 bytes"),
        (10**254, "254 bytes"),
        ("a\nb", "control character: U\\+000A at position 1"),
        ("a\r\nX-Admin: 1", "control"),
        ("\x00", "control"),
        ("tab\t", "control"),
        ("del\x7f", "control"),
        ("c1\x85", "control"),
        ("\ud800", "surrogate"),
        ("ok\udfff", "surrogate"),
        ("a\u200bb", "invisible character: U\\+200B"),
        ("a\u200d", "invisible"),
        ("\ufeffa", "invisible"),
        ("a\u202eb", "invisible"),
        ("a\u2066b", "invisible"),
        ("a\u00adb", "invisible"),
        ("a\u3164", "invisible"),
        ("a\u034fb", "invisible"),
        ("a\u2028b", "line separator"),
        ("a\u2029b", "paragraph separator"),
        (None, "string or an int, got None"),
        (True, "string or an int, got True"),
        (False, "string or an int"),
        (1.0, "string or an int"),
        (b"abc", "a bytes"),
        (["a"], "a list"),
        ({"id": 1}, "a dict"),
    ],
    ids=count(),  # pytest fails to print huge ints
)
def test_unusable_identifiers(value: object, said: str) -> None:
    """Empty, too long, unprintable or no string: refused with a short message that says what is wrong."""
    with pytest.raises(InvalidIdentifier, match=said) as caught:
        normalise_identifier(value)
    assert caught.value.field == "customer_identifier"
    assert len(str(caught.value)) < 300


@given(st.one_of(st.text(), st.text(st.characters(categories=["Lo", "Mn", "Zs", "Cf", "Ll"]), max_size=200)))
def test_normalising_is_idempotent_or_refuses(text: str) -> None:
    """Whatever passes is printable NFC of 1 to 254 bytes, and passes again unchanged."""
    try:
        found = normalise_identifier(text)
    except InvalidIdentifier:
        return
    assert normalise_identifier(found) == found
    assert 1 <= len(found.encode()) <= 254
    assert unicodedata.is_normalized("NFC", found)
    assert found == found.strip()
    assert not {unicodedata.category(c) for c in found} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


# --- rates


@pytest.mark.parametrize(
    ("value", "canonical", "rates"),
    [
        (100, 100, [(100, 60)]),
        (0, 0, [(0, 60)]),
        (3_000_000, 3_000_000, [(3_000_000, 60)]),
        ("60", 60, [(60, 60)]),
        (" 60 ", 60, [(60, 60)]),
        (60.0, 60, [(60, 60)]),
        ("100/minute", 100, [(100, 60)]),
        ("100 per 1 minute", 100, [(100, 60)]),
        ("100/60 seconds", 100, [(100, 60)]),
        ("100/minute; 2000/hour", "100/minute; 2000/hour", [(100, 60), (2000, 3600)]),
        ("2000/hour, 100/minute", "100/minute; 2000/hour", [(100, 60), (2000, 3600)]),
        ("100/minute; 50/minute", 50, [(50, 60)]),
        ("50/minute; 100/minute", 50, [(50, 60)]),
        ("5/second", "5/second", [(5, 1)]),
        ("5 per 90 seconds", "5/90second", [(5, 90)]),
        ("7 per 120 minutes", "7/2hour", [(7, 7200)]),
        ("7/day", "7/day", [(7, 86_400)]),
        ("7 per 31 days", "7/31day", [(7, 31 * 86_400)]),
        ("7/month", "7/30day", [(7, 30 * 86_400)]),  # what a month is to `limits`
    ],
    ids=count(),  # pytest fails to print huge ints
)
def test_rates_have_one_form(value: object, canonical: int | str, rates: list[tuple[int, int]]) -> None:
    """Rates of equal meaning are stored alike, and what is stored reads as it was meant."""
    assert canonical_rate(value) == canonical
    assert list(parse_rates(value)) == rates
    assert canonical_rate(canonical) == canonical
    assert parse_rates(canonical) == parse_rates(value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1, "from 0 to 3,000,000"),
        (3_000_001, "from 0 to 3,000,000"),
        (10**5000, "far more"),
        ("3000001/minute", "from 0 to 3,000,000"),
        ("9" * 150, "far more"),
        ("9" * 150 + "/minute", "far more"),
        (1.5, "whole number"),
        (float("nan"), "whole number"),
        (float("inf"), "whole number"),
        (True, "whole number"),
        ("", "whole number"),
        ("-5", "whole number"),
        ("lots", "whole number"),
        ("5/fortnight", "whole number"),
        ("5/minute and more", "whole number"),
        ("5/minute;" * 1000, "whole number"),
        ("٣", "whole number"),
        ([5], "a list"),
        ("5/year", "use a budget"),
        ("5 per 32 days", "use a budget"),
        ("5 per 2 months", "use a budget"),
        ("5 per 99999999999999 days", "use a budget"),
        ("; ".join(f"1/{n} seconds" for n in range(1, 10)), "at most 8 rates"),
    ],
    ids=count(),  # pytest fails to print huge ints
)
def test_unusable_rates(value: object, said: str) -> None:
    """Amounts and windows that no backend can keep exactly, and what is no rate, are refused."""
    with pytest.raises(InvalidInput, match=said) as caught:
        canonical_rate(value)
    assert caught.value.field == "rate_limit"
    assert len(str(caught.value)) < 300


# --- customers


def test_all_fields() -> None:
    """A customer takes every field of `customer_params`, and its params are JSON that reads back as the same."""
    customer = Customer(
        customer_identifier=42,
        name="Hendrix Liu",
        email="hendrix@respan.ai",
        metadata={"plan": "pro", "seats": [1, 2.5, None, True]},
        group_identifier=7,
        rate_limit="100/minute; 2000/hour",
        budget_duration="monthly",
        period_budget=25,
        total_budget="200.50",
        period_start="2026-01-31",
        markup_percentage=20,
        blocked=True,
        time_zone="Europe/Berlin",
    )
    stored = customer.to_params()
    assert stored == {
        "name": "Hendrix Liu",
        "email": "hendrix@respan.ai",
        "metadata": {"plan": "pro", "seats": [1, 2.5, None, True]},
        "group_identifier": "7",
        "rate_limit": "100/minute; 2000/hour",
        "budget_duration": "monthly",
        "period_budget": "25",
        "total_budget": "200.5",
        "period_start": "2026-01-31",
        "markup_percentage": "20",
        "blocked": True,
        "time_zone": "Europe/Berlin",
    }
    assert Customer.from_params("42", json.loads(json.dumps(stored))) == customer


def test_values_are_what_they_mean() -> None:
    """Money is Decimal, dates are dates, the identifier is a string."""
    customer = Customer(customer_identifier=5, period_budget=0.1, period_start=date(2026, 1, 31), rate_limit="60")
    assert customer.customer_identifier == "5"
    assert customer.period_budget == Decimal("0.1")
    assert customer.period_start == date(2026, 1, 31)
    assert customer.rate_limit == 60


def test_a_customer_is_a_value() -> None:
    """A customer can't be changed in place."""
    customer = Customer(customer_identifier="c")
    with pytest.raises(ValidationError, match="frozen"):
        customer.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("amount", [25, 25.0, "25", "25.00", " 25 ", "2.5e1", Decimal("25.000")], ids=count())
def test_equal_money_is_stored_alike(amount: object) -> None:
    """However an amount is written, it is stored as the same text."""
    assert params(period_budget=amount) == {"period_budget": "25"}


@pytest.mark.parametrize(
    ("amount", "stored"),
    [
        (0, "0"),
        (-0.0, "0"),
        (1000, "1000"),
        (9_000_000, "9000000"),
        (0.1, "0.1"),
        ("0.000000001", "0.000000001"),
        (1e-9, "0.000000001"),
        ("1234567.123456789", "1234567.123456789"),
    ],
    ids=count(),  # pytest fails to print huge ints
)
def test_money_is_stored_without_exponent(amount: object, stored: str) -> None:
    """Amounts from a nano-USD to nine million are exact decimal text; 0 is a budget."""
    assert params(total_budget=amount) == {"total_budget": stored}


@pytest.mark.parametrize("field", ["period_budget", "total_budget", "markup_percentage"])
@pytest.mark.parametrize(
    "amount",
    [
        -1,
        "-0.01",
        float("nan"),
        float("inf"),
        float("-inf"),
        "NaN",
        "sNaN",
        "Infinity",
        Decimal("nan"),
        True,
        False,
        "",
        "five",
        "1e999999999",
        "9" * 100_000,
        9_000_001,
        10**30,
        10**5000,
        2**63,
        [],
        {},
        b"5",
        1j,
    ],
    ids=count(),  # pytest fails to print huge ints
)
def test_unusable_money(field: str, amount: object) -> None:
    """What is negative, not finite, too large, a bool or no number is refused in a message that says what is right."""
    with pytest.raises(InvalidInput, match=r"from 0 to [91],000,000") as caught:
        Customer.from_params("c", {field: amount})
    assert caught.value.field == field
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("field", ["period_start", "period_end", "period_anchor"])
@pytest.mark.parametrize(
    "value",
    [
        "tomorrow",
        "",
        "2026-02-30",
        "2026-1-1",
        "20260101",
        "2026-W01-1",
        "2026-01-01T00:00:00Z",
        " 2026-01-01",
        "\uff12\uff10\uff12\uff16-01-01",
        datetime(2026, 1, 1, tzinfo=UTC),
        1767225600,
        True,
        [],
        "1899-12-31",
        "9999-12-31",
    ],
    ids=count(),  # pytest fails to print huge ints
)
def test_unusable_dates(field: str, value: object) -> None:
    """A date is YYYY-MM-DD and nothing else, in years that periods can be counted from."""
    with pytest.raises(InvalidInput, match=r"YYYY-MM-DD|years 1900 to 2999") as caught:
        Customer.from_params("c", {"period_start": "2026-01-01", field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"period_start": "2026-01-10", "period_end": "2026-01-09"}, "must be after period_start"),
        ({"period_start": "2026-01-10", "period_end": "2026-01-10"}, "must be after period_start"),
        ({"period_end": "2026-01-10"}, "needs a period_start"),
        (
            {"period_start": "2026-01-31", "period_end": "2026-03-01", "budget_duration": "monthly"},
            "end on 2026-02-28; leave out",
        ),
        ({"period_start": "2026-01-31", "period_end": "2027-01-30", "budget_duration": "yearly"}, "end on 2027-01-31"),
        ({"budget_duration": "hourly"}, "yearly, monthly, weekly, daily, got 'hourly'"),
        ({"budget_duration": "Monthly"}, "yearly, monthly, weekly, daily"),
        ({"budget_duration": 1}, "yearly, monthly, weekly, daily"),
        ({"budget_duration": "x" * 100_000}, "yearly, monthly, weekly, daily"),
        ({"time_zone": "Mars/Olympus"}, "IANA name"),
        ({"time_zone": 1}, "IANA name"),
        ({"time_zone": "localtime"}, "'localtime', which is another zone on each machine"),
        ({"blocked": "yes"}, "true or false"),
        ({"blocked": 1}, "true or false"),
        ({"name": 5}, "name must be a string"),
        ({"name": "x" * 1001}, "at most 1,000 characters"),
        ({"name": "a\x00"}, "control or surrogate"),
        ({"email": "\ud800@x"}, "control or surrogate"),
        ({"group_identifier": ""}, "group_identifier must not be empty"),
        ({"group_identifier": True}, "group_identifier must be a string or an int"),
        ({"metadata": "plan=pro"}, "JSON object"),
        ({"metadata": {"a": float("nan")}}, "nothing but JSON"),
        ({"metadata": {"a": object()}}, "nothing but JSON"),
        ({"metadata": {"a": "\ud800"}}, "nothing but JSON"),
        ({"metadata": {"a": 10**5000}}, "nothing but JSON"),
        ({"metadata": {("a",): 1}}, "nothing but JSON"),
        ({"metadata": {"a": "\x00"}}, "U\\+0000"),
        ({"metadata": {"a": "x" * 16_384}}, "16,384 bytes"),
        ({"period_bugdet": 5}, "no field 'period_bugdet'; the fields are customer_identifier, name"),
        ({"x" * 100_000: 5}, "the fields are customer_identifier"),
    ],
    ids=count(),  # pytest fails to print huge ints
)
def test_unusable_fields(fields: dict[str, Any], said: str) -> None:
    """A field that is unusable or unknown, and fields that contradict each other, are refused by name and in short."""
    with pytest.raises(InvalidInput, match=said) as caught:
        Customer.from_params("c", fields)
    assert caught.value.field is not None
    assert len(str(caught.value)) < 400


def test_deep_metadata() -> None:
    """Nesting beyond what JSON writers can follow is refused, not a crash."""
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(InvalidInput, match="metadata"):
        Customer.from_params("c", {"metadata": deep})
    while deep:  # a deep dict is taken apart by hand: its destructor recurses
        deep = deep["a"]


def test_constructor_and_validation_raise_the_same_error() -> None:
    """`Customer(...)`, `from_params` and `model_validate` all say InvalidInput; inside other models pydantic's own."""
    with pytest.raises(InvalidInput, match="period_budget must be an amount of USD"):
        Customer(customer_identifier="c", period_budget=-1)
    with pytest.raises(InvalidInput, match="period_budget must be an amount of USD"):
        Customer.model_validate({"customer_identifier": "c", "period_budget": -1})
    with pytest.raises(InvalidIdentifier):
        Customer(customer_identifier="")
    with pytest.raises(InvalidInput, match="customer_identifier is missing"):
        Customer.model_validate({})
    with pytest.raises(ValidationError, match="period_budget must be an amount of USD"):
        TypeAdapter(Customer).validate_python({"customer_identifier": "c", "period_budget": -1})


def test_unset_fields_are_not_stored() -> None:
    """None, not blocked, and empty metadata mean the same as nothing."""
    assert params(name=None, blocked=False, metadata={}, period_budget=None) == {}
    assert Customer.from_params("c", None) == Customer(customer_identifier="c")


def test_the_identifier_is_not_among_the_params() -> None:
    """`from_params` takes the identifier it was given, whatever the params say."""
    customer = Customer.from_params("right", {"customer_identifier": "wrong", "name": "n"})
    assert customer.customer_identifier == "right"
    assert customer.to_params() == {"name": "n"}


def test_an_end_that_follows_from_the_duration_is_left_out() -> None:
    """A period_end that only repeats start + duration adds nothing; without a duration it is the period."""
    assert params(budget_duration="monthly", period_start="2026-01-31", period_end="2026-02-28") == {
        "budget_duration": "monthly",
        "period_start": "2026-01-31",
    }
    custom = {"period_start": "2026-01-31", "period_end": "2026-02-28"}
    assert params(**custom) == custom


def test_copies_are_checked_before_they_are_stored() -> None:
    """`model_copy` checks nothing, `to_params` does."""
    customer = Customer(customer_identifier="c", period_budget=5)
    assert customer.model_copy(update={"period_budget": 40.0}).to_params() == {"period_budget": "40"}
    with pytest.raises(InvalidInput, match="period_budget"):
        customer.model_copy(update={"period_budget": -1}).to_params()


def test_an_anchor_that_has_nothing_to_do_with_the_period_says_nothing() -> None:
    """`period_anchor` counts only with a start and end that are one of its periods."""
    assert params(period_start="2026-02-10", period_end="2026-03-10", budget_duration="monthly",
                  period_anchor="2026-01-31")["period_start"] == "2026-02-10"  # fmt: skip
    assert params(period_start="2026-02-10", period_anchor="2026-01-31")["period_start"] == "2026-02-10"
    assert params(period_anchor="2026-01-31") == {}
    with pytest.raises(InvalidInput, match="contradicts"):
        params(
            period_start="2026-02-10", period_end="2026-03-11", budget_duration="monthly", period_anchor="2026-01-31"
        )


@pytest.mark.parametrize("field", ["period_budget", "total_budget", "markup_percentage"])
def test_what_is_too_small_to_count_is_no_zero(field: str) -> None:
    """A budget that would round to nothing would refuse everything: it is an error."""
    with pytest.raises(InvalidInput, match=f"{field} must be 0 or at least 0.000000001, got '1e-12'"):
        Customer.model_validate({"customer_identifier": "c1", field: "1e-12"})
    assert getattr(Customer.model_validate({"customer_identifier": "c1", field: 0}), field) == 0
