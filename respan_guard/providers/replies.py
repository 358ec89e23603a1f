"""Replies of all formats, told apart by what they call themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from respan_guard.providers import anthropic, gemini, openai
from respan_guard.usage import Usage

__all__ = ["read_reply"]


def read_reply(body: Mapping[str, Any]) -> Usage | None:
    """Read the usage off a reply's JSON, never raising.

    Only the shapes of known APIs count (by `object`, `type` or `usageMetadata`), so that an app that
    echoes what a user sent doesn't let the user write the bill.

    Returns:
        The usage; None for any other JSON, and for usage that is missing or malformed.
    """
    if body.get("type") == "message":
        return anthropic.reply_usage(body)
    if "usageMetadata" in body or "usage_metadata" in body:
        return gemini.reply_usage(body)
    return openai.reply_usage(body)
