"""Calls that are sent as forms: audio to write down, images to change.

A form is read by whoever serves it, too, and readers differ in what they overlook. So what a client of this world
sends is read, and all else, whatever some reader makes of it, is a form that can't be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from respan_guard.errors import BodyTooLarge, InvalidInput
from respan_guard.providers.base import Call, decode_json, fallbacks, limit, text
from respan_guard.providers.openai import deployment
from respan_guard.providers.urls import as_read

__all__ = ["call_of_fields", "form_call", "is_form_path"]

_FORMS = {
    "/audio/transcriptions": "transcription",
    "/audio/translations": "transcription",
    "/images/edits": "image_generation",
    "/images/variations": "image_generation",
}
_PATHS = tuple(_FORMS)
_IMAGE_TOKENS = 16_384  # of one image, drawn or looked at
_AUDIO_BYTES_PER_TOKEN = 24  # of the lowest bitrate of MP3, at ten tokens a second
_OVERHEAD = 64
_READ = ("model", "n")
_PICTURES = ("image", "mask")  # how the names of fields with images begin
_MOST_PARTS = 1_000
_HEADERS = 16  # of a part
_HEADER = 4_096  # bytes of them
_VALUE = 256

_QUOTED = r'"(?:[^"\\]|\\\\|\\[^"\\])*"'  # ends at the same place for readers with and without escapes
_PARAMS = rf'(?:[ \t]*;[ \t]*[\w*-]+=(?:{_QUOTED}|[^\s";\\]+))*+[ \t]*;?[ \t]*'
_KIND = re.compile(rf"multipart/form-data({_PARAMS})", re.IGNORECASE)
_DISPOSITION = re.compile(rf"form-data({_PARAMS})", re.IGNORECASE)
_PARAM = re.compile(rf'([\w*-]+)=({_QUOTED}|[^\s";\\]+)')
_HEADER_NAME = re.compile(r"[\w-]+")
_BOUNDARY = re.compile(r"[\w'()+,./:=?-]{1,70}", re.ASCII)
_AS_IT_IS = ("7bit", "8bit", "binary")


def is_form_path(path: str) -> bool:
    """Whether the API takes calls as forms there."""
    return as_read(path).lower().endswith(_PATHS)


def form_call(path: str, content_type: str, content: bytes) -> tuple[Call, InvalidInput | None]:
    """The call that a request to such a path is, and why its body can't be read, if so; it then names no model.

    Some of these paths take JSON as well.
    """
    try:
        if content_type.lstrip().lower().startswith("multipart/"):
            fields: Mapping[str, Any] = _fields(content_type, content)
        elif not isinstance(fields := decode_json(content), Mapping):
            raise _unclear("it is neither multipart/form-data nor a JSON object")
    except InvalidInput as error:
        call = call_of_fields(path, {}, len(content))
        call.model = ""  # also where the path has a deployment: how many images are asked for is not known
        return call, error
    return call_of_fields(path, fields, len(content)), None


def call_of_fields(path: str, fields: Mapping[str, Any], size: int) -> Call:
    """The call that the fields of a form, or a JSON object, ask for.

    Args:
        path: The URL's path.
        fields: What was found.
        size: Bytes of the body.
    """
    path = as_read(path)
    lower, named = path.lower(), deployment(path)
    draws = next(operation for suffix, operation in _FORMS.items() if lower.endswith(suffix)) == "image_generation"
    return Call(
        provider="openai" if named is None else "azure",
        operation="image_generation" if draws else "transcription",
        model=named or text(fields.get("model"), _VALUE) or "",
        input_tokens_bound=_OVERHEAD
        + (_IMAGE_TOKENS * _pictures(fields) + size // 8 if draws else size // _AUDIO_BYTES_PER_TOKEN),
        max_output_tokens=_IMAGE_TOKENS if draws else None,
        choices=(limit(fields.get("n")) or 1) if draws else 1,
        has_audio=not draws,
        has_images=draws,
        fallbacks=fallbacks(fields) if named is None else (),
    )


def _pictures(fields: Mapping[str, Any]) -> int:
    """How many images are sent or named, at least one."""
    given = [value for name, value in fields.items() if name.startswith(_PICTURES)]
    return max(1, sum(len(value) if isinstance(value, list) else value is not None for value in given))


def _fields(content_type: str, content: bytes) -> dict[str, Any]:
    """What a form says about the names that matter, and how many images it has. Files are not copied.

    A part's name is what its own header says: what is in the parts, an end user may have written.

    Raises:
        InvalidInput: It says one of them twice, or readers may differ about what it says.
    """
    mark = b"--" + _boundary(content_type)
    found: dict[str, Any] = {}
    images: list[None] = []
    at = content.find(mark)
    if at < 0 or content[max(0, at - 2) : at] not in (b"", b"\r\n"):
        raise _unclear("it does not begin with its boundary")
    for parts in range(_MOST_PARTS + 1):
        begin = at + len(mark)
        after, at = content[begin : begin + 2], content.find(mark, begin)
        if after == b"--" and at < 0 < parts:
            if images:
                found["images"] = images
            return found
        # All that looks like a boundary has to be one, alone on its line.
        if after != b"\r\n" or at < 0 or content[at - 2 : at] != b"\r\n":
            raise _unclear("its parts are not divided by its boundary")
        value = content.find(b"\r\n\r\n", begin + 2, min(at, begin + _HEADER)) + 4
        if not begin + 6 < value <= at - 2:
            raise _unclear("a part has no headers, or too long ones")
        name = _name(content[begin + 2 : value - 4].decode("utf-8", "replace"))
        if name.startswith(_PICTURES):
            images.append(None)
        elif name in _READ:
            if name in found:
                raise InvalidInput(f"the body names {name} twice; say it once", field=name)
            # What is longer than a value may be names nothing.
            found[name] = content[value : at - 2].decode("utf-8", "replace").strip() if at - 2 - value <= _VALUE else ""
            if name == "n" and limit(found[name]) is None:
                raise InvalidInput("n must be a whole number", field=name)
    raise BodyTooLarge(f"the request's form must have at most {_MOST_PARTS:,} parts", field="body")


def _boundary(content_type: str) -> bytes:
    kind = _KIND.fullmatch(content_type.strip())
    params = _params(kind[1]) if kind else {}
    if not _BOUNDARY.fullmatch(params.get("boundary", "")):
        raise _unclear("its content-type must be multipart/form-data with one boundary")
    return params["boundary"].encode("ascii")


def _name(head: str) -> str:
    """The name of a part with these headers."""
    headers: dict[str, str] = {}
    for line in head.split("\r\n", _HEADERS):
        header, colon, value = line.partition(":")
        header = header.lower()
        if not colon or not _HEADER_NAME.fullmatch(header) or header in headers or re.search(r"[\r\n\0]", line):
            raise _unclear("a part's headers are malformed")
        headers[header] = value.strip()
    found = _DISPOSITION.fullmatch(headers.get("content-disposition", ""))
    name = _params(found[1]).get("name", "") if found else ""
    if not name or "%" in name or "\\" in name:
        raise _unclear("a part's content-disposition must be form-data with one plain name")
    if headers.get("content-transfer-encoding", "binary").lower() not in _AS_IT_IS:
        raise _unclear("a part is encoded")
    return name


def _params(given: str) -> dict[str, str]:
    """The parameters of a header's value; none if one comes twice, or in pieces or another encoding."""
    pairs = [(name.lower(), value.strip('"')) for name, value in _PARAM.findall(given)]
    found = dict(pairs)
    odd = any("*" in name and name != "filename*" for name in found)
    return {} if odd or len(found) != len(pairs) else found


def _unclear(why: str) -> InvalidInput:
    return InvalidInput(f"the request's form can't be read: {why}", field="body")
