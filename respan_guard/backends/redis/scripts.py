"""The Lua scripts: what runs on the server, each in one go."""

from __future__ import annotations

import hashlib
from importlib.resources import files

__all__ = ["READS", "Script", "script"]

READS = frozenset(
    ("check", "count", "customers", "days", "entries", "entry", "facts", "holds", "refusals", "refused", "rows", "sums")
)
"""Scripts that may run twice for one call: they change nothing that anyone could tell."""

_FIRST = {  # parts that stand before a script's own
    "apply": ("prelude",),
    "ask": ("prelude",),
    "audit": ("prelude", "note"),
    "check": ("prelude",),
    "create": (),
    "count": ("prelude",),
    "customers": ("prelude", "row"),
    "days": ("prelude",),
    "delete": ("prelude", "note"),
    "entries": ("prelude", "shown"),
    "entry": ("prelude", "shown"),
    "fact": ("prelude",),
    "facts": ("prelude",),
    "fold": ("prelude",),
    "forget": ("prelude",),
    "holds": ("prelude",),
    "mark": ("prelude",),
    "put": ("prelude", "note"),
    "refusals": ("prelude",),
    "refused": ("prelude",),
    "refuse": ("prelude",),
    "rows": ("prelude", "row"),
    "sums": ("prelude",),
}


class Script:
    """A script's source, and the digest that a server knows it by once it was loaded."""

    __slots__ = ("sha", "source")

    def __init__(self, name: str) -> None:
        directory = files(__package__) / "lua"
        parts = [(directory / f"{part}.lua").read_text(encoding="utf-8") for part in (*_FIRST[name], name)]
        self.source = "".join(parts)
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


_SCRIPTS = {name: Script(name) for name in _FIRST}


def script(name: str) -> Script:
    """A script by the name of its file."""
    return _SCRIPTS[name]
