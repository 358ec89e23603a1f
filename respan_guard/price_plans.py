"""A model's prices as integers: what a call cost, exactly, and the most that it can cost.

A price may be finer than a nano-USD per token, so rates are whole numbers of a fraction of one, the sum is
exact, and it is rounded once. Prices nest: a cached token is an input token with a price of its own. So
the cost is a sum over token kinds, where a kind's rate is what it costs beyond the kind that includes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from operator import attrgetter
from typing import NamedTuple

from respan_guard.usage import Usage

__all__ = ["KINDS", "Rates", "Segment", "TokenPrices"]

KINDS: Mapping[str, str] = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_read": "cache_read_tokens",
    "cache_write": "cache_write_tokens",
    "cache_write_1h": "cache_write_1h_tokens",
    "input_audio": "input_audio_tokens",
    "cache_audio_read": "cache_audio_read_tokens",
    "input_image": "input_image_tokens",
    "cache_image_read": "cache_image_read_tokens",
    "input_video": "input_video_tokens",
    "output_audio": "output_audio_tokens",
    "output_image": "output_image_tokens",
    "output_video": "output_video_tokens",
    "reasoning": "reasoning_tokens",
}
"""Names of prices, and the count of `Usage` that each one prices."""

_PARTS_OF_INPUT = ("cache_read", "cache_write", "input_audio", "input_image", "input_video")
_PARTS_OF_OUTPUT = ("output_audio", "output_image", "output_video", "reasoning")
_PARTS_OF_PARTS = {
    "cache_write": ("cache_write_1h",),
    "cache_read": ("cache_audio_read", "cache_image_read"),
    "input_audio": ("cache_audio_read",),
    "input_image": ("cache_image_read",),
}
_NANO_PER_TOKEN = 1_000  # a USD per million tokens is 1,000 nano-USD per token

TokenPrices = Mapping[str, Fraction]
"""USD per million tokens by name; "request" is USD per request. A kind without a price costs what its parent costs.

Names beyond `KINDS` are of tokens that are not counted apart: they play a part in bounds only."""

_Part = tuple[Callable[[Usage], int], int, int, int]  # count, rate, its weight in input, its weight in output


class Segment(NamedTuple):
    """The prices of calls whose input is longer than `start` tokens, up to the next segment's start."""

    start: int
    prices: TokenPrices


class _Compiled(NamedTuple):
    start: int
    request: int
    input: int
    output: int
    parts: tuple[_Part, ...]
    dearest_input: tuple[int, int, int, int]  # by has_audio + 2 * has_images
    dearest_output: tuple[int, int]  # by has_audio

    @property
    def prices(self) -> tuple[int, ...]:
        """All that bounds are made of."""
        return (self.request, *self.dearest_input, *self.dearest_output)


class Rates:
    """What a model costs at one moment and service tier.

    Args:
        segments: Prices by length of the input, ascending, the first from 0. A length's prices hold for the
            whole call, not only for the tokens beyond it.
    """

    __slots__ = ("_scale", "_segments", "_subsets", "segments")

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments
        nano = [
            {
                name: price * (1_000_000_000 if name == "request" else _NANO_PER_TOKEN)
                for name, price in s.prices.items()
            }
            for s in segments
        ]
        self._scale = scale = math.lcm(1, *(price.denominator for prices in nano for price in prices.values()))
        whole = [{name: int(price * scale) for name, price in prices.items()} for prices in nano]
        compiled = [_compile(s.start, prices) for s, prices in zip(segments, whole, strict=True)]
        self._segments = tuple(reversed(compiled))  # the longest input first
        subsets = {of: [part for part in parts if part in whole[0]] for of, parts in _PARTS_OF_PARTS.items()}
        self._subsets = tuple((attrgetter(KINDS[of]), _count_of(parts)) for of, parts in subsets.items() if parts)

    def cost(self, usage: Usage) -> int:
        """The cost in nano-USD, rounded half to even.

        Counts that contradict each other (more cached tokens than input) have no exact cost; each of
        their tokens is then charged at the dearest rate that one can have.
        """
        given, made = usage.input_tokens, usage.output_tokens
        for start, total, rate_in, rate_out, parts, _, _ in self._segments:  # noqa: B007
            if given > start:
                break
        total += given * rate_in + made * rate_out
        rest_in, rest_out, nested = given, made, False
        for count, rate, weight_in, weight_out in parts:
            tokens = count(usage)
            if tokens:
                if weight_in + weight_out < 1:
                    nested = True  # parts of parts
                total += tokens * rate
                rest_in -= tokens * weight_in
                rest_out -= tokens * weight_out
        if rest_in < 0 or rest_out < 0:
            return self._contradicting(usage)
        if nested:
            for of, count in self._subsets:
                if count(usage) > of(usage):
                    return self._contradicting(usage)
        scale = self._scale
        if scale == 1:  # most prices are whole nano-USD a token
            return total
        whole, rest = divmod(total, scale)
        rest *= 2
        return whole + (rest > scale or (rest == scale and whole & 1))

    def bound(self, input_tokens: int, output_tokens: int, *, has_audio: bool = True, has_images: bool = True) -> int:
        """The most, in nano-USD, that a call of at most this size can cost, rounded up."""
        kind = has_audio + 2 * has_images
        most = 0
        for start, request, _, _, _, dearest_input, dearest_output in self._segments:
            if input_tokens > start or start <= 0:
                cost = request + input_tokens * dearest_input[kind] + output_tokens * dearest_output[has_audio]
                if cost > most:
                    most = cost
        return -(-most // self._scale)

    def covers(self, other: Rates) -> bool:
        """Whether no call's bound is higher by the other's prices."""
        mine, theirs = self._scale, other._scale
        return all(
            any(
                own.start <= max(0, segment.start)
                and all(a * theirs >= b * mine for a, b in zip(own.prices, segment.prices, strict=True))
                for own in self._segments
            )
            for segment in other._segments
        )

    def _contradicting(self, usage: Usage) -> int:
        given = max(usage.input_tokens, *(getattr(usage, KINDS[name]) for name in (*_PARTS_OF_INPUT, "cache_write_1h")))
        made = max(usage.output_tokens, *(getattr(usage, KINDS[name]) for name in _PARTS_OF_OUTPUT))
        return self.bound(given, made)


def _count_of(parts: Sequence[str]) -> Callable[[Usage], int]:
    """How many tokens are of any of these kinds."""
    counts = [attrgetter(KINDS[part]) for part in parts]
    return counts[0] if len(counts) == 1 else lambda usage: sum([count(usage) for count in counts])


def _compile(start: int, prices: Mapping[str, int]) -> _Compiled:
    base_in, base_out = prices.get("input", 0), prices.get("output", 0)
    read = prices.get("cache_read", base_in)
    audio, image = prices.get("input_audio", base_in), prices.get("input_image", base_in)
    parts: list[_Part] = []

    def part(name: str, rate: int, weight_in: int = 0, weight_out: int = 0) -> None:
        parts.append((attrgetter(KINDS[name]), rate, weight_in, weight_out))

    for name in _PARTS_OF_INPUT:
        if name in prices:
            part(name, prices[name] - base_in, 1)
    if "cache_write_1h" in prices:
        part("cache_write_1h", prices["cache_write_1h"] - prices.get("cache_write", base_in))
    for name, medium in (("cache_audio_read", audio), ("cache_image_read", image)):
        if name in prices:
            # Counted in both parents, so it gives both back, and the overlap is taken out of the input once only.
            part(name, prices[name] - read - medium + base_in, -1)
    for name in _PARTS_OF_OUTPUT:
        if name in prices:
            part(name, prices[name] - base_out, 0, 1)
    # Output of images and video is not asked for in a way that all requests share; what isn't counted can be anything.
    uncounted = [name for name in prices if name not in KINDS and name != "request"]
    others_out = [name for name in uncounted if name.startswith("output_")]
    others_in = [name for name in uncounted if name not in others_out]

    def dearest(least: int, *names: str) -> int:
        return max(least, *(prices.get(name, 0) for name in names))

    text = dearest(base_in, "cache_read", "cache_write", "cache_write_1h", *others_in)
    sound = dearest(text, "input_audio", "cache_audio_read")
    seen = dearest(text, "input_image", "cache_image_read", "input_video")
    written = dearest(base_out, "reasoning", "output_image", "output_video", *others_out)
    return _Compiled(
        start,
        prices.get("request", 0),
        base_in,
        base_out,
        tuple(parts),
        (text, sound, seen, max(sound, seen)),
        (written, dearest(written, "output_audio")),
    )
