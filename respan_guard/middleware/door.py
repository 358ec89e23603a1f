"""The ASGI middleware: identify, admit, run the app, end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Literal, TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from respan_guard.context import current_slot
from respan_guard.entering import leave
from respan_guard.errors import ConfigurationError, GuardError, LimitExceeded
from respan_guard.guard import Guard
from respan_guard.middleware.answers import can_respond, refusal_in, send_http, send_websocket
from respan_guard.middleware.faults import Faults
from respan_guard.middleware.gate import Gate
from respan_guard.middleware.headers import RateLimitFields, is_preflight, without_body
from respan_guard.middleware.heard import Heard, unheard
from respan_guard.middleware.identity import Identify, describe
from respan_guard.middleware.lifespan import run_lifespan
from respan_guard.middleware.passage import Gone, Passage, RefusedHere
from respan_guard.middleware.paths import GuardedPaths
from respan_guard.middleware.roots import inner_roots
from respan_guard.refusal import render
from respan_guard.settings import mask_url
from respan_guard.tracing import refused

__all__ = ["GuardMiddleware"]

logger = logging.getLogger("respan_guard")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
RefusalHandler: TypeAlias = Callable[[Any, Any], Awaitable[Response]]

SCOPE_KEY = "respan_guard"
_MIB = 1024 * 1024


class GuardMiddleware:
    """Guards an ASGI app: what is refused never reaches it, what is admitted is ended and accounted for.

    Without `identify` the app's own code says who the customer is, by `await guard.admit(id)`; a refusal that it lets
    pass becomes the answer. With `identify` the door admits each request to the included paths, holds what the body
    says the call may cost, and reads the usage off the response.

    Args:
        app: The app.
        guard: The guard. The app's lifespan opens and closes it.
        identify: A source of the customer, or several, the first that knows wins: "user", "state:NAME", a callable
            `(HTTPConnection) -> str | Customer | None` (sync or async); and, the client's word, "header:NAME",
            "respan-params", "body", "openai-user", "anthropic-user". What a callable raises is the app's own error.
            The fields that it sets on a `Customer`, None and False too, are stored if they differ.
        include: The paths that are guarded: exact ones ("/v1/responses"), or beginnings ("/v1/*" is "/v1" and all
            below it, "/v1/images*" all that begins so), relative to `root_path`, without host and query, in any case of
            their letters. Required with `identify`; everything if left out without.
        exclude: Paths that are not guarded, although included; to the letter.
        unidentified: What happens without a customer: "reject" answers 401; "anonymous" lets all such requests share
            one customer of that name.
        refusal: `async (request, exc) -> Response` that makes the answer to what is refused. It can read the body from
            its beginning, also if the app has read it: JSON that `identify` looked at whole, other bodies up to a MiB;
            one that is longer, and that the app has begun to read, is empty to it. For a WebSocket it is given that
            instead of a request, and asked only where the server can send a response (the ASGI extension
            `websocket.http.response`): elsewhere a refused connection can but be closed.
        max_body_bytes: How much of a body is read at most to know customer and cost. A JSON object that is longer is
            refused (413) on every guarded path, as is a form where calls are forms (audio to write down, images to
            change), and a compressed body, which is never unpacked, where it would have to be understood (400). Other
            bodies, uploads and forms, pass at any length; such a request holds `default_hold`, and what its response
            says it spent is booked. The default leaves room for audio as large as OpenAI takes it (25 MB) and for a few
            pictures; what is read is kept until the app has taken it. What is large is looked at on another thread, and
            what has too many JSON values for that is refused (413).

    Raises:
        ConfigurationError: An argument can't work.
    """

    def __init__(
        self,
        app: App,
        guard: Guard,
        *,
        identify: Identify | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        unidentified: Literal["reject", "anonymous"] = "reject",
        refusal: RefusalHandler | None = None,
        max_body_bytes: int = 32 * 1024 * 1024,
    ) -> None:
        if not isinstance(guard, Guard):
            raise ConfigurationError(f"guard must be a Guard, got {guard!r}")
        if identify is not None and include is None:
            raise ConfigurationError(
                'identify needs include, the paths that spend money, like include=["/v1/*"]: '
                "a request elsewhere may well be nobody's"
            )
        if unidentified not in ("reject", "anonymous"):
            raise ConfigurationError(f'unidentified must be "reject" or "anonymous", got {unidentified!r}')
        if refusal is not None and not callable(refusal):
            raise ConfigurationError(f"refusal must be an async function (request, exc) -> Response, got {refusal!r}")
        if max_body_bytes.__class__ is not int or max_body_bytes < 1:
            raise ConfigurationError(f"max_body_bytes must be a number of bytes from 1, got {max_body_bytes!r}")
        self.app = app
        self.guard = guard
        self._identify = identify
        self._paths = GuardedPaths(include, exclude, inner_roots(app))
        self._refusal = refusal
        self._max_body = max_body_bytes
        self._faults = Faults(guard.clock)
        self._gate: Gate | None = None
        if identify is not None:
            self._gate = Gate(
                guard, self._faults, identify, anonymous=unidentified == "anonymous", max_body=max_body_bytes
            )
        self._switch = guard.switch
        self._fields = RateLimitFields(show_amounts=guard.settings.show_amounts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind = scope["type"]
        if kind == "http":
            if self._switch.off or not self._paths.guards(scope):
                await self.app(scope, receive, send)
            elif is_preflight(scope):
                await self.app(scope, without_body(receive), send)
            else:
                await self._http(scope, receive, send)
        elif kind == "websocket" and not self._switch.off and self._paths.guards(scope):
            await self._websocket(scope, receive, send)
        elif kind == "lifespan":
            await run_lifespan(self.app, self.guard, self._announce, scope, receive, self._learning(scope, send))
        else:
            await self.app(scope, receive, send)

    # -- HTTP --------------------------------------------------------------------------------------

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        around: Passage | None = scope.get(SCOPE_KEY)
        if around is not None and (own := around.of(self.guard)) is not None:
            await self._join(own, scope, receive, send)
            return
        scope[SCOPE_KEY] = passage = Passage(self.guard, around)
        token = current_slot.set(passage.slot)
        started = released = False
        held_back: list[Message] = []  # the app's 500 for our refusal, until we know whether that leaves the app, too
        feed: Callable[[bytes], None] | None = None
        heard: Heard | None = None
        failure: BaseException | None = None

        # A plain function: a coroutine for each chunk would cost more than all that is done here.
        def guarded_send(message: Message) -> Awaitable[None]:
            nonlocal started, feed
            if started:
                # Only messages of the body have one: files sent by path or descriptor are left unread.
                if feed is not None:
                    try:
                        if chunk := message.get("body"):
                            feed(chunk)
                        if not message.get("more_body") and passage.capture is not None:
                            passage.capture.complete()
                    except Exception:
                        feed = None
                        passage.give_up()
            elif held_back:
                held_back.append(message)
                return release() if message.get("more_body") else _nothing()
            elif message["type"] == "http.response.start":
                if message["status"] == 500 and not released and refusal_in(sys.exception()) is not None:
                    # Maybe an error page that a mounted app makes of every exception, which it then raises on.
                    held_back.append(message)
                    return _nothing()
                started = True
                if heard is not None:
                    heard.forget()
                message = self._with_headers(message, passage)
                if passage.capture is not None:
                    feed = passage.capture.start(message)
            return send(message)

        async def release() -> None:
            nonlocal released
            released, messages = True, list(held_back)
            held_back.clear()
            for message in messages:
                await guarded_send(message)

        def answer(error: GuardError) -> Awaitable[None]:
            held_back.clear()
            again = unheard(passage, receive) if heard is None else heard.replay()
            return self._refuse(error, passage, scope, again, guarded_send)

        try:
            if self._gate is not None:
                receive = await self._gate.admit(passage, scope, receive)
            if self._refusal is not None or passage.capture is not None:
                heard = Heard(passage, receive, self._kept(passage))
            await self.app(scope, receive if heard is None else heard.receive, guarded_send)
            if held_back:
                await release()
        except Gone:
            pass
        except RefusedHere as here:
            await answer(here.error)
        except Exception as error:
            failure = error
            refusal = refusal_in(error)
            if refusal is None or started:
                if held_back:
                    await release()
                raise
            await answer(refusal)
        except BaseException as error:
            failure = error
            raise
        finally:
            passage.end(failure)
            leave(token)

    # -- WebSocket ---------------------------------------------------------------------------------

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        around: Passage | None = scope.get(SCOPE_KEY)
        if around is not None and (own := around.of(self.guard)) is not None:
            await self._join(own, scope, receive, send)
            return
        scope[SCOPE_KEY] = passage = Passage(self.guard, around)
        token = current_slot.set(passage.slot)
        connected = started = False

        async def guarded_receive() -> Message:
            nonlocal connected
            message = await receive()
            connected = True
            return message

        def guarded_send(message: Message) -> Awaitable[None]:
            nonlocal started
            if not started:
                started = True
                if message["type"] != "websocket.close":
                    message = self._with_headers(message, passage)
            return send(message)

        try:
            if self._gate is not None:
                await self._gate.admit(passage, scope, receive)
            await self.app(scope, guarded_receive, guarded_send)
        except Exception as error:
            refusal = error.error if isinstance(error, RefusedHere) else refusal_in(error)
            if refusal is None or started:
                raise
            if connected or (await receive())["type"] == "websocket.connect":
                await self._refuse(refusal, passage, scope, receive, guarded_send)
        finally:
            passage.end(None)
            leave(token)

    # -- both --------------------------------------------------------------------------------------

    async def _join(self, passage: Passage, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what came through another door of this guard: that one ends it and sees its response."""
        if self._gate is not None and not passage.admitted:
            try:
                receive = await self._gate.admit(passage, scope, receive)
            except Gone:
                return
            except RefusedHere as here:
                # Answered here: on its way out it could meet a handler that makes a 500 of it.
                await self._refuse(here.error, passage, scope, unheard(passage, receive), send)
                return
            if passage.capture is not None:
                receive = Heard(passage, receive, 0).receive
        await self.app(scope, receive, send)

    async def _refuse(self, error: GuardError, passage: Passage, scope: Scope, receive: Receive, send: Send) -> None:
        if isinstance(error, LimitExceeded):
            passage.refused = error.decision
            refused(passage.slot.span, error.decision)
        if self._refusal is not None and can_respond(scope):
            http = scope["type"] == "http"
            asked = Request(scope, receive) if http else WebSocket(scope, receive, send)
            response = await self._refusal(asked, error)
            await response(scope, receive, send)
            return
        settings = self.guard.settings
        answer = render(error, show_amounts=settings.show_amounts, budget_status_code=settings.budget_status_code)
        if scope["type"] == "http":
            await send_http(answer, scope, send)
        else:
            await send_websocket(answer, scope, send)

    def _kept(self, passage: Passage) -> int:
        """How much of a body is kept for who answers a refusal: all that the door has read as JSON, else a MiB."""
        if self._refusal is None:
            return 0
        known = passage.body is not None and passage.body.json is not None
        return self._max_body if known else min(self._max_body, _MIB)

    def _with_headers(self, message: Message, passage: Passage) -> Message:
        """The first message of the response, with the RateLimit fields; the app's own message is left alone."""
        headers = message.get("headers")
        if headers.__class__ is not list and headers is not None:
            headers = list(headers)  # an iterator, maybe: more than one of us reads it
            message = {**message, "headers": headers}
        try:
            decision, held = passage.refused, 0
            if decision is None:
                slot = passage.slot
                admission = slot.bound or (slot.admissions[-1] if slot.admissions else None)
                if admission is None:
                    return message
                decision, held = admission.decision, admission.held
            fields = self._fields.of(decision, held)
            return {**message, "headers": [*(headers or ()), *fields]} if fields else message
        except Exception:
            self._faults.report("the RateLimit headers could not be made; the response goes without them")
            return message

    def _learning(self, scope: Scope, send: Send) -> Send:
        """The `send` of a lifespan: when all are started, apps further in have told what they take off a path."""

        async def learned(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                root = scope.get("root_path")
                self._paths.learn([*inner_roots(self.app, scope.get("app")), *([root] if root else [])])
            await send(message)

        return learned

    def _announce(self) -> None:
        settings = self.guard.settings
        logger.info(
            "respan_guard: storage=%s mode=%s guarded=%s identify=%s default_limits=%s",
            mask_url(settings.storage),
            self._switch.mode,
            ", ".join(self._paths.patterns),
            "by the app" if self._identify is None else describe(self._identify),
            settings.default_limits or "none",
        )


async def _nothing() -> None:
    """What is awaited for a message that is not sent."""
