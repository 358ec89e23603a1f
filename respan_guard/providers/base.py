"""What the wire formats share: the facts of a request (`Call`), and an upper bound for its input.

Why a count of bytes bounds tokens: the tokenizers of all providers here work on bytes of UTF-8, or fall
back to them, so each token of a text covers at least one of its bytes. What providers add around the
text (role markers, separators, tool schemas rendered anew, the system prompt that comes with tools) is
covered by `NODE_BYTES` for each JSON value, by the keys' own bytes, and by the two overheads.
Images, audio and files are not text and have bounds of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from respan_guard.usage import MAX_TOKENS

__all__ = [
    "Call",
    "Layout",
    "Measure",
    "Media",
    "count",
    "decode_json",
    "fallbacks",
    "limit",
    "mapping",
    "measure",
    "media_tokens",
    "shares",
    "text",
]

MAX_NODES = 1_000_000
NODE_BYTES = 4
_MOST_MODELS = 32  # to choose from; each is priced
REQUEST_OVERHEAD = 64
# Anthropic documents 313 to 735 tokens of system prompt for tools; twice that leaves room for newer models.
TOOLS_OVERHEAD = 1_536

Kind = Literal["image", "audio", "file", "video"]


@dataclass(slots=True)
class Call:
    """What a request says about the LLM call it asks for.

    Attributes:
        provider: Whose wire format it is: "openai", "azure", "anthropic", "google".
        operation: "chat", "text_completion", "embeddings", "generate_content", "image_generation", ...
            as in OpenTelemetry's `gen_ai.operation.name`.
        model: The model asked for; "" where the request names none.
        fallbacks: Models that may answer instead (OpenRouter's `models`).
        request_ids: Ids that the request gives itself, which some servers make their reply's of.
        input_tokens_bound: What the request shows is charged for no more input tokens than this.
        max_output_tokens: The cap on output tokens for each choice; None where the request sets none.
        choices: How many answers are asked for (`n`, `best_of`, `candidateCount`), at least 1.
        stream: Whether the answer comes as a stream.
        wants_usage: Whether the answer will carry usage without further ado.
        hidden: Whether the model reads what the request doesn't show, or shows in a form that tells no size: stored
            conversations and prompts, files named by id or address, documents. The model's context window is the bound.
        tool_runs: How often tools that the provider runs (search, interpreters, MCP) may be used. The model reads its
            context again after each. None if the request has such tools and sets no number.
        predicted_tokens: A guess at the answer that the request brings; where it is wrong it is charged as output.
        has_audio: Whether audio goes in or is asked for.
        has_images: Whether images, video or files go in.
        service_tier: The tier asked for, where the request names one.
    """

    provider: str
    operation: str
    model: str
    input_tokens_bound: int
    max_output_tokens: int | None = None
    choices: int = 1
    stream: bool = False
    wants_usage: bool = True
    hidden: bool = False
    tool_runs: int | None = 0
    predicted_tokens: int = 0
    has_audio: bool = False
    has_images: bool = False
    service_tier: str | None = None
    fallbacks: tuple[str, ...] = ()
    request_ids: tuple[str, ...] = ()

    def output_tokens_bound(self, default: int) -> int:
        """The most output tokens of all choices together, with `default` for a request without a cap."""
        cap = default if self.max_output_tokens is None else self.max_output_tokens
        return min((cap + self.predicted_tokens) * self.choices, MAX_TOKENS)


@dataclass(slots=True)
class Media:
    """A part of a request that is no text.

    Attributes:
        kind: What it is.
        size: Characters of base64, where the bytes are in the request.
        format: Media type or file extension, lower case.
        remote: It is named by id or address.
        text: Parts beside the payload that count as text.
    """

    kind: Kind
    size: int = 0
    format: str = ""
    remote: bool = False
    text: tuple[Any, ...] = ()


@dataclass(slots=True)
class Measure:
    """The size of a request's input."""

    tokens: int = 0
    hidden: bool = False
    has_audio: bool = False
    has_images: bool = False


def decode_json(data: str | bytes | bytearray) -> Any:
    """The value that JSON spells; None if it is none."""
    try:
        return from_json(data, cache_strings="keys")
    except ValueError:
        pass
    try:
        return json.loads(data)  # half a surrogate pair, other encodings, and deeper nesting than that one takes
    except (ValueError, RecursionError):
        return None


def count(value: object) -> int | None:
    """The value if it is a plausible token count (an integer in 0..10^12), else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS else None


def shares(source: object, *names: str) -> int | None:
    """The first of these counts that a details object holds; 0 if it holds none, None if one is malformed."""
    if source is None:
        return 0
    if source.__class__ is not dict and not isinstance(source, Mapping):
        return None
    for name in names:
        if (found := source.get(name)) is not None:
            return count(found)
    return 0


def limit(value: object) -> int | None:
    """A cap or a number of choices that a request sets, else None.

    Also read from 100.0 and "100", which lenient servers obey.
    """
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() and len(value) <= 12 else None
    elif isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return count(value)


def fallbacks(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The models that a request lets the server choose from; "", whose price is unknown, for what is no name."""
    models = body.get("models")
    if not isinstance(models, list):
        return ()
    return tuple(dict.fromkeys(text(model) or "" for model in models[:_MOST_MODELS])) + ("",) * (
        len(models) > _MOST_MODELS
    )


def text(value: object, limit: int = 256) -> str | None:
    """The value if it is a string of at most `limit` characters, else None."""
    return value if isinstance(value, str) and 0 < len(value) <= limit else None


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def utf8_size(value: str) -> int:
    """Bytes of the text in UTF-8; a lone surrogate counts as three."""
    return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))


def media_tokens(media: Media, image_tokens: int) -> int:
    """A bound for the tokens of one image, clip or file.

    Audio is charged by time: 10 tokens a second at OpenAI, 32 at Google, so the lowest bitrate of the format gives
    the longest clip: 8,000 bytes a second for WAV, 1,000 for MP3 (8 kbit/s); other formats may pause, so
    a token for every 4 bytes. Documents are compressed, so there is no sound bound; an eighth of the bytes is generous.
    """
    size = math.ceil(media.size * 3 / 4)
    if media.kind == "image":
        return image_tokens
    if media.remote:
        return REMOTE_FILE_TOKENS
    if media.kind == "audio":
        for name, bytes_per_token in (("wav", 128), ("pcm", 128), ("mp3", 24), ("mpeg", 24)):
            if name in media.format:
                return 64 + size // bytes_per_token
        return 64 + size // 4
    if media.kind == "file" and media.format.startswith("text/"):
        return size
    return max(4_096, size // 8)


REMOTE_FILE_TOKENS = 65_536
"""What a file that the request only names is taken for. A guess: such a call has `hidden` input."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a wire format keeps what.

    Attributes:
        media: Recognises an image, clip or file by its JSON object.
        image_tokens: The bound of one image.
        content: Top-level names under which media can stand. Elsewhere (tool schemas, say) what looks like
            an image is text to the provider, and is counted as such.
        opaque: Names within content whose values are text to the provider, whatever they look like: a
            tool's arguments.
        skip: Top-level names that never reach the model.
    """

    media: Callable[[Mapping[str, Any]], Media | None]
    image_tokens: int
    content: frozenset[str]
    opaque: frozenset[str]
    skip: frozenset[str]


def measure(body: Mapping[str, Any], layout: Layout, *, has_tools: bool = False) -> Measure:
    """Bound the input tokens of a request by one walk over its JSON, without recursion.

    Args:
        body: The request's JSON.
        layout: The format.
        has_tools: Whether the request brings tools.
    """
    found = Measure(tokens=REQUEST_OVERHEAD + (TOOLS_OVERHEAD if has_tools else 0))
    content: list[Any] = []
    other: list[Any] = []
    total = nodes = 0
    for name, value in body.items():
        if name in layout.skip:
            continue
        if value.__class__ is str and value.isascii() and name.isascii():  # nearly all there is: not twice
            total += len(name) + len(value)
            nodes += 2
        else:
            other.append(name)
            (content if name in layout.content else other).append(value)
    while content:
        value = content.pop()
        if isinstance(value, dict):
            nodes += 1
            media = layout.media(value)
            if media is not None:
                total += media_tokens(media, layout.image_tokens)
                other.extend(media.text)
                _mark(found, media)
                continue
            for name, part in value.items():
                if part.__class__ is str and part.isascii() and name.isascii():
                    total += len(name) + len(part)
                    nodes += 2
                else:
                    other.append(name)
                    (other if name in layout.opaque else content).append(part)
        elif isinstance(value, list) and not (value and value[0].__class__ is int and _is_numbers(value)):
            nodes += 1
            content.extend(value)
        else:
            other.append(value)
        if nodes > MAX_NODES:
            break
    while other:
        value = other.pop()
        nodes += 1
        kind = value.__class__
        if kind is str:
            total += len(value) if value.isascii() else utf8_size(value)
        elif kind is dict:
            other.extend(value)
            other.extend(value.values())
        elif kind is list:
            if value and value[0].__class__ is int and _is_numbers(value):  # ready-made tokens, maybe millions
                nodes += len(value)
                total += len(value) * (max(max(value), -min(value)).bit_length() // 3 + 1)
            else:
                other.extend(value)
        elif kind is int:
            total += value.bit_length() // 3 + 1  # at least its digits, without writing them
        elif kind is float:
            total += 24
        if nodes > MAX_NODES:
            found.hidden = True
            break
    found.tokens = min(found.tokens + total + nodes * NODE_BYTES, MAX_TOKENS)
    return found


def _is_numbers(value: list[Any]) -> bool:
    return set(map(type, value)) == {int}


def _mark(found: Measure, media: Media) -> None:
    found.has_audio |= media.kind in ("audio", "video")
    found.has_images |= media.kind != "audio"
    exact = media.kind == "image" or (not media.remote and (media.kind == "audio" or media.format.startswith("text/")))
    found.hidden |= not exact
