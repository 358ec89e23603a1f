"""How long calls took, and when the first text of a stream came, by the guard's clock."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard
from respan_guard.testing import FakeClock, StandInProvider
from respan_guard.testing.provider import Answer, Gate

from .support import ASK, CHAT, CLAUDE, claude, open_ai, records


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands still."""
    return FakeClock()


@pytest.fixture
def timed(clock: FakeClock, tmp_path: Path) -> Guard:
    """A guard with that clock."""
    return Guard("memory://", clock=clock, journal_dir=tmp_path)


@contextmanager
def stream(url: str, guard: Guard, kind: str) -> Generator[Any]:
    """A stream of four words."""
    if kind == "messages":
        with guard.wrap(claude(url)) as anthropic:
            yield anthropic.messages.create(model=CLAUDE, max_tokens=50, messages=ASK, stream=True)
        return
    with guard.wrap(open_ai(url)) as client:
        if kind == "responses":
            yield client.responses.create(model=CHAT, input="hello", stream=True)
        else:
            yield client.chat.completions.create(model=CHAT, messages=ASK, stream=True)


@pytest.mark.parametrize("kind", ["chat", "responses", "messages"])
def test_streams_tell_when_their_first_text_came(
    timed: Guard, clock: FakeClock, provider: StandInProvider, url: str, kind: str
) -> None:
    """What comes before the first text (roles, ids, empty parts) is no token; the latency is that of the whole."""
    gate = Gate()
    provider.script(Answer(text="moon star sun sky", chunks=4, gate=gate))
    with stream(url, timed, kind) as events:
        clock.advance(0.25)
        seen = ""
        while "moo" not in seen:
            gate.release()
            seen += str(next(events))
        clock.advance(1)
        gate.open()
        list(events)
    (record,) = records(timed)
    assert (record.usage.ttft_ms, record.usage.latency_ms) == (250, 1250)


def test_a_whole_reply_has_a_latency_only(timed: Guard, provider: StandInProvider, url: str) -> None:
    """There is no first token where all come at once."""
    with timed.wrap(open_ai(url)) as client:
        client.chat.completions.create(model=CHAT, messages=ASK)
    (record,) = records(timed)
    assert (record.usage.ttft_ms, record.usage.latency_ms) == (None, 0)


def test_a_stream_without_text_has_no_first_token(
    timed: Guard, clock: FakeClock, provider: StandInProvider, url: str
) -> None:
    """Role and end alone are no token."""
    provider.script(Answer(text="", output_tokens=0))
    with stream(url, timed, "chat") as events:
        clock.advance(2)
        list(events)
    (record,) = records(timed)
    assert (record.usage.ttft_ms, record.usage.latency_ms) == (None, 2000)
