"""A console over a store in memory, and requests to it as a browser would make them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from respan_guard import Customer, Guard, Usage
from respan_guard.console import Console
from respan_guard.testing import FakeClock

PASSWORD = "open sesame, please"
VIEWER = "only looking around"
SAME = {"sec-fetch-site": "same-origin"}


def make_guard(**options: Any) -> Guard:
    """A guard on a clock that stands still."""
    return Guard("memory://", clock=FakeClock(), default_limits={"rate_limit": 60, "period_budget": 5}, **options)


def client_of(guard: Guard, path: str = "", **options: Any) -> TestClient:
    """A client of the console, mounted."""
    if not {"auth", "open_to_all"} & options.keys():
        options = {"password": PASSWORD, "read_only_password": VIEWER, **options}
    app = Starlette(routes=[Mount(path or "/", Console(guard, **options))])
    return TestClient(app, base_url=f"http://console.example{path}", follow_redirects=False)


@asynccontextmanager
async def asking(guard: Guard) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """What gets pages of a console that is open to all, on this loop: what goes on behind one, goes on."""
    transport = httpx2.ASGITransport(app=Console(guard, open_to_all=True))
    async with httpx2.AsyncClient(transport=transport, base_url="http://console.example") as client:

        async def page(path: str) -> str:
            answer = await client.get(path)
            assert answer.status_code == 200, answer.text
            return answer.text

        yield page


def signed_in(guard: Guard, password: str = PASSWORD, path: str = "", **options: Any) -> TestClient:
    """A client that has signed in."""
    client = client_of(guard, path, **options)
    answer = client.post("/signin", data={"password": password}, headers=SAME)
    assert answer.status_code == 303, answer.text
    return client


def token_in(page: str) -> str:
    """The token of the forms of a page."""
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page)
    assert found is not None
    return found[1]


async def fill(guard: Guard) -> None:
    """Two customers, some calls of each kind, a refusal."""
    await guard.put_customer(
        Customer(customer_identifier="ann", name="Ann & Co", email="ann@example.com", period_budget=5, rate_limit=3)
    )
    for number in range(3):
        async with guard.admit("ann") as admission:
            usage = Usage(model="gpt-4o", provider="openai", input_tokens=1000, output_tokens=200, latency_ms=900,
                          trace_id=f"{number:032x}", response_id=f"chatcmpl-{number:016x}")  # fmt: skip
            await admission.record(usage)
    await guard.try_admit("ann")
    await guard.record(Usage(model="flux", cost=Decimal("0.04"), status="error"), "bob")
    await guard.record(Usage(model="unheard-of", input_tokens=5), "bob")
    await guard.flush()
