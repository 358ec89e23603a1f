"""A call as the stand-in provider understands it, whatever the wire format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Event", "ProviderRequest", "Rejected", "count_tokens", "unknown_names"]

_MESSAGE_TOKENS = 4
_IMAGE_TOKENS = 85
_MEDIA = frozenset({"image_url", "input_image", "image", "input_audio", "inlineData", "inline_data", "file"})


@dataclass(slots=True)
class ProviderRequest:
    """One call.

    Attributes:
        endpoint: "chat.completions", "completions", "responses", "embeddings", "images", "messages",
            "generateContent" or "embedContent".
        provider: Whose wire format it is: "openai", "anthropic", "google".
        model: The model asked for.
        body: The request's JSON.
        headers: Its headers, names in lower case, without those that carry keys.
        prompt_tokens: A token for every 4 bytes of text (rounded up; roles and types are no text), 4 for every
            message and 85 for every image or clip, but never more than the body has bytes.
        max_output_tokens: The cap of one choice; None if the request sets none.
        choices: How many answers are asked for.
        stream: Whether the answer comes as a stream.
        include_usage: Whether a stream of chat or legacy completions ends with a chunk of usage.
        array: A stream of Gemini's comes as a JSON array instead of SSE.
    """

    endpoint: str
    provider: str
    model: str
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    prompt_tokens: int = 0
    max_output_tokens: int | None = None
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    array: bool = False

    @property
    def generates(self) -> bool:
        """Whether the model writes an answer; embedding does not."""
        return not self.endpoint.startswith("embed")


@dataclass(slots=True)
class Event:
    """One event of a stream; `name` is the SSE event's name where the provider sends one."""

    data: dict[str, Any] | str
    name: str | None = None


class Rejected(Exception):
    """The provider refuses the call.

    Args:
        status: HTTP status.
        message: What is wrong.
        param: The offending parameter.
        code: OpenAI's code.
        retry_after: Seconds, for the header `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


def unknown_names(body: Mapping[str, Any], known: frozenset[str]) -> str | None:
    """The first top-level name that the API doesn't know, or None."""
    return next((name for name in body if name not in known), None)


def count_tokens(*parts: object, size: int) -> int:
    """Count the tokens of a prompt's parts by the rule of `ProviderRequest.prompt_tokens`."""
    text = extra = 0
    pending: list[object] = list(parts)
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            text += len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, Mapping):
            if value.get("type") in _MEDIA or not _MEDIA.isdisjoint(value):
                extra += _IMAGE_TOKENS
                pending.append(value.get("text"))
                continue
            if "role" in value or "parts" in value:
                extra += _MESSAGE_TOKENS
            pending.extend(part for name, part in value.items() if name not in ("role", "type"))
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            extra += 1  # a prompt given as token ids
    return min(-(-text // 4) + extra, size)
