"""What tests of apps and of backends stand on: `FakeClock`, `StandInProvider`, `BackendContract`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from respan_guard.testing.clock import FakeClock
    from respan_guard.testing.contract import BackendContract
    from respan_guard.testing.provider import StandInProvider

__all__ = ["BackendContract", "FakeClock", "StandInProvider"]

_MODULES = {"BackendContract": "contract", "FakeClock": "clock", "StandInProvider": "provider"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
