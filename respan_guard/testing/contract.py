"""The contract of storage as tests, for this package's backends and yours."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "respan_guard.testing.contract_admissions",
    "respan_guard.testing.contract_facts",
    "respan_guard.testing.contract_reads",
    "respan_guard.testing.contract_records",
    "respan_guard.testing.contract_sums",
)

from respan_guard.testing.contract_admissions import AdmissionRules  # noqa: E402
from respan_guard.testing.contract_facts import FactRules  # noqa: E402
from respan_guard.testing.contract_reads import ReadRules  # noqa: E402
from respan_guard.testing.contract_records import CustomerRules, RecordRules  # noqa: E402
from respan_guard.testing.contract_sums import SumRules  # noqa: E402

__all__ = ["BackendContract"]


class BackendContract(AdmissionRules, RecordRules, CustomerRules, ReadRules, SumRules, FactRules):
    """Holds a backend to the contract in `respan_guard.backends.base`, rule by rule.

    Write one class for your backend, and run it with pytest. The tests are async: they need anyio's pytest
    plugin (`anyio_mode = "auto"`) or pytest-asyncio in auto mode.

        from respan_guard.testing import BackendContract

        class TestMyBackend(BackendContract):
            async def open_backend(self):
                backend = MyBackend("mine://localhost/test")
                await backend.open()  # open, and empty: every test begins with a store of its own
                return backend
    """
