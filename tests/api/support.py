"""A client for the API that holds every answer to the OpenAPI document."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import httpx2
import jsonschema_rs
from starlette.applications import Starlette
from starlette.routing import Mount

from respan_guard import Guard
from respan_guard.api import RespanAPI
from respan_guard.api.app import OPERATIONS
from respan_guard.api.openapi import document

KEY, READ_KEY = "sk-full-of-power", "sk-looks-only"
MOUNT = "/respan"
DOCUMENT = document(OPERATIONS, MOUNT)


def _validators() -> dict[tuple[str, str, int], Any]:
    """By operation and status, what its body must be."""
    found: dict[tuple[str, str, int], Any] = {}
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                schema = answer.get("content", {}).get("application/json", {}).get("schema")
                validator = None
                if schema is not None:
                    validator = jsonschema_rs.Draft202012Validator(
                        {**schema, "components": DOCUMENT["components"]}, validate_formats=True
                    )
                found[path, method, int(status)] = validator
    return found


VALIDATORS = _validators()
_PATTERNS = [
    (re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(path.rstrip("/"))) + r"/?"), path)
    for path in sorted(DOCUMENT["paths"], key=lambda path: ("{" in path, -len(path)))
]


def mounted(guard: Guard, **options: Any) -> Starlette:
    """An app with the API in it."""
    options = {"api_key": KEY, "read_only_key": READ_KEY} | options
    return Starlette(routes=[Mount(MOUNT, RespanAPI(guard, **options))])


class Client:
    """Sends JSON and reads it, numbers as `Decimal`; `last` is the last response."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self.http = http
        self.last: httpx2.Response

    async def __call__(
        self, method: str, path: str, body: Any = None, status: int = 200, *, key: str = KEY, **query: Any
    ) -> Any:
        """Call, check the status and the shape of the answer, and give its body."""
        headers = {"authorization": f"Bearer {key}"}
        content = None
        if body is not None:
            headers["content-type"] = "application/json"
            content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        self.last = answer = await self.http.request(
            method, path, content=content, headers=headers, params=query or None
        )
        assert answer.status_code == status, answer.text
        check(method, answer)
        return json.loads(answer.content, parse_float=Decimal) if answer.content else None

    async def log(self, body: Any = None, status: int = 201, **fields: Any) -> Any:
        """Log one call."""
        return await self("POST", "/api/request-logs/", {"model": "gpt-4o-mini", **(body or {}), **fields}, status)

    async def logs(self, filters: Any = None, status: int = 200, **query: Any) -> Any:
        """List calls."""
        return await self("POST", "/api/request-logs/list/", {"filters": filters or {}}, status, **query)

    async def users(self, filters: Any = None, status: int = 200, **query: Any) -> Any:
        """List users."""
        return await self("POST", "/api/users/list/", {"filters": filters or {}}, status, **query)

    async def follow(self, page: Any) -> list[Any]:
        """The rows of a page and of all that follow by `next`."""
        rows = list(page["results"])
        while page["next"] is not None:
            method = self.last.request.method
            page = await self(method, page["next"], json.loads(self.last.request.content or b"null"))
            rows += page["results"]
        return rows


def check(method: str, answer: httpx2.Response) -> None:
    """Hold an answer to the document."""
    path = answer.request.url.path.removeprefix(MOUNT)
    for pattern, template in _PATTERNS:
        if pattern.fullmatch(path) and (template, method.lower(), answer.status_code) in VALIDATORS:
            validator = VALIDATORS[template, method.lower(), answer.status_code]
            if validator is None:
                assert answer.content == b""
            else:
                validator.validate(answer.json())
            return
    assert answer.status_code in (401, 404, 405), f"{method} {path} {answer.status_code} is not in the document"


def escaped(identifier: str) -> str:
    """An id as a careful client writes it into a path."""
    return quote(identifier, safe="")
