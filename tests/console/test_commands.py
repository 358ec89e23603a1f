"""`respan-guard serve`, and the traffic that the demo shows."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

import pytest
from typer.testing import CliRunner

from respan_guard import Customer, Guard
from respan_guard.cli import seed as seeding
from respan_guard.cli import serve as serving
from respan_guard.cli.app import app

NOW = datetime(2026, 3, 20, 12, tzinfo=UTC)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


class Stay(HTTPRedirectHandler):
    """Follows nothing."""

    def redirect_request(self, *args: object) -> None:
        """Stay."""


def status_of(url: str, password: str | None = None) -> int:
    """What the console answers to a page, or to a password."""
    opener = build_opener(ProxyHandler({}), Stay())
    data = None if password is None else urlencode({"password": password}).encode()
    try:
        with opener.open(Request(url, data, {"sec-fetch-site": "same-origin"}), timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


@pytest.mark.parametrize("chosen", [None, "chosen by me"])
def test_serve_serves_the_console(tmp_path: Path, chosen: str | None) -> None:
    """On its own, with the password of the environment or one that it prints; SIGTERM ends it tidily."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "CONSOLE_PASSWORD"}
    if chosen:
        environment["CONSOLE_PASSWORD"] = chosen
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    Guard(storage).sync.info()
    command = [sys.executable, "-m", "respan_guard", "serve", storage, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    try:
        assert process.stdout is not None
        assert str(port) in process.stdout.readline()
        password = chosen
        if password is None:
            found = re.search(r"Password for this run: (\S+)", process.stdout.readline())
            assert found is not None
            password = found[1]
        for _ in range(100):
            try:
                assert status_of(f"http://127.0.0.1:{port}/") == 303
                break
            except OSError:
                time.sleep(0.1)
        assert status_of(f"http://127.0.0.1:{port}/signin", "wrong password") == 401
        assert status_of(f"http://127.0.0.1:{port}/signin", password) == 303
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


async def test_the_seeded_traffic_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the guard's own doors: every sum is its records', somebody is refused, and twice is alike."""
    monkeypatch.setattr(seeding, "DAYS", 3)
    found = []
    for name in ("a", "b"):
        url = f"sqlite:///{tmp_path / name}.db?synchronous=normal"
        calls = await seeding.seed(url, until=NOW)
        async with Guard(url, journal_dir=tmp_path) as guard:
            assert await guard.verify() == []
            sums = await guard.usage("customer", "day")
            refused = await guard.lane().call(lambda backend: backend.refusal_sums())
            customers = await guard.list_customers(limit=500)
        found.append((calls, sums, refused, [row.customer.name for row in customers]))
        assert sum(row.calls for row in sums) == calls > 100
        assert len({row.day for row in sums}) >= 3
    assert found[0] == found[1]


def test_the_demo_fills_a_store_of_ones_own(tmp_path: Path) -> None:
    """--storage without --seed is a mistake; the traffic of a whole demo is for people to look at."""
    command = [sys.executable, "-m", "respan_guard", "demo", "--storage", f"sqlite:///{tmp_path / 'x.db'}"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2
    assert "--seed" in ran.stderr


def test_a_store_that_is_used_is_not_filled(tmp_path: Path) -> None:
    """One customer is enough for --seed to refuse it, before anything is written: its limits would be overwritten."""
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    guard = Guard(storage)
    guard.sync.put_customer(Customer(customer_identifier="delta_analytics", total_budget=7))
    command = [sys.executable, "-m", "respan_guard", "demo", "--seed", "--storage", storage]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"respan-guard: {storage} is not empty (1 customers)")
    assert ran.stderr.count("\n") == 1
    [kept] = guard.sync.list_customers()
    assert (kept.customer.customer_identifier, str(kept.customer.total_budget)) == ("delta_analytics", "7")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["demo", "--seed", "--storage", "postgresql://u:hunter2@127.0.0.1:1/db"], 1, "can't be reached"),
        (["demo", "--seed", "--storage", "sqlite:///no/x.db"], 2, "does not exist"),
        (["serve", "postgresql://u:hunter2@127.0.0.1:1/db"], 1, "can't be reached"),
        (["serve", "sqlite:///damaged.db"], 1, "is damaged"),
        (["serve", "sqlite:///gaurd.db"], 1, "there is no store yet"),
        (["serve", "sqlite:///."], 2, "is a directory"),
        (["serve", "sqlite:///good.db", "--host", "::1%nowhere"], 1, "can't be served"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_shown_is_one_line(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    """No address, no password, no traceback, and no store that a misspelt path would make."""
    (tmp_path / "damaged.db").write_bytes(b"this is no database" * 100)
    if "good.db" in str(arguments):
        Guard(f"sqlite:///{tmp_path / 'good.db'}").sync.info()
    command = [sys.executable, "-m", "respan_guard", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert ran.stderr.count("\n") == 1
    assert said in ran.stderr
    assert "hunter2" not in ran.stderr
    assert not (tmp_path / "gaurd.db").exists()


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    """Before an address is printed; exit code 1."""
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    Guard(storage).sync.info()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = CliRunner().invoke(app, ["serve", storage, "--port", str(taken.getsockname()[1])])
    assert (found.exit_code, found.stdout) == (1, "")
    assert "in use" in found.stderr


def test_an_address_of_ipv6_is_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host has brackets; and how uvicorn fails is this command's way to fail."""

    async def free(host: str, port: int) -> None:
        """Any address."""

    def end(*_: object, **__: object) -> None:
        sys.exit(3)

    storage = f"sqlite:///{tmp_path / 'x.db'}"
    Guard(storage).sync.info()
    monkeypatch.setattr(serving, "_try_to_listen", free)
    monkeypatch.setattr("uvicorn.run", end)
    found = CliRunner().invoke(app, ["serve", storage, "--host", "::1", "--port", "9874"])
    assert "http://[::1]:9874/" in found.stdout
    assert found.exit_code == 1
