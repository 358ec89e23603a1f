"""Which store this machine used last under an URL, so that one that was wiped between two runs is noticed.

A process that never saw a store takes an empty one for a new one. What tells them apart is a number that each store is
given when it is made; it is noted beside the journal, which outlives a process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

__all__ = ["is_another"]

logger = logging.getLogger("respan_guard")


def is_another(place: Path, identity: str) -> bool:
    """Whether another store was used here before; from now on it is this one.

    Args:
        place: The file that it is noted in; its directory is there.
        identity: What tells the store from others.
    """
    try:
        before = place.read_text("ascii")
    except FileNotFoundError:
        before = ""
    except (OSError, ValueError) as error:
        logger.debug("%s can't be read: %s", place, error)
        return False
    if before != identity:
        with contextlib.suppress(OSError, ValueError):  # where nothing can be noted, nothing is noticed
            new = place.with_name(f"{place.name}.{os.getpid()}.new")
            new.write_text(identity, "ascii")
            new.replace(place)
    return before not in ("", identity)
