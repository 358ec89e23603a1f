"""An OpenAI-compatible gateway: your back ends call it as if it were the provider, each customer within its limits.

    python examples/gateway.py          # or: uvicorn examples.gateway:app

Without settings a stand-in provider answers, so that it costs nothing to try. `OPENAI_API_KEY`, `OPENAI_BASE_URL` or
both put a real provider there. Customers and usage are kept in the file that `RESPAN_GUARD_STORAGE` says.

A request names its customer, and that customer's limits, in its body: `customer_params`, as Respan's gateway has it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from respan_guard import Guard, GuardMiddleware
from respan_guard.testing import StandInProvider

OPENAI = "https://api.openai.com/v1"
# Whatever is not listed is not forwarded: a call that nobody can meter should not be paid for with our key.
ENDPOINTS = {"chat/completions", "completions", "responses", "embeddings"}
STREAMS_WITHOUT_USAGE = {"chat/completions", "completions"}

RESPAN_PARAMS = {"customer_params", "customer_identifier", "respan_params", "keywordsai_params"}
# The client's connection is not ours to the provider, and its key is for us. Compressed streams could not be edited.
NOT_FORWARDED = {"host", "content-length", "authorization", "cookie", "accept-encoding", "x-data-respan-params"}
NOT_RETURNED = {"content-length", "content-encoding", "set-cookie"}
EVENT_ENDS = re.compile(rb"(?<=\n\n)|(?<=\n\r\n)")
HOP_BY_HOP = {"connection", "keep-alive", "proxy-authorization", "trailer", "transfer-encoding", "upgrade"}
HOP_BY_HOP.add("te")  # codespell:ignore te


def without_customer_params(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without what is meant for the gateway, which providers refuse as unknown."""
    return {name: value for name, value in body.items() if name not in RESPAN_PARAMS}


async def forward_to_provider(request: Request) -> Response:
    """Send the request on, and the answer back as it comes, without waiting for its end."""
    endpoint = request.path_params["endpoint"]
    if endpoint not in ENDPOINTS:
        return _error(404, f"This gateway does not serve {request.url.path}.")
    try:
        body = without_customer_params(await request.json())
    except (ValueError, AttributeError):
        return _error(400, "The body must be a JSON object.")
    if body.get("stream") is True and endpoint in STREAMS_WITHOUT_USAGE:
        # What a stream cost is told only if it is asked for. A client that did not ask is not shown it.
        options = body.get("stream_options") or {}
        if isinstance(options, dict):
            request.state.hide_usage = not options.get("include_usage")
            body["stream_options"] = {**options, "include_usage": True}
    provider: httpx2.AsyncClient = request.app.state.provider
    dropped = NOT_FORWARDED | HOP_BY_HOP
    headers = {name: value for name, value in request.headers.items() if name not in dropped}
    try:
        answer = await provider.send(provider.build_request("POST", endpoint, json=body, headers=headers), stream=True)
    except httpx2.TransportError:
        logging.getLogger("gateway").exception("the provider can't be reached")
        return _error(502, "The provider can't be reached.")
    return Relay(answer)


class Relay(StreamingResponse):
    """The provider's answer, passed on piece by piece; closed at the end, also if the client leaves before it."""

    def __init__(self, answer: httpx2.Response) -> None:
        dropped = NOT_RETURNED | HOP_BY_HOP
        headers = {name: value for name, value in answer.headers.items() if name not in dropped}
        super().__init__(answer.aiter_bytes(), answer.status_code, headers)
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answer.aclose()


class HideUsage:
    """Takes a stream's last chunk, which tells its usage, out of answers to clients that did not ask for it.

    It stands outside the guard, which needs to see that chunk.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        rest = b""

        async def edited(message: Message) -> None:
            nonlocal rest
            if message["type"] != "http.response.body" or not state.get("hide_usage"):
                await send(message)
                return
            *events, rest = EVENT_ENDS.split(rest + message.get("body", b""))
            body = b"".join(event for event in events if not _tells_usage(event))
            if not message.get("more_body"):
                body += rest
            await send({**message, "body": body})

        await self.app(scope, receive, edited)


def _tells_usage(event: bytes) -> bool:
    try:
        chunk = json.loads(event.removeprefix(b"data:"))
    except ValueError:
        return False
    return isinstance(chunk, dict) and chunk.get("choices") == [] and bool(chunk.get("usage"))


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "gateway_error", "code": None}}, status)


def create_app(guard: Guard | None = None, *, base_url: str | None = None, api_key: str | None = None) -> Starlette:
    """Build the gateway.

    Args:
        guard: Whose limits apply; by default one with everything in `respan_guard.db`.
        base_url: The provider's, with "/v1"; a stand-in provider is started if neither this nor a key is given.
        api_key: The key to pay with.
    """
    # `trust_customer_params` lets whoever sends a request set the limits that apply to it. That is right for a
    # gateway whose callers are your own back ends, and for nothing else: never do this where customers can call it.
    guard = guard or Guard(
        trust_customer_params=True,
        default_limits={"rate_limit": 60, "budget_duration": "monthly", "period_budget": 5},
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            url = base_url or (OPENAI if api_key else stack.enter_context(StandInProvider().serve()) + "/v1")
            client = httpx2.AsyncClient(
                base_url=url,
                headers={"authorization": f"Bearer {api_key or 'no-key'}", "accept-encoding": "identity"},
                timeout=httpx2.Timeout(600, connect=5),
                limits=httpx2.Limits(
                    max_connections=None
                ),  # how many calls run at once is the customers' limits' affair
                trust_env=bool(base_url or api_key),  # the way to the stand-in provider leads through no proxy
            )
            app.state.provider = await stack.enter_async_context(client)
            yield

    app = Starlette(routes=[Route("/v1/{endpoint:path}", forward_to_provider, methods=["POST"])], lifespan=lifespan)
    app.add_middleware(GuardMiddleware, guard=guard, identify="body", include=["/v1/*"])
    app.add_middleware(HideUsage)  # added later = stands further out
    return app


app = create_app(base_url=os.environ.get("OPENAI_BASE_URL"), api_key=os.environ.get("OPENAI_API_KEY"))

if __name__ == "__main__":
    import uvicorn

    logging.basicConfig(level=logging.INFO)
    uvicorn.run(app, host="127.0.0.1", port=8000)
