"""What the stand-in provider answers: as scripted, else derived from the request by stated rules.

Token counts are inclusive, as in `respan_guard.Usage`: cached, cache-write and audio tokens are part of the input,
reasoning and audio tokens part of the output. Each wire format turns them into its provider's way to count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from typing import Any

from respan_guard.errors import InvalidInput
from respan_guard.testing.provider.gate import Gate
from respan_guard.testing.provider.request import ProviderRequest

__all__ = ["Answer", "FilledAnswer"]

_WORDS = ("a", "small", "river", "runs", "from", "the", "hills", "to", "the", "sea", "and", "nobody", "asks", "why")
_HEADER = "x-stand-in-"
_PARTS_OF_INPUT = ("cache_read_tokens", "cache_write_tokens", "input_audio_tokens")
_PARTS_OF_OUTPUT = ("reasoning_tokens", "output_audio_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one call is answered with. What is left out follows from the request.

    A request may script its own answer with headers: `x-stand-in-output-tokens: 7`, `x-stand-in-text: Hello`, ...

    Args:
        text: The text; one word for each visible token if left out.
        input_tokens: All input tokens. Left out: see `ProviderRequest.prompt_tokens`.
        output_tokens: All output tokens of one choice. Left out: the provider's default, or the request's cap if lower.
        cache_read_tokens: Input tokens read from the provider's cache.
        cache_write_tokens: Input tokens written to the provider's cache, of any lifetime.
        cache_write_1h_tokens: The part of `cache_write_tokens` kept for an hour.
        reasoning_tokens: Output tokens spent on reasoning.
        input_audio_tokens: Input tokens of audio, cached ones included.
        cache_audio_read_tokens: Input tokens of audio read from the cache.
        output_audio_tokens: Output tokens of audio.
        chunks: In how many pieces a stream brings the text.
        gate: Each piece of a stream after the first waits here; without a stream, the whole answer does.

    Raises:
        InvalidInput: A count is negative, or parts are more than their whole.
    """

    text: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    cache_audio_read_tokens: int = 0
    output_audio_tokens: int = 0
    chunks: int | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise InvalidInput(f"{name} must be an integer of at least 0, got {value!r}", field=name)
        if self.chunks == 0:
            raise InvalidInput("chunks must be at least 1", field="chunks")
        if self.input_tokens is not None:
            _check("input_tokens", self.input_tokens, sum(getattr(self, name) for name in _PARTS_OF_INPUT[:2]))
            _check("input_tokens", self.input_tokens, self.input_audio_tokens)
        if self.output_tokens is not None:
            _check("output_tokens", self.output_tokens, sum(getattr(self, name) for name in _PARTS_OF_OUTPUT))
        _check("cache_write_tokens", self.cache_write_tokens, self.cache_write_1h_tokens)
        _check("cache_read_tokens", self.cache_read_tokens, self.cache_audio_read_tokens)
        _check("input_audio_tokens", self.input_audio_tokens, self.cache_audio_read_tokens)

    def scripted_by(self, headers: Mapping[str, str]) -> Answer:
        """This answer with what the request's `x-stand-in-*` headers say.

        Raises:
            InvalidInput: A header's value is no count, or counts contradict each other.
        """
        given: dict[str, Any] = {}
        for name, value in headers.items():
            field = name.removeprefix(_HEADER).replace("-", "_")
            if not name.startswith(_HEADER) or field not in _SCRIPTABLE:
                continue
            if field != "text" and not value.isdecimal():
                raise InvalidInput(f"{name} must be a number of tokens or chunks, got {value!r}", field=name)
            given[field] = value.encode("latin-1").decode(errors="replace") if field == "text" else int(value)
        return replace(self, **given) if given else self

    def fill(
        self, request: ProviderRequest, *, default_output_tokens: int, response_id: str, created: int
    ) -> FilledAnswer:
        """The answer to this request, with everything decided."""
        parts_in = max(self.cache_read_tokens + self.cache_write_tokens, self.input_audio_tokens)
        parts_out = self.reasoning_tokens + self.output_audio_tokens
        given = max(request.prompt_tokens, parts_in) if self.input_tokens is None else self.input_tokens
        made, truncated = self.output_tokens, False
        if not request.generates:
            made = 0
        elif made is None:
            cap = request.max_output_tokens
            made = max(default_output_tokens, parts_out)
            truncated = cap is not None and cap < made
            made = max(cap, parts_out) if truncated and cap is not None else made
        visible = max(0, made - parts_out)
        return FilledAnswer(
            answer=self,
            text=" ".join(islice(cycle(_WORDS), visible)) if self.text is None else self.text,
            input_tokens=given,
            output_tokens=made * request.choices,
            reasoning_tokens=self.reasoning_tokens * request.choices,
            output_audio_tokens=self.output_audio_tokens * request.choices,
            truncated=truncated,
            response_id=response_id,
            created=created,
        )


_COUNTS = tuple(f.name for f in fields(Answer) if f.name not in ("text", "gate"))
_SCRIPTABLE = frozenset({*_COUNTS, "text"})


def _check(whole: str, count: int, parts: int) -> None:
    if parts > count:
        raise InvalidInput(f"{whole} is {count}, but its parts are {parts}; counts include their parts", field=whole)


@dataclass(frozen=True, slots=True)
class FilledAnswer:
    """An answer with everything decided; the counts are those of all choices together."""

    answer: Answer
    text: str
    input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    output_audio_tokens: int
    truncated: bool
    response_id: str
    created: int

    def pieces(self) -> Iterator[str]:
        """The text in the pieces that a stream brings."""
        wanted = self.answer.chunks or min(8, max(1, len(self.text)))
        size, extra = divmod(len(self.text), wanted)
        at = 0
        for index in range(wanted):
            end = at + size + (index < extra)
            yield self.text[at:end]
            at = end

    @property
    def total_tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens
