"""Letting go of what is large in a reply's JSON and tells no usage: images and audio as base64."""

from __future__ import annotations

__all__ = ["without_media"]

_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_"
_KEPT = 64  # bytes of each string that stay: enough for "data:image/png;base64,"
_STEP = 2_048


def without_media(data: bytes | bytearray) -> bytes:
    """JSON, or a part of it that is cut anywhere, without the inside of its long strings of base64.

    Base64 holds neither quotes nor backslashes, and nothing between JSON's strings looks like so much of it, so what is
    left has the same structure. A look at every 2,048th byte finds all strings of twice that length.
    """
    kept: list[bytes | bytearray] = []
    done = at = 0
    while at + _STEP <= len(data):
        if not _is_base64(data[at : at + _KEPT]) or not _is_base64(data[at : at + _STEP]):
            at += _STEP
            continue
        start = max(done, data.rfind(b'"', done, at) + 1) + _KEPT
        end = data.find(b'"', at)
        end = len(data) if end < 0 else end
        # A backslash at the end of what stays would be half an escape.
        if b"\\" not in data[start - _KEPT : start] and start < end and _is_base64(data[start:end]):
            kept.append(data[done:start])
            done = end
        at = max(end, at + 1)
    kept.append(data[done:])
    return b"".join(kept)


def _is_base64(data: bytes | bytearray) -> bool:
    return not data.translate(None, _BASE64)
