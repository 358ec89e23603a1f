"""The stand-in provider, its answers, its faults and its meter."""

from __future__ import annotations

from respan_guard.testing.provider.answer import Answer
from respan_guard.testing.provider.faults import Fault, FaultKind
from respan_guard.testing.provider.gate import Gate
from respan_guard.testing.provider.meter import Meter, MeteredCall
from respan_guard.testing.provider.request import ProviderRequest
from respan_guard.testing.provider.standin import StandInProvider

__all__ = ["Answer", "Fault", "FaultKind", "Gate", "Meter", "MeteredCall", "ProviderRequest", "StandInProvider"]
