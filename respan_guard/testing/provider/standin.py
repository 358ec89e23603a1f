"""The stand-in provider: an LLM provider's API without a model, with exact books and faults on demand."""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import parse_qs

from respan_guard.clock import Clock, SystemClock
from respan_guard.errors import InvalidInput
from respan_guard.testing.provider import anthropic, gemini, openai
from respan_guard.testing.provider.answer import Answer, FilledAnswer
from respan_guard.testing.provider.delivery import (
    ClientGone,
    Connection,
    Receive,
    Scope,
    Send,
    content_type,
    deliver,
    frame,
)
from respan_guard.testing.provider.faults import Fault, FaultKind, Match, Orders, garble, usage_position
from respan_guard.testing.provider.meter import Meter, MeteredCall, charge
from respan_guard.testing.provider.request import Event, ProviderRequest, Rejected, count_tokens
from respan_guard.testing.serving import serve, serve_async

__all__ = ["StandInProvider"]

MODELS = ("gpt-4o", "gpt-4o-mini", "gpt-4.1-mini", "gpt-5-mini", "text-embedding-3-small", "claude-sonnet-4-6")
_SECRET = frozenset({"authorization", "x-api-key", "x-goog-api-key", "cookie", "api-key"})


class WireFormat(Protocol):
    """What each of the wire formats' modules offers."""

    def read(
        self, endpoint: str, body: Mapping[str, Any], headers: Mapping[str, str], size: int, *, strict: bool
    ) -> ProviderRequest: ...
    def reply(self, request: ProviderRequest, filled: FilledAnswer) -> dict[str, Any]: ...
    def events(self, request: ProviderRequest, filled: FilledAnswer) -> list[Event]: ...
    def error(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> dict[str, Any]: ...


class StandInProvider:
    """An ASGI app that speaks OpenAI's, Anthropic's and Google's API, for tests without network, keys or cost.

    Answers are deterministic: the same request gets the same text and the same counts. What each call costs stands in
    `meter`, priced by genai-prices alone, so that a ledger can be held against it. Call it directly through an ASGI
    transport, or let it listen: `with provider.serve() as url:` (OpenAI's SDK wants `f"{url}/v1"` as its `base_url`,
    the others `url`).

    Args:
        default_output_tokens: Length of an answer to a request without a lower cap.
        strict: Refuse top-level parameters that the API doesn't know, as the providers do.
        api_key: The only key that is let in; any key is if left out.
        clock: Where the time on answers, and the day of prices, comes from.
        seed: Makes the ids of answers reproducible. Two providers with the same seed give out the same ids, which
            for whoever keeps records is the same calls.
    """

    def __init__(
        self,
        *,
        default_output_tokens: int = 32,
        strict: bool = True,
        api_key: str | None = None,
        clock: Clock | None = None,
        seed: str | None = None,
    ) -> None:
        self.meter = Meter()
        self.default_output_tokens = default_output_tokens
        self.strict = strict
        self.api_key = api_key
        self._clock = clock or SystemClock()
        self._seed = seed or secrets.token_hex(16)
        self._numbers = itertools.count(1)
        self._orders = Orders()

    # -- what tests tell it ------------------------------------------------------------------------

    def script(self, *answers: Answer, match: Match | None = None) -> None:
        """Answer the next calls with these, in order.

        Args:
            *answers: One for each call.
            match: Only calls for which this is true; others are answered as ever.
        """
        for answer in answers:
            self._orders.add_answer(answer, match)

    def fault(
        self,
        kind: FaultKind,
        *,
        times: int | None = 1,
        match: Match | None = None,
        status: int = 500,
        retry_after: float | None = None,
        message: str = "The stand-in provider was told to fail.",
    ) -> Fault:
        """Let something go wrong with the next calls; see `FaultKind`.

        Args:
            kind: What.
            times: For how many calls; None for all from now on.
            match: Only calls for which this is true.
            status: Of kind "error".
            retry_after: Seconds for the header `Retry-After` of kind "error".
            message: Of kind "error".

        Returns:
            The fault; opening its `gate` ends a stall.

        Raises:
            InvalidInput: There is no such fault, or the status is no error's.
        """
        fault = Fault(kind, times, match, status, retry_after, message)
        self._orders.add_fault(fault)
        return fault

    def reset(self) -> None:
        """Forget calls, scripts and faults."""
        self._orders.clear()
        self.meter.reset()

    # -- serving -----------------------------------------------------------------------------------

    def serve(self, *, port: int = 0) -> AbstractContextManager[str]:
        """Listen on a port of the loopback interface, any free one if left out; gives the URL without a path.

        Raises:
            ConfigurationError: uvicorn is not installed.
        """
        return serve(self, port=port)

    def serve_async(self, *, port: int = 0) -> AbstractAsyncContextManager[str]:
        """Listen on the running event loop; otherwise as `serve`."""
        return serve_async(self, port=port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            for part in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{part}.complete"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        else:
            connection = Connection(scope, receive, send)
            try:
                await self._answer(connection)
            except ClientGone:
                return

    # -- one call ----------------------------------------------------------------------------------

    async def _answer(self, connection: Connection) -> None:
        scope = connection.scope
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        public = {name: value for name, value in headers.items() if name not in _SECRET}
        query = scope.get("query_string", b"")
        wire, endpoint, model, verb = _route(scope["path"].rstrip("/"))
        request_id = f"req_{self._unique()[:24]}"
        request: ProviderRequest | None = None
        raw = await connection.body()
        async with connection.watched():
            try:
                self._authenticate(headers, query)
                free = self._free_answer(scope["method"], scope["path"], endpoint, raw)
                if free is not None:
                    await _send_json(connection, 200, free, request_id)
                    return
                request = wire.read(endpoint, _parse(raw), public, len(raw), strict=self.strict)
                if wire is gemini:
                    request.model, request.stream = model, verb.startswith("stream")
                    request.array = request.stream and b"alt=sse" not in query
                faults = self._orders.take_faults(request)
                if (error := faults.get("error")) is not None:
                    raise Rejected(error.status, error.message, retry_after=error.retry_after)
                filled = self._fill(request, short_id="short-ids" in faults)
            except Rejected as refused:
                self.meter.add(
                    MeteredCall(
                        request_id=request_id,
                        endpoint=endpoint,
                        provider=request.provider if request else "",
                        model=request.model if request else "",
                        stream=request is not None and request.stream,
                        status=refused.status,
                        completed=True,
                        headers=public,
                    )
                )
                body = wire.error(refused.status, refused.message, param=refused.param, code=refused.code)
                await _send_json(connection, refused.status, body, request_id, refused.retry_after)
                return
            await self._deliver(connection, wire, request, filled, faults, request_id)

    def _free_answer(self, method: str, path: str, endpoint: str, raw: bytes) -> dict[str, Any] | None:
        """The answer to what is no call of a model: the list of models, counting tokens."""
        if method == "GET" and path.rstrip("/").endswith("/models"):
            return openai.models(MODELS, self._created())
        if not endpoint or method != "POST":
            raise Rejected(404, f"Invalid URL ({method} {path})")
        if endpoint == "count_tokens":
            counted = count_tokens(_parse(raw), size=len(raw))
            return {"input_tokens": counted, "totalTokens": counted}
        return None

    async def _deliver(
        self,
        connection: Connection,
        wire: WireFormat,
        request: ProviderRequest,
        filled: FilledAnswer,
        faults: dict[str, Fault],
        request_id: str,
    ) -> None:
        call = self.meter.add(charge(request, filled, request_id, self._now()))
        kinds = set(faults)
        events = wire.events(request, filled) if request.stream else [Event(wire.reply(request, filled))]
        events = garble(events, kinds, stream=request.stream)
        pieces = frame(request, events, kinds)
        headers = {
            "content-type": "text/plain" if "wrong-content-type" in kinds else content_type(request),
            "x-request-id": request_id,
            "request-id": request_id,
        }
        if "gzip" in kinds:
            headers["content-encoding"] = "gzip"
        if not request.stream:
            headers["content-length"] = str(len(pieces[0]))

        def complete() -> None:
            call.completed = True

        await deliver(
            connection,
            headers,
            pieces,
            faults,
            gate=filled.answer.gate,
            usage_at=usage_position(events),
            on_last=complete,
        )

    def _fill(self, request: ProviderRequest, *, short_id: bool) -> FilledAnswer:
        answer = self._orders.take_answer(request) or Answer()
        try:
            answer = answer.scripted_by(request.headers)
        except InvalidInput as error:
            raise Rejected(400, str(error)) from error
        return answer.fill(
            request,
            default_output_tokens=self.default_output_tokens,
            response_id=f"chatcmpl-{next(self._numbers) % 1000}" if short_id else self._response_id(request),
            created=self._created(),
        )

    def _authenticate(self, headers: Mapping[str, str], query: bytes) -> None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key"), headers.get("x-goog-api-key"), headers.get("api-key")]
        given += [token if scheme.lower() == "bearer" else None, *parse_qs(query.decode("latin-1")).get("key", [])]
        keys = [key for key in given if key]
        if not keys:
            raise Rejected(401, "You didn't provide an API key.")
        if self.api_key is not None and self.api_key not in keys:
            raise Rejected(401, "Incorrect API key provided.")

    def _response_id(self, request: ProviderRequest) -> str:
        unique = self._unique()
        if request.provider == "anthropic":
            return f"msg_01{unique[:22]}"
        if request.provider == "google":
            return unique[:22]
        if request.endpoint == "responses":
            return f"resp_{hashlib.sha256(unique.encode()).hexdigest()[:48]}"
        prefix = openai.ID_PREFIXES.get(request.endpoint)
        return "" if prefix is None else prefix + unique[:29]

    def _unique(self) -> str:
        digest = hashlib.sha256(f"{self._seed}:{next(self._numbers)}".encode()).digest()
        number, letters = int.from_bytes(digest), []
        for _ in range(32):
            number, rest = divmod(number, 62)
            letters.append("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[rest])
        return "".join(letters)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC)

    def _created(self) -> int:
        return self._clock.now_ms() // 1000


def _route(path: str) -> tuple[WireFormat, str, str, str]:
    """Which format, which endpoint, and for Gemini the model and the verb that stand in the path."""
    before, _, verb = path.rpartition(":")
    if "/models/" in before:
        endpoint = "count_tokens" if verb == "countTokens" else gemini.VERBS.get(verb, "")
        return gemini, endpoint, before.rpartition("/models/")[2], verb
    if path.endswith("/messages"):
        return anthropic, "messages", "", ""
    if path.endswith("/messages/count_tokens"):
        return anthropic, "count_tokens", "", ""
    for suffix, endpoint in openai.ENDPOINTS.items():
        if path.endswith(suffix):
            return openai, endpoint, "", ""
    return openai, "", "", ""


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Rejected(400, "We could not parse the JSON body of your request.")
    return body


async def _send_json(
    connection: Connection, status: int, body: dict[str, Any], request_id: str, retry_after: float | None = None
) -> None:
    content = json.dumps(body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "x-request-id": request_id,
        "request-id": request_id,
    }
    if retry_after is not None:
        headers["retry-after"] = f"{retry_after:g}"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await connection.send({"type": "http.response.start", "status": status, "headers": raw})
    await connection.send({"type": "http.response.body", "body": content, "more_body": False})
