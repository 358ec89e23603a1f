"""A gateway that does not wait for the reply: what it had asked of the provider is billed, and presumed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import httpx2
import openai
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from respan_guard import Guard
from respan_guard.middleware import GuardMiddleware
from respan_guard.testing import StandInProvider
from respan_guard.usage import Usage
from tests.middleware.support import CHAT, App, Ledger, call, gateway, make_guard


async def answer(send: Any, status: int) -> None:
    """An error of the app's."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"no", "more_body": False})


def answering(status: int) -> App:
    """An app that answers with an error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, status)

    return app


def raising(error: BaseException) -> App:
    """An app that raises."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    return app


async def book(app: App, *, wrap: Callable[[App], App] | None = None, **options: Any) -> Ledger:
    """Let one request through the door and give the ledger."""
    guard, ledger = make_guard()
    door: App = gateway(app, guard)
    await call(door if wrap is None else wrap(door), customer="org_1", catch=True, **options)
    await ledger.settled(1)
    return ledger


@pytest.mark.parametrize("status", [408, 499, 504])
async def test_answers_of_who_gave_up_are_presumed(status: int) -> None:
    """A timeout or a client that left, by the app's own word: what was held is booked."""
    ledger = await book(answering(status))
    assert ledger.kinds == ["presumed"]
    assert ledger.entries[0].source == "presumed"
    assert ledger.entries[0].cost == ledger.admits[0].cost > 0


@pytest.mark.parametrize("status", [302, 400, 404, 422, 429, 500, 502, 503])
async def test_other_errors_cost_nothing(status: int) -> None:
    """They say that there was no reply, or that nothing was asked."""
    assert (await book(answering(status))).entries == []


async def test_only_known_calls_are_presumed() -> None:
    """Of a request that tells of no call a timeout says nothing."""
    for app in (answering(504), raising(TimeoutError())):
        guard, ledger = make_guard()
        await call(gateway(app, guard), "/v1/ask", customer="org_1", body=b'{"question": "hi"}', catch=True)
        await ledger.settled(1)
        assert ledger.entries == []


TIMEOUTS = [TimeoutError(), httpx.ReadTimeout("x"), httpx2.ReadTimeout("x")]


@pytest.mark.parametrize("error", TIMEOUTS, ids=["builtin", "httpx", "httpx2"])
@pytest.mark.parametrize("starlette", [False, True])
async def test_a_timeout_that_the_app_raises_is_presumed(error: Exception, starlette: bool) -> None:
    """Also where a framework inside makes its error page of it and raises on."""
    app = raising(error)
    if starlette:

        async def endpoint(request: Request) -> Response:
            raise error

        app = Starlette(routes=[Route(CHAT, endpoint, methods=["POST"])])
    assert (await book(app)).kinds == ["presumed"]


@pytest.mark.parametrize(
    "error", [httpx.ConnectTimeout("x"), httpx2.PoolTimeout("x"), httpx.ReadError("x"), KeyError()]
)
async def test_what_was_never_sent_and_other_failures_cost_nothing(error: Exception) -> None:
    """Without a connection nothing was asked; other failures tell of no call."""
    assert (await book(raising(error))).entries == []


async def passing(request: Any, call_next: Any) -> Any:
    """A dispatch that does nothing."""
    return await call_next(request)


def returns() -> Awaitable[None]:
    """The app just ends."""
    return asyncio.sleep(0)


async def raises() -> None:
    """The app makes an error of it."""
    raise RuntimeError("nobody is there")


@pytest.mark.parametrize("then", [returns, raises, 499, 500])
@pytest.mark.parametrize("inside", [False, True])
async def test_a_client_that_leaves_before_the_answer_is_presumed(then: Any, inside: bool) -> None:
    """The app hears that nobody waits and stops, whatever it makes of that; the provider does not stop."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await (answer(send, then) if isinstance(then, int) else then())

    gone = asyncio.Event()
    gone.set()
    inner = BaseHTTPMiddleware(app, dispatch=passing) if inside else app
    ledger = await book(inner, disconnect=gone)
    assert ledger.kinds == ["presumed"]
    assert ledger.entries[0].cost == ledger.admits[0].cost


async def test_a_client_that_leaves_after_an_error_began_costs_nothing() -> None:
    """It left with its answer, which says that the provider made none."""
    gone = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await answer(send, 502)
        gone.set()
        assert (await receive())["type"] == "http.disconnect"

    assert (await book(app, disconnect=gone)).entries == []


async def test_a_mounted_gateway_hears_its_client_leave() -> None:
    """The door that joins another one of its guard listens, too."""
    guard, ledger = make_guard()
    gone = asyncio.Event()
    gone.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    await call(GuardMiddleware(gateway(app, guard), guard), customer="org_1", disconnect=gone)
    await ledger.settled(1)
    assert ledger.kinds == ["presumed"]


async def test_a_refusal_is_no_call() -> None:
    """An app that is refused what it admits has sent nothing, though its client has left."""
    guard, ledger = make_guard()
    await guard.update_customer("broke", total_budget=0)
    gone = asyncio.Event()
    gone.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        async with guard.admit("broke"):
            pass

    exchange = await call(gateway(app, guard), customer="org_1", disconnect=gone)
    assert exchange.status == 402
    assert ledger.entries == []


async def test_what_was_recorded_is_not_presumed_as_well() -> None:
    """An app that books the call itself and answers 504 is charged once."""
    guard, ledger = make_guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guard.record(Usage(model="gpt-4o-mini", input_tokens=10, output_tokens=5))
        await answer(send, 504)

    await call(gateway(app, guard), customer="org_1")
    await ledger.settled(1)
    assert ledger.kinds == ["usage"]


@pytest.mark.parametrize("fault", ["stall-before", "error"])
async def test_a_wrapped_client_knows_better(fault: Any) -> None:
    """Where it took part it tells what is owed: once what it sent and gave up on, nothing for an error."""
    guard = Guard("memory://", default_limits={"period_budget": 10})
    provider = StandInProvider()
    provider.fault(fault)
    with provider.serve() as url:
        sdk = openai.AsyncOpenAI(api_key="k", base_url=url + "/v1", max_retries=0, timeout=0.2)
        async with guard.wrap(sdk) as client:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                try:
                    await client.chat.completions.create(
                        model="gpt-4o-mini", max_tokens=50, messages=[{"role": "user", "content": "hello"}]
                    )
                except openai.OpenAIError:
                    await answer(send, 504)

            await call(gateway(app, guard), customer="org_1")
    await guard.flush()
    found = [record.source async for record in guard.records("org_1")]
    assert found == (["presumed"] if fault == "stall-before" else [])
    assert (await guard.status("org_1")).limits[0].held == 0


@pytest.mark.parametrize("policy", ["hold", "estimate", "flag"])
async def test_what_is_presumed_follows_missing_usage(policy: str) -> None:
    """As for a reply without usage."""
    guard, ledger = make_guard(missing_usage=policy)
    await call(gateway(answering(504), guard), customer="org_1")
    await ledger.settled(1)
    assert ledger.kinds == ["presumed"]
    assert (ledger.entries[0].cost is None) is (policy == "flag")
