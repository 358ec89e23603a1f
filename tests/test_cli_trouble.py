"""What the command line says where the machine says no: one line, an exit code, never a traceback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard, Usage
from respan_guard.backends.base import Discrepancy
from respan_guard.cli.discrepancies import as_row

COMMAND = [sys.executable, "-m", "respan_guard"]
needs_unix = pytest.mark.skipif(os.name != "posix", reason="closed descriptors and devices of Unix")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with one call of a customer whose name is not ASCII."""
    storage = f"sqlite:///{tmp_path}/guard.db"

    async def fill() -> None:
        async with Guard(storage) as guard:
            await guard.record(Usage("gpt-4o", 1, 1, cost=Decimal("1.5"), time=datetime(2026, 3, 1, tzinfo=UTC)), "Zoë")

    asyncio.run(fill())
    return storage


def ran(place: Path, *arguments: str, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, without the machine's settings; `shell` redirects it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RESPAN_GUARD_")}
    command = ["sh", "-c", f'"$@" {shell}', "sh", *COMMAND, *arguments] if shell else [*COMMAND, *arguments]
    return subprocess.run(
        command, cwd=place, env={**clean, **variables}, capture_output=True, text=True, timeout=60, encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def one_line(told: subprocess.CompletedProcess[str], code: int) -> str:
    """The only line on standard error, of a command that ended so."""
    assert told.returncode == code, told.stderr
    assert told.stderr.count("\n") == 1, told.stderr
    assert told.stderr.startswith("respan-guard: ")
    return told.stderr


@pytest.mark.parametrize(
    ("path", "code", "said"), [("a" * 300, 1, "can't be opened"), ("a%00b.db", 2, "UTF-8")], ids=["too long", "NUL"]
)
def test_a_path_that_no_file_can_have(path: str, code: int, said: str, tmp_path: Path) -> None:
    """It is said in a line, also where a store would be made; `check` says it as what is wrong."""
    told = ran(tmp_path, "customers", "set", "a", "--name", "b", "--storage", f"sqlite:///{path}")
    assert said in one_line(told, code)
    checked = ran(tmp_path, "check", "--json", "--storage", f"sqlite:///{path}")
    assert checked.returncode == 1
    assert said in json.loads(checked.stdout)["error"]


@needs_unix
def test_a_path_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A byte that is no UTF-8 on the command line."""
    told = subprocess.run(
        [*map(os.fsencode, COMMAND), b"check", b"--json", b"--storage", b"sqlite:///\xff.db"],
        cwd=tmp_path, capture_output=True, timeout=60,
    )  # fmt: skip
    assert told.returncode == 1
    assert b"Traceback" not in told.stderr
    assert "UTF-8" in json.loads(told.stdout)["error"]


@needs_unix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may enter every directory")
def test_a_directory_that_must_not_be_entered(tmp_path: Path) -> None:
    """For readers, writers and `check` alike."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    try:
        for command in (("verify",), ("customers", "set", "a", "--name", "b")):
            assert "Permission denied" in one_line(ran(tmp_path, *command, "--storage", f"sqlite:///{closed}/x.db"), 1)
    finally:
        closed.chmod(0o700)


@needs_unix
def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    """A relative path means nothing there."""
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    command = ["sh", "-c", script, "sh", str(gone), *COMMAND, "verify", "--storage", "sqlite:///x.db"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONSAFEPATH": "1"})
    assert "the working directory is gone" in one_line(told, 2)


def test_a_rate_limit_of_thousands_of_digits(tmp_path: Path) -> None:
    """It is no rate limit, whatever Python says of such numbers."""
    told = ran(tmp_path, "customers", "set", "a", "--rate-limit", "9" * 5000, "--storage", f"sqlite:///{tmp_path}/x.db")
    assert "rate_limit must be" in one_line(told, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["usage", "verify --json", "export", "export --help"])
def test_standard_output_on_a_full_disk(command: str, tmp_path: Path, url: str) -> None:
    """What could not be written was not told: exit code 1."""
    storage = [] if command.endswith("help") else ["--storage", url]
    told = ran(tmp_path, *command.split(), *storage, shell="> /dev/full")
    assert "No space left on device" in one_line(told, 1)


@needs_unix
def test_descriptors_that_are_closed(tmp_path: Path, url: str) -> None:
    """An export has nowhere to go, and nobody can be asked; that is said."""
    assert "standard output is closed" in one_line(ran(tmp_path, "export", "--storage", url, shell=">&-"), 1)
    assert "--yes" in one_line(ran(tmp_path, "customers", "delete", "Zoë", "--storage", url, shell="<&-"), 2)


@pytest.mark.parametrize("command", [("usage",), ("customers", "show", "Zoë")], ids=" ".join)
def test_a_terminal_without_the_letters(command: tuple[str, ...], tmp_path: Path, url: str) -> None:
    """Names are shown with escapes where standard output is not UTF-8."""
    told = ran(tmp_path, *command, "--storage", url, PYTHONIOENCODING="ascii")
    assert (told.returncode, told.stderr) == (0, "")
    assert "Zo\\xeb" in told.stdout


def test_standard_error_is_empty_where_nothing_is_wrong(tmp_path: Path, url: str) -> None:
    """No progress bar, not an empty line of it, and no word of a kill switch that was thrown long since."""
    for command in (("switch", "off", "--reason", "incident"), ("verify",), ("prune", "--older-than", "400")):
        told = ran(tmp_path, *command, "--storage", url)
        assert (told.returncode, told.stderr) == (0, ""), command


@needs_unix
def test_an_early_interrupt_is_silent(tmp_path: Path, url: str) -> None:
    """Ctrl-C while the command is still loading: exit code 130 and nothing said."""
    code = "import respan_guard.cli, sys; print(flush=True); respan_guard.cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "verify", "--storage", url],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.25)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert said == ""
    assert process.returncode in (130, 0)


def test_check_makes_no_store(tmp_path: Path) -> None:
    """Where there is none it says that the app will make it, if it can; a misspelt path leaves no file."""
    told = ran(tmp_path, "check", "--json", "--storage", "sqlite:///gaurd.db")
    found = json.loads(told.stdout)
    assert told.returncode == 0
    assert (found["ok"], found["storage"]) == (True, None)
    assert found["note"].startswith(f"there is no store yet at {tmp_path}/gaurd.db")
    assert "no store yet" in ran(tmp_path, "check", "--storage", "sqlite:///gaurd.db").stdout
    assert list(tmp_path.iterdir()) == []
    nowhere = ran(tmp_path, "check", "--json", "--storage", "sqlite:///no/x.db")
    assert nowhere.returncode == 1
    assert "mkdir -p" in json.loads(nowhere.stdout)["error"]


def test_an_age_that_no_record_has(tmp_path: Path, url: str) -> None:
    """The message names both bounds."""
    told = ran(tmp_path, "prune", "--older-than", "800000 days", "--storage", url)
    assert "--older-than must be a number of days from 40 to 100000" in one_line(told, 2)


DAY = datetime(2026, 3, 1, tzinfo=UTC)
ORDINAL, HOUR, MS = DAY.toordinal(), int(DAY.timestamp()) // 3600, int(DAY.timestamp()) * 1000


@pytest.mark.parametrize(
    ("found", "row"),
    [
        (("cost", f"a gpt-4 {ORDINAL}", 1_500_000_007, 0), ("a gpt-4 2026-03-01", "1.500000007", "0")),
        (("calls", f"a 739000 {ORDINAL}:gpt-4", 2, 1), ("a 739000 2026-03-01:gpt-4", 2, 1)),
        (("customers", f"day {ORDINAL}", 2, 1), ("day 2026-03-01", 2, 1)),
        (("cost", f"all gpt-4 hour {HOUR}", 5, 0), ("all gpt-4 hour 2026-03-01T00:00:00+00:00", "0.000000005", "0")),
        (("total cost", "b 739000", -5, 0), ("b 739000", "-0.000000005", "0")),
        (("log out of order", "7", MS, MS), ("7", "2026-03-01T00:00:00+00:00", "2026-03-01T00:00:00+00:00")),
        (("file", "integrity_check", "row missing", "ok"), ("integrity_check", "row missing", "ok")),
    ],
)  # fmt: skip
def test_discrepancies_are_told_in_usd_and_dates(found: tuple[Any, ...], row: tuple[Any, ...]) -> None:
    """As all that the command line tells; a customer named like a day stays what it is."""
    assert tuple(as_row(Discrepancy(*found)).values())[1:] == row


def test_verify_tells_money_in_usd(tmp_path: Path, url: str) -> None:
    """A sum of which a nano-dollar is lost, on a day that is a date."""
    with sqlite3.connect(tmp_path / "guard.db") as connection:
        connection.execute("UPDATE rollups SET cost = cost - 1 WHERE calls > 0")
    connection.close()
    rows = json.loads(ran(tmp_path, "verify", "--json", "--storage", url).stdout)["discrepancies"]
    own = next(row for row in rows if row["what"] == "cost" and row["where"].startswith("Zoë"))
    assert own["where"].endswith("2026-03-01")
    assert (own["stored"], own["recomputed"]) == ("1.499999999", "1.5")
