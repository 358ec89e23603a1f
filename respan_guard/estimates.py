"""What a call may cost at most, and what it is presumed to have cost when its usage stays unknown."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING

from respan_guard.money import to_nano
from respan_guard.recorder import storable
from respan_guard.usage import MAX_TOKENS, Usage

if TYPE_CHECKING:
    from respan_guard.pricing import PriceBook
    from respan_guard.providers import Call, Reader
    from respan_guard.settings import Settings

__all__ = ["Ask", "Estimator", "text_seen"]

logger = logging.getLogger("respan_guard")

ASSUMED_WINDOW = 1_048_576
"""The context window, in tokens, of a model for which none is known."""
ASSUMED_TOOL_RUNS = 1
"""How often tools that the provider runs are taken to be used, where the request sets no number."""
_NOT_DEARER = ("auto", "batch", "default", "flex")  # service tiers that are charged as if none was named, at most
_BYTES_PER_TOKEN = 4  # of English text, for estimates; bounds take every byte for a token


@dataclass(slots=True)
class Ask:
    """What an admission asks for.

    Attributes:
        cost: What it holds, nano-USD.
        tokens: How many tokens it holds.
        model: The model, for limits per model.
        free: The model is known to cost nothing, so a spent budget does not stop it.
        unpriced: Why no cost is known, where that matters.
    """

    cost: int = 0
    tokens: int = 0
    model: str = ""
    free: bool = False
    unpriced: str | None = None


def text_seen(reader: Reader | None) -> int:
    """Bytes of text that a stream has brought so far. A whole reply has its usage, or may be pictures: 0."""
    return 0 if reader is None or reader.first_token is None else reader.output_bytes


class Estimator:
    """Turns what is known of a call into what to hold for it."""

    def __init__(self, settings: Settings, prices: PriceBook) -> None:
        self._prices = prices
        self._hold = settings.hold
        self._max_output = settings.default_max_output_tokens
        self._warned: set[str] = set()
        self._reject = settings.unknown_price == "reject"
        self._missing = settings.missing_usage
        self._nothing = Ask(cost=to_nano(settings.default_hold, "default_hold", up=True))
        self._fixed = None if isinstance(settings.hold, str) else to_nano(settings.hold, "hold", up=True)

    def given(self, estimate: Decimal | Usage | None) -> Ask:
        """What to hold for an estimate that the app gives.

        Raises:
            InvalidInput: It is negative or no number.
        """
        if estimate is None:
            return self._nothing
        if not isinstance(estimate, Usage):
            return Ask(cost=to_nano(estimate, "estimate", up=True))
        if estimate.cost is not None:
            cost: int | None = to_nano(estimate.cost, "estimate", up=True)
        else:
            cost = self._prices.cost(estimate)
        return self._ask(estimate.model, cost, estimate.total_tokens)

    def of_call(self, call: Call | None) -> Ask:
        """What to hold for a call that a request's body describes; None if it describes none.

        Where the server may choose among models, it is the dearest's.
        """
        if call is None:
            return self._nothing
        ask = self._of_one(call)
        for model in call.fallbacks:
            other = self._of_one(replace(call, model=model))
            if ask.unpriced is None and (other.unpriced is not None or other.cost > ask.cost):
                ask = replace(other, model=ask.model)
        return ask

    def _of_one(self, call: Call) -> Ask:
        given, output = self._input_bound(call), call.output_tokens_bound(self._max_output)
        cost = self._prices.bound(
            call.model,
            call.provider,
            given,
            output,
            service_tier=call.service_tier,
            has_audio=call.has_audio,
            has_images=call.has_images,
        )
        if self._fixed is not None:
            cost = None if cost is None else self._fixed
        elif self._hold == "none":
            cost = None if cost is None else 0
            return Ask(model=storable(call.model), unpriced=self._unpriced(call.model) if cost is None else None)
        return self._ask(call.model, cost, given + output)

    def _input_bound(self, call: Call) -> int:
        """The most input that a call is charged for: what the request shows, else what the model can read at once.

        Each run of a tool of the provider's has the model read all that it knows by then once more.
        """
        runs = call.tool_runs
        if (runs == 0 and not call.hidden) or self._hold != "upper_bound":
            return call.input_tokens_bound
        window = self._prices.window(call.model, call.provider)
        if window is None:
            window = ASSUMED_WINDOW
            self._warn(
                "window",
                f"the context window of model {call.model[:100]!r} is not known, and a call of it reads what its "
                f"request does not show: {ASSUMED_WINDOW} tokens of input are held for it; set "
                '"context_window" beside its price in `prices`',
            )
        if runs is None:
            runs = ASSUMED_TOOL_RUNS
            self._warn(
                "tools",
                f"a call of model {call.model[:100]!r} lets the provider use tools (search, interpreters, MCP) any "
                f"number of times: the hold is for {ASSUMED_TOOL_RUNS}, and more can end over the budget; set "
                "max_tool_calls (Anthropic: max_uses)",
            )
        shown = call.input_tokens_bound
        return min((max(shown, window) if call.hidden else shown) + runs * window, MAX_TOKENS)

    def _warn(self, kind: str, message: str) -> None:
        """Say once what a bound rests on."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", message)

    def presume(self, call: Call, unspent: int, seen: int = 0) -> tuple[int | None, Usage]:
        """What to book for a call that was made and told nothing about its usage.

        Args:
            call: What was asked for.
            unspent: What its hold still has, nano-USD.
            seen: Bytes of text that its answer brought: without a cap in the request that may be more than was held.

        Returns:
            Cost, nano-USD, and usage.
        """
        usage = Usage(model=call.model, provider=call.provider, operation=call.operation, estimated=True)
        if self._missing == "flag":
            return None, usage
        output = -(-seen // _BYTES_PER_TOKEN)
        if call.max_output_tokens is not None:
            output = min(output, call.output_tokens_bound(self._max_output))
        if self._missing == "hold" and unspent > 0:
            if not output:
                return unspent, usage
            tier = None if call.service_tier in _NOT_DEARER else call.service_tier
            written = replace(usage, input_tokens=self._input_bound(call), output_tokens=output, service_tier=tier)
            return max(unspent, self._dearest(written, call) or 0), usage
        usage.input_tokens = -(-call.input_tokens_bound // _BYTES_PER_TOKEN)
        usage.output_tokens = max(call.output_tokens_bound(self._max_output), output)
        return self._dearest(usage, call), usage

    def _dearest(self, usage: Usage, call: Call) -> int | None:
        """The price of a usage by the dearest of the models that may have answered; None if none has one."""
        costs = [self._prices.cost(replace(usage, model=model)) for model in (call.model, *call.fallbacks)]
        return max((cost for cost in costs if cost is not None), default=None)

    def _ask(self, model: str, cost: int | None, tokens: int) -> Ask:
        model = storable(model)
        if cost is None:
            return Ask(cost=self._nothing.cost, tokens=tokens, model=model, unpriced=self._unpriced(model))
        return Ask(cost=cost, tokens=tokens, model=model, free=cost == 0 and tokens > 0)

    def _unpriced(self, model: str) -> str | None:
        if not self._reject:
            return None
        return (
            f"no price is known for model {model[:100]!r}, and a budget applies; add the model to the setting "
            "`prices`, or set unknown_price='flag' to let such calls pass unpriced"
        )
