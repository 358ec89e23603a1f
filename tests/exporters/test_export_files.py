"""Where `respan-guard export` writes to, and what is left where it does not get to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from respan_guard import Guard, Usage
from respan_guard.cli import export as exporting
from respan_guard.cli.app import app

needs_unix = pytest.mark.skipif(os.name != "posix", reason="devices, pipes and permissions of Unix")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of three calls, and no other settings."""
    for name in [name for name in os.environ if name.upper().startswith("RESPAN_GUARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESPAN_GUARD_STORAGE", f"sqlite:///{tmp_path}/guard.db")

    async def fill() -> None:
        async with Guard() as guard:
            for number in range(3):
                await guard.record(Usage("m", 10, cost="0.000000002"), "Zoë", entry_id=str(number))

    asyncio.run(fill())
    return tmp_path / "guard.db"


def run(*arguments: str, code: int = 0) -> Result:
    """Run a command and check how it ends."""
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.parametrize("name", ["guard.db", "guard.db-wal", "guard.db-checkpoint", "link.db", "twin.db"])
@pytest.mark.parametrize("more", [[], ["--follow"]])
def test_the_store_is_no_output(name: str, more: list[str], store: Path) -> None:
    """Neither by its own name nor by another, nor a file that belongs to it: exit code 2, and it is as it was."""
    Path("link.db").symlink_to(store)
    Path("twin.db").hardlink_to(store)
    assert "belongs to the store itself" in run("--output", name, *more, code=2).stderr
    assert run().stdout.count("\n") == 3


def test_an_export_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C halfway is exit code 130; the file of before is whole, and nothing lies beside it."""
    run("--output", "usage.jsonl")
    before, names = Path("usage.jsonl").read_text(), sorted(os.listdir())

    def interrupt(batch: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(exporting._WRITERS, "jsonl", interrupt)
    run("--output", "usage.jsonl", code=130)
    run("--output", "other.jsonl", code=130)
    assert Path("usage.jsonl").read_text() == before
    assert sorted(os.listdir()) == names


def test_where_there_is_no_store_no_file_is_made() -> None:
    """The export could not begin, so there is no empty file that looks like one."""
    run("--output", "new.jsonl", "--storage", "sqlite:///missing.db", code=1)
    run("--output", "new.jsonl", "--follow", "--storage", "sqlite:///missing.db", code=1)
    assert not Path("new.jsonl").exists()


@needs_unix
def test_a_file_keeps_its_permissions_and_a_link_its_target() -> None:
    """Whoever might not read the file of before may not read the new one; what was a link is one."""
    target = Path("real.jsonl")
    target.touch()
    target.chmod(0o640)
    Path("link.jsonl").symlink_to(target)
    run("--output", "link.jsonl")
    assert Path("link.jsonl").is_symlink()
    assert target.read_text().count("\n") == 3
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@needs_unix
def test_what_is_no_file_is_written_into(tmp_path: Path) -> None:
    """Devices and pipes stay what they are."""
    run("--output", os.devnull)
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)
    os.mkfifo("pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()))
    reader.start()
    run("--output", "pipe")
    reader.join(10)
    assert read[0].count("\n") == 3
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    with open("kept", "w") as out:
        out.write("before\n")
        out.flush()
        command = [sys.executable, "-m", "respan_guard", "export", "--output", "/dev/stdout"]
        subprocess.run(command, stdout=out, check=True, timeout=60)
    assert Path("kept").read_text().startswith("before\n")
    assert Path("kept").read_text().count('"customer_identifier"') == 3


@needs_unix
def test_following_ends_well_and_what_is_plain_does_not() -> None:
    """Ctrl-C is how --follow ends, exit code 0, with what was written in the file."""
    command = [sys.executable, "-m", "respan_guard", "export", "--follow", "--output", "usage.jsonl"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(300):
        if Path("usage.jsonl").exists() and Path("usage.jsonl").read_text().count("\n") == 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")
    assert Path("usage.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_standard_output_is_utf_8(form: str) -> None:
    """Whatever encoding the terminal has: an export is for programs."""
    ran = subprocess.run(
        [sys.executable, "-m", "respan_guard", "export", "--format", form],
        capture_output=True, check=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert ran.stdout.decode("utf-8").count("Zoë" if form == "csv" else "Zo\\u00eb") == 3
    assert ran.stderr == b""  # no empty line of a progress bar, either, that a cron job would mail
