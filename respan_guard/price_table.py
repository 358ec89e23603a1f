"""The app's own price table, the setting `prices`."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from respan_guard.errors import ConfigurationError
from respan_guard.price_plans import KINDS, Rates, Segment

__all__ = ["OwnPrice"]


class OwnPrice:
    """An entry of the table: the same price at all times and service tiers.

    Args:
        name: The entry's name, a model or "provider/model".
        prices: USD per million tokens by name (`price_plans.KINDS`); "request" is USD per request, "context_window" the
            tokens that the model reads at most.

    Raises:
        ConfigurationError: A name is unknown or missing, or a value is no amount.

    Attributes:
        window: The context window in tokens, if the entry tells it.
    """

    __slots__ = ("_rates", "name", "window")

    tiers = ()

    def __init__(self, name: str, prices: object) -> None:
        self.name = name
        self.window: int | None = None
        if isinstance(prices, Mapping) and "context_window" in prices:
            prices = dict(prices)
            self.window = _own_window(name, prices.pop("context_window"))
        self._rates = _own_rates(name, prices)

    def rates(self, at_ms: int, tier: str | None) -> Rates:
        """The one price."""
        return self._rates

    def dearest(self, at_ms: int, tier: str | None) -> tuple[Rates, ...]:
        """The same."""
        return (self._rates,)


def _own_rates(model: str, prices: object) -> Rates:
    names = (*KINDS, "request", "context_window")
    if not isinstance(prices, Mapping):
        raise ConfigurationError(
            f'the price of {model!r} must be like {{"input": 0.5, "output": 1.5}} (USD per million tokens), '
            f"got {prices!r}"
        )
    unknown = [name for name in prices if name not in names]
    if unknown:
        raise ConfigurationError(
            f"the price of {model!r} has an unknown name {unknown[0]!r}; names are {', '.join(names)}"
        )
    missing = [name for name in ("input", "output") if name not in prices]
    if missing:
        raise ConfigurationError(f'the price of {model!r} lacks "{missing[0]}"; set it to 0 if that is free')
    found = {name: _own_price(model, name, price) for name, price in prices.items()}
    for medium, cached in (("input_audio", "cache_audio_read"), ("input_image", "cache_image_read")):
        if "cache_read" in found and medium in found:
            found.setdefault(cached, found[medium])
    return Rates((Segment(0, found),))


def _own_window(model: str, window: object) -> int:
    if not isinstance(window, int) or isinstance(window, bool) or not 0 < window <= 1_000_000_000:
        raise ConfigurationError(
            f'the "context_window" of {model!r} must be from 1 to 1,000,000,000 tokens, got {window!r}'
        )
    return window


def _own_price(model: str, name: str, price: object) -> Fraction:
    try:
        usd = Decimal(str(price)) if isinstance(price, (int, float, str, Decimal)) else None
    except InvalidOperation:
        usd = None
    if usd is None or isinstance(price, bool) or not usd.is_finite() or not 0 <= usd <= 1_000_000:
        raise ConfigurationError(
            f'the price "{name}" of {model!r} must be from 0 to 1,000,000 (USD per million tokens), got {price!r}'
        )
    return Fraction(usd)
