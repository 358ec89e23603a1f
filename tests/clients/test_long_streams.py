"""Streams that told no usage, and brought more text than was held for: what passed is charged, by both doors."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import httpx2
import openai
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from respan_guard import Guard, GuardMiddleware
from respan_guard.money import from_nano
from respan_guard.providers import call_from_request
from respan_guard.testing import StandInProvider
from respan_guard.testing.provider import Answer

from .support import ASK, CHAT, arecords, async_open_ai, holds

LONG = 16_000
"""Tokens, four times as many as are held for a request without a cap."""


def long(provider: StandInProvider) -> None:
    """The next answer is a long one."""
    provider.script(Answer(text="word " * LONG, output_tokens=LONG, chunks=40))


async def drain(client: openai.AsyncOpenAI, **options: Any) -> None:
    """Read a stream to its end, whichever that is."""
    with suppress(openai.APIConnectionError, httpx2.TransportError):
        async for _ in await client.chat.completions.create(model=CHAT, messages=ASK, stream=True, **options):
            pass


def gateway(guard: Guard, upstream: httpx2.AsyncClient) -> Starlette:
    """A gateway that forwards streams by a client of its own."""

    async def forward(request: Request) -> StreamingResponse:
        asked = upstream.build_request("POST", request.url.path, content=await request.body())
        asked.headers.update({"authorization": "Bearer k", "content-type": "application/json"})
        found = await upstream.send(asked, stream=True)
        kind = {"content-type": found.headers["content-type"]}
        return StreamingResponse(found.aiter_raw(), found.status_code, kind, background=BackgroundTask(found.aclose))

    app = Starlette(routes=[Route("/v1/chat/completions", forward, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard, identify="header:x-user", include=["/v1/*"])
    return app


@pytest.mark.parametrize("missing", ["hold", "estimate"])
async def test_a_wrapped_client_presumes_what_passed(
    make_guard: Any, provider: StandInProvider, url: str, missing: str
) -> None:
    """The connection broke before the usage came."""
    guard: Guard = make_guard(missing_usage=missing)
    async with guard, guard.wrap(async_open_ai(url), customer="c1") as client:
        long(provider)
        provider.fault("drop-before-usage")
        await drain(client)
        (record,) = await arecords(guard)
        assert record.kind == "presumed"
        assert record.cost is not None
        assert provider.meter.total_cost <= record.cost < 2 * provider.meter.total_cost
        assert await holds(guard, "c1") == 0


async def test_a_gateway_presumes_what_passed(make_guard: Any, provider: StandInProvider, url: str) -> None:
    """The client did not ask for usage, as SDKs don't by themselves."""
    guard: Guard = make_guard()
    upstream = httpx2.AsyncClient(base_url=url)
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(gateway(guard, upstream)))
    sdk = openai.AsyncOpenAI(api_key="k", base_url="http://app/v1", default_headers={"x-user": "c1"}, http_client=http)
    async with guard, upstream, sdk as client:
        long(provider)
        await drain(client)
        (record,) = await arecords(guard)
        assert record.kind == "presumed"
        assert record.cost is not None
        assert provider.meter.total_cost <= record.cost < 2 * provider.meter.total_cost


@pytest.mark.parametrize("options", [{}, {"max_tokens": 5}], ids=["short", "capped"])
async def test_other_streams_cost_their_hold_as_ever(
    guard: Guard, provider: StandInProvider, url: str, options: dict[str, int]
) -> None:
    """Short ones, and those with a cap, which the provider keeps, however its text is counted."""
    body = {"model": CHAT, "messages": ASK, "stream": True, **options}
    held = guard.estimator.of_call(call_from_request("/v1/chat/completions", body)).cost
    async with guard, guard.wrap(async_open_ai(url), customer="c1") as client:
        provider.script(Answer(text="extraordinarily " * 50, output_tokens=5))
        provider.fault("drop-before-usage")
        await drain(client, **options)
        (record,) = await arecords(guard)
    assert record.kind == "presumed"
    assert record.cost == from_nano(held)
