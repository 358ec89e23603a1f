"""What the tests of the examples and of Respan's snippets share."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType

from respan_guard import Guard, UsageRecord

__all__ = ["load_example", "records_of"]

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str) -> ModuleType:
    """Run an example's file, as `uvicorn examples.NAME:app` does."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records_of(guard: Guard, customer: str, count: int) -> list[UsageRecord]:
    """A customer's records, once there are so many.

    A client has its answer before the gateway's server has ended the request, so the last record may come a little
    later than the answer.
    """
    until = time.monotonic() + 10
    while True:
        guard.sync.flush()
        found = list(guard.sync.records(customer))
        if len(found) >= count or time.monotonic() > until:
            assert len(found) == count
            return found
        time.sleep(0.005)
