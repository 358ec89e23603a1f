"""The door as a transport of httpx2 or httpx, whichever the client stands on."""

from __future__ import annotations

import functools
import importlib
from types import TracebackType
from typing import Any, Self

from respan_guard.clients.asking import OPTION, REFUSALS
from respan_guard.clients.bodies import Body, Decoded, WatchedAsyncStream, WatchedStream
from respan_guard.clients.door import Door, RefusedCall
from respan_guard.clients.exchange import Exchange
from respan_guard.clients.requests import Outgoing, read
from respan_guard.clients.streams import UsageFilter
from respan_guard.providers import is_call_path

__all__ = ["AsyncTransport", "Kinds", "Transport", "kinds_of"]

_OF_THE_BODY = (b"content-length", b"content-encoding")
_OF_THE_ANSWER: tuple[bytes, ...] = (b"accept-encoding",)
_OF_THE_REQUEST: tuple[bytes, ...] = (b"content-length", b"transfer-encoding", b"accept-encoding")
_ENCODINGS = ("gzip", "x-gzip", "deflate", "identity")
_NO_TEXT = ("audio/", "image/", "video/")
_TAKES_BODY = ("HTTPTransport", "AsyncHTTPTransport")
"""Transports that ask for a request's body once there is a connection to send it on."""


class Passage:
    """What both kinds of transport share.

    Attributes:
        door: Decides.
        inner: Sends.
        kinds: The classes of the library they are made of.
    """

    kinds: Kinds

    def __init__(self, door: Door, inner: Any) -> None:
        self.door = door
        self.inner = inner
        self._takes_body = type(inner).__name__ in _TAKES_BODY

    def must_read(self, request: Any, path: str) -> bool:
        """Whether a request's body has to be fetched first: it is made while it is sent, or came by a redirect."""
        try:
            _ = request.content
        except Exception:
            return isinstance(request.stream, self.kinds.bytes) or is_call_path(path)
        return False

    def read(self, request: Any, path: str) -> Outgoing | None:
        """The LLM call that a request asks for, if it does."""
        try:
            content = request.content
        except Exception:  # the app's own: an upload to somewhere
            content = None
        kind = request.headers.get("content-type", "")
        asking = self.door.asking
        outgoing = read(path, kind, content, include_usage=asking.wanted)
        if outgoing is not None:
            outgoing.call.request_ids += tuple(request.headers.get_list("x-request-id"))
            if outgoing.content is not None and not asking.may(request.url, outgoing.call):
                outgoing.content = None
        return outgoing

    def changed(self, request: Any, outgoing: Outgoing) -> Any:
        """The request to send: with an answer that can be read, asking for a stream's usage if need be."""
        offered = request.headers.get("accept-encoding")
        if outgoing.content is None:
            accepted, dropped, stream = _readable(offered), _OF_THE_ANSWER, request.stream
            if accepted == offered:
                return request
        else:  # what is compressed is better not edited as it passes
            accepted, dropped, stream = "identity", _OF_THE_REQUEST, self.kinds.bytes(outgoing.content)
        headers = [(name, value) for name, value in request.headers.raw if name.lower() not in dropped]
        if outgoing.content is not None:
            headers.append((b"content-length", b"%d" % len(outgoing.content)))
        headers.append((b"accept-encoding", (accepted or "identity").encode("latin-1")))
        changed = type(request)(
            request.method, request.url, headers=headers, stream=stream, extensions=request.extensions
        )
        changed.read()  # so that transports find its content as they would the first one's
        return changed

    def refusal(self, refused: RefusedCall, request: Any) -> Any:
        """The answer to a call that must not be made; the client makes its own exception of it."""
        answer = refused.answer
        return self.kinds.response(
            answer.status,
            headers=answer.headers,
            content=answer.body,
            request=request,
            extensions={"respan_guard": refused.error},
        )

    def watched(self, response: Any, exchange: Exchange, outgoing: Outgoing, kind: type) -> Any:
        """The response, read as it passes."""
        content_type, encoding = _content(response)
        hide = None
        if outgoing.content is not None and response.status_code < 300 and not content_type.startswith(_NO_TEXT):
            hide = UsageFilter(content_type)
        if response.is_closed:  # of a transport that has the whole body already: nobody will ask for its stream
            return self._read_whole(response, exchange, content_type, hide)
        if hide is not None:
            if encoding:
                plain = self.kinds.response(response.status_code, headers=response.headers, stream=response.stream)
                response.stream, encoding = Decoded(plain), ""
            response.headers = self._plain(response.headers)
        feed = exchange.answered(response.status_code, content_type, encoding)
        response.stream = kind(response.stream, exchange, feed, hide)
        return response

    def _read_whole(self, response: Any, exchange: Exchange, content_type: str, hide: UsageFilter | None) -> Any:
        feed = exchange.answered(response.status_code, content_type, "")
        if feed is not None:
            feed(response.content)
        exchange.finish()
        if hide is None:
            return response
        content = hide.passed(response.content) + hide.rest()
        headers = self._plain(response.headers)
        return self.kinds.response(
            response.status_code, headers=headers, content=content, extensions=response.extensions
        )

    def _plain(self, headers: Any) -> Any:
        """The headers of a body that is edited, so that its length is another, and not encoded."""
        kept = [(name, value) for name, value in headers.raw if name.lower() not in _OF_THE_BODY]
        return type(headers)(kept)


class Transport(Passage):
    """Guards the calls that go through another transport."""

    def handle_request(self, request: Any) -> Any:
        """Send a request; an LLM call only if it may be made."""
        door = self.door
        if door.guard.switch.off or request.method != "POST":
            return self.inner.handle_request(request)
        path = request.url.path
        if self.must_read(request, path):
            request.read()
        outgoing = self.read(request, path)
        if outgoing is None:
            return self.inner.handle_request(request)
        try:
            exchange = door.guard.sync.run(door.open(outgoing.call))
        except RefusedCall as refused:
            return self.refusal(refused, request)
        while True:
            sent = self.changed(request, outgoing)
            stream = sent.stream
            body = sent.stream = exchange.body = self.kinds.body(stream, taken=not self._takes_body)
            try:
                response = self.inner.handle_request(sent)
                if outgoing.content is not None and response.status_code in REFUSALS:
                    body.taken = False  # what is refused costs nothing
                    told = b"".join(response.stream)
                    response.stream.close()
                    response.stream = self.kinds.bytes(told)
                    if OPTION in told:
                        outgoing = Outgoing(outgoing.call, refused=True)
                        continue
                if outgoing.refused and response.status_code < 300:
                    door.asking.refused(request.url, outgoing.call)
                return self.watched(response, exchange, outgoing, self.kinds.stream)
            except BaseException as error:
                exchange.failed(error)
                raise
            finally:
                sent.stream = stream

    def close(self) -> None:
        """Close the transport behind."""
        self.inner.close()

    def __enter__(self) -> Self:
        self.inner.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.inner.__exit__(exc_type, exc_value, traceback)


class AsyncTransport(Passage):
    """Guards the calls that go through another transport."""

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request; an LLM call only if it may be made."""
        door = self.door
        if door.guard.switch.off or request.method != "POST":
            return await self.inner.handle_async_request(request)
        path = request.url.path
        if self.must_read(request, path):
            await request.aread()
        outgoing = self.read(request, path)
        if outgoing is None:
            return await self.inner.handle_async_request(request)
        try:
            exchange = await door.open(outgoing.call)
        except RefusedCall as refused:
            return self.refusal(refused, request)
        while True:
            sent = self.changed(request, outgoing)
            stream = sent.stream
            body = sent.stream = exchange.body = self.kinds.body(stream, taken=not self._takes_body)
            try:
                response = await self.inner.handle_async_request(sent)
                if outgoing.content is not None and response.status_code in REFUSALS:
                    body.taken = False  # what is refused costs nothing
                    told = b"".join([chunk async for chunk in response.stream])
                    await response.stream.aclose()
                    response.stream = self.kinds.bytes(told)
                    if OPTION in told:
                        outgoing = Outgoing(outgoing.call, refused=True)
                        continue
                if outgoing.refused and response.status_code < 300:
                    door.asking.refused(request.url, outgoing.call)
                return self.watched(response, exchange, outgoing, self.kinds.async_stream)
            except BaseException as error:
                exchange.failed(error)
                raise
            finally:
                sent.stream = stream

    async def aclose(self) -> None:
        """Close the transport behind."""
        await self.inner.aclose()

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.inner.__aexit__(exc_type, exc_value, traceback)


class Kinds:
    """The classes above, as one HTTP library's own.

    Args:
        library: "httpx2" or "httpx".
    """

    def __init__(self, library: str) -> None:
        http: Any = importlib.import_module(library)
        self.response: Any = http.Response
        self.bytes: Any = http.ByteStream
        self.body: Any = type("Body", (Body, http.SyncByteStream, http.AsyncByteStream), {})
        self.stream: Any = type("WatchedStream", (WatchedStream, http.SyncByteStream), {})
        self.async_stream: Any = type("WatchedAsyncStream", (WatchedAsyncStream, http.AsyncByteStream), {})
        members = {"kinds": self}
        self.transport: Any = type("GuardedTransport", (Transport, http.BaseTransport), members)
        self.async_transport: Any = type("GuardedAsyncTransport", (AsyncTransport, http.AsyncBaseTransport), members)
        self.sync_client: type = http.Client
        self.base: type = http.BaseTransport
        self.async_base: type = http.AsyncBaseTransport
        self.default: Any = http.HTTPTransport
        self.async_default: Any = http.AsyncHTTPTransport


kinds_of = functools.cache(Kinds)


def _readable(offered: str | None) -> str | None:
    """Of the encodings that a request accepts, those that can be read as they pass."""
    if offered is None:
        return None
    parts = [part for part in offered.split(",") if part.partition(";")[0].strip().lower() in _ENCODINGS]
    return ",".join(parts).strip() or "identity"


def _content(response: Any) -> tuple[str, str]:
    """Type and encoding of a body; looking names up one by one takes the libraries ten times as long."""
    kind = encoding = ""
    for name, value in response.headers.raw:
        match name.lower():
            case b"content-type":
                kind = value.decode("latin-1")
            case b"content-encoding":
                encoding += ("," if encoding else "") + value.decode("latin-1").strip().lower()
    return kind, "" if encoding == "identity" else encoding
