"""Driving ASGI apps in-process, message by message, and seeing what reached the store."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from respan_guard.backends.base import Admit, Entry, Op, Record, Release
from respan_guard.guard import Guard
from respan_guard.middleware import GuardMiddleware
from respan_guard.testing import FakeClock

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

CHAT = "/v1/chat/completions"
QUESTION = {"model": "gpt-4o-mini", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


_numbers = itertools.count(1)


def reply() -> dict[str, Any]:
    """A chat completion, each with an id of its own."""
    return {
        "id": f"chatcmpl-{next(_numbers):024d}",
        "object": "chat.completion",
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def chunks(*, usage: bool = True) -> list[bytes]:
    """The same as a stream of events."""
    base = reply() | {"object": "chat.completion.chunk", "usage": None}
    words = [{**base, "choices": [{"index": 0, "delta": {"content": word}}]} for word in ("hel", "lo")]
    events = [*words, {**base, "choices": [], "usage": USAGE}] if usage else words
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


class Exchange:
    """One request and what came back."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.received = 0
        self.error: BaseException | None = None

    @property
    def started(self) -> Message:
        """The one `http.response.start`."""
        (start,) = [message for message in self.sent if message["type"] == "http.response.start"]
        return start

    @property
    def status(self) -> int:
        """The status code."""
        status: int = self.started["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        """Response headers; each comes once."""
        pairs = [(name.decode().lower(), value.decode()) for name, value in self.started["headers"]]
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(message.get("body", b"") for message in self.sent if message["type"] == "http.response.body")

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def http_scope(path: str = CHAT, method: str = "POST", **fields: Any) -> dict[str, Any]:
    """A scope as servers make it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    } | fields


async def call(
    app: App,
    path: str = CHAT,
    *,
    method: str = "POST",
    body: bytes | list[bytes] | None = None,
    customer: str | None = None,
    headers: list[tuple[bytes, bytes]] | None = None,
    disconnect: asyncio.Event | None = None,
    on_send: Callable[[Message], Awaitable[None]] | None = None,
    catch: bool = False,
    **fields: Any,
) -> Exchange:
    """Send one request.

    Args:
        app: The app.
        path: Where to.
        method: How.
        body: The body, maybe in chunks; `QUESTION` if left out.
        customer: Value of the header x-customer.
        headers: More headers.
        disconnect: When set, the client is gone.
        on_send: Awaited for each message, before it counts as sent.
        catch: Keep what the app raises in `error`.
        **fields: More of the scope.
    """
    exchange = Exchange()
    if body is None:
        body = json.dumps(QUESTION).encode() if method == "POST" else b""
    parts = [body] if isinstance(body, bytes) else list(body)
    pending: list[Message] = [
        {"type": "http.request", "body": part, "more_body": at < len(parts) - 1} for at, part in enumerate(parts)
    ]
    gone = disconnect or asyncio.Event()

    async def receive() -> Message:
        exchange.received += 1
        if pending:
            return pending.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if on_send is not None:
            await on_send(message)
        exchange.sent.append(message)

    names = list(headers or [])
    if customer is not None:
        names.append((b"x-customer", customer.encode()))
    try:
        await app(http_scope(path, method, headers=names, **fields), receive, send)
    except BaseException as error:
        exchange.error = error
        if not catch:
            raise
    return exchange


class Ledger:
    """What a guard on `memory://` asked of its store."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.ops: list[Op] = []
        lane: Any = guard.lane()

        def watched(way: Any) -> Any:
            def spy(ops: Any, *more: Any) -> Any:
                self.ops.extend(ops)
                return way(ops, *more)

            return spy

        lane._apply, lane._post = watched(lane._apply), watched(lane._post)

    @property
    def admits(self) -> list[Admit]:
        """Admissions that were asked for."""
        return [op for op in self.ops if isinstance(op, Admit)]

    @property
    def entries(self) -> list[Entry]:
        """What was booked."""
        return [op.entry for op in self.ops if isinstance(op, Record)]

    @property
    def kinds(self) -> list[str]:
        """What kinds of entries were booked."""
        return [entry.kind for entry in self.entries]

    async def settled(self, admissions: int = 1) -> None:
        """Check that each of so many admissions ended exactly once, behind its records, and that nothing is held."""
        released = [op.id for op in self.ops if isinstance(op, Release)]
        assert len(released) == admissions
        assert set(released) <= {op.id for op in self.admits}  # the others were refused
        assert len(set(released)) == admissions
        for entry in self.entries:
            if entry.admission is not None:
                at = [op.entry.id if isinstance(op, Record) else getattr(op, "id", "") for op in self.ops]
                assert at.index(entry.id) < len(self.ops) - 1 - self.ops[::-1].index(self._release(entry.admission))
        assert await self.guard.lane().call(lambda backend: backend.holds(now=self.guard.now_ms())) == []

    def _release(self, admission: str) -> Op:
        return next(op for op in self.ops if isinstance(op, Release) and op.id == admission)


def make_guard(clock: FakeClock | None = None, **options: Any) -> tuple[Guard, Ledger]:
    """A guard in memory with room for everything, and its ledger."""
    limits = {"rate_limit": 1000, "budget_duration": "monthly", "period_budget": 100}
    guard = Guard("memory://", clock=clock or FakeClock(), **({"default_limits": limits} | options))
    return guard, Ledger(guard)


def gateway(app: App, guard: Guard, **options: Any) -> GuardMiddleware:
    """The app behind a door that identifies by the header x-customer."""
    return GuardMiddleware(app, guard, **({"identify": "header:x-customer", "include": ["/v1/*"]} | options))


async def provider(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """An app whose response is a provider's: a chat completion, or a stream of one if the body says so."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        if not message["more_body"]:
            break
    asked = json.loads(body)
    if asked.get("stream"):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for part in chunks():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return
    whole = json.dumps(reply()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": whole, "more_body": False})
