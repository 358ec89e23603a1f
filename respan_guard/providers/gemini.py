"""Google's generateContent, of the Gemini API and of Vertex AI.

`promptTokenCount` includes cached tokens; `candidatesTokenCount` leaves out `thoughtsTokenCount`, and what
tools of Google's put into the prompt is counted apart, in `toolUsePromptTokenCount`
(https://ai.google.dev/api/generate-content#UsageMetadata).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from respan_guard.providers.base import Call, Layout, Media, count, limit, mapping, measure, text
from respan_guard.usage import Usage

__all__ = ["call", "reply_usage"]

# 258 a tile of 768 x 768, at most 16 tiles of a 3,072 x 3,072 image; "ultra high" resolution is 2,240.
_IMAGE_TOKENS = 5_000
_APPS_TOOLS = ("functionDeclarations", "function_declarations")


def _either(body: Mapping[str, Any], camel: str, snake: str) -> Any:
    """REST accepts both spellings of a name."""
    value = body.get(camel)
    return body.get(snake) if value is None else value


def _most(config: Mapping[str, Any], *names: str) -> int | None:
    return max((found for name in names if (found := limit(config.get(name))) is not None), default=None)


def _media(part: Mapping[str, Any]) -> Media | None:
    inline, file = _either(part, "inlineData", "inline_data"), _either(part, "fileData", "file_data")
    if not isinstance(inline, Mapping) and not isinstance(file, Mapping):
        return None
    source = inline if isinstance(inline, Mapping) else file
    form = _either(source, "mimeType", "mime_type")
    form = form.lower() if isinstance(form, str) else ""
    kind = form.partition("/")[0]
    data = source.get("data")
    beside = tuple(v for k, v in part.items() if k not in ("inlineData", "inline_data", "fileData", "file_data"))
    size = len(data) if isinstance(data, str) else 0
    remote = not isinstance(inline, Mapping)
    if kind == "image":
        return Media("image", remote=remote, text=beside)
    if kind == "audio":
        return Media("audio", size, form, remote, text=beside)
    if kind == "video" or not form:
        return Media("video", size, form, remote, text=beside)
    return Media("file", size, form, remote, text=beside)


_LAYOUT = Layout(
    _media,
    _IMAGE_TOKENS,
    content=frozenset({"contents", "content", "requests", "systemInstruction", "system_instruction"}),
    opaque=frozenset({"args", "response", "functionCall", "function_call"}),
    skip=frozenset({"labels", "safetySettings", "customer_params"}),
)


def call(path: str, body: Mapping[str, Any]) -> Call:
    """Read a request. The model stands in the path, as do streaming and the verb."""
    before, _, verb = path.rpartition(":")
    model = before.rpartition("/models/")[2] if "/models/" in before else before.rpartition("/")[2]
    verb = verb.lower()
    if not verb.startswith(("generate", "stream", "embed", "batchembed")):
        model = text(body.get("model")) or ""
    model = model.removeprefix("models/")[:256]
    tools = body.get("tools")
    size = measure(body, _LAYOUT, has_tools=isinstance(tools, list))
    own = isinstance(tools, list) and any(name not in _APPS_TOOLS for tool in tools for name in mapping(tool))
    # Which of two spellings counts is the server's affair, so what asks for most is taken.
    configs = [mapping(body[name]) for name in ("generationConfig", "generation_config") if body.get(name) is not None]
    caps = [_most(config, "maxOutputTokens", "max_output_tokens") for config in configs]
    choices = [_most(config, "candidateCount", "candidate_count") or 1 for config in configs]
    modalities = [_either(config, "responseModalities", "response_modalities") for config in configs]
    embeds = "mbed" in verb
    return Call(
        provider="google",
        operation="embeddings" if embeds else "generate_content",
        model=model,
        input_tokens_bound=size.tokens,
        max_output_tokens=0 if embeds else max((cap for cap in caps if cap is not None), default=None),
        choices=max(choices, default=1),
        stream=verb.startswith("stream"),
        hidden=size.hidden or _either(body, "cachedContent", "cached_content") is not None,
        tool_runs=None if own else 0,  # no request can say how often
        has_audio=size.has_audio or any(isinstance(names, list) and "AUDIO" in names for names in modalities),
        has_images=size.has_images,
        service_tier=text(_either(body, "serviceTier", "service_tier"), 32),
    )


def reply_usage(body: Mapping[str, Any]) -> Usage | None:
    """Read the usage off a reply or a chunk of one; None if it is none or its usage is malformed."""
    usage = _either(body, "usageMetadata", "usage_metadata")
    if not isinstance(usage, Mapping):
        return None
    if not any(
        name in body for name in ("candidates", "promptFeedback", "prompt_feedback", "modelVersion", "model_version")
    ):
        return None

    def value(camel: str, snake: str) -> int | None:
        found = _either(usage, camel, snake)
        return 0 if found is None else count(found)

    prompt = value("promptTokenCount", "prompt_token_count")
    tool = value("toolUsePromptTokenCount", "tool_use_prompt_token_count")
    cached = value("cachedContentTokenCount", "cached_content_token_count")
    answer = value("candidatesTokenCount", "candidates_token_count")
    thoughts = value("thoughtsTokenCount", "thoughts_token_count")
    if prompt is None or tool is None or cached is None or answer is None or thoughts is None:
        return None
    if prompt + tool > 10**12 or answer + thoughts > 10**12 or not (prompt or answer or thoughts):
        return None
    given = _either(usage, "promptTokensDetails", "prompt_tokens_details")
    by_tools = _either(usage, "toolUsePromptTokensDetails", "tool_use_prompt_tokens_details")
    cache = _either(usage, "cacheTokensDetails", "cache_tokens_details")
    made = _either(usage, "candidatesTokensDetails", "candidates_tokens_details")
    model = text(_either(body, "modelVersion", "model_version"))
    return Usage(
        model=model or "",
        input_tokens=prompt + tool,
        output_tokens=answer + thoughts,
        cache_read_tokens=cached,
        reasoning_tokens=thoughts,
        input_audio_tokens=_modality(given, "AUDIO") + _modality(by_tools, "AUDIO"),
        cache_audio_read_tokens=_modality(cache, "AUDIO"),
        output_audio_tokens=_modality(made, "AUDIO"),
        input_image_tokens=_modality(given, "IMAGE") + _modality(by_tools, "IMAGE"),
        cache_image_read_tokens=_modality(cache, "IMAGE"),
        output_image_tokens=_modality(made, "IMAGE"),
        input_video_tokens=_modality(given, "VIDEO") + _modality(by_tools, "VIDEO"),
        output_video_tokens=_modality(made, "VIDEO"),
        provider="google",
        response_id=text(_either(body, "responseId", "response_id")),
        response_model=model,
        operation="generate_content",
    )


def _modality(details: object, name: str) -> int:
    """Tokens of one modality in a list of `{modality, tokenCount}`."""
    if not isinstance(details, list):
        return 0
    found = 0
    for entry in details:
        if isinstance(entry, Mapping) and entry.get("modality") == name:
            found += count(_either(entry, "tokenCount", "token_count")) or 0
    return min(found, 10**12)
