"""Files: whole lines only, rotated, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Usage, UsageRecord
from respan_guard.errors import ConfigurationError
from respan_guard.exporters import CSVExporter, ExportFailed, JSONLExporter
from respan_guard.exporters.rows import COLUMNS
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .sink import book, check_nothing_is_lost, delivery


def record(number: int = 0, **usage: Any) -> UsageRecord:
    """A record."""
    return UsageRecord(
        id=f"r{number}",
        customer_identifier="c1",
        time=FakeClock().now,
        day="2026-01-15",
        usage=Usage(**({"model": "m"} | usage)),
        cost=Decimal("0.000000001"),
        sequence=number,
    )


async def test_jsonl_has_a_record_a_line(make_guard: MakeGuard, tmp_path: Path) -> None:
    """Every field by its name, money as an exact decimal string."""
    path = tmp_path / "usage.jsonl"
    async with make_guard() as guard:
        ids = await book(guard, 3, cost="0.1")
        await delivery(guard, JSONLExporter(path)).step()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["id"] for row in rows] == ids
        assert tuple(rows[0]) == COLUMNS
        assert (rows[0]["cost"], rows[0]["input_tokens"], rows[0]["time"]) == ("0.1", 10, "2026-01-15T12:00:00.000Z")
        await check_nothing_is_lost(guard, "jsonl", {row["id"] for row in rows})


async def test_files_are_rotated(tmp_path: Path) -> None:
    """A file that is full is put aside under the next number; numbers are never used twice."""
    exporter = JSONLExporter(tmp_path / "usage.jsonl", max_bytes=1)
    for number in range(12):
        await exporter.export([record(number)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(["usage.jsonl", *(f"usage.{number}.jsonl" for number in range(1, 12))])
    assert json.loads((tmp_path / "usage.11.jsonl").read_text())["id"] == "r10"
    (tmp_path / "usage.3.jsonl").unlink()
    await exporter.export([record(12)])
    assert json.loads((tmp_path / "usage.12.jsonl").read_text())["id"] == "r11"


@pytest.mark.parametrize(
    ("name", "aside"),
    [
        ("usage", "usage.{}"),
        (".usage", ".usage.{}"),
        ("usage[eu].jsonl", "usage[eu].{}.jsonl"),
        ("us*ge?.jsonl", "us*ge?.{}.jsonl"),
        ("a.b.jsonl", "a.b.{}.jsonl"),
        ("usage.1", "usage.{}.1"),
    ],
)
async def test_whatever_a_file_is_called_none_put_aside_is_written_over(tmp_path: Path, name: str, aside: str) -> None:
    """Without a suffix, with characters of patterns, with a number of its own: each file has its place."""
    for other in ("usage.x.jsonl", "usage.7.csv", "usagee.9", "a.b.c.jsonl"):
        (tmp_path / other).write_text("somebody else's\n")
    exporter = JSONLExporter(tmp_path / name, max_bytes=1)
    for number in range(4):
        await exporter.export([record(number)])
    found = [tmp_path / name, *(tmp_path / aside.format(number) for number in (3, 2, 1))]
    assert [json.loads(path.read_text())["id"] for path in found] == ["r3", "r2", "r1", "r0"]


async def test_every_csv_file_has_a_header(tmp_path: Path) -> None:
    """The first line of each names the columns."""
    exporter = CSVExporter(tmp_path / "usage.csv", max_bytes=1)
    await exporter.export([record(0), record(1)])
    await exporter.export([record(2)])
    for name, count in (("usage.1.csv", 2), ("usage.csv", 1)):
        rows = list(csv.DictReader(io.StringIO((tmp_path / name).read_text())))
        assert len(rows) == count
        assert tuple(rows[0]) == COLUMNS
        assert rows[0]["cost"] == "0.000000001"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\nx"])
async def test_no_cell_is_a_formula(tmp_path: Path, text: str) -> None:
    """Text that a spreadsheet would run begins with an apostrophe, wherever it came from."""
    exporter = CSVExporter(tmp_path / "usage.csv")
    odd = record(model=text, provider=text, response_model=f'"{text}"', metadata={"a": text})
    odd = replace(odd, id=text, customer_identifier=text, cost=Decimal("-0.5"))
    await exporter.export([odd])
    [_, row] = csv.reader(io.StringIO((tmp_path / "usage.csv").read_text()))
    assert not [cell for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) and cell != "-0.5"]
    cells = dict(zip(COLUMNS, row, strict=True))
    assert cells["customer_identifier"] == cells["model"] == "'" + text.replace("\r", "\\r").replace("\n", "\\n")
    assert cells["cost"] == "-0.5", "a number of ours is a number"


@pytest.mark.parametrize("kind", [JSONLExporter, CSVExporter])
@pytest.mark.parametrize("cut", [1, 5, 100])
async def test_a_line_that_a_crash_cut_off_is_taken_away(tmp_path: Path, kind: Any, cut: int) -> None:
    """It was not acknowledged, so it comes again: the file has whole lines only, each record once."""
    path = tmp_path / "usage"
    exporter = kind(path)
    await exporter.export([record(0), record(1)])
    whole = path.read_bytes()
    await exporter.export([record(2)])
    os.truncate(path, path.stat().st_size - cut)
    await kind(path).export([record(2)])
    assert path.read_bytes().startswith(whole)
    assert path.read_bytes().count(b"\n") == whole.count(b"\n") + 1
    assert path.read_bytes().count(b"r2") == 1


async def test_a_disk_that_is_full_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a batch is taken back, and the batch counts as failed, so it comes again."""
    path = tmp_path / "usage.jsonl"
    exporter = JSONLExporter(path)
    await exporter.export([record(0)])
    before = path.read_bytes()
    write = os.write
    calls = 0

    def full(file: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return write(file, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ExportFailed, match="No space left"):
        await exporter.export([record(1)])
    monkeypatch.undo()
    assert path.read_bytes() == before
    await exporter.export([record(1)])
    assert len(path.read_text().splitlines()) == 2


def test_what_cannot_work_is_an_error_at_once(tmp_path: Path) -> None:
    """A directory that is not there, a size that is none."""
    with pytest.raises(ConfigurationError, match="there is no directory"):
        JSONLExporter(tmp_path / "none" / "usage.jsonl")
    with pytest.raises(ConfigurationError, match="max_bytes"):
        CSVExporter(tmp_path / "usage.csv", max_bytes=0)
