"""Google's generateContent. It counts thoughts apart from candidates, and repeats the usage in every chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from respan_guard.testing.provider.answer import FilledAnswer
from respan_guard.testing.provider.request import Event, ProviderRequest, Rejected, count_tokens, unknown_names

__all__ = ["VERBS", "error", "events", "read", "reply"]

VERBS = {
    "generateContent": "generateContent",
    "streamGenerateContent": "generateContent",
    "embedContent": "embedContent",
    "batchEmbedContents": "embedContent",
}
_KNOWN = frozenset(
    {
        *("cachedContent", "content", "contents", "generationConfig", "labels", "model", "outputDimensionality"),
        *("requests", "safetySettings", "serviceTier", "systemInstruction", "taskType", "title", "toolConfig", "tools"),
    }
)
_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}


def read(
    endpoint: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    size: int,
    *,
    strict: bool,
) -> ProviderRequest:
    """Understand a request; model and verb stand in the path, hence are set by the caller.

    Raises:
        Rejected: Google would answer 400.
    """
    snake = {"_".join(_snake(name)): name for name in _KNOWN}
    body = {snake.get(name, name): value for name, value in body.items()}
    name = unknown_names(body, _KNOWN) if strict else None
    if name is not None:
        raise Rejected(400, f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.', param=name)
    if not any(body.get(name) for name in ("contents", "content", "requests")):
        raise Rejected(400, "* GenerateContentRequest.contents: contents is not specified")
    config = body.get("generationConfig") or {}
    cap = config.get("maxOutputTokens")
    return ProviderRequest(
        endpoint=endpoint,
        provider="google",
        model="",
        body=body,
        headers=headers,
        prompt_tokens=count_tokens(
            *(body.get(n) for n in ("contents", "content", "requests", "systemInstruction", "tools")), size=size
        ),
        max_output_tokens=cap if isinstance(cap, int) else None,
        choices=config.get("candidateCount") or 1,
    )


def _snake(name: str) -> list[str]:
    words, start = [], 0
    for at, letter in enumerate(name):
        if letter.isupper():
            words.append(name[start:at].lower())
            start = at
    return [*words, name[start:].lower()]


def error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error's body."""
    return {"error": {"code": status, "message": message, "status": _STATUS.get(status, "UNKNOWN")}}


def reply(request: ProviderRequest, filled: FilledAnswer) -> dict[str, Any]:
    """The whole answer."""
    if request.endpoint == "embedContent":
        several = request.body.get("requests")
        values = [0.25] * 8
        if isinstance(several, list):
            return {"embeddings": [{"values": values} for _ in several]}
        return {"embedding": {"values": values}}
    return _chunk(request, filled, filled.text, filled.output_tokens, last=True)


def events(request: ProviderRequest, filled: FilledAnswer) -> list[Event]:
    """The answer as a stream: what is generated so far stands in every chunk."""
    pieces = list(filled.pieces())
    visible = filled.output_tokens - filled.reasoning_tokens
    return [
        Event(
            _chunk(
                request,
                filled,
                piece,
                filled.reasoning_tokens + visible * at // len(pieces),
                last=at == len(pieces),
            )
        )
        for at, piece in enumerate(pieces, 1)
    ]


def _chunk(request: ProviderRequest, filled: FilledAnswer, text: str, output: int, *, last: bool) -> dict[str, Any]:
    answer = filled.answer
    finish = {"finishReason": "MAX_TOKENS" if filled.truncated else "STOP"} if last else {}
    usage: dict[str, Any] = {
        "promptTokenCount": filled.input_tokens,
        "candidatesTokenCount": output - filled.reasoning_tokens,
        "totalTokenCount": filled.input_tokens + output,
        "promptTokensDetails": _details(filled.input_tokens, answer.input_audio_tokens),
    }
    if filled.reasoning_tokens:
        usage["thoughtsTokenCount"] = filled.reasoning_tokens
    if answer.cache_read_tokens:
        usage["cachedContentTokenCount"] = answer.cache_read_tokens
        usage["cacheTokensDetails"] = _details(answer.cache_read_tokens, answer.cache_audio_read_tokens)
    if filled.output_audio_tokens:
        usage["candidatesTokensDetails"] = _details(output - filled.reasoning_tokens, filled.output_audio_tokens)
    return {
        "candidates": [
            {"content": {"parts": [{"text": text}], "role": "model"}, "index": index, **finish}
            for index in range(request.choices)
        ],
        "usageMetadata": usage,
        "modelVersion": request.model,
        "responseId": filled.response_id,
    }


def _details(total: int, audio: int) -> list[dict[str, Any]]:
    return [
        {"modality": name, "tokenCount": count}
        for name, count in (("TEXT", total - audio), ("AUDIO", audio))
        if count or name == "TEXT"
    ]
