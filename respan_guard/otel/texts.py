"""What the texts on a span tell: how long they are, where nobody counted, and whether a failed call was made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from respan_guard.otel.names import as_json, first
from respan_guard.usage import Usage

__all__ = ["estimate_from_texts", "was_made"]

_BYTES_PER_TOKEN = 4  # of English text
_NOT_MADE = re.compile(
    r"(?:APIStatusError|APIConnectionError|RateLimitError|BadRequestError|AuthenticationError|PermissionDeniedError"
    r"|NotFoundError|ConflictError|UnprocessableEntityError|InternalServerError|OverloadedError|ServiceUnavailable\w*"
    r"|ClientError|ServerError|ConnectError|ConnectTimeout|ModelHTTPError|ContentPolicyViolation\w*|RequestTooLargeError"
    r"|RateLimitExceeded|BudgetExceeded|CustomerBlocked|APIError)$"
)
_NOT_SENT = "Streaming is required for operations that may take longer"  # says Anthropic's SDK, and sends nothing
_STATUS = re.compile(r"(?:Error code: |HTTP |status_code: |^)([45]\d\d)\b")


def was_made(attributes: Mapping[str, Any], usage: Usage, description: str | None, kinds: Sequence[str]) -> bool:
    """Whether a call that ended with an error was answered, hence paid for: a reply that can't be parsed was."""
    if usage.response_id:
        return True
    status = attributes.get("http.response.status_code", attributes.get("status_code"))
    if isinstance(status, int) and status >= 400:
        return False
    answer = first(attributes, "content_out")
    if usage.output_tokens or (isinstance(answer, (str, list, tuple)) and _text_size(answer)):
        return True  # a stream that an error event broke off: OpenAI's SDK raises there what it raises for a refusal
    if any(_NOT_MADE.search(kind) for kind in kinds):
        return False
    text = f"{description or ''} {attributes.get('error.message') or ''}".strip()
    if _STATUS.search(text[:300]) or text.startswith(_NOT_SENT):
        return False
    return not re.match(rf"\s*(?:[\w.]+\.)?{_NOT_MADE.pattern[:-1]}\b", text[:300])


def estimate_from_texts(attributes: Mapping[str, Any], usage: Usage, *, cut_off: bool) -> tuple[int, int] | None:
    """Tokens by the length of the texts, where the span has them; counts that are told are kept."""
    made, given = first(attributes, "content_out"), first(attributes, "content_in")
    if not isinstance(made, (str, list, tuple)) or not isinstance(given, (str, list, tuple)):
        return None
    output = usage.output_tokens
    if cut_off or not output:
        output = max(output, -(-_text_size(made) // _BYTES_PER_TOKEN))
    return usage.input_tokens or -(-_text_size(given) // _BYTES_PER_TOKEN), output


def _text_size(value: object) -> int:
    """Bytes of the words in a JSON of messages, or of a text that is none."""
    body = as_json(value) if isinstance(value, str) else value
    if body is None:
        return len(str(value).encode("utf-8", "replace"))
    size, left = 0, [(body, False)]
    for _ in range(100_000):
        if not left:
            break
        item, spoken = left.pop()
        if isinstance(item, str):
            size += len(item.encode("utf-8", "replace")) if spoken else 0
        elif isinstance(item, Mapping):
            left += [
                (part, spoken or name in _SPOKEN) for name, part in item.items() if name not in ("role", "type", "id")
            ]
        elif isinstance(item, (list, tuple)):
            left += [(part, spoken or isinstance(part, str)) for part in item]
    return size


_SPOKEN = ("content", "text", "arguments", "input", "messages", "response", "output_text", "instructions", "reasoning")
