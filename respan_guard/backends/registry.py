"""From a storage URL to the backend it names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from respan_guard.backends.base import Backend
from respan_guard.errors import ConfigurationError
from respan_guard.urls import SCHEME, mask_url

__all__ = ["backend_factory"]

_GROUP = "respan_guard.backends"
_BUILT_IN = {
    "memory": "respan_guard.backends.memory:MemoryBackend",
    "sqlite": "respan_guard.backends.sqlite:SQLiteBackend",
}


def backend_factory(url: str, *, namespace: str = "default", **options: Any) -> Callable[[], Backend]:
    """What makes the backends of a storage URL: one for each event loop, or always the same if it is shared.

    Other packages add schemes by entry points of the group `respan_guard.backends`, named by the scheme.

    Raises:
        ConfigurationError: The URL has no or an unknown scheme, or can't work.
    """
    scheme = url.partition("://")[0]
    if not SCHEME.match(url):
        raise ConfigurationError(f"storage must be a URL like sqlite:///guard.db, got {mask_url(url)}")
    cls = _backend_class(scheme)
    first = cls(url, namespace=namespace, **options)
    if first.shared:
        return lambda: first
    return lambda: cls(url, namespace=namespace, **options)


def _backend_class(scheme: str) -> Callable[..., Backend]:
    found: Callable[..., Backend]
    if scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[scheme].partition(":")
        found = getattr(importlib.import_module(module), name)
        return found
    points = {point.name: point for point in entry_points(group=_GROUP)}
    if scheme not in points:
        known = ", ".join(sorted({f"{name}://" for name in (*points, *_BUILT_IN)}))
        raise ConfigurationError(f"unknown storage scheme {scheme}://; known: {known}")
    try:
        found = points[scheme].load()
    except ImportError as error:
        dist = points[scheme].dist
        extras = ",".join(points[scheme].extras)
        wanted = (dist.name if dist is not None else "respan-guard") + (f"[{extras}]" if extras else "")
        raise ConfigurationError(
            f"storage {scheme}:// needs a package that is missing ({error}); pip install '{wanted}'"
        ) from error
    return found
