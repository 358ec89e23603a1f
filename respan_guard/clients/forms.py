"""Calls that are sent as forms: audio to write down, images to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from email.message import Message
from email.parser import BytesHeaderParser

from respan_guard.providers import Call, decode_json, deployment, limit

__all__ = ["form_call", "is_form_path"]

_FORMS = {
    "/audio/transcriptions": "transcription",
    "/audio/translations": "transcription",
    "/images/edits": "image_generation",
    "/images/variations": "image_generation",
}
_PATHS = tuple(_FORMS)
_IMAGE_TOKENS = 16_384  # of one drawn image
_AUDIO_BYTES_PER_TOKEN = 24  # of the lowest bitrate of MP3, at ten tokens a second
_OVERHEAD = 64
_READ = ("model", "n")
_HEADER = 4_096
_VALUE = 256


def is_form_path(path: str) -> bool:
    """Whether the API takes calls as forms there."""
    return path.rstrip("/").lower().endswith(_PATHS)


def form_call(path: str, content_type: str, content: bytes) -> tuple[Call, bool]:
    """The call that a request to such a path is, and whether its body could be read; else it names no model."""
    lower, named = path.rstrip("/").lower(), deployment(path)
    operation = next(name for suffix, name in _FORMS.items() if lower.endswith(suffix))
    fields = _fields(content_type, content)
    models = fields.get("model", set())
    draws = operation == "image_generation"
    call = Call(
        "openai" if named is None else "azure",
        operation,
        (named or next(iter(models), "")) if fields and len(models) < 2 else "",
        _OVERHEAD + (_IMAGE_TOKENS + len(content) // 8 if draws else len(content) // _AUDIO_BYTES_PER_TOKEN),
        _IMAGE_TOKENS if draws else None,
        choices=max((limit(n) or 1 for n in fields.get("n", ())), default=1) if draws else 1,
        has_audio=not draws,
        has_images=draws,
    )
    return call, bool(fields)


def _fields(content_type: str, content: bytes) -> dict[str, set[str]]:
    """What a form, or the JSON that some of these paths take as well, says about the names that matter."""
    found: dict[str, set[str]] = {}
    kind = Message()
    kind["content-type"] = content_type
    boundary = kind.get_boundary() if kind.get_content_maintype() == "multipart" else None
    if boundary is not None:
        for name, value in _short_parts(content, boundary.encode("latin-1", "replace")):
            found.setdefault(name, set()).add(value)
    elif isinstance(body := decode_json(content), Mapping):
        found = {name: {str(value)} for name, value in body.items() if isinstance(value, (str, int))}
    return found


def _short_parts(content: bytes, boundary: bytes) -> Iterator[tuple[str, str]]:
    """Names of a form's parts; of those that matter the values, and of no others, which may be large files.

    A part's name is what its own header says: what is in the parts, an end user may have written.
    """
    mark = b"\r\n--" + boundary
    at = len(mark) - 2 if content.startswith(mark[2:]) else content.find(mark) + len(mark)
    while (end := content.find(mark, at)) >= 0:
        begin = content.find(b"\r\n\r\n", at, end)
        if at <= begin <= at + _HEADER:
            header = BytesHeaderParser().parsebytes(content[at + 2 : begin + 4])
            name = header.get_param("name", header="content-disposition")
            if isinstance(name, str):
                value = content[begin + 4 : min(end, begin + 4 + _VALUE)] if name in _READ else b""
                yield name, value.decode("utf-8", "replace").strip()
        at = end + len(mark)
