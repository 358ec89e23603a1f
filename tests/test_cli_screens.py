"""What the command line shows on screens of different widths: nothing is cut."""

from __future__ import annotations

import asyncio
import os
import re
import struct
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.cli import output

pytest.importorskip("termios", reason="screens are pseudo-terminals of Unix")
import fcntl
import pty
import termios

LONG_NAME = "a customer with a very long identifier, of 70 characters or a few more"
STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WIDTHS = pytest.mark.parametrize("width", [40, 80, 120, 200])


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with numbers as wide as they get."""
    storage = f"sqlite:///{tmp_path / 'x.db'}"

    async def fill() -> None:
        async with Guard(storage) as guard:
            await guard.put_customer(
                Customer(customer_identifier=LONG_NAME, name="Müller & Söhne", rate_limit="1000/minute; 20000/hour",
                         budget_duration="monthly", period_budget="8999999.123456789", total_budget=9_000_000,
                         markup_percentage="17.5")
            )  # fmt: skip
            for customer in (LONG_NAME, "acme"):
                usage = Usage("claude-sonnet-4-5-20250929", 123456789, 98765432, cost=Decimal("1234.123456789"))
                await guard.record(usage, customer)

    asyncio.run(fill())
    return storage


def on_screen(width: int, place: Path, *arguments: str) -> str:
    """What a command shows on a screen of so many columns, without styles and the terminal's own line ends."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RESPAN_GUARD_", "COLUMNS"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "respan_guard", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=place, env={**clean, "TERM": "xterm", "NO_COLOR": "1"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not more:
            break
        shown += more
    os.close(ours)
    assert process.wait(30) == 0, shown
    return STYLE.sub("", shown.decode().replace("\r", ""))


@WIDTHS
def test_usage_is_shown_whole(width: int, tmp_path: Path, url: str) -> None:
    """Every number and every name, those of the total too, and no line of a table is wider than the screen."""
    shown = on_screen(width, tmp_path, "usage", "--storage", url)
    for whole in (LONG_NAME, "acme", "123456789", "98765432", "1234.123456789", "246913578", "2468.246913578", "total"):
        assert whole in shown
    assert "1450.095061727075" in shown  # with markup
    lines = shown.splitlines()
    assert all(len(line) <= width or ": " in line for line in lines)


@WIDTHS
def test_customers_are_shown_whole(width: int, tmp_path: Path, url: str) -> None:
    """In the list and each on its own: names, limits and amounts."""
    listed = on_screen(width, tmp_path, "customers", "list", "--storage", url)
    for whole in (LONG_NAME, "Müller & Söhne", "1000/minute; 20000/hour", "8999999.123456789 monthly", "9000000"):
        assert whole in listed
    shown = on_screen(width, tmp_path, "customers", "show", LONG_NAME, "--storage", url)
    for whole in (LONG_NAME, "period_budget", "8999999.123456789", "8998765", "1234.123456789"):
        assert whole in shown


@WIDTHS
def test_models_are_shown_whole(width: int, tmp_path: Path, url: str) -> None:
    """By model and by day as well."""
    shown = on_screen(width, tmp_path, "usage", "--by", "model", "--by", "day", "--storage", url)
    for whole in ("claude-sonnet-4-5-20250929", "246913578", "2468.246913578"):
        assert whole in shown


def test_prose_goes_on_in_the_next_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a table fits with its prose in several lines it stays a table; no word is broken."""
    words = "twelve-month budgets of everybody"
    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table = output.columns("name", ">amount", "~why", "~source")
    output.print_table(table, [("acme", "1234.123456789", words, "a file")], "")
    shown = STYLE.sub("", capsys.readouterr().out)
    assert "1234.123456789" in shown
    assert "why: " not in shown
    assert set(words.split()) <= set(shown.split())
    assert max(map(len, shown.splitlines())) <= 44


def test_where_there_is_no_screen_a_row_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """However long: what a program reads is not broken for a width that nobody has."""
    names = ["n" * 500, "m" * 500]
    output.print_table(output.columns("name", "other", ">amount"), [(*names, 5)], "")
    assert names == capsys.readouterr().out.splitlines()[3].split()[:2]
