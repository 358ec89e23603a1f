"""What a request on its way to a provider asks for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from respan_guard.providers import Call, call_from_request, decode_json

__all__ = ["Outgoing", "is_form_path", "read_form", "read_json"]

logger = logging.getLogger("respan_guard")

# Chat completions and legacy completions tell what a stream cost only if they are asked to.
_USAGE_ON_DEMAND = ("/chat/completions", "/completions")
_FORMS = {
    "/audio/transcriptions": "transcription",
    "/audio/translations": "transcription",
    "/images/edits": "image_generation",
    "/images/variations": "image_generation",
}
_FORM_PATHS = tuple(_FORMS)
_FORM_MODEL = re.compile(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n')
_IMAGE_TOKENS = 16_384  # of one drawn image
_AUDIO_BYTES_PER_TOKEN = 24  # of the lowest bitrate of MP3, at ten tokens a second
_OVERHEAD = 64


@dataclass(slots=True)
class Outgoing:
    """A request that is an LLM call.

    Attributes:
        call: What it asks for.
        content: The body to send instead, asking for the stream's usage; None to send it as it is.
        refused: Whether the server refused to be asked.
    """

    call: Call
    content: bytes | None = None
    refused: bool = False


def read_json(path: str, content: bytes, *, include_usage: bool) -> Outgoing | None:
    """Read a request's body; None if it is no LLM call.

    Args:
        path: The URL's path.
        content: The body.
        include_usage: Whether to ask for the usage of streams that would not tell it.
    """
    body = decode_json(content)
    if not isinstance(body, dict):
        return None
    try:
        call = call_from_request(path, body)
    except Exception:  # a fault of ours must not let a call pass that nobody counts
        logger.exception("a request could not be read as an LLM call; its size alone is held")
        model = body.get("model")
        call = Call("openai", "chat", model if isinstance(model, str) else "", len(content))
    if call is None:
        return None
    if include_usage and call.stream and not call.wants_usage and path.rstrip("/").endswith(_USAGE_ON_DEMAND):
        return Outgoing(call, _asking_for_usage(body, content))
    return Outgoing(call)


def _asking_for_usage(body: Mapping[str, Any], content: bytes) -> bytes | None:
    if "stream_options" not in body and content[:1] == b"{":
        return b'{"stream_options":{"include_usage":true},' + content[1:]  # all else stays to the letter
    options = body.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        return None
    changed = {**body, "stream_options": {**(options or {}), "include_usage": True}}
    # As the clients write it; a lone surrogate would not encode otherwise.
    return json.dumps(changed, separators=(",", ":")).encode()


def is_form_path(path: str) -> bool:
    """Whether the API takes calls as forms there: audio to write down, images to change."""
    return path.endswith(_FORM_PATHS)


def read_form(path: str, content: bytes) -> Outgoing:
    """Read a form that is a call; see `is_form_path`."""
    operation = next(name for suffix, name in _FORMS.items() if path.endswith(suffix))
    found = _FORM_MODEL.search(content)
    draws = operation == "image_generation"
    return Outgoing(
        Call(
            "openai",
            operation,
            found[1].decode("utf-8", "replace") if found else "",
            _OVERHEAD + (_IMAGE_TOKENS + len(content) // 8 if draws else len(content) // _AUDIO_BYTES_PER_TOKEN),
            _IMAGE_TOKENS if draws else None,
            has_audio=not draws,
            has_images=draws,
        )
    )
