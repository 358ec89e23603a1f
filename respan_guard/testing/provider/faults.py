"""What can go wrong with an answer, on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from respan_guard.errors import InvalidInput
from respan_guard.testing.provider.answer import Answer
from respan_guard.testing.provider.gate import Gate
from respan_guard.testing.provider.request import Event, ProviderRequest

__all__ = ["Fault", "FaultKind", "Match", "Orders", "garble", "usage_position"]

FaultKind = Literal[
    "error",
    "drop-before",
    "drop-after-start",
    "drop-middle",
    "drop-before-usage",
    "stall-before",
    "stall-middle",
    "no-usage",
    "usage-negative",
    "usage-string",
    "usage-huge",
    "usage-nan",
    "usage-twice",
    "invalid-json",
    "wrong-content-type",
    "gzip",
    "one-byte-chunks",
    "short-ids",
]
"""What `StandInProvider.fault` can do:

- error: answer with an HTTP status of your choice, in the provider's own error shape; nothing is charged
- drop-before, drop-after-start, drop-middle, drop-before-usage: close the connection before the first byte, behind the
  headers and the first piece, half-way, or when only what tells the usage (else the last piece) is missing
- stall-before, stall-middle: send nothing more until `fault.gate` opens or the client goes away
- no-usage, usage-negative, usage-string, usage-huge, usage-nan, usage-twice: what the answer says it used
- invalid-json: the reply, or the last event with JSON, is cut short
- wrong-content-type: text/plain
- gzip: the answer is compressed; one-byte-chunks: it comes byte by byte; short-ids: `chatcmpl-123`, as Ollama's
"""

Match = Callable[[ProviderRequest], bool]


@dataclass(slots=True)
class Fault:
    """A fault that waits for its calls.

    Attributes:
        kind: See `FaultKind`.
        times: For how many more calls; None for all.
        match: Only calls for which this is true.
        status: Of an error.
        retry_after: Seconds that an error's `Retry-After` asks for.
        message: Of an error.
        gate: What a stall waits for.

    Raises:
        InvalidInput: There is no such fault, or the status is no error's.
    """

    kind: FaultKind
    times: int | None = 1
    match: Match | None = None
    status: int = 500
    retry_after: float | None = None
    message: str = "The stand-in provider was told to fail."
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise InvalidInput(f"{self.kind!r} is no fault; known: {', '.join(get_args(FaultKind))}", field="kind")
        if not 400 <= self.status <= 599:
            raise InvalidInput(f"an error's status is from 400 to 599, got {self.status}", field="status")


class Orders:
    """Answers and faults that wait for calls to match. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._answers: list[tuple[Answer, Match | None]] = []

    def add_fault(self, fault: Fault) -> None:
        """Put a fault in line."""
        with self._lock:
            self._faults.append(fault)

    def add_answer(self, answer: Answer, match: Match | None) -> None:
        """Put an answer in line."""
        with self._lock:
            self._answers.append((answer, match))

    def take_faults(self, request: ProviderRequest) -> dict[str, Fault]:
        """The faults of this call by kind: of each kind the first that matches."""
        found: dict[str, Fault] = {}
        with self._lock:
            for fault in list(self._faults):
                if fault.kind in found or (fault.match is not None and not fault.match(request)):
                    continue
                found[fault.kind] = fault
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
        return found

    def take_answer(self, request: ProviderRequest) -> Answer | None:
        """The first answer in line that matches, or None."""
        with self._lock:
            for at, (_, match) in enumerate(self._answers):
                if match is None or match(request):
                    return self._answers.pop(at)[0]
        return None

    def clear(self) -> None:
        """Forget whatever waits."""
        with self._lock:
            self._faults.clear()
            self._answers.clear()


_USAGE = ("usage", "usageMetadata")
_NESTING = ("response", "message")
_GARBLED: dict[str, Callable[[int], object]] = {
    "usage-negative": lambda count: -count - 1,
    "usage-string": str,
    "usage-huge": lambda count: count + 10**18,
    "usage-nan": lambda _: float("nan"),
}


def garble(events: list[Event], kinds: set[str], *, stream: bool) -> list[Event]:
    """Change what the events say about usage, as the faults of these kinds want."""
    for kind in kinds & {"no-usage", *_GARBLED}:
        events = [Event(_garbled(event.data, kind), event.name) for event in events]
    if "no-usage" in kinds:
        events = [e for e in events if not (isinstance(e.data, dict) and e.data.get("choices") == [])]
    if "usage-twice" in kinds and stream:
        at = usage_position(events)
        events.insert(at, events[at])
    return events


def usage_position(events: list[Event]) -> int:
    """The last event that tells the usage; without one, the last that is an object."""
    tells = [at for at, event in enumerate(events) if _tells(event.data)]
    return (tells or [at for at, event in enumerate(events) if isinstance(event.data, dict)])[-1]


def _tells(data: object) -> bool:
    return isinstance(data, dict) and any(
        (name in _USAGE and isinstance(value, dict)) or (name in _NESTING and _tells(value))
        for name, value in data.items()
    )


def _garbled(data: Any, kind: str) -> Any:
    if not isinstance(data, dict):
        return data
    changed = {}
    for name, value in data.items():
        if name in _USAGE and isinstance(value, dict):
            if kind != "no-usage":
                changed[name] = _each_count(value, _GARBLED[kind])
        else:
            changed[name] = _garbled(value, kind) if name in _NESTING else value
    return changed


def _each_count(value: Any, change: Callable[[int], object]) -> Any:
    if isinstance(value, dict):
        return {name: _each_count(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [_each_count(part, change) for part in value]
    return change(value) if isinstance(value, int) else value
