"""An app behind the door, for real servers: `GUARD_URL` says where its guard keeps things."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from respan_guard.guard import Guard
from respan_guard.middleware import GuardMiddleware
from tests.middleware.support import chunks, reply

guard = Guard(
    os.environ["GUARD_URL"],
    default_limits={"rate_limit": 1000, "budget_duration": "monthly", "period_budget": 100},
    hold_ttl=2,
)
done: list[str] = []


async def chat(request: Request) -> Response:
    """Answer as the body says: whole, as a stream, slowly, for ever, to nobody, or with an error."""
    asked = await request.json()
    how = asked.get("how", "whole")
    if how == "raise":
        raise RuntimeError("the app's own")
    if how == "slow":
        await asyncio.sleep(0.6)
        done.append("slow")
    if how == "leaving":
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return Response(status_code=499)
    if how in ("stream", "endless"):

        async def parts() -> AsyncIterator[bytes]:
            for part in chunks():
                yield part
                if how == "endless":
                    await asyncio.sleep(0.05)
                    for _ in range(1000):
                        yield b": still here\n\n"
                        await asyncio.sleep(0.02)

        return StreamingResponse(parts(), media_type="text/event-stream")
    return JSONResponse(reply())


async def ledger(request: Request) -> Response:
    """What the store says of one customer."""
    customer = request.path_params["customer"]
    await guard.flush()
    holds = await guard.lane().call(lambda backend: backend.holds(customer, now=guard.now_ms()))
    status = await guard.status(customer)
    return JSONResponse(
        {
            "holds": len(holds),
            "requests": status.total_requests,
            "kinds": [record.kind async for record in guard.records(customer)],
            "done": done,
        }
    )


async def upload(request: Request) -> Response:
    """Take a body of any size."""
    size = 0
    async for part in request.stream():
        size += len(part)
    return Response(json.dumps(size))


app = Starlette(
    routes=[
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/files", upload, methods=["POST"]),
        Route("/ledger/{customer}", ledger),
    ]
)
app.add_middleware(GuardMiddleware, guard=guard, identify="header:x-customer", include=["/v1/*"])
