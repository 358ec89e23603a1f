"""Finding the apps further in that set a root path by themselves (`FastAPI(root_path=...)`)."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable
from types import FunctionType, MethodType
from typing import Any

from starlette.routing import BaseRoute

from respan_guard.guard import Guard

__all__ = ["inner_roots"]

logger = logging.getLogger("respan_guard")
_MOST = 2_000
"""Objects that are looked at: more than any chain of apps, less than anybody would wait for."""


def inner_roots(*apps: Any) -> list[str]:
    """Prefixes that apps within these (wrapped, mounted, behind a function) take off a path by themselves."""
    roots: dict[str, None] = {}
    waiting: list[Any] = list(apps)
    seen: set[int] = set()
    while waiting and len(seen) < _MOST:
        app = waiting.pop(0)
        try:
            if id(app) in seen or isinstance(app, (Guard, type)):
                continue
            seen.add(id(app))
            root = _attributes(app).get("root_path")
            if isinstance(root, str) and root:
                roots[root] = None
            waiting.extend(_within(app))
        except Exception:
            logger.debug("an object that an app may stand behind could not be looked into", exc_info=True)
    return list(roots)


def _within(app: Any) -> Iterable[Any]:
    """What an app may hand a request to. Nothing is called, and no attribute of a proxy is asked for."""
    if isinstance(app, functools.partial):
        return [app.func, *filter(callable, app.args), *filter(callable, app.keywords.values())]
    if isinstance(app, MethodType):
        return [app.__self__]
    if isinstance(app, FunctionType):
        names = inspect.getclosurevars(app)
        found = [*names.nonlocals.values(), *names.globals.values()]
        return [one for one in found if callable(one) and not isinstance(one, type)]
    within: list[Any] = []
    for name, value in _attributes(app).items():
        if isinstance(value, (list, tuple)):
            within.extend(one for one in value if isinstance(one, BaseRoute))
        elif name != "endpoint" and callable(value) and not (isinstance(app, BaseRoute) and _is_function(value)):
            within.append(value)
    return within


def _is_function(value: Any) -> bool:
    """Whether it is a route's endpoint, as routes wrap it: the app's own code, not an app."""
    return isinstance(value, (FunctionType, MethodType, functools.partial))


def _attributes(app: Any) -> dict[str, Any]:
    try:
        found = vars(app)
    except TypeError:
        found = {name: getattr(app, name, None) for name in getattr(type(app), "__slots__", ()) if name == "app"}
    return dict(found)
