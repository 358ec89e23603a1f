"""The command `respan-guard`. Exit codes: 0 all right, 1 it found something wrong, 2 it was asked wrongly."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA = {"rich", "typer"}


def main() -> None:
    """Run the command line; without the extra, say how to get it."""
    try:
        from respan_guard.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write("respan-guard's command line is an extra: pip install 'respan-guard[cli]'\n")
        sys.exit(2)
    app(prog_name="respan-guard")
