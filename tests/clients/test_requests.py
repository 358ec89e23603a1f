"""Wrapped clients inside guarded requests: one customer, one rate count, one record for each call."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, Any

import httpx2
import openai
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Header
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from respan_guard import Customer, Guard, GuardMiddleware, Usage
from respan_guard.testing import StandInProvider
from respan_guard.testing.provider import Answer

from .support import ASK, CHAT, arecords, async_open_ai, holds, open_ai, same

Who = Annotated[str, Header(alias="x-user")]


class Service:
    """The first example of the README, and its variations; `x-user` stands for its authentication."""

    def __init__(self, guard: Guard, url: str) -> None:
        self.guard = guard
        self.client = guard.wrap(async_open_ai(url, max_retries=2))
        self.blocking = guard.wrap(open_ai(url, max_retries=2))
        self.app = FastAPI()
        self.late: list[asyncio.Task[Any]] = []
        self._routes()

    async def ask(self, question: str) -> str:
        """One call."""
        reply = await self.client.responses.create(model=CHAT, input=question)
        return reply.output_text

    def _routes(self) -> None:
        guard, app = self.guard, self.app

        async def admitted(user: Who) -> None:
            await guard.admit(user)

        def admitted_in_a_thread(user: Who) -> None:
            guard.sync.admit(user)

        async def admitted_with_a_yield(user: Who) -> AsyncIterator[None]:
            await guard.admit(user)
            yield

        def yielding_in_a_thread(user: Who) -> Iterator[None]:
            guard.sync.admit(user)
            yield

        async def scoped(user: Who) -> AsyncIterator[None]:
            async with guard.admit(user):
                yield

        for path, dependency in {
            "async": admitted,
            "sync": admitted_in_a_thread,
            "yield": admitted_with_a_yield,
            "sync-yield": yielding_in_a_thread,
            "scoped": scoped,
        }.items():
            app.post(f"/{path}", dependencies=[Depends(dependency)])(self._endpoint())

        @app.post("/blocking", dependencies=[Depends(admitted)])
        def blocking(question: str) -> str:
            return self.blocking.responses.create(model=CHAT, input=question).output_text

        @app.post("/three", dependencies=[Depends(admitted)])
        async def three(question: str) -> list[str]:
            return list(await asyncio.gather(*[self.ask(question) for _ in range(3)]))

        @app.post("/stream", dependencies=[Depends(admitted)])
        async def stream(question: str) -> StreamingResponse:
            async def words() -> AsyncIterator[str]:
                async for chunk in await self.client.chat.completions.create(
                    model=CHAT, messages=[{"role": "user", "content": question}], stream=True
                ):
                    yield chunk.choices[0].delta.content or ""

            return StreamingResponse(words())

        @app.post("/background", dependencies=[Depends(admitted)])
        async def background(question: str, tasks: BackgroundTasks) -> str:
            tasks.add_task(self.ask, question)
            return "later"

        @app.post("/handled", dependencies=[Depends(admitted)])
        async def handled(question: str) -> str:
            try:
                return await self.ask(question)
            except openai.APIStatusError as error:
                return f"sorry: {error.status_code}"

        @app.post("/forgotten", dependencies=[Depends(admitted)])
        async def forgotten(question: str) -> str:
            self.late.append(asyncio.create_task(self.later(question)))
            return "later"

    async def later(self, question: str) -> str:
        """A call by a task that outlives its request."""
        await asyncio.sleep(0.05)
        return await self.ask(question)

    def _endpoint(self) -> Callable[[str], Awaitable[str]]:
        async def endpoint(question: str) -> str:
            return await self.ask(question)

        return endpoint

    async def post(self, path: str, user: str = "c1") -> httpx2.Response:
        """Send a request."""
        transport = httpx2.ASGITransport(app=self.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://app") as http:
            return await http.post(path, params={"question": "How far is the moon?"}, headers={"x-user": user})


async def _passing(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    return response


@pytest.fixture(params=["bare", "inside", "outside", "both"])
async def service(request: pytest.FixtureRequest, guard: Guard, url: str) -> AsyncIterator[Service]:
    """The service, with BaseHTTPMiddleware on neither, one or both sides of the guard."""
    made = Service(guard, url)
    if request.param in ("inside", "both"):
        made.app.add_middleware(BaseHTTPMiddleware, dispatch=_passing)
    made.app.add_middleware(GuardMiddleware, guard=guard)
    if request.param in ("outside", "both"):
        made.app.add_middleware(BaseHTTPMiddleware, dispatch=_passing)
    yield made
    made.blocking.close()
    await made.client.close()


PATHS = ["async", "sync", "yield", "sync-yield", "scoped", "blocking", "stream", "background", "three"]


@pytest.mark.parametrize("path", PATHS)
async def test_calls_belong_to_the_requests_customer(
    service: Service, guard: Guard, provider: StandInProvider, path: str
) -> None:
    """Wherever the app admits and calls: the admitted customer pays, and the request counts once."""
    async with guard:
        assert (await service.post(path)).status_code == 200
        found = await arecords(guard)
        same(found, provider)
        assert {record.customer_identifier for record in found} == {"c1"}
        assert len(found) == (3 if path == "three" else 1)
        assert (await guard.status("c1")).total_requests == 1
        assert await holds(guard, "c1") == 0


@pytest.mark.parametrize("path", ["async", "sync", "scoped", "blocking"])
async def test_an_escaped_refusal_of_a_call_is_the_apps_own(
    service: Service, guard: Guard, provider: StandInProvider, path: str
) -> None:
    """The request is let in, but its call holds more than the budget has: the app answers 402, not 500."""
    async with guard:
        await guard.put_customer(Customer(customer_identifier="c1", total_budget="0.0000001"))
        answer = await service.post(path)
        assert answer.status_code == 402
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["error"]["code"] == "total_budget"
        assert provider.meter.calls == []
        assert (await service.post("handled")).json() == "sorry: 402"


async def test_a_request_over_its_limit_makes_no_call(
    service: Service, guard: Guard, provider: StandInProvider
) -> None:
    """Refused in the dependency: 429, and the endpoint never runs."""
    async with guard:
        await guard.put_customer(Customer(customer_identifier="c1", rate_limit=1))
        assert [(await service.post("three")).status_code for _ in range(2)] == [200, 429]
        assert len(provider.meter.calls) == 3


async def test_a_task_that_outlives_its_request_is_nobodys(
    service: Service, guard: Guard, provider: StandInProvider
) -> None:
    """The customer's admission ended: what a forgotten task calls later is recorded, but not as theirs."""
    async with guard:
        await service.post("forgotten")
        await asyncio.gather(*service.late)
        (record,) = await arecords(guard)
        assert record.customer_identifier == ""
        assert record.cost == provider.meter.total_cost


async def test_requests_at_once_never_mix(service: Service, guard: Guard, provider: StandInProvider) -> None:
    """Forty requests of eight customers, by every path at once: each call is its own customer's."""
    async with guard:
        paths = ["async", "sync", "yield", "scoped", "blocking", "stream", "background", "handled"]
        sent = [(paths[n % 8], f"c{n % 5}") for n in range(40)]
        answers = await asyncio.gather(*[service.post(path, user) for path, user in sent])
        assert {answer.status_code for answer in answers} == {200}
        found = await arecords(guard)
        same(found, provider)
        counts = {user: sum(record.customer_identifier == user for record in found) for _, user in sent}
        assert counts == {f"c{n}": 8 for n in range(5)}


# -- gateways --------------------------------------------------------------------------------------------------


@pytest.fixture
async def app(guard: Guard, url: str) -> AsyncIterator[Starlette]:
    """An app that forwards with a wrapped client, behind a door that reads its responses."""
    client = guard.wrap(async_open_ai(url))

    async def forward(request: Request) -> Response:
        asked = await request.json()
        if asked.get("stream"):

            async def events() -> AsyncIterator[bytes]:
                async for chunk in await client.chat.completions.create(**asked):
                    yield b"data: " + chunk.model_dump_json().encode() + b"\n\n"
                yield b"data: [DONE]\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")
        reply = await client.chat.completions.create(**asked)
        return JSONResponse(reply.model_dump(mode="json", exclude_none=True))

    app = Starlette(routes=[Route("/v1/chat/completions", forward, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard, identify="header:x-user", include=["/v1/*"])
    yield app
    await client.close()


async def forwarded(app: Starlette, **fields: Any) -> httpx2.Response:
    """Ask the gateway."""
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://app") as http:
        body = {"model": CHAT, "messages": ASK, "max_tokens": 50} | fields
        return await http.post("/v1/chat/completions", json=body, headers={"x-user": "c1"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_call_that_middleware_and_client_see_is_one_record(
    guard: Guard, provider: StandInProvider, app: Starlette, stream: bool, include_usage: bool
) -> None:
    """The door reads the response, the client the reply; the ledger has the call once, and nothing stays held."""
    async with guard:
        fields: dict[str, Any] = {"stream": stream}
        if stream and include_usage:
            fields["stream_options"] = {"include_usage": True}
        assert (await forwarded(app, **fields)).status_code == 200
        same(await arecords(guard), provider)
        assert (await guard.status("c1")).total_requests == 1
        assert await holds(guard, "c1") == 0


@pytest.mark.parametrize("fault", ["no-usage", "drop-before"])
async def test_a_call_without_usage_is_presumed_once(
    guard: Guard, provider: StandInProvider, app: Starlette, fault: Any
) -> None:
    """Neither door learns the usage: one of them presumes it."""
    provider.fault(fault)
    async with guard:
        if fault == "no-usage":
            await forwarded(app)
        else:
            with pytest.raises(openai.APIConnectionError):
                await forwarded(app)
        (record,) = await arecords(guard)
        assert record.kind == "presumed"
        assert record.cost is not None
        assert record.cost >= provider.meter.total_cost > 0
        assert await holds(guard, "c1") == 0


async def test_a_budget_for_one_call_lets_one_through_two_doors(
    guard: Guard, provider: StandInProvider, app: Starlette
) -> None:
    """The door's hold is for the client's call: it is not asked for twice."""
    from respan_guard.money import from_nano
    from respan_guard.providers import call_from_request

    body = {"model": CHAT, "messages": ASK, "max_tokens": 50, "stream": False}
    call = call_from_request("/v1/chat/completions", body)
    budget = from_nano(guard.estimator.of_call(call).cost)
    async with guard:
        await guard.put_customer(Customer(customer_identifier="c1", total_budget=budget))
        provider.script(Answer(input_tokens=1, output_tokens=1))
        assert (await forwarded(app)).status_code == 200
        same(await arecords(guard), provider)


# -- admissions by hand ----------------------------------------------------------------------------------------


async def test_calls_claim_from_what_is_held_around_them(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Two calls at once within an admission that holds enough for one: the other asks for a hold of its own."""
    from respan_guard.providers import call_from_request

    body = {"model": CHAT, "messages": ASK, "max_tokens": 50}
    cost = guard.estimator.of_call(call_from_request("/v1/chat/completions", body)).cost
    answers = [Answer(gate=None)] * 2
    provider.script(*answers)
    async with guard, guard.wrap(async_open_ai(url)) as client:
        from respan_guard.money import from_nano

        async with guard.admit("c1", estimate=from_nano(cost + cost // 2)):
            before = await holds(guard, "c1")
            await asyncio.gather(*[client.chat.completions.create(**body) for _ in range(2)])
            await guard.flush()
            assert await holds(guard, "c1") < before
        same(await arecords(guard), provider)
        assert await holds(guard, "c1") == 0
        status = await guard.status("c1")
        assert (status.total_requests, status.total_spend) == (1, provider.meter.total_cost)


async def test_a_claim_outlives_the_admission(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The admission ends while a call that claimed from it is in flight: its money stays held until the call ends."""
    from respan_guard.testing.provider import Gate

    gate = Gate()
    provider.script(Answer(gate=gate))
    async with guard, guard.wrap(async_open_ai(url)) as client:
        async with guard.admit("c1", estimate=Usage(CHAT, 10_000, 10_000, provider="openai")):
            task = asyncio.create_task(client.chat.completions.create(model=CHAT, messages=ASK, max_tokens=50))
            await gate.arrival()
        await guard.flush()
        assert await holds(guard, "c1") > 0
        gate.open()
        await task
        same(await arecords(guard), provider)
        assert await holds(guard, "c1") == 0


async def test_customers_are_right_or_absent(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Nested names, tasks, threads and executors: a call is its own customer's or nobody's, never another's."""
    found: list[str] = []

    def blocking() -> None:
        client.chat.completions.create(model=CHAT, messages=ASK)

    async with guard:
        with guard.wrap(open_ai(url)) as client, guard.wrap(open_ai(url), customer="own") as own:
            loop = asyncio.get_running_loop()
            with guard.on_behalf_of("outer"):
                await asyncio.to_thread(blocking)  # "outer": it copies the context
                with guard.on_behalf_of("inner"):
                    task = asyncio.create_task(asyncio.to_thread(blocking))  # "inner"
                async with guard.admit("admitted"):
                    await asyncio.to_thread(blocking)  # "admitted"
                    with guard.on_behalf_of("named"):
                        await asyncio.to_thread(blocking)  # "named"
                with concurrent.futures.ThreadPoolExecutor() as pool:
                    await loop.run_in_executor(pool, blocking)  # an executor has no context: nobody's
                await asyncio.to_thread(blocking)  # "outer" again
                await task
                own.chat.completions.create(model=CHAT, messages=ASK)  # "own"
            await asyncio.to_thread(blocking)  # nobody's
        records = await arecords(guard)
        found = sorted(record.customer_identifier for record in records)
    same(records, provider)
    assert found == ["", "", "admitted", "inner", "named", "outer", "outer", "own"]
