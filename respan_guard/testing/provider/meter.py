"""The stand-in provider's own books: what it was asked, what it answered, what it charges."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from genai_prices import Usage, calc_price

from respan_guard.testing.provider.answer import FilledAnswer
from respan_guard.testing.provider.request import ProviderRequest

__all__ = ["Meter", "MeteredCall", "charge"]

_NANO = Decimal("0.000000001")


@dataclass(slots=True, kw_only=True)
class MeteredCall:
    """One call. Token counts are inclusive, as in `respan_guard.Usage`, and those of all choices together.

    Attributes:
        request_id: The provider's id of the request, unique.
        response_id: The id in the answer; "" where an answer has none (embeddings), None if the call was refused.
        endpoint: See `ProviderRequest.endpoint`; "" for a path that is none.
        provider: "openai", "anthropic" or "google", by the wire format.
        model: The model asked for.
        stream: Whether a stream was asked for.
        status: HTTP status of the answer.
        input_tokens: And so on: what is charged. A refused call is charged nothing. One whose answer was made is
            charged whole, also if the client went away or the connection broke: the provider had done the work.
        cost: USD by genai-prices, rounded half to even to a billionth; None if it knows no price for the model.
        completed: The whole answer went out.
        headers: The request's, names in lower case, without those that carry keys.
    """

    request_id: str
    response_id: str | None = None
    endpoint: str
    provider: str
    model: str
    stream: bool
    status: int
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    cache_audio_read_tokens: int = 0
    output_audio_tokens: int = 0
    cost: Decimal | None = Decimal(0)
    completed: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def total_tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens

    @property
    def attempt(self) -> int:
        """0 for a first try, else which retry of OpenAI's or Anthropic's SDK this was."""
        count = self.headers.get("x-stainless-retry-count", "0")
        return int(count) if count.isdecimal() else 0


class Meter:
    """All calls in the order they came. Safe to read from any thread.

    A call stands here before the first byte of its answer goes out, and is `completed` before the last one does, so
    whoever has the answer can look.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[MeteredCall] = []

    @property
    def calls(self) -> list[MeteredCall]:
        """Every call, refused ones included."""
        with self._lock:
            return list(self._calls)

    @property
    def charged(self) -> list[MeteredCall]:
        """The calls that were answered, hence are charged."""
        return [call for call in self.calls if call.response_id is not None]

    @property
    def total_cost(self) -> Decimal:
        """USD of all calls whose model has a price."""
        return sum((call.cost for call in self.calls if call.cost is not None), Decimal(0))

    @property
    def total_tokens(self) -> int:
        """Input and output tokens of all calls."""
        return sum(call.total_tokens for call in self.calls)

    def count(self, **attributes: Any) -> int:
        """How many calls have these values: `meter.count(model="gpt-4o", status=200)`."""
        return sum(all(getattr(call, name) == value for name, value in attributes.items()) for call in self.calls)

    def reset(self) -> None:
        """Forget every call."""
        with self._lock:
            self._calls.clear()

    def add(self, call: MeteredCall) -> MeteredCall:
        """Book a call."""
        with self._lock:
            self._calls.append(call)
        return call


def charge(request: ProviderRequest, filled: FilledAnswer, request_id: str, at: datetime) -> MeteredCall:
    """What the provider books for an answer."""
    answer = filled.answer
    counts = {
        "input_tokens": filled.input_tokens,
        "output_tokens": filled.output_tokens,
        "cache_read_tokens": answer.cache_read_tokens,
        "cache_write_tokens": answer.cache_write_tokens,
        "cache_write_1h_tokens": answer.cache_write_1h_tokens,
        "reasoning_tokens": filled.reasoning_tokens,
        "input_audio_tokens": answer.input_audio_tokens,
        "cache_audio_read_tokens": answer.cache_audio_read_tokens,
        "output_audio_tokens": filled.output_audio_tokens,
    }
    return MeteredCall(
        request_id=request_id,
        response_id=filled.response_id,
        endpoint=request.endpoint,
        provider=request.provider,
        model=request.model,
        stream=request.stream,
        status=200,
        cost=_price(request, counts, at),
        headers=request.headers,
        **counts,  # type: ignore[arg-type]  # its names are those of counts only
    )


def _price(request: ProviderRequest, counts: Mapping[str, int], at: datetime) -> Decimal | None:
    """The price by genai-prices itself, so that a fault in respan_guard's own pricing shows."""
    known = {("output_reasoning_tokens" if name == "reasoning_tokens" else name): n for name, n in counts.items() if n}
    if request.endpoint == "images":
        known["output_image_tokens"] = counts["output_tokens"]
    try:
        price = calc_price(Usage(**known), request.model, provider_id=request.provider, genai_request_timestamp=at)
    except LookupError:
        return None
    return price.total_price.quantize(_NANO, ROUND_HALF_EVEN)
