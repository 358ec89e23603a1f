"""Where `export` writes to: standard output, a file that is whole or as it was, or whatever else a path names."""

from __future__ import annotations

import io
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TextIO

from respan_guard.cli.output import FAILED, MISUSED, fail

__all__ = ["begin_writing", "is_special", "refuse_store"]

_LINKS: Final = 40


def refuse_store(output: Path, store: Path | None) -> None:
    """End the command if the output is the store, or one of the files beside it that belong to it."""
    if store is None:
        return
    with _telling(output):
        same = output.exists() and store.exists() and output.samefile(store)
        wanted, kept = output.resolve(), store.resolve()
    if same or (wanted.parent == kept.parent and (wanted.name == kept.name or wanted.name.startswith(f"{kept.name}-"))):
        fail(f"--output {output} belongs to the store itself; choose another file", MISUSED)


@contextmanager
def begin_writing(output: Path | None, *, growing: bool) -> Iterator[Callable[[], TextIO]]:
    """Give what opens the output, once there is something to write, and close it at the end.

    A file is replaced when the block ends well, and until then as it was. What is no file, and one that somebody reads
    while it grows, is written straight into.
    """
    opened: list[TextIO] = []
    beside: list[Path] = []
    straight = False
    if output is not None:
        with _telling(output):
            straight = is_special(output)
            if straight:  # now, since a pipe waits here for its reader
                opened.append(output.open("a", encoding="utf-8", newline=""))

    def begin() -> TextIO:
        if output is None:
            return _standard_output()
        with _telling(output):
            if growing and not straight:
                opened.append(output.open("a", encoding="utf-8", newline=""))
                opened[0].truncate(0)
            elif not straight:
                opened.append(_new_file(output.resolve(), beside))
        return opened[0]

    try:
        yield begin
        if output is not None and beside:
            with _telling(output):
                opened[0].flush()
                os.fsync(opened[0].fileno())
                opened[0].close()
                beside[0].replace(output.resolve())
    except BaseException:
        for path in beside:
            with suppress(OSError):
                path.unlink()
        raise
    finally:
        for out in opened:
            with suppress(OSError):  # it was told where it was written
                out.close()


def _standard_output() -> TextIO:
    if sys.stdout is None:
        fail("standard output is closed; give --output FILE", FAILED)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="strict", newline="")
    return sys.stdout


def _new_file(target: Path, beside: list[Path]) -> TextIO:
    """A file beside another, with its permissions, that shall take its place."""
    path = target.with_name(f".respan-guard-export-{secrets.token_hex(4)}")
    out = path.open("x", encoding="utf-8", newline="")
    beside.append(path)
    if target.exists():
        path.chmod(stat.S_IMODE(target.stat().st_mode))
    return out


def is_special(output: Path) -> bool:
    """Whether there is something at a path that must not be replaced: a device, a pipe, an open file's other name."""
    path = output
    for _ in range(_LINKS):
        if Path(os.path.abspath(path)).parts[1:2] in (("dev",), ("proc",)):  # noqa: PTH100  # links are looked at here
            return True
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return output.exists() and not output.is_file()


@contextmanager
def _telling(output: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # ValueError: no name for a file; RuntimeError: links in a ring
        fail(f"{output} can't be written: {getattr(error, 'strerror', None) or error}", FAILED)
