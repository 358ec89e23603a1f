"""Blocking calls that a signal's exception interrupts (a soft time limit, ^C): wherever it falls, they end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from respan_guard import Guard
from respan_guard.clients.door import Door
from respan_guard.clients.exchange import Exchange
from respan_guard.context import Slot
from respan_guard.entering import entered
from respan_guard.providers import Call

from .conftest import MakeGuard
from .support import ASK, CHAT, records

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
REPLY = {"id": "chatcmpl-abcdefghijklmnopqrstuvwx", "object": "chat.completion", "model": CHAT, "usage": USAGE}


class Interrupted(BaseException):
    """What a signal's handler raises."""


class Once:
    """Interrupts a function the first time, before it works or after it has."""

    def __init__(self, function: Callable[..., Any], *, after: bool = False) -> None:
        self.function = function
        self.after = after
        self.due = True

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Work, unless interrupted."""
        due, self.due = self.due, False
        if due and not self.after:
            raise Interrupted
        found = self.function(*args, **options)
        if due:
            raise Interrupted
        return found


def ask(guard: Guard, handle: Callable[[httpx2.Request], httpx2.Response] | None = None) -> None:
    """A call through a guarded transport, for c1."""
    inner = httpx2.MockTransport(handle or (lambda _: httpx2.Response(200, json=REPLY)))
    body = {"model": CHAT, "messages": ASK, "max_tokens": 50}
    with httpx2.Client(transport=guard.transport(inner)) as http, guard.on_behalf_of("c1"):
        http.post("http://p/v1/chat/completions", json=body)


def held(guard: Guard) -> Decimal | int:
    """What is held of the budget."""
    return sum(limit.held for limit in guard.sync.status("c1").limits)


def ended(guard: Guard, kinds: list[str]) -> None:
    """Nothing is held or renewed any more, and what was recorded is of these kinds."""
    gc.collect()
    deadline = time.monotonic() + 10  # a call that is collected is ended by a thread
    while (guard.renewer.live or held(guard)) and time.monotonic() < deadline:
        guard.sync.flush()
    assert guard.renewer.live == []
    assert held(guard) == 0
    assert [record.kind for record in records(guard)] == kinds


@pytest.fixture
def raising() -> Iterator[signal.Signals]:
    """A signal whose handler raises."""
    before = signal.signal(signal.SIGUSR1, _raise)
    yield signal.SIGUSR1
    signal.signal(signal.SIGUSR1, before)


def _raise(*_: object) -> None:
    raise Interrupted


# -- waiting to be let in --------------------------------------------------------------------------------------


class Untaken:
    """A future that is done when its waiter is interrupted."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self.future = future

    def result(self, timeout: float | None = None) -> Any:
        """Wait."""
        concurrent.futures.wait([self.future], timeout)
        del self  # as the real one does, so that the traceback does not hold it
        raise Interrupted

    def cancel(self) -> None:
        """Too late."""
        assert not self.future.cancel()


def test_an_answer_that_nobody_took(make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is let in just when its waiter is interrupted: nothing stays held, while the traceback lives on too."""
    guard = make_guard(default_limits={"total_budget": 1})
    start = asyncio.run_coroutine_threadsafe

    def started(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Any:
        return Untaken(start(work, loop))

    guard.sync.flush()
    with monkeypatch.context() as patched:
        if guard._homes.shared is None:
            patched.setattr(asyncio, "run_coroutine_threadsafe", started)
        else:  # nobody waits for another thread
            patched.setattr(Door, "open", _interrupted_after(Door.open))
        with pytest.raises(Interrupted) as caught:
            ask(guard)
    ended(guard, [])
    assert caught.traceback


def _interrupted_after(opened: Any) -> Any:
    async def then(door: Door, call: Call) -> Exchange:
        await opened(door, call)
        raise Interrupted

    return then


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
def test_a_real_signal_while_the_guard_decides(
    make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch, raising: signal.Signals
) -> None:
    """The signal comes when the call is let in, and its waiter has not heard of it yet."""
    guard = make_guard(default_limits={"total_budget": 1})
    opened = Door.open
    main = threading.main_thread().ident
    assert main is not None

    async def slowly(door: Door, call: Call) -> Exchange:
        exchange = await opened(door, call)
        signal.pthread_kill(main, raising)
        return exchange

    with monkeypatch.context() as patched:
        patched.setattr(Door, "open", slowly)
        with pytest.raises(Interrupted):
            ask(guard)
    ended(guard, [])
    ask(guard)
    ended(guard, ["usage"])


# -- while the provider is at it -------------------------------------------------------------------------------


def test_a_real_signal_while_the_provider_works(guard: Guard, raising: signal.Signals) -> None:
    """The provider has the request, so the call is presumed."""

    def work(_: httpx2.Request) -> httpx2.Response:
        signal.raise_signal(raising)
        raise AssertionError("the handler raises")

    with pytest.raises(Interrupted):
        ask(guard, work)
    ended(guard, ["presumed"])


def test_interrupted_when_it_fails(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks, and the signal comes while that is noted: the call is presumed all the same."""
    monkeypatch.setattr(Exchange, "failed", lambda *_: _raise())

    def drop(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError("gone")

    with pytest.raises(Interrupted):
        ask(guard, drop)
    ended(guard, ["presumed"])


# -- at the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("place", ["entry", "post", "unwatch", "usage", "settle"])
@pytest.mark.parametrize("claimed", [False, True])
def test_interrupted_while_it_is_booked(
    make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch, place: str, after: bool, claimed: bool
) -> None:
    """Before or after any step of the end of a call: its usage is booked once, and nothing stays held."""
    guard = make_guard(default_limits={"total_budget": 1})
    slot = Slot(guard, is_request=True)
    with entered(slot):
        admission = guard.sync.admit("c1", estimate=Decimal("0.5") if claimed else None).admission
        exchange = guard.sync.run(Door(guard, None, include_usage=True).open(_call()))
    feed = exchange.answered(200, "application/json", "")
    assert feed is not None
    feed(httpx2.Response(200, json=REPLY).content)
    target: Any = {
        "entry": guard.recorder,
        "post": admission._lane,
        "unwatch": guard.renewer,
        "usage": Exchange,
        "settle": type(admission),
    }[place]
    name = "_usage" if place == "usage" else place
    if place in ("usage", "settle"):
        once = Once(getattr(target, name), after=after)
        monkeypatch.setattr(target, name, lambda *args, **options: once(*args, **options))
    else:
        monkeypatch.setattr(target, name, Once(getattr(target, name), after=after))
    if place == "unwatch" and claimed:
        guard.admissions.end(slot)  # the call's end is then that of the admission
        assert once_left(target, name)
    with pytest.raises(Interrupted):
        exchange.finish()
    exchange.finish()
    monkeypatch.undo()
    guard.admissions.end(slot)
    ended(guard, ["usage"])
    assert guard.sync.status("c1").total_calls == 1


def once_left(target: Any, name: str) -> bool:
    """Whether the interruption is still to come."""
    return bool(getattr(target, name).due)


def _call() -> Call:
    from respan_guard.providers import call_from_request

    found = call_from_request("/v1/chat/completions", {"model": CHAT, "messages": ASK, "max_tokens": 50})
    assert found is not None
    return found
