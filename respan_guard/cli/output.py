"""What the commands print: tables for people, JSON for programs, one line for what went wrong."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["FAILED", "MISUSED", "as_day", "columns", "fail", "plain", "print_json", "print_table", "say", "usd"]

FAILED = 1
MISUSED = 2
_WIDE = 300  # where nobody's screen sets the width, a row is a line


def plain(value: object) -> Text:
    """A value as text that can't act on the terminal.

    Customer identifiers, names and models come from outside. Control, format and surrogate characters are shown as
    escapes: among them are cursor movements, and marks that turn the direction of the text. Being a `Text`, it is
    never read as markup.
    """
    shown = "" if value is None else str(value)
    return Text(
        "".join(
            c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else f"\\u{ord(c):04x}" for c in shown
        )
    )


def usd(amount: Decimal | None) -> str:
    """An amount for people; a dash where it is unknown, which is not zero."""
    return "-" if amount is None else f"{amount:f}"


def as_day(moment: datetime | None) -> date | None:
    """The day that was typed; the command line parses days as their midnights."""
    return None if moment is None else moment.date()


def columns(*names: str) -> Table:
    """A table with these columns; those that start with ">" are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        number = name.startswith(">")
        table.add_column(name.lstrip(">"), justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def print_table(table: Table, rows: Iterable[Sequence[object]], empty: str) -> None:
    """Print a table, or a line that says there is nothing to show."""
    for row in rows:
        table.add_row(*(plain(value) for value in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    if table.row_count:
        console.print(table)
    else:
        console.print(plain(empty))


def say(text: str) -> None:
    """Print a line."""
    Console(highlight=False, soft_wrap=True).print(plain(text))


def print_json(value: object) -> None:
    """Print a value as JSON: money as decimal strings, days and moments as ISO 8601."""
    typer.echo(json.dumps(value, default=_json, indent=2))


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End the command with a line on standard error.

    Raises:
        typer.Exit: Always.
    """
    Console(stderr=True, highlight=False, soft_wrap=True).print(plain(f"respan-guard: {message}"))
    raise typer.Exit(code)


def _json(value: object) -> Any:
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
