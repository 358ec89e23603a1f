"""What a middleware adds to a request, and to a chunk of a stream, in-process and without a server.

Each variant wraps the same Starlette app with one route. Rounds are interleaved, so that a busy machine slows all,
and what is measured is the process's own time; "adds" is the difference to the bare app, and the ratios of what is
added are the result.

The door does all of its work: identity, rate, period budget, total budget, a hold, both RateLimit
fields, the end. The others count one rate. asgi-ratelimit sends no headers; slowapi is measured
with and without.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

from fastapi import Depends, FastAPI
from fastapi_limiter.depends import RateLimiter
from pyrate_limiter import Duration, InMemoryBucket, Limiter, Rate
from ratelimit import RateLimitMiddleware, Rule
from ratelimit.backends.simple import MemoryBackend
from slowapi import Limiter as SlowLimiter
from slowapi.middleware import SlowAPIASGIMiddleware
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from respan_guard.guard import Guard
from respan_guard.middleware import GuardMiddleware
from respan_guard.usage import Usage

ROUNDS = 11
REQUESTS = 400
CHUNKS = 2_000
CUSTOMER = (b"x-customer", b"org_42")
LIMITS = {"rate_limit": 1_000_000, "budget_duration": "monthly", "period_budget": 9_000_000, "total_budget": 9_000_000}
QUESTION = json.dumps(
    {"model": "gpt-4o-mini", "max_tokens": 100, "messages": [{"role": "user", "content": "word " * 400}]}
).encode()
REPLY = {
    "object": "chat.completion",
    "model": "gpt-4o-mini-2024-07-18",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 100}}],
    "usage": {"prompt_tokens": 410, "completion_tokens": 100, "total_tokens": 510},
}
App = Callable[..., Awaitable[None]]


def scope(app: object = None, method: str = "GET", path: str = "/v1/x") -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"user-agent", b"bench"), (b"accept", b"*/*"), CUSTOMER],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }


def guard(**options: Any) -> Guard:
    return Guard(
        "memory://",
        **({"default_limits": LIMITS, "hold": Decimal("0.001"), "default_hold": Decimal("0.001")} | options),
    )


def starlette(**middleware: Any) -> Starlette:
    async def endpoint(request: Any) -> PlainTextResponse:
        return PlainTextResponse("ok")

    return Starlette(routes=[Route("/v1/x", endpoint)])


def door(inner: App | None = None, **options: Any) -> App:
    app = starlette() if inner is None else inner
    if isinstance(app, Starlette):
        app.add_middleware(GuardMiddleware, guard=guard(), identify="header:x-customer", include=["/v1/*"])
        return app
    return GuardMiddleware(app, guard(**options), identify="header:x-customer", include=["/v1/*"])


def slowapi(*, headers: bool) -> App:
    app = starlette()
    app.state.limiter = SlowLimiter(
        key_func=lambda request: request.headers["x-customer"],
        default_limits=["1000000/minute"],
        headers_enabled=headers,
    )
    app.add_middleware(SlowAPIASGIMiddleware)
    return app


def asgi_ratelimit() -> App:
    async def authenticate(scope: Any) -> tuple[str, str]:
        return next(value.decode() for name, value in scope["headers"] if name == b"x-customer"), "default"

    app = starlette()
    app.add_middleware(
        RateLimitMiddleware,
        authenticate=authenticate,
        backend=MemoryBackend(),
        config={r"^/v1/": [Rule(minute=1_000_000)]},
    )
    return app


def no_op() -> App:
    class Nothing:
        def __init__(self, app: App) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)

    app = starlette()
    app.add_middleware(Nothing)
    return app


def base_http() -> App:
    async def passing(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app = starlette()
    app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    return app


def door_and_record() -> App:
    """The door in front of an endpoint that books a call by hand."""
    own = guard()

    async def endpoint(request: Any) -> PlainTextResponse:
        own.record_soon(Usage("gpt-4o-mini", 410, 100, provider="openai"))
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/v1/x", endpoint)])
    app.add_middleware(GuardMiddleware, guard=own, identify="header:x-customer", include=["/v1/*"])
    return app


def fastapi_app(kind: str) -> App:
    app = FastAPI()
    dependencies: list[Any] = []
    if kind == "fastapi-limiter":
        limiter = Limiter(InMemoryBucket([Rate(1_000_000, Duration.MINUTE)]))
        dependencies = [Depends(RateLimiter(limiter))]
    elif kind == "guard":
        own = guard()

        async def admitted() -> None:
            await own.admit("org_42")

        dependencies = [Depends(admitted)]
        app.add_middleware(GuardMiddleware, guard=own)

    @app.get("/v1/x", dependencies=dependencies)
    async def endpoint() -> PlainTextResponse:
        return PlainTextResponse("ok")

    return app


spent: list[float] = []
"""Microseconds a chunk of the last stream, from its first chunk to its last: admission and end are the request's."""


def provider(stream: int = 0) -> App:
    """A gateway's app: reads the body, answers with a completion of its own id, or with a stream."""
    counter = iter(range(10**9))
    head = b'data: {"id":"chatcmpl-%024d","object":"chat.completion.chunk","model":"gpt-4o-mini","choices":[{"index":0,'
    word = head % 1 + b'"delta":{"content":"word "}}],"usage":null}\n\n'

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if stream:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
            )
            message = {"type": "http.response.body", "body": word, "more_body": True}
            start = time.process_time()
            for _ in range(stream):
                await asyncio.sleep(0)
                await send(message)
            spent.append((time.process_time() - start) / stream * 1e6)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
            return
        body = json.dumps({"id": f"chatcmpl-{next(counter):024d}", **REPLY}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return app


async def time_requests(app: App, count: int, method: str = "GET", path: str = "/v1/x", body: bytes = b"") -> float:
    """Microseconds for each request."""
    message = {"type": "http.request", "body": body, "more_body": False}

    async def receive() -> dict[str, Any]:
        return message

    async def send(message: Any) -> None:
        pass

    scopes = [scope(app, method, path) for _ in range(count)]
    start = time.process_time()
    for one in scopes:
        await app(one, receive, send)
    return (time.process_time() - start) / count * 1e6


async def time_first_chunks(app: App, count: int) -> float:
    """Microseconds from a request to the first chunk of its stream."""
    arrived, message = 0.0, {"type": "http.request", "body": QUESTION, "more_body": False}

    async def receive() -> dict[str, Any]:
        return message

    async def send(message: Any) -> None:
        nonlocal arrived
        if not arrived and message["type"] == "http.response.body":
            arrived = time.process_time()

    total = 0.0
    for one in [scope(app, "POST", "/v1/chat/completions") for _ in range(count)]:
        arrived = 0.0
        start = time.process_time()
        await app(one, receive, send)
        total += arrived - start
    return total / count * 1e6


async def table(
    title: str, variants: dict[str, Callable[[], Awaitable[float]]], per: str = "request"
) -> dict[str, float]:
    """Measure all variants in turn, print them, and give what each adds to the first."""
    rounds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(ROUNDS + 1):
        for name, measure in variants.items():
            gc.collect()
            gc.disable()
            try:
                spent = await measure()
            finally:
                gc.enable()
            if number:  # the first warms up
                rounds[name].append(spent)
    best = {name: min(values) for name, values in rounds.items()}  # the least disturbed round
    bare = next(iter(best.values()))
    print(f"\n{title}\n{'':48} {'us/' + per:>12} {'adds us':>9} {'x bare':>7}")
    for name, value in best.items():
        print(f"{name:48} {value:12.2f} {value - bare:9.2f} {value / bare:7.2f}")
    return {name: value - bare for name, value in best.items()} | {"bare": bare}


def verdict(what: str, ratio: float, target: float) -> None:
    print(f"  {what}: {ratio:.3f} (target {target})  {'met' if ratio <= target else 'MISSED'}")


async def main() -> None:
    apps = {
        "bare Starlette, one route": starlette(),
        "+ a middleware that does nothing": no_op(),
        "+ BaseHTTPMiddleware that does nothing": base_http(),
        "+ SlowAPIASGIMiddleware": slowapi(headers=False),
        "+ SlowAPIASGIMiddleware, headers": slowapi(headers=True),
        "+ asgi-ratelimit, memory": asgi_ratelimit(),
        "+ GuardMiddleware (rate, 2 budgets, hold, headers)": door(),
        "+ GuardMiddleware, and a priced record": door_and_record(),
    }
    adds = await table(
        "A request through a Starlette app",
        {name: lambda app=app: time_requests(app, REQUESTS) for name, app in apps.items()},  # type: ignore[misc]
    )
    ours = adds["+ GuardMiddleware (rate, 2 budgets, hold, headers)"]
    recorded = adds["+ GuardMiddleware, and a priced record"]
    for name, value in (("admitted", ours), ("admitted and recorded", recorded)):
        verdict(f"{name}, of what slowapi's ASGI middleware adds", value / adds["+ SlowAPIASGIMiddleware"], 0.3)
        verdict(f"{name}, of what asgi-ratelimit adds", value / adds["+ asgi-ratelimit, memory"], 1.25)

    apps = {
        "bare FastAPI, one route": fastapi_app("bare"),
        "+ fastapi-limiter, memory": fastapi_app("fastapi-limiter"),
        "+ GuardMiddleware, admitted in a dependency": fastapi_app("guard"),
    }
    adds = await table(
        "A request through a FastAPI app",
        {name: lambda app=app: time_requests(app, REQUESTS) for name, app in apps.items()},  # type: ignore[misc]
    )
    ratio = adds["+ GuardMiddleware, admitted in a dependency"] / adds["+ fastapi-limiter, memory"]
    verdict("admitted in a dependency, of what fastapi-limiter adds", ratio, 1.0)

    path = "/v1/chat/completions"
    gateways = {
        "bare gateway": provider(),
        "+ GuardMiddleware (estimate, capture, record)": door(provider(), hold="upper_bound"),
    }
    await table(
        "A 2 KB chat completion through a gateway, estimated and read off the response",
        {
            name: lambda app=app: time_requests(app, REQUESTS, "POST", path, QUESTION)  # type: ignore[misc]
            for name, app in gateways.items()
        },
    )

    firsts = {
        "bare stream": provider(stream=3),
        "+ GuardMiddleware (estimate, capture, record)": door(provider(stream=3), hold="upper_bound"),
    }
    await table(
        "From a request to the first chunk of its stream",
        {name: lambda app=app: time_first_chunks(app, REQUESTS) for name, app in firsts.items()},  # type: ignore[misc]
    )

    async def chunk(app: App) -> float:
        await time_requests(app, 1, "POST", path, QUESTION)
        return spent.pop()

    streams = {
        "bare stream": provider(stream=CHUNKS),
        "+ GuardMiddleware, no capture": GuardMiddleware(provider(stream=CHUNKS), guard()),
        "+ GuardMiddleware, reading usage": door(provider(stream=CHUNKS), hold="upper_bound"),
    }
    adds = await table(
        "A chunk of a stream whose producer suspends",
        {name: lambda app=app: chunk(app) for name, app in streams.items()},  # type: ignore[misc]
        "chunk",
    )
    for name in list(streams)[1:]:
        verdict(f"{name[2:]}, of bare", 1 + adds[name] / adds["bare"], 1.10)


if __name__ == "__main__":
    asyncio.run(main())
