"""Who may be asked to tell a stream's usage: not every server that speaks OpenAI's format knows `stream_options`."""

from __future__ import annotations

import logging
import re
from typing import Any

from respan_guard.providers import Call

__all__ = ["OPTION", "REFUSALS", "Asking"]

logger = logging.getLogger("respan_guard")

REFUSALS = (400, 422)
OPTION = b"stream_options"
"""An error of such a status that names this is taken to be about it: the request is sent again without."""
_AZURE_SINCE = "2024-09-01"  # the first version, a preview, whose specification has `stream_options`
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_MOST = 1_000


class Asking:
    """What is known of the servers of one client.

    Args:
        wanted: Whether to ask at all.
    """

    def __init__(self, *, wanted: bool) -> None:
        self.wanted = wanted
        self._refusing: set[tuple[str, str, str]] = set()

    def may(self, url: Any, call: Call) -> bool:
        """Whether the server may be asked: by the version of Azure's API, and by what it answered before."""
        if self._refusing and _place(url, call) in self._refusing:
            return False
        version = _DATE.match(url.params.get("api-version", "")) if call.provider == "azure" else None
        if version is None or version[0] >= _AZURE_SINCE:
            return True
        self._refused(url, call, f"Azure's API version {url.params['api-version']} does not tell what a stream used")
        return False

    def refused(self, url: Any, call: Call) -> None:
        """The server refused to be asked, and took the same request without the option."""
        self._refused(url, call, f"{url.host} refuses stream_options")

    def _refused(self, url: Any, call: Call, why: str) -> None:
        if not self._refusing:
            logger.warning("%s; streams of model %r are presumed to cost what they hold", why, call.model[:100])
        if len(self._refusing) < _MOST:
            self._refusing.add(_place(url, call))


def _place(url: Any, call: Call) -> tuple[str, str, str]:
    return url.host, url.path, call.model
