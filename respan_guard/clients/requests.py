"""What a request on its way to a provider asks for."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from respan_guard.providers import (
    Call,
    call_from_request,
    call_of_path,
    decode_json,
    form_call,
    is_form_path,
    warn_of,
    warn_unread,
)

__all__ = ["Outgoing", "read"]

logger = logging.getLogger("respan_guard")

# Chat completions and legacy completions tell what a stream cost only if they are asked to.
_USAGE_ON_DEMAND = ("/chat/completions", "/completions")


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


def read(path: str, content_type: str, content: bytes | None, *, include_usage: bool) -> Outgoing | None:
    """Read a request; None if it is no LLM call.

    A call whose body can't be read is one of no known model, so no budget lets it pass.

    Args:
        path: The URL's path.
        content_type: Of the body.
        content: The body; None if it is not there yet, and the path alone makes no call.
        include_usage: Whether to ask for the usage of streams that would not tell it.
    """
    call: Call | None
    if content is not None and is_form_path(path):
        call, unclear = form_call(path, content_type, content)
        if unclear is not None:
            warn_unread(path)
        return Outgoing(call)
    body = None if content is None else decode_json(content)
    if content is None or not isinstance(body, dict):
        call = None if content is None else call_of_path(path)
        if content is None or call is None:
            warn_of(path)
            return None
        warn_unread(path)
        return Outgoing(replace(call, model="", input_tokens_bound=len(content)))
    try:
        call = call_from_request(path, body)
    except Exception:  # a fault of ours must not let a call pass that nobody counts
        logger.exception("a request could not be read as an LLM call; its size alone is held")
        model = body.get("model")
        call = Call("openai", "chat", model if isinstance(model, str) else "", len(content))
    if call is None:
        warn_of(path)
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
