"""Which requests are guarded: patterns on the path that the app's router will match, never on Host or URL."""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping
from typing import Any

from respan_guard.errors import ConfigurationError
from respan_guard.providers.urls import is_odd, plain_path

__all__ = ["GuardedPaths", "route_path"]

_MAX_KNOWN = 1024
_LONGEST_KNOWN = 512


class GuardedPaths:
    """Include and exclude patterns.

    A pattern is an exact path ("/v1/chat/completions", with or without a slash at the end) or ends with `*`: "/v1/*" is
    "/v1" and everything below, "/v1/images*" everything that starts so. Patterns are compared, as routes are, with
    the decoded path relative to `root_path`: to what the app is mounted at, or what the server was told.

    A path that some routers and proxies would rewrite (`//`, `/./`, `%2f` that is still encoded, a backslash, a newline
    at the end, letters in another case) counts as guarded if either form is: what reaches a guarded endpoint was
    guarded. What is excluded is so to the letter.

    Args:
        include: Patterns of what is guarded; None for everything.
        exclude: Patterns of what is not, although included.
        roots: Prefixes that an app further in takes off the path by itself (`FastAPI(root_path=...)`).

    Raises:
        ConfigurationError: A pattern can't match anything.
    """

    __slots__ = ("_exclude", "_include", "_known", "_roots", "patterns")

    def __init__(self, include: Iterable[str] | None, exclude: Iterable[str] = (), roots: Iterable[str] = ()) -> None:
        self._include = _Patterns("include", ["/*"] if include is None else include)
        self._exclude = _Patterns("exclude", exclude)
        self._roots = tuple(dict.fromkeys(roots))
        self._known: dict[tuple[str, str], bool] = {}
        self.patterns = [*self._include.texts, *(f"not {text}" for text in self._exclude.texts)]

    def learn(self, roots: Iterable[str]) -> None:
        """Take in more prefixes that an app further in takes off."""
        more = [root for root in roots if root not in self._roots]
        if more:
            self._roots = (*self._roots, *more)
            self._known.clear()

    def guards(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether the request of an "http" or "websocket" scope is guarded."""
        key = scope["path"], scope.get("root_path") or ""
        guarded = self._known.get(key)
        if guarded is None:
            guarded = self._guards(*key)
            if len(key[0]) <= _LONGEST_KNOWN:  # clients choose them, of any length
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[key] = guarded
        return guarded

    def _guards(self, whole: str, root: str) -> bool:
        path = route_path(whole, root)
        if not self._roots and not is_odd(path):
            return self._include.match_any_case(path) and not self._exclude.match(path)
        forms = {path, *(route_path(whole, inner) for inner in self._roots)}
        forms |= {plain_path(form) for form in forms}
        return any(map(self._include.match_any_case, forms)) and not all(map(self._exclude.match, forms))


def route_path(path: str, root_path: str) -> str:
    """The path below `root_path`, as Starlette's router finds it. A path that is not below it stays whole."""
    if not root_path or not path.startswith(root_path):
        return path
    rest = path[len(root_path) :]
    return rest if not rest or rest[0] == "/" else path


class _Patterns:
    __slots__ = ("_exact", "_exact_folded", "_prefixes", "_prefixes_folded", "texts")

    def __init__(self, name: str, patterns: Iterable[str]) -> None:
        if isinstance(patterns, str):
            raise ConfigurationError(f'{name} must be a list of patterns like ["/v1/*"], got the string {patterns!r}')
        given: list[Any] = list(patterns)
        self.texts = given
        exact: set[str] = set()
        prefixes: list[str] = []
        for text in given:
            if not isinstance(text, str) or not text.startswith("/") or "*" in text[:-1] or re.search(r"[?#\s]", text):
                raise ConfigurationError(
                    f'{name} must have patterns like "/v1/chat/completions" or "/v1/*" '
                    f"(a path from the first slash on, * only at the end), got {text!r}"
                )
            if text.endswith("*"):
                prefixes.append(text[:-1])
                if text.endswith("/*"):
                    exact.add(text[:-2])
            else:
                bare = text.rstrip("/")
                exact |= {bare, bare + "/"}
        self._exact = frozenset(exact)
        self._prefixes = tuple(prefixes)
        self._exact_folded = frozenset(map(str.casefold, exact))
        self._prefixes_folded = tuple(map(str.casefold, prefixes))

    def match(self, path: str) -> bool:
        return path in self._exact or path.startswith(self._prefixes)

    def match_any_case(self, path: str) -> bool:
        """Whether it matches for a host that makes no difference between `/openai` and `/OpenAI`."""
        path = path.casefold()
        return path in self._exact_folded or path.startswith(self._prefixes_folded)
