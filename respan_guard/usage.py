"""What an LLM call consumed (`Usage`), and the ledger's entry for it (`UsageRecord`).

Token counts are inclusive, as in OpenTelemetry's GenAI conventions: cached and audio tokens are part
of `input_tokens`, reasoning and audio tokens part of `output_tokens`. Providers that count
exclusively (Anthropic) are normalised where their replies are read.
"""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from decimal import Decimal
from operator import attrgetter
from typing import Any, Self

from respan_guard.errors import InvalidInput
from respan_guard.money import plus_percent, to_nano

__all__ = ["MAX_TOKENS", "TOKEN_KINDS", "Usage", "UsageRecord"]

MAX_TOKENS = (1 << 40) - 1  # per call and kind, about 10^12; anything above is a broken counter, not usage
TOKEN_KINDS = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "cache_write_1h_tokens",
    "reasoning_tokens",
    "input_audio_tokens",
    "cache_audio_read_tokens",
    "output_audio_tokens",
    "input_image_tokens",
    "cache_image_read_tokens",
    "output_image_tokens",
    "input_video_tokens",
    "output_video_tokens",
)


@dataclass(slots=True)
class Usage:
    """What one LLM call consumed. Treat it as a value: it is not changed once recorded.

    Args:
        model: The model as it was asked for; "" where a call has none.
        input_tokens: All input tokens, cached, cache-write, audio, image and video ones included.
        output_tokens: All output tokens, reasoning, audio, image and video ones included.
        cache_read_tokens: Input tokens read from the provider's cache.
        cache_write_tokens: Input tokens written to the provider's cache, of any lifetime.
        reasoning_tokens: Output tokens spent on reasoning.
        cache_write_1h_tokens: The part of `cache_write_tokens` kept for an hour (Anthropic).
        input_audio_tokens: Input tokens of audio, cached ones included.
        cache_audio_read_tokens: Input tokens of audio read from the cache.
        output_audio_tokens: Output tokens of audio.
        input_image_tokens: Input tokens of images, cached ones included.
        cache_image_read_tokens: Input tokens of images read from the cache.
        output_image_tokens: Output tokens of images.
        input_video_tokens: Input tokens of video.
        output_video_tokens: Output tokens of video.
        provider: "openai", "anthropic", "google", ... as in OpenTelemetry's `gen_ai.provider.name`.
        cost: USD; priced by the guard when omitted.
        response_id: The provider's id of the reply.
        response_model: The model that answered, usually a dated name.
        operation: "chat", "embeddings", ... as in OpenTelemetry's `gen_ai.operation.name`.
        service_tier: The provider's tier where it changes the price ("flex", "priority", "batch").
        time: When the call ended (aware); now when omitted.
        latency_ms: How long the call took.
        ttft_ms: Time to the first token.
        status: "ok" or "error"; "failed" where failed work around calls was reported, which is no call's error.
        estimated: The tokens were estimated, not reported.
        trace_id: Trace of the call, 32 hex digits.
        span_id: Span of the call, 16 hex digits.
        metadata: Anything small that reports should show.

    Raises:
        InvalidInput: A count is no integer in 0..10^12, or the cost is no finite amount >= 0.
    """

    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_1h_tokens: int = 0
    input_audio_tokens: int = 0
    cache_audio_read_tokens: int = 0
    output_audio_tokens: int = 0
    input_image_tokens: int = 0
    cache_image_read_tokens: int = 0
    output_image_tokens: int = 0
    input_video_tokens: int = 0
    output_video_tokens: int = 0
    provider: str | None = None
    cost: Decimal | int | float | str | None = None
    response_id: str | None = None
    response_model: str | None = None
    operation: str | None = None
    service_tier: str | None = None
    time: datetime | None = None
    latency_ms: int | None = None
    ttft_ms: int | None = None
    status: str = "ok"
    estimated: bool = False
    trace_id: str | None = None
    span_id: str | None = None
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            # One negative count makes all of it negative, one beyond 40 bits makes it larger; only ints have `|`.
            together = (
                self.input_tokens
                | self.output_tokens
                | self.cache_read_tokens
                | self.cache_write_tokens
                | self.reasoning_tokens
                | self.cache_write_1h_tokens
                | self.input_audio_tokens
                | self.cache_audio_read_tokens
                | self.output_audio_tokens
                | self.input_image_tokens
                | self.cache_image_read_tokens
                | self.output_image_tokens
                | self.input_video_tokens
                | self.output_video_tokens
            )
        except TypeError:
            together = -1
        if together.__class__ is not int or not 0 <= together <= MAX_TOKENS:
            self.check_counts()
        if not isinstance(self.model, str):
            raise InvalidInput(f"model must be a string, got {reprlib.repr(self.model)}", field="model")
        if self.cost is not None:
            to_nano(self.cost, "cost")
        if self.time is not None and self.time.tzinfo is None:
            raise InvalidInput("time must be an aware datetime; add tzinfo=timezone.utc", field="time")

    def check_counts(self) -> None:
        """Look at each count by itself.

        Raises:
            InvalidInput: One is no integer in 0..10^12; it says which.
        """
        for kind in TOKEN_KINDS:
            count = getattr(self, kind)
            if count.__class__ is not int or not 0 <= count <= MAX_TOKENS:
                raise InvalidInput(f"{kind} must be an integer from 0 to 10^12, got {reprlib.repr(count)}", field=kind)

    @property
    def total_tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens

    @classmethod
    def from_response(cls, reply: object, *, provider: str | None = None) -> Self:
        """Read the usage off a reply of OpenAI, Anthropic or Gemini, an SDK object or its JSON as a dict.

        Raises:
            InvalidInput: The reply is of no known shape or holds no usage in tokens. Audio charged by its length
                and images charged by the piece are recorded as `Usage(model=..., cost=...)`.
        """
        # Wire formats are known one layer up; an import at the top would be a cycle.
        providers = importlib.import_module("respan_guard.providers")
        usage: Self = providers.usage_from_reply(reply, provider=provider)
        return usage

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values; `cost` as a decimal string."""
        found: dict[str, Any] = {
            name: value for (name, default), value in zip(_DEFAULTS, _values(self), strict=True) if value != default
        }
        if "cost" in found:
            found["cost"] = str(found["cost"])
        if "time" in found:
            found["time"] = found["time"].isoformat()
        if "metadata" in found:
            found["metadata"] = dict(found["metadata"])
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` wrote; names unknown to this version are left out."""
        known = {name: value for name, value in values.items() if name in _NAMES}
        if "cost" in known:
            known["cost"] = Decimal(known["cost"])
        if "time" in known:
            known["time"] = datetime.fromisoformat(known["time"])
        return cls(**known)


_DEFAULTS = tuple((f.name, f.default) for f in fields(Usage) if f.default is not MISSING)
_values = attrgetter(*(name for name, _ in _DEFAULTS))
_NAMES = frozenset(name for name, _ in _DEFAULTS)


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """A stored usage: an entry of the ledger.

    Attributes:
        id: Unique for the customer; recording the same id twice counts once.
        customer_identifier: Whose usage it is; "" for usage nobody could be found for.
        time: When the call ended, UTC.
        day: The local date it is booked on, ISO format.
        usage: Tokens, model and provider as reported.
        cost: USD; None where no price is known (`unpriced`).
        kind: "usage", "adjustment" (by hand, or reported for the work around calls) or "presumed" (a call whose usage
            stayed unknown).
        source: Which door saw it: "response", "client", "span", "manual", "presumed", "api".
        admission_id: The admission it was made under.
        sequence: Its place in the ledger's log, in commit order.
        revision: 1, or higher for a presumed entry that real usage has shrunk.
        late: It came after its hold had ended.
        markup_percentage: What the customer's reports put on top of the cost; told where records are exported.
    """

    id: str
    customer_identifier: str
    time: datetime
    day: str
    usage: Usage
    cost: Decimal | None
    kind: str = "usage"
    source: str = "manual"
    admission_id: str | None = None
    sequence: int = 0
    revision: int = 1
    late: bool = False
    markup_percentage: Decimal | None = None

    @property
    def cost_with_markup(self) -> Decimal | None:
        """The cost as the customer is shown it, USD; budgets compare the raw one."""
        return None if self.cost is None else plus_percent(self.cost, self.markup_percentage)

    @property
    def model(self) -> str:
        """The model as it was asked for."""
        return self.usage.model

    @property
    def provider(self) -> str | None:
        """Who served the call."""
        return self.usage.provider

    @property
    def unpriced(self) -> bool:
        """No price was known, so the cost is unknown, which is not zero."""
        return self.cost is None
