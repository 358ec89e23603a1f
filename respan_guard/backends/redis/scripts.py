"""The Lua scripts: what runs on the server, each in one go."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

__all__ = ["AGAIN", "Script", "script"]

AGAIN = frozenset(
    ("ask", "booked", "check", "count", "customers", "days", "entries", "entry", "facts", "holds", "refusals",
     "refused", "rows", "sums")
)  # fmt: skip
"""Scripts that may run twice for one call: nobody could tell. ("ask" only ever writes how far a reader has read.)"""
_FIRST = {  # parts that stand before a script's own
    "apply": ("prelude", "batch", "used", "admit", "record"),
    "ask": ("prelude",),
    "audit": ("prelude", "note"),
    "booked": ("prelude",),
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


_CONSTANTS = re.compile(r"^local ([A-Z_, \n]+) =\s([0-9, \n]+)$", re.MULTILINE)
_DEFINED = re.compile(r"^local [0-9, \n]+ =\s[0-9, \n]+$", re.MULTILINE)


class Script:
    """A script's source, and the digest that a server knows it by once it was loaded."""

    __slots__ = ("sha", "source")

    def __init__(self, name: str) -> None:
        directory = files(__package__) / "lua"
        parts = [(directory / f"{part}.lua").read_text(encoding="utf-8") for part in (*_FIRST[name], name)]
        self.source = _folded("".join(parts))
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


def _folded(source: str) -> str:
    """The source with the values of its constants, which are `local NAME, ... = NUMBER, ...`, in their places.

    Lua has no constants: each would be a variable that every function which names it has to find, at every call.
    """
    for names, values in _CONSTANTS.findall(source):
        for name, value in zip(names.split(","), values.split(","), strict=True):
            source = re.sub(rf"\b{name.strip()}\b", value.strip(), source)
    return _DEFINED.sub("", source)


_SCRIPTS = {name: Script(name) for name in _FIRST}


def script(name: str) -> Script:
    """A script by the name of its file."""
    return _SCRIPTS[name]
