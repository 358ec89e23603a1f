"""A store that was wiped between two runs is noticed by a machine that knew it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from redis import Redis

from respan_guard import Guard
from respan_guard.sightings import is_another
from tests.backends import postgres_server, redis_server
from tests.backends.postgres_support import asked

SAID = "it was wiped or replaced"


async def used(url: str, place: Path) -> None:
    """One run of an app."""
    async with Guard(url, journal_dir=place) as guard:
        await guard.admit("c1")


def wipe(url: str, tmp_path: Path) -> None:
    """Lose everything in a store."""
    if url.startswith("sqlite"):
        for file in tmp_path.glob("guard.db*"):
            file.unlink()
    elif url.startswith("postgres"):
        asked(url, "DROP SCHEMA {schema} CASCADE")
    else:
        with Redis.from_url(url) as client:
            client.flushall()


def store(kind: str, tmp_path: Path) -> str:
    """A store of its own."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'guard.db'}"
    if kind == "postgresql":
        return postgres_server.new_store(postgres_server.given_or_started())
    return redis_server.RedisServer().url


@pytest.mark.parametrize("kind", ["sqlite", "redis", "postgresql"])
async def test_a_store_wiped_between_two_runs_is_noticed(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next run says so, once; runs on the store that it knows say nothing, nor does a machine that is new to it."""
    url, place = store(kind, tmp_path), tmp_path / "journal"
    for _ in range(2):
        await used(url, place)
    assert SAID not in caplog.text
    wipe(url, tmp_path)
    await used(url, tmp_path / "of another machine")
    assert SAID not in caplog.text
    await used(url, place)
    assert caplog.text.count(SAID) == 1
    await used(url, place)
    assert caplog.text.count(SAID) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs permissions")
def test_where_nothing_can_be_noted_nothing_fails(tmp_path: Path) -> None:
    """A place that is a directory, or has no directory, is passed over."""
    (tmp_path / "place").mkdir()
    assert not is_another(tmp_path / "place", "a")
    assert not is_another(tmp_path / "none" / "place", "a")
    noted = tmp_path / "noted"
    assert not is_another(noted, "a")
    assert not is_another(noted, "a")
    assert is_another(noted, "b")
    assert noted.read_text() == "b"
    noted.write_bytes(b"\xff")
    assert not is_another(noted, "b")


async def test_a_journal_that_cannot_be_there_stops_nobody(tmp_path: Path) -> None:
    """Noting is no condition: the app starts with a journal directory that can't be made."""
    (tmp_path / "file").write_text("")
    url, place = f"sqlite:///{tmp_path / 'guard.db'}", tmp_path / "file" / "journal"
    await used(url, place)
    async with Guard(url, journal_dir=place) as guard:
        assert (await guard.status("c1")).total_requests == 1
