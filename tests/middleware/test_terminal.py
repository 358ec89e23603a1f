"""However a request ends, its admission ends exactly once, behind its records, and nothing stays held."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route

from respan_guard.middleware import GuardMiddleware
from respan_guard.usage import Usage
from tests.middleware.support import CHAT, QUESTION, App, Exchange, Ledger, call, chunks, gateway, make_guard, reply

STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
BROKEN = LookupError("the app's own")


def body(part: bytes, *, more: bool = True) -> dict[str, Any]:
    """A message of the body."""
    return {"type": "http.response.body", "body": part, "more_body": more}


# Each cell is an app and what must be booked for it: usage read, presumed, or nothing.


async def completes(scope: Any, receive: Any, send: Any) -> None:
    """A whole stream."""
    await send(STREAM)
    for part in chunks():
        await send(body(part))
    await send(body(b"", more=False))


async def completes_at_once(scope: Any, receive: Any, send: Any) -> None:
    """A whole JSON reply."""
    await send(STREAM | {"headers": [(b"content-type", b"application/json")]})
    await send(body(json.dumps(reply()).encode(), more=False))


async def raises_before_start(scope: Any, receive: Any, send: Any) -> None:
    """Nothing was answered."""
    raise BROKEN


async def raises_after_start(scope: Any, receive: Any, send: Any) -> None:
    """Cut off by a fault of the app."""
    await send(STREAM)
    await send(body(chunks()[0]))
    raise BROKEN


async def never_sends(scope: Any, receive: Any, send: Any) -> None:
    """The app returns without an answer."""


async def sends_start_only(scope: Any, receive: Any, send: Any) -> None:
    """A start and nothing behind it."""
    await send(STREAM)


async def answers_an_error(scope: Any, receive: Any, send: Any) -> None:
    """The provider refused: nothing was spent."""
    await send(STREAM | {"status": 500})
    await send(body(b'{"error": {"message": "no"}}', more=False))


async def times_out_inside(scope: Any, receive: Any, send: Any) -> None:
    """The app gives up by itself and answers 504: what it had asked of the provider goes on, and is billed."""
    try:
        async with asyncio.timeout(0):
            await asyncio.sleep(3600)
    except TimeoutError:
        await send(STREAM | {"status": 504})
        await send(body(b"late", more=False))


async def closes_its_generator(scope: Any, receive: Any, send: Any) -> None:
    """The source of the stream is closed half way."""

    async def source() -> AsyncIterator[bytes]:
        for part in chunks():
            yield part

    parts = source()
    await send(STREAM)
    await send(body(await anext(parts)))
    await parts.aclose()  # type: ignore[attr-defined]  # it is a generator
    await send(body(b"", more=False))


CELLS: list[tuple[App, list[str]]] = [
    (completes, ["usage"]),
    (completes_at_once, ["usage"]),
    (raises_before_start, []),
    (raises_after_start, ["presumed"]),
    (never_sends, []),
    (sends_start_only, ["presumed"]),
    (answers_an_error, []),
    (times_out_inside, ["presumed"]),
    (closes_its_generator, ["presumed"]),
]


def plain(app: App, guard: Any) -> App:
    """Only the door."""
    return gateway(app, guard)


async def passing(request: Any, call_next: Any) -> Any:
    """A dispatch that does nothing."""
    return await call_next(request)


def base_outside(app: App, guard: Any) -> App:
    """BaseHTTPMiddleware around the door."""
    return BaseHTTPMiddleware(gateway(app, guard), dispatch=passing)


def base_inside(app: App, guard: Any) -> App:
    """BaseHTTPMiddleware behind the door."""
    return gateway(BaseHTTPMiddleware(app, dispatch=passing), guard)


def gzip_inside(app: App, guard: Any) -> App:
    """A response that is compressed behind the door."""
    return gateway(GZipMiddleware(app, minimum_size=1), guard)


def mounted(app: App, guard: Any) -> App:
    """Door and app mounted in another app."""
    return Starlette(routes=[Mount("/inner", app=gateway(app, guard))])


WRAPPINGS = [plain, base_outside, base_inside, gzip_inside, mounted]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize(("app", "kinds"), CELLS, ids=lambda value: getattr(value, "__name__", ""))
async def test_terminal_events(app: App, kinds: list[str], wrapping: Callable[[App, Any], App]) -> None:
    """Each way to end, in each wrapping: one end, the right entry, nothing held, the app's own exception."""
    guard, ledger = make_guard()
    path = "/inner" + CHAT if wrapping is mounted else CHAT
    headers = [(b"accept-encoding", b"gzip")]
    exchange = await call(wrapping(app, guard), path, customer="org_1", headers=headers, catch=True)
    if app in (raises_before_start, raises_after_start) and wrapping is not mounted:
        assert exchange.error is BROKEN
    assert ledger.kinds == kinds
    await ledger.settled(1)


# -- cancellation and disconnects --------------------------------------------------------------------


class Waiting:
    """An app that says when it is in the middle, and waits there."""

    def __init__(self, *, started: bool, clean_up: bool = False) -> None:
        self.here = asyncio.Event()
        self.started = started
        self.clean_up = clean_up

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.started:
            await send(STREAM)
            await send(body(chunks()[0]))
        self.here.set()
        try:
            await asyncio.sleep(3600)
        finally:
            if self.clean_up:
                self.here.clear()
                await asyncio.sleep(3600)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("times", [1, 2])
async def test_cancellation(started: bool, times: int) -> None:
    """Cancelled once, or again while the app cleans up: one end, and the call that was cut off is presumed."""
    guard, ledger = make_guard()
    app = Waiting(started=started, clean_up=times == 2)
    task = asyncio.create_task(call(gateway(app, guard), customer="org_1"))
    await app.here.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ledger.kinds == ["presumed"]
    await ledger.settled(1)


async def test_cancelled_twice_in_one_breath() -> None:
    """A second cancellation before the first is handled changes nothing: nothing is awaited at the end."""
    guard, ledger = make_guard()
    app = Waiting(started=True)
    task = asyncio.create_task(call(gateway(app, guard), customer="org_1"))
    await app.here.wait()
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ledger.settled(1)


@pytest.mark.parametrize("kind", ["asyncio.timeout", "anyio scope"])
async def test_cancelled_from_outside(kind: str) -> None:
    """A timeout around the door ends the request like any cancellation."""
    guard, ledger = make_guard()
    app = Waiting(started=True)
    door = gateway(app, guard)
    if kind == "asyncio.timeout":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await call(door, customer="org_1")
    else:
        with anyio.move_on_after(0.01) as scope:
            await call(door, customer="org_1")
        assert scope.cancelled_caught
    assert ledger.kinds == ["presumed"]
    await ledger.settled(1)


async def test_cancelled_while_being_admitted() -> None:
    """A request that is cancelled while storage thinks leaves nothing behind, and the app never runs."""
    guard, ledger = make_guard()
    lane: Any = guard.lane()
    submit = lane.submit
    reached = asyncio.Event()

    async def slow(op: Any) -> Any:
        reached.set()
        await asyncio.sleep(3600)
        return await submit(op)

    lane.submit = slow
    task = asyncio.create_task(call(gateway(Waiting(started=True), guard), customer="org_1"))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ledger.settled(0)


async def test_the_closed_coroutine_of_a_request() -> None:
    """A server that throws the request's coroutine away (GeneratorExit) ends the request too."""
    guard, ledger = make_guard()
    app = Waiting(started=True)
    coroutine = call(gateway(app, guard), customer="org_1")
    while not app.here.is_set():
        coroutine.send(None)
    coroutine.close()
    await ledger.settled(1)


async def streaming(scope: Any, receive: Any, send: Any) -> None:
    """Starlette's StreamingResponse, which listens for the disconnect and then returns as if all was well."""

    async def parts() -> AsyncIterator[bytes]:
        for part in chunks()[:2]:
            yield part
            await asyncio.sleep(0.01)
        await asyncio.sleep(3600)

    await StreamingResponse(parts(), media_type="text/event-stream")(scope, receive, send)


@pytest.mark.parametrize("wrapping", [plain, base_outside, base_inside, gzip_inside])
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_a_client_that_leaves_mid_stream(spec: str, wrapping: Callable[[App, Any], App]) -> None:
    """The app returns normally, or the send raises as newer servers do: one end, the call presumed."""
    guard, ledger = make_guard()
    gone = asyncio.Event()
    seen = 0

    async def on_send(message: Any) -> None:
        nonlocal seen
        if message.get("body"):
            seen += 1
            if seen == 2:
                gone.set()
                if spec == "2.4":
                    raise OSError("the client is gone")

    exchange = await call(
        wrapping(streaming, guard),
        customer="org_1",
        disconnect=gone,
        on_send=on_send,
        catch=True,
        asgi={"version": "3.0", "spec_version": spec},
    )
    assert exchange.error is None or spec == "2.4"
    assert ledger.kinds == ["presumed"]
    await ledger.settled(1)


@pytest.mark.parametrize("when", ["before the answer", "after the last byte"])
async def test_a_client_that_leaves_early_or_late(when: str) -> None:
    """An app that goes on for a client that is gone is billed for what it did, as its bytes say."""
    guard, ledger = make_guard()
    gone = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if when == "before the answer":
            gone.set()
            assert (await receive())["type"] == "http.disconnect"
        await completes(scope, receive, send)
        gone.set()
        assert (await receive())["type"] == "http.disconnect"

    await call(gateway(app, guard), customer="org_1", disconnect=gone)
    assert ledger.kinds == ["usage"]
    await ledger.settled(1)


@pytest.mark.parametrize("parts", [[], [b'{"model": "gpt-4o-mini",']])
async def test_a_client_that_leaves_while_it_asks(parts: list[bytes]) -> None:
    """A body that never arrives: no admission, no hold, and the app is not run for nobody."""
    guard, ledger = make_guard()
    messages: list[Any] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.disconnect"})
    ran: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ran.append(True)

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        ran.append(True)

    scope = {"type": "http", "path": CHAT, "method": "POST", "headers": [(b"x-customer", b"org_1")]}
    await gateway(app, guard)(scope, receive, send)
    assert ran == []
    assert ledger.ops == []


# -- work behind the response ------------------------------------------------------------------------


async def test_background_tasks_belong_to_the_request() -> None:
    """What a background task records is still charged to the request's admission; the end comes after it."""
    guard, ledger = make_guard()

    async def later() -> None:
        assert ledger.kinds == []
        await guard.record(Usage(model="gpt-4o-mini", input_tokens=7, output_tokens=3))

    async def endpoint(request: Request) -> Response:
        await guard.admit("org_1")
        return Response("ok", background=BackgroundTask(later))

    app = Starlette(routes=[Route("/ask", endpoint, methods=["POST"])])
    await call(GuardMiddleware(app, guard), "/ask")
    assert [(entry.customer, entry.input_tokens) for entry in ledger.entries] == [("org_1", 7)]
    await ledger.settled(1)


async def test_usage_after_the_end_is_still_booked() -> None:
    """A task that outlives its request records late: the entry is kept, and draws from no ended hold."""
    guard, ledger = make_guard()
    go = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def late() -> None:
        await go.wait()
        await guard.record(Usage(model="gpt-4o-mini", input_tokens=7), customer_identifier="org_1")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(late()))
        await answers_an_error(scope, receive, send)

    await call(gateway(app, guard), customer="org_1")
    await ledger.settled(1)
    go.set()
    await tasks[0]
    assert [entry.customer for entry in ledger.entries] == ["org_1"]


async def test_what_another_door_recorded_is_not_read_off_the_response_again() -> None:
    """If the app recorded the call itself, the response's usage is the same call and is left alone."""
    guard, ledger = make_guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guard.record(Usage(model="gpt-4o-mini", input_tokens=10, output_tokens=5))
        await completes(scope, receive, send)

    await call(gateway(app, guard), customer="org_1")
    assert len(ledger.entries) == 1
    assert ledger.entries[0].source == "manual"
    await ledger.settled(1)


# -- many at once ------------------------------------------------------------------------------------


async def test_a_hundred_requests_that_end_in_every_way_at_once() -> None:
    """Concurrent requests of several customers don't mix: each ends once, and the ledger adds up."""
    guard, ledger = make_guard()
    waiting = Waiting(started=True)
    apps: list[App] = [app for app, _ in CELLS] + [waiting]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await apps[int(scope["query_string"])](scope, receive, send)

    door = gateway(app, guard)

    def ask(number: int) -> Awaitable[Exchange]:
        which = str(number % len(apps)).encode()
        return call(door, customer=f"org_{number % 7}", query_string=which, catch=True)

    tasks = [asyncio.ensure_future(ask(number)) for number in range(100)]
    await waiting.here.wait()
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await ledger.settled(100)
    expected = [kind for number in range(100) for kind in (*[kinds for _, kinds in CELLS], ["presumed"])[number % 10]]
    assert sorted(ledger.kinds) == sorted(expected)


async def test_holds_live_only_while_the_request_does() -> None:
    """While the app works the bound is held; afterwards only what was spent counts."""
    guard, ledger = make_guard()
    held: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        holds = await guard.lane().call(lambda backend: backend.holds(now=guard.now_ms()))
        held.extend(hold.cost for hold in holds)
        await completes(scope, receive, send)

    await call(gateway(app, guard), customer="org_1", body=json.dumps(QUESTION).encode())
    (cost,) = [entry.cost for entry in ledger.entries]
    assert cost is not None
    assert 0 < cost < held[0]
    await ledger.settled(1)
    _only(ledger)


def _only(ledger: Ledger) -> None:
    assert {op.customer for op in ledger.admits} == {"org_1"}
