"""The command `respan-guard`. Exit codes: 0 all right, 1 it found something wrong, 2 it was asked wrongly.

Ctrl-C is 130, as shells have it.
"""

from __future__ import annotations

import io
import os
import sys

__all__ = ["main"]

_EXTRA = {"rich", "typer"}
_INTERRUPTED = 130


def main() -> None:
    """Run the command line; without the extra, say how to get it."""
    try:
        try:
            _run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # while a full disk can still be told
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except OSError as error:  # the machine says no: a closed directory, a full disk
        _forget_output()
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"respan-guard: {where}{error.strerror or error}\n")
        sys.exit(1)


def _run() -> None:
    try:
        from respan_guard.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write("respan-guard's command line is an extra: pip install 'respan-guard[cli]'\n")
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in a language that the terminal's encoding has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="respan-guard")


def _forget_output() -> None:
    """Have the interpreter's end not fail once more at what could not be written."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # it is closed, or none
        return
