"""Templates and static files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from respan_guard.console import formats
from respan_guard.console.access import Access, User
from respan_guard.console.ranges import RANGES

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Pages"]

_HERE = Path(__file__).parent
_DONE = {
    "created": "The customer was created.",
    "saved": "Saved. It holds from the next request on.",
    "unchanged": "Nothing was changed.",
    "blocked": "Blocked. Every request is refused from now on.",
    "unblocked": "Unblocked.",
    "deleted": "The customer was deleted; its sums stay under a random label.",
}


class _Static(StaticFiles):
    """Files whose address says which version they are may be kept for ever."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Answer with a file."""
        response = super().file_response(*args, **kwargs)
        scope: Scope = args[2] if len(args) > 2 else kwargs["scope"]
        kept = b"v=" in scope.get("query_string", b"")
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if kept else "no-cache"
        return response


class Pages:
    """Renders pages."""

    def __init__(self, guard: Guard, access: Access) -> None:
        self._guard = guard
        self.static = _Static(directory=_HERE / "static")
        version = hashlib.sha256()
        for path in sorted((_HERE / "static").rglob("*")):
            if path.is_file():
                version.update(path.read_bytes())
        self._version = version.hexdigest()[:12]
        zone = ZoneInfo(guard.settings.time_zone)
        self._templates = templates = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates.filters.update(
            usd=formats.usd,
            exact_usd=formats.exact_usd,
            count=formats.count,
            compact=formats.compact,
            moment=lambda when: formats.moment(when, zone),
            minutes=lambda when: formats.minutes(when, zone),
            ago=lambda ms: formats.ago(ms, guard.now_ms()),
            left=lambda when: int(when.timestamp() * 1000) - guard.now_ms(),
            day=formats.date_text,
            pretty=lambda value: json.dumps(value, ensure_ascii=False, indent=2),
            q=lambda text: quote(str(text), safe=""),
        )
        templates.globals.update(
            static=lambda name: f"static/{name}?v={self._version}",
            zone=guard.settings.time_zone,
            mode=guard.settings.mode,
            ranges=RANGES,
            by_password=access.by_password,
        )

    def render(
        self,
        request: Request,
        user: User | None,
        template: str,
        status: int = 200,
        *,
        headers: dict[str, str] | None = None,
        **context: Any,
    ) -> Response:
        """A page."""
        given = {
            "user": user,
            "write": False,
            "token": "",
            "here": request.url.path.rsplit("/", 1)[-1],
            "done": _DONE.get(request.query_params.get("done", ""), ""),
            "error": "",
            "wrong": "",
            "refresh": 0,
            **context,
        }
        page = self._templates.get_template(template).render(given)
        # What somebody wrote by hand may hold halves of surrogate pairs in a store that takes them.
        return HTMLResponse(page.encode("utf-8", "replace"), status, headers)
