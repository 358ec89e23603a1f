"""Every backend of the package keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from respan_guard.backends.base import Backend
from respan_guard.testing import BackendContract
from tests.backends.conftest import BACKENDS, new_store


class TestContract(BackendContract):
    @pytest.fixture(autouse=True, params=BACKENDS)
    def store(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.make = new_store(request.param, tmp_path)

    async def open_backend(self) -> Backend:
        backend = self.make()
        await backend.open()
        return backend
