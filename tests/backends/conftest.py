"""The backends that every test of storage runs on."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from respan_guard.backends.base import Backend
from respan_guard.backends.registry import backend_factory
from tests.backends import postgres_server, redis_server

BACKENDS = ["memory", "sqlite", "redis", "postgresql"]


def new_store(name: str, directory: Path) -> Callable[[], Backend]:
    """Makes instances of one new store of that kind; of PostgreSQL there is one at a time, emptied."""
    namespace = "default" if name == "postgresql" else f"test-{secrets.token_hex(6)}"
    return backend_factory(storage_url(name, directory), namespace=namespace)


def storage_url(name: str, directory: Path) -> str:
    """The URL of an empty store of that kind; a Redis tells them apart by namespaces, of PostgreSQL there is one."""
    if name == "redis":
        return redis_server.shared_url()
    if name == "postgresql":
        return postgres_server.emptied_store(postgres_server.given_or_started())
    return "memory://" if name == "memory" else f"sqlite:///{directory / 'guard.db'}?synchronous=normal"


@pytest.fixture(params=BACKENDS)
def make_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Backend]:
    """Makes instances of one store, not yet opened: a shared backend is always the same one."""
    return new_store(request.param, tmp_path)


@pytest.fixture
async def backend(make_backend: Callable[[], Backend]) -> AsyncIterator[Backend]:
    """An open, empty store of each kind."""
    opened = make_backend()
    await opened.open()
    yield opened
    await opened.close()
