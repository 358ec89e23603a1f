"""Money: integers of nano-USD inside, `Decimal` USD at the edges, never a float in between.

One nano-USD is 10^-9 USD. Amounts stay within `MAX_NANO`, because every backend, Lua's doubles
included, counts exactly up to there (2^53 is 9.007e15).
"""

from __future__ import annotations

import reprlib
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, InvalidOperation

from respan_guard.errors import InvalidInput

__all__ = ["EXACT", "MAX_NANO", "NANO", "from_nano", "plus_percent", "to_nano"]

NANO = 1_000_000_000
MAX_NANO = 9_000_000_000_000_000  # 9 million USD
EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
"""For arithmetic on money: the app's own context may have few digits, other roundings, or traps."""


def to_nano(
    amount: Decimal | int | float | str, field: str = "amount", *, up: bool = False, signed: bool = False
) -> int:
    """Turn USD into nano-USD.

    A float is read by its shortest decimal form (0.1 is a tenth), not by its binary value.

    Args:
        amount: USD.
        field: The name to use in an error.
        up: Round up (holds) instead of half to even (costs).
        signed: Whether a negative amount is a value (adjustments) or an error.

    Raises:
        InvalidInput: It is no number, not finite, negative, or beyond 9,000,000 USD.
    """
    if isinstance(amount, bool) or not isinstance(amount, (Decimal, int, float, str)):
        raise InvalidInput(f"{field} must be a number of USD, got {_shown(amount)}", field=field)
    try:
        usd = amount if isinstance(amount, Decimal) else Decimal(str(amount))
    except (InvalidOperation, ValueError):  # ValueError: an int of thousands of digits
        raise InvalidInput(f"{field} must be a number of USD, got {_shown(amount)}", field=field) from None
    if not usd.is_finite():
        raise InvalidInput(f"{field} must be a finite number of USD, got {_shown(amount)}", field=field)
    if usd < 0 and not signed:
        raise InvalidInput(f"{field} must not be negative, got {_shown(amount)}", field=field)
    if usd.adjusted() > 7 or EXACT.abs(EXACT.multiply(usd, NANO)) > MAX_NANO:
        raise InvalidInput(f"{field} must be at most 9,000,000 USD, got {_shown(amount)}", field=field)
    return int(EXACT.multiply(usd, NANO).to_integral_value(ROUND_CEILING if up else ROUND_HALF_EVEN, EXACT))


def from_nano(nano: int) -> Decimal:
    """Turn nano-USD into exact USD, without trailing zeros. Write it with `format(usd, "f")`: `str` uses exponents."""
    usd = Decimal(nano).scaleb(-9, EXACT).normalize(EXACT)
    return usd.quantize(Decimal(1), context=EXACT) if usd.as_tuple().exponent > 0 else usd  # type: ignore[operator]  # finite


def plus_percent(usd: Decimal, percentage: Decimal | None) -> Decimal:
    """An amount with so many percent on top, exactly."""
    if not percentage:
        return usd
    return EXACT.divide(EXACT.multiply(usd, EXACT.add(100, percentage)), 100)


def _shown(amount: object) -> str:
    try:
        return reprlib.repr(amount)
    except ValueError:
        return "an integer of thousands of digits"
