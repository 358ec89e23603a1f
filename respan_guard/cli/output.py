"""What the commands print: tables for people, JSON for programs, one line for what went wrong."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NoReturn

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement, measure_renderables
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

__all__ = [
    "FAILED",
    "MISUSED",
    "as_day",
    "columns",
    "fail",
    "plain",
    "print_json",
    "print_table",
    "progress",
    "say",
    "usd",
]

FAILED = 1
MISUSED = 2
_WIDEST = 1_000_000  # what a table is measured in, and how wide it may be where there is no screen


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
    """A table with these columns; those that start with ">" are numbers, those that start with "~" prose.

    Prose may go on in the next line. What is no prose is never cut nor broken.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in names:
        justify: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        table.add_column(name.lstrip(">~"), justify=justify, no_wrap=not name.startswith("~"), overflow="fold")
    return table


def print_table(table: Table, rows: Iterable[Sequence[object]], empty: str) -> None:
    """Print a table, or a line that says there is nothing to show.

    On a screen that is too narrow for it, each row is a block of lines "column: value". Where nobody's screen sets
    the width, a row is a line however long.
    """
    for row in rows:
        table.add_row(*(plain(value) for value in row))
    console = Console(highlight=False, soft_wrap=True)
    if not table.row_count:
        console.print(plain(empty))
        return
    whole = _measured(console, table).maximum
    if not console.file.isatty():
        console.width = whole
    prose = [
        (_measured(console, column.header, *column.cells), column) for column in table.columns if not column.no_wrap
    ]
    spare = console.width - whole + sum(width.maximum - width.minimum for width, _ in prose)
    if spare < 0:
        _print_blocks(console, table)
        return
    prose.sort(key=lambda item: item[0].maximum - item[0].minimum)
    for left, (width, column) in zip(range(len(prose), 0, -1), prose, strict=True):
        more = min(width.maximum - width.minimum, spare // left)
        column.width = width.minimum + more  # never narrower than its longest word
        spare -= more
    console.print(table, soft_wrap=False)


def _measured(console: Console, *shown: RenderableType) -> Measurement:
    """How wide the widest word and the widest line of these are."""
    return measure_renderables(console, console.options.update(max_width=_WIDEST), shown)


def _print_blocks(console: Console, table: Table) -> None:
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    if table.show_footer:
        rows.append(tuple(column.footer for column in table.columns))
    names = [column.header for column in table.columns]
    for row in rows:
        if len(row) == 2:  # a name and its value as they are
            console.print(_line(*row))
            continue
        for name, value in zip(names, row, strict=True):
            console.print(_line(name, value))
        console.print()


def _line(name: RenderableType, value: RenderableType) -> Text:
    parts = [part if isinstance(part, Text) else plain(part) for part in (name, value)]
    return Text(": ").join(parts)


def progress(*shown: ProgressColumn) -> Progress:
    """A bar on standard error, gone when done; nothing where nobody looks."""
    console = Console(stderr=True)
    return Progress(*shown, console=console, transient=True, disable=not console.file.isatty())


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
