"""`respan-guard export`, and what it shows of exporters."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from respan_guard import Customer, Guard, Usage
from respan_guard.cli.app import app
from respan_guard.exporters import ExportResult

from .sink import Keeper, book, delivery


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of three calls on two days, and no other settings."""
    for name in [name for name in os.environ if name.upper().startswith("RESPAN_GUARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/guard.db"
    monkeypatch.setenv("RESPAN_GUARD_STORAGE", url)

    async def fill() -> None:
        async with Guard() as guard:
            await guard.put_customer(Customer(customer_identifier="org_1", markup_percentage=50))
            for number, (customer, day) in enumerate([("org_1", 1), ("=org_2", 1), ("org_1", 2)]):
                when = datetime(2026, 3, day, 12, tzinfo=UTC)
                await guard.record(Usage("m", 10, cost="0.000000002", time=when), customer, entry_id=str(number))

    asyncio.run(fill())
    return url


def run(*arguments: str, code: int = 0) -> Result:
    """Run a command and check how it ends."""
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def rows(*arguments: str) -> list[dict[str, Any]]:
    """Records as JSONL."""
    return [json.loads(line) for line in run(*arguments).stdout.splitlines()]


def test_records_are_written_to_standard_output() -> None:
    """One JSON object a line, oldest first, with both costs as exact decimal strings."""
    found = rows()
    assert [row["id"] for row in found] == ["own:0", "own:1", "own:2"]
    assert (found[0]["cost"], found[0]["cost_with_markup"]) == ("0.000000002", "0.000000003")
    assert found[1]["cost_with_markup"] == "0.000000002"


def test_records_are_picked() -> None:
    """By customer and by when the calls ended; a day is its midnight, UTC."""
    assert [row["id"] for row in rows("--customer", "org_1", "--since", "2026-03-02")] == ["own:2"]
    assert [row["id"] for row in rows("--until", "2026-03-02")] == ["own:0", "own:1"]
    assert [row["id"] for row in rows("--since", "2026-03-02T12:00:00")] == ["own:2"]
    assert rows("--customer", "nobody") == []


def test_csv_goes_to_a_file_and_is_no_formula(tmp_path: Path) -> None:
    """With a header; identifiers from outside can't act in a spreadsheet."""
    path = tmp_path / "usage.csv"
    assert "3 records" in run("--format", "csv", "--output", str(path)).output
    found = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["customer_identifier"] for row in found] == ["org_1", "'=org_2", "org_1"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "xml"], "jsonl or csv"),
        (["--customer", ""], "customer_identifier"),
        (["--since", "yesterday"], "yesterday"),
    ],
)
def test_what_is_asked_wrongly_is_told(arguments: list[str], says: str) -> None:
    """With exit code 2."""
    assert says in run(*arguments, code=2).output


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """With exit code 1."""
    assert "can't be written" in run("--output", str(tmp_path / "no" / "x"), code=1).output


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_file_is_emptied_only_once_storage_answers(tmp_path: Path, form: str) -> None:
    """What was exported before is there still when a later export could not begin, and replaced when it could."""
    path = tmp_path / "usage"
    run("--format", form, "--output", str(path))
    before = path.read_text()
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"this is no database" * 100)
    run("--format", form, "--output", str(path), "--storage", f"sqlite:///{broken}", code=1)
    assert path.read_text() == before
    run("--format", form, "--output", str(path), "--customer", "nobody")
    assert path.read_text().count("\n") == (form == "csv")
    run("--format", form, "--output", str(path))
    assert path.read_text() == before


def test_it_follows_what_is_booked(store: str) -> None:
    """With --follow it goes on until it is interrupted."""
    process = subprocess.Popen(
        [sys.executable, "-m", "respan_guard", "export", "--follow", "--since", "2026-03-02"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["id"] == "own:2"

        async def more() -> None:
            async with Guard(store) as guard:
                await book(guard, 1, start=9)

        asyncio.run(more())
        assert json.loads(process.stdout.readline())["id"] == "own:r9"
    finally:
        process.kill()
        process.communicate()


def test_dead_letters_are_listed_and_replayed(store: str) -> None:
    """They are shown with record and reason; a replay is done by whoever exports, and then they are gone."""
    keeper = Keeper()

    async def export(reject: bool) -> None:
        keeper.fault = lambda batch: ExportResult({0: "not this one"} if reject else {})
        async with Guard(store) as guard:
            way = delivery(guard, keeper)
            for _ in range(3):
                await way.step()
            await way.close()

    asyncio.run(export(True))
    found = json.loads(run("dead-letters", "list", "keeper", "--json").stdout)
    assert [(row["id"], row["customer_identifier"], row["reason"]) for row in found] == [
        ("own:0", "org_1", "not this one")
    ]
    assert "not this one" in run("dead-letters", "list", "keeper").stdout
    [status] = json.loads(run("status", "--json").stdout)
    assert (status["name"], status["behind"], status["dead_letters"], status["leader"]) == ("keeper", 0, 1, None)
    assert "keeper" in run("status").stdout
    assert json.loads(run("dead-letters", "replay", "keeper", "--json").stdout) == {"exporter": "keeper", "asked": 1}
    asyncio.run(export(False))
    assert json.loads(run("dead-letters", "list", "keeper", "--json").stdout) == []
    assert keeper.ids == {"own:0", "own:1", "own:2"}
    run("forget", "keeper")
    assert json.loads(run("status", "--json").stdout) == []
