"""The gateway's half of the door: who is it, what do they ask for, may they."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from respan_guard.errors import ConfigurationError, GuardError, InvalidInput, StorageUnavailable, Unidentified
from respan_guard.guard import Guard
from respan_guard.middleware.body import RequestBody, single_names
from respan_guard.middleware.capture import Capture
from respan_guard.middleware.faults import Faults
from respan_guard.middleware.headers import header, sends_body
from respan_guard.middleware.identity import Identified, Identify, sources
from respan_guard.middleware.passage import Gone, Passage, RefusedHere
from respan_guard.providers import (
    Call,
    call_from_request,
    call_of_fields,
    form_call,
    is_call_path,
    is_form_path,
    warn_of,
)

__all__ = ["ANONYMOUS", "Gate"]

logger = logging.getLogger("respan_guard")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

ANONYMOUS = "anonymous"
"""The customer that requests without a customer share, where they are let in."""
_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_NOTHING: Mapping[str, Any] = {}
# What is fetched here was booked when it was made; a provider's reply to another GET is a call of its own.
_KEPT = re.compile(r"/(?:responses|chat/completions)(?:/|$)", re.IGNORECASE)


class Gate:
    """Identifies and admits requests before the app sees them.

    Args:
        guard: Decides.
        faults: Where faults of ours are reported.
        identify: The sources of the customer.
        anonymous: Whether requests without a customer are let in as one shared customer.
        max_body: Bytes of a body that are read at most.
    """

    def __init__(self, guard: Guard, faults: Faults, identify: Identify, *, anonymous: bool, max_body: int) -> None:
        self._guard = guard
        self._faults = faults
        self._sources = sources(identify)
        self._anonymous = anonymous
        self._max_body = max_body
        self._single = single_names(name for source in self._sources for name in source.names)

    async def admit(self, passage: Passage, scope: Scope, receive: Receive) -> Receive:
        """Identify the customer and let the request in.

        Returns:
            The `receive` for the app.
        """
        call = None
        try:
            found = None
            body: Mapping[str, Any] = _NOTHING
            for source in self._sources:
                if source.names and body is _NOTHING and scope["type"] == "http":
                    read = await self._read(passage, scope, receive)
                    read.require()
                    body = read.json or {}
                answer = source.find(scope, body)
                found = answer if answer is None or answer.__class__ is Identified else await answer  # type: ignore[misc]
                if found is not None:
                    break
            else:
                if not self._anonymous:
                    raise Unidentified("The request does not say which customer it is for.")
                found = Identified(ANONYMOUS)
            if _may_have_body(scope):
                call = await self._call(passage, scope, receive)
                if call is not None:
                    call.request_ids += tuple(
                        value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"
                    )
            try:
                await self._guard.admissions.request(passage.slot, found.customer, call, found.params)
            except GuardError:
                raise
            except Exception as error:
                self._faults.report("the guard failed to decide; the request is refused")
                raise StorageUnavailable("the guard failed to decide") from error
        except ConfigurationError:
            raise
        except GuardError as error:
            if not self._guard.switch.shadow:
                raise RefusedHere(error) from error
            logger.info("shadow mode: a request would be refused: %s", type(error).__name__)
        else:
            if not _fetches(scope) or (passage.body is not None and passage.body.size):
                # Also if we know of no call: a provider's reply tells that there was one, whatever was asked.
                passage.capture = Capture(call, self._faults, self._guard.clock.monotonic)
        if call is None and scope["type"] == "http" and scope["method"] == "POST":
            warn_of(scope["path"])
        passage.admitted = True
        return receive if passage.body is None else passage.body.replay()

    async def _call(self, passage: Passage, scope: Scope, receive: Receive) -> Call | None:
        """The LLM call that the request asks for, by its body; None if it asks for none."""
        body = await self._read(passage, scope, receive)
        if body.json is None and body.form is None:
            if is_call_path(scope["path"]):
                body.require()  # else a body that we can't read but the provider can would hold nothing
            body.check()
            return None
        try:
            return await asyncio.to_thread(_asked, scope, body) if body.is_large else _asked(scope, body)
        except InvalidInput:  # of a form
            raise
        except Exception:
            self._faults.report("a request could not be read as an LLM call; it holds what `default_hold` says")
            return None
        finally:
            body.form = None  # the app gets the messages that it came in

    async def _read(self, passage: Passage, scope: Scope, receive: Receive) -> RequestBody:
        body = passage.body
        if body is None:
            passage.body = body = RequestBody(
                scope, receive, self._max_body, self._single, forms=is_form_path(scope["path"])
            )
            await body.read()
            if body.disconnected:
                raise Gone
        return body


def _asked(scope: Scope, body: RequestBody) -> Call | None:
    """The LLM call that a body asks for.

    Raises:
        InvalidInput: It is a form, and what it asks for is not clear.
    """
    path = scope["path"]
    if body.json is not None:
        return call_of_fields(path, body.json, body.size) if is_form_path(path) else call_from_request(path, body.json)
    call, unclear = form_call(
        path, (header(scope["headers"], b"content-type") or b"").decode("latin-1"), body.form or b""
    )
    if unclear is not None:
        raise unclear
    return call


def _may_have_body(scope: Scope) -> bool:
    """Whether there may be a body: with any method that is not known to have none, and with those if one is sent."""
    if scope["type"] != "http":
        return False
    if scope["method"] not in _WITHOUT_BODY or scope.get("http_version", "1.1")[0] != "1":
        return True
    return sends_body(scope)


def _fetches(scope: Scope) -> bool:
    """Whether a request without a body fetches a reply that a provider kept."""
    return scope["type"] != "http" or (scope["method"] in _WITHOUT_BODY and _KEPT.search(scope["path"]) is not None)
