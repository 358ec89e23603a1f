"""The guard opens and closes with the app, and the app's own lifespan is not disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient
from uvicorn.lifespan.on import LifespanOn

from respan_guard.errors import GuardError
from respan_guard.guard import Guard
from respan_guard.middleware import GuardMiddleware
from respan_guard.usage import Usage
from tests.middleware.support import make_guard, provider


class Spy(Guard):
    """A guard that says when it is opened and closed."""

    def __init__(self, events: list[str], storage: str = "memory://", **options: Any) -> None:
        super().__init__(storage, **options)
        self.events = events

    async def open(self) -> None:
        self.events.append("guard opens")
        await super().open()

    async def aclose(self) -> None:
        self.events.append("guard closes")
        await super().aclose()


async def run(app: Any, events: list[str], *, stop: bool = True) -> BaseException | None:
    """Play a server: start, then stop; what the app answers becomes events."""
    inbox: list[dict[str, Any]] = [{"type": "lifespan.startup"}]
    if stop:
        inbox.append({"type": "lifespan.shutdown"})

    async def receive() -> dict[str, Any]:
        if not inbox:
            await asyncio.sleep(3600)
        return inbox.pop(0)

    async def send(message: dict[str, Any]) -> None:
        events.append(message["type"].removeprefix("lifespan."))

    try:
        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    except BaseException as error:
        return error
    return None


async def test_open_before_the_app_starts_and_close_after_it_stopped() -> None:
    """The guard is there for all that the app's lifespan does, and closes before the server is told."""
    events: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
        events.append("app starts")
        yield {"key": "value"}
        events.append("app stops")

    app = Starlette(lifespan=lifespan)
    app.add_middleware(GuardMiddleware, guard=Spy(events))
    assert await run(app, events) is None
    assert events == [
        "guard opens",
        "app starts",
        "startup.complete",
        "app stops",
        "guard closes",
        "shutdown.complete",
    ]


async def raises(scope: Any, receive: Any, send: Any) -> None:
    """An app that knows no lifespan, as the specification has it."""
    raise RuntimeError("unknown scope")


async def returns(scope: Any, receive: Any, send: Any) -> None:
    """An app that ignores what it doesn't know."""


async def reads_and_raises(scope: Any, receive: Any, send: Any) -> None:
    """An app that looks before it gives up."""
    await receive()
    raise KeyError("path")


async def asserts(scope: Any, receive: Any, send: Any) -> None:
    """An app that is for requests only."""
    if scope["type"] != "http":
        raise AssertionError


async def is_for_requests(scope: Any, receive: Any, send: Any) -> None:
    """As Django says it."""
    raise ValueError("Django can only handle ASGI/HTTP connections, not lifespan.")


async def is_not_implemented(scope: Any, receive: Any, send: Any) -> None:
    """As many examples say it."""
    raise NotImplementedError(scope["type"])


@pytest.mark.parametrize(
    "app", [raises, returns, reads_and_raises, asserts, is_for_requests, is_not_implemented, provider]
)
async def test_apps_without_a_lifespan(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    """For an app without a lifespan the guard still opens and closes with the server, and nobody is warned."""
    events: list[str] = []
    assert await run(GuardMiddleware(app, Spy(events)), events) is None
    assert events == ["guard opens", "startup.complete", "guard closes", "shutdown.complete"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("error", [ValueError("SECRET_KEY is not set"), KeyError("DATABASE_URL"), AssertionError("no")])
async def test_an_app_that_cannot_be_built_does_not_start_silently(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette builds its middlewares when it is asked for the lifespan: what they raise is logged and the server's.

    Servers that are told to go on without a lifespan still have an open guard for their requests.
    """
    events: list[str] = []

    def broken(app: Any) -> Any:
        raise error

    guard = Spy(events)
    app = GuardMiddleware(Starlette(middleware=[Middleware(broken)]), guard)
    assert await run(app, events) is error
    assert events == ["guard opens"]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    async with guard.admit("org_1") as admission:
        assert admission.customer_identifier == "org_1"
    await guard.aclose()


@pytest.mark.parametrize("how", ["on", "auto"])
async def test_uvicorn_decides_on_an_app_that_cannot_be_built(how: Literal["on", "auto"]) -> None:
    """With `lifespan="on"` it does not start, with "auto" it does, as without the guard."""

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("SECRET_KEY is not set")

    guard, _ = make_guard()
    for app in (broken, GuardMiddleware(broken, guard)):
        config = uvicorn.Config(app, lifespan=how, log_config=None)
        lifespan = LifespanOn(config)
        await lifespan.startup()
        assert lifespan.should_exit is (how == "on")
    await guard.aclose()


async def test_a_failing_start_of_the_app_is_the_apps() -> None:
    """The app's own failure is told and raised as it is, and the guard is closed."""
    events: list[str] = []
    error = RuntimeError("no database")

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        if app is not None:
            raise error
        yield

    assert await run(GuardMiddleware(Starlette(lifespan=lifespan), Spy(events)), events) is error
    assert events == ["guard opens", "guard closes", "startup.failed"]


async def test_a_failing_stop_of_the_app_is_the_apps() -> None:
    """A failure at shutdown is told and raised, behind the guard's close."""
    events: list[str] = []
    error = RuntimeError("stuck")

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        raise error

    assert await run(GuardMiddleware(Starlette(lifespan=lifespan), Spy(events)), events) is error
    assert events == ["guard opens", "startup.complete", "guard closes", "shutdown.failed"]


async def test_a_guard_that_cannot_open_stops_the_start(tmp_path: Path) -> None:
    """An app whose limits can't be kept does not start: servers would go on without them otherwise."""
    events: list[str] = []
    (tmp_path / "guard.db").write_bytes(b"this is no database, and longer than a header of one" * 9)
    guard = Guard(f"sqlite:///{tmp_path}/guard.db")
    started: list[bool] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        started.append(True)
        yield

    error = await run(GuardMiddleware(Starlette(lifespan=lifespan), guard), events)
    assert isinstance(error, GuardError)
    assert events == ["startup.failed"]
    assert started == []


async def test_what_waits_is_stored_at_shutdown(tmp_path: Path) -> None:
    """A record that nobody waited for is in the store once the server was told that shutdown is complete."""
    events: list[str] = []
    url = f"sqlite:///{tmp_path}/guard.db"
    guard = Guard(url)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        guard.record_soon(Usage(model="gpt-4o-mini", input_tokens=7), customer_identifier="org_1")

    assert await run(GuardMiddleware(Starlette(lifespan=lifespan), guard), events) is None
    async with Guard(url) as later:
        assert [record.usage.input_tokens async for record in later.records()] == [7]


async def test_a_cancelled_lifespan_closes_the_guard() -> None:
    """A server that cancels the lifespan (hypercorn) leaves no open guard, whatever the app does about it."""
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await receive()

    task = asyncio.create_task(run(GuardMiddleware(app, Spy(events)), events, stop=False))
    while "startup.complete" not in events:
        await asyncio.sleep(0)
    task.cancel()
    assert isinstance(await task, asyncio.CancelledError)
    assert events.count("guard closes") == 1


async def test_two_doors_open_and_close_in_pairs(tmp_path: Path) -> None:
    """Two middlewares of one guard each open and close it, and the guard is there for the outer one to the end."""
    events: list[str] = []
    guard = Spy(events, f"sqlite:///{tmp_path}/guard.db")
    app = GuardMiddleware(GuardMiddleware(Starlette(), guard), guard)
    assert await run(app, events) is None
    assert events.count("guard opens") == events.count("guard closes") == 2


def test_lifespan_state_passes() -> None:
    """What an app keeps in the lifespan's state reaches its requests."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
        yield {"pool": "here"}

    guard, _ = make_guard()
    app = FastAPI(lifespan=lifespan)
    app.add_middleware(GuardMiddleware, guard=guard)

    @app.get("/state")
    async def state(request: Request) -> str:
        return str(request.state.pool)

    with TestClient(app) as client:
        assert client.get("/state").json() == "here"
