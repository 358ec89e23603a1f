"""Whose a call is: right or nobody's, and the same for a wrapped client as for `guard.record` and `guard.current()`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from decimal import Decimal
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from respan_guard import Customer, Guard, GuardMiddleware, Usage
from respan_guard.context import Slot
from respan_guard.entering import entered
from respan_guard.testing import StandInProvider

from .support import ASK, CHAT, arecords, async_open_ai

DIME = Decimal("0.1")
Told = Callable[[], Coroutine[Any, Any, None]]


async def told(guard: Guard, url: str, endpoint: Callable[[Told], Awaitable[None]]) -> list[list[str]]:
    """What an endpoint's work is told apart by: for each thing it tells, the customers by every way to ask."""
    found: list[list[str]] = []
    async with guard, guard.wrap(async_open_ai(url)) as client:

        async def tell() -> None:
            before = len(await arecords(guard))
            await guard.record(Usage(cost=DIME))
            await client.chat.completions.create(model=CHAT, messages=ASK)
            admission = guard.current()
            found.append(["" if admission is None else admission.customer_identifier])
            found[-1] += [record.customer_identifier for record in (await arecords(guard))[before:]]

        async def serve(request: Request) -> JSONResponse:
            await endpoint(tell)
            return JSONResponse({})

        app = Starlette(routes=[Route("/", serve)])
        app.add_middleware(GuardMiddleware, guard=guard)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app") as http:
            assert (await http.get("/")).status_code == 200
    return found


async def test_work_that_outlives_its_admission_is_nobodys(guard: Guard, provider: StandInProvider, url: str) -> None:
    """A task begun for b within a's request, and going on after b's block, is nobody's: not a's."""

    async def endpoint(tell: Told) -> None:
        await guard.admit("a")
        over = asyncio.Event()

        async def later() -> None:
            await over.wait()
            await tell()

        async with guard.admit("b"):
            task = asyncio.create_task(later())
        over.set()
        await task
        await tell()

    assert await told(guard, url, endpoint) == [[""] * 3, ["a"] * 3]


async def test_a_threads_block_leaves_the_request_its_customer(
    guard: Guard, provider: StandInProvider, url: str
) -> None:
    """While a thread is in its block for b, and after, the request's own code works for a."""

    async def endpoint(tell: Told) -> None:
        await guard.admit("a")
        begun, done = threading.Event(), threading.Event()

        def for_b() -> str:
            with guard.sync.admit("b"):
                begun.set()
                done.wait(30)
                admission = guard.current()
                return "" if admission is None else admission.customer_identifier

        thread = asyncio.create_task(asyncio.to_thread(for_b))
        await asyncio.to_thread(begun.wait, 30)
        await tell()
        done.set()
        assert await thread == "b"
        await tell()

    assert await told(guard, url, endpoint) == [["a"] * 3] * 2


async def test_another_tasks_block_is_its_own(guard: Guard, provider: StandInProvider, url: str) -> None:
    """In a request that is nobody's, a block on the event loop is for its own code, not for what runs beside."""

    async def endpoint(tell: Told) -> None:
        over = asyncio.Event()

        async def later() -> None:
            await over.wait()
            await tell()

        async with guard.admit("b"):
            left_over = asyncio.create_task(later())
        async with guard.admit("c"):
            over.set()
            await left_over
            await asyncio.create_task(tell())
        begun, done = asyncio.Event(), asyncio.Event()

        async def for_d() -> None:
            async with guard.admit("d"):
                begun.set()
                await done.wait()

        task = asyncio.create_task(for_d())
        await begun.wait()
        await tell()
        done.set()
        await task

    assert await told(guard, url, endpoint) == [[""] * 3, ["c"] * 3, [""] * 3]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_threads_that_enter_blocks_at_once_leave_the_request_alone(guard: Guard, order: tuple[int, int]) -> None:
    """Two are let in before either enters its block: whichever does first, the request is a's again."""
    slot = Slot(guard, is_request=True)
    with entered(slot):
        await guard.admit("a")
        both = [guard.sync.admit(name) for name in ("b", "c")]
        for at in order:
            both[at].__enter__()
        assert slot.customer_identifier == "a"
        for at in reversed(order):
            both[at].__exit__()
        assert slot.customer_identifier == "a"
    guard.admissions.end(slot)


async def test_a_threads_block_leaves_the_requests_headers(guard: Guard) -> None:
    """What a client is told are its own limits, whoever else was let in meanwhile."""
    for name, rate in (("a", 10), ("b", 777)):
        await guard.put_customer(Customer(customer_identifier=name, rate_limit=rate))

    def serve(request: Request) -> JSONResponse:
        guard.sync.admit("a")
        with guard.sync.admit("b"):
            pass
        return JSONResponse({})

    app = Starlette(routes=[Route("/", serve)])
    app.add_middleware(GuardMiddleware, guard=guard)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app") as http:
        policy = (await http.get("/")).headers["ratelimit-policy"]
    assert '"rate_limit";q=10;' in policy
    assert "777" not in policy


@pytest.mark.parametrize(("first", "left"), [("a", "a"), (None, "")])
async def test_a_threads_block_leaves_the_requests_span(guard: Guard, first: str | None, left: str) -> None:
    """The request's span names the request's customer, or nobody; never that of a block within it."""
    slot = Slot(guard, is_request=True)
    attributes: dict[str, Any] = {}

    class Span:
        """Takes attributes."""

        def set_attribute(self, name: str, value: Any) -> None:
            """Take one."""
            attributes[name] = value

    slot.span = Span()  # type: ignore[assignment]
    with entered(slot):
        if first is not None:
            await guard.admit(first)
        with guard.sync.admit("b"):
            assert attributes["respan.customer_params.customer_identifier"] == left
    guard.admissions.end(slot)


async def test_a_name_stays_with_what_was_started_under_it(guard: Guard, provider: StandInProvider, url: str) -> None:
    """A task begun in `on_behalf_of` is for that customer to its end; a worker's jobs are for whom each one names."""

    async def endpoint(tell: Told) -> None:
        jobs: asyncio.Queue[str | None] = asyncio.Queue()

        async def work() -> None:
            while (customer := await jobs.get()) is not None:
                with guard.on_behalf_of(customer):
                    await tell()
            await tell()

        with guard.on_behalf_of("a"):
            worker = asyncio.create_task(work())
        for job in ("b", "c", None):
            jobs.put_nowait(job)
        await worker

    found = await told(guard, url, endpoint)
    assert [one[1:] for one in found] == [["b"] * 2, ["c"] * 2, ["a"] * 2]
