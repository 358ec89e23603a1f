"""Prices of `genai-prices` as `Rates`, for each moment and service tier."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from respan_guard.money import EXACT, NANO
from respan_guard.price_plans import Rates, Segment
from respan_guard.usage import Usage

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, Provider

__all__ = ["Plan", "compile_rates"]

logger = logging.getLogger(__name__)

_GENAI_KEYS: Mapping[str, str] = {
    "input": "input_mtok",
    "output": "output_mtok",
    "cache_read": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
    "input_audio": "input_audio_mtok",
    "cache_audio_read": "cache_audio_read_mtok",
    "input_image": "input_image_mtok",
    "cache_image_read": "cache_image_read_mtok",
    "input_video": "input_video_mtok",
    "output_audio": "output_audio_mtok",
    "output_image": "output_image_mtok",
    "output_video": "output_video_mtok",
    "reasoning": "output_reasoning_mtok",
}
_CONTEXT = ("service_tier", "processing", "speed")
"""Where genai-prices keeps what we call the service tier: "flex", "priority" · "batch" · "fast"."""


class Plan:
    """A model of genai-prices; its rates are compiled for each set of prices that is in force at some moment."""

    __slots__ = ("_compiled", "_constraints", "_current", "_dearest", "_known", "_step", "info", "provider", "tiers")

    def __init__(self, provider: Provider, info: ModelInfo) -> None:
        self.provider = provider
        self.info = info
        # genai-prices applies variants only to a provider's own models.
        variants = info.price_variants or [] if any(info is model for model in provider.models) else []
        conditional = info.prices if isinstance(info.prices, list) else []
        constraints = [c.constraint for c in conditional] + [v.constraint for v in variants]
        self._constraints = tuple(constraint for constraint in constraints if constraint is not None)
        self._step = _step(self._constraints)
        self.tiers = tuple(
            dict.fromkeys(
                (name, value)
                for v in variants
                for name, value in v.when.items()
                if len(v.when) == 1 and name in _CONTEXT
            )
        )
        self._known = {value: value for _, value in self.tiers}
        self._compiled: dict[tuple[tuple[bool, ...], str | None], Rates | None] = {}
        self._current: dict[str | None, tuple[int, int, Rates | None]] = {}
        self._dearest: dict[str | None, tuple[int, int, tuple[Rates | None, ...]]] = {}

    @property
    def window(self) -> int | None:
        """The model's context window in tokens, if it is known."""
        return self.info.context_window

    def rates(self, at_ms: int, tier: str | None) -> Rates | None:
        """The rates at a moment; None if the model isn't charged by tokens or requests."""
        tier = self._known.get(tier) if tier is not None else None
        known = self._current.get(tier)
        if known is not None and known[0] <= at_ms < known[1]:
            return known[2]
        return self._switch(at_ms, tier)

    def dearest(self, at_ms: int, tier: str | None) -> tuple[Rates | None, ...]:
        """All rates by which the bound of a call can be set that is asked for now: now and in an hour.

        Args:
            at_ms: Now.
            tier: The service tier asked for, by which and without which it may be charged; None leaves it to the
                provider, which may choose any.
        """
        tier = self._known.get(tier) if tier is not None else _ANY
        known = self._dearest.get(tier)
        if known is not None and known[0] <= at_ms < known[1]:
            return known[2]
        tiers: list[str | None] = [None]
        tiers += [value for name, value in self.tiers if name == "service_tier"] if tier is _ANY else [tier]
        met = dict.fromkeys(self.rates(when, one) for one in tiers for when in (at_ms, at_ms + _HOUR))
        found = (None,) if None in met else _not_covered([rates for rates in met if rates is not None])
        since, until = self._window(at_ms)
        self._dearest[tier] = since, max(until - _HOUR, at_ms + 1), found
        return found

    def _window(self, at_ms: int) -> tuple[int, int]:
        """Between which moments around this one no price changes."""
        if self._step is None:
            return _EVER
        start = at_ms - at_ms % self._step
        return start, start + self._step

    def _switch(self, at_ms: int, tier: str | None) -> Rates | None:
        """Find the rates, and remember between which moments they can't change."""
        at = datetime.fromtimestamp(at_ms / 1000, UTC)
        key = (tuple(c.active(at) for c in self._constraints), tier)
        if key not in self._compiled:
            context = dict.fromkeys(_CONTEXT, tier) if tier is not None else None
            self._compiled[key] = compile_rates(self.info.get_prices(at, context), self.info.id)
        rates = self._compiled[key]
        self._current[tier] = *self._window(at_ms), rates
        return rates


_ANY = "?"
_MINUTE, _HOUR, _DAY = 60_000, 3_600_000, 86_400_000
_EVER = -(1 << 62), 1 << 62


def _step(constraints: tuple[Any, ...]) -> int | None:
    """Between two multiples of this many milliseconds no price changes; None if none ever does."""
    if not constraints:
        return None
    times = [
        t for c in constraints for t in (getattr(c, "start_time", None), getattr(c, "end_time", None)) if t is not None
    ]
    if not times:
        return _DAY  # start dates begin at midnight, UTC
    whole = all(t.second == t.microsecond == 0 and t.tzinfo in (None, UTC) for t in times)
    return _MINUTE if whole else 1


def _not_covered(found: list[Rates]) -> tuple[Rates, ...]:
    """Those that others leave something to: a bound is asked for with each call, and most models' tiers are one's."""
    kept: list[Rates] = []
    for rates in found:
        if not any(other.covers(rates) for other in kept):
            kept = [*(other for other in kept if not rates.covers(other)), rates]
    return tuple(kept)


def compile_rates(prices: ModelPrice, model: str) -> Rates | None:
    """Compile prices of genai-prices; None if none of them is for what `Usage` counts."""
    given = {name: price for name, key in _GENAI_KEYS.items() if (price := getattr(prices, key, None)) is not None}
    request = getattr(prices, "requests_kcount", None)
    if not given and request is None and any(value is not None for value in vars(prices).values()):
        return None
    # Tokens that `Usage` doesn't count cost what their whole does, but they may be the dearest, so bounds heed them.
    given |= {
        name.removesuffix("_mtok"): price
        for name, price in vars(prices).items()
        if price is not None and name.endswith("_mtok") and name not in _GENAI_KEYS.values()
    }
    starts = {0} | {tier.start for price in given.values() for tier in getattr(price, "tiers", ())}
    segments = []
    for start in sorted(starts):
        found = {name: Fraction(_price_at(price, start)) for name, price in given.items()}
        if request is not None:
            found["request"] = Fraction(_price_at(request, start)) / 1000
        segments.append(Segment(start, found))
    rates = Rates(tuple(segments))
    for start in sorted(starts):
        probe = Usage(model="-", input_tokens=start + 7_919, output_tokens=104_729)
        with localcontext(Context()):  # the app's own may have fewer digits
            usd = prices.calc_price({"input_tokens": probe.input_tokens, "output_tokens": probe.output_tokens})[
                "total_price"
            ]
        if rates.cost(probe) != int(EXACT.multiply(usd, NANO).to_integral_value(ROUND_HALF_EVEN, EXACT)):
            logger.warning(
                "genai-prices prices %s in a way that respan_guard does not know; its price counts as unknown", model
            )
            return None
    return rates


def _price_at(price: Any, start: int) -> Decimal:
    """A price for inputs just above `start` tokens."""
    found: Decimal = getattr(price, "base", price)
    for tier in getattr(price, "tiers", ()):
        if start >= tier.start:
            found = tier.price
    return found
