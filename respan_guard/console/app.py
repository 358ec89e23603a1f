"""The console as an ASGI app: routes, who may do what, forms, headers.

Every link is relative and every page lies beside the others, so that it works under any mount and behind a proxy that
strips a prefix, whether the app was told of it or not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from decimal import localcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from respan_guard.console import customer as one
from respan_guard.console import log_exports, logs, panels, users
from respan_guard.console.access import Access, Auth, User
from respan_guard.console.dashboard import dashboard
from respan_guard.console.gate import Gate, form_of
from respan_guard.console.log_view import PILLS, view_from
from respan_guard.console.pages import Pages
from respan_guard.console.ranges import range_from
from respan_guard.console.remembered import Remembered
from respan_guard.customer import Customer, normalise_identifier
from respan_guard.customers import is_shown, not_reserved
from respan_guard.errors import BackendError, InvalidInput, RevisionConflict
from respan_guard.money import EXACT

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Console"]

logger = logging.getLogger("respan_guard")

_BROKE_OFF = "\nThis file broke off here and is not complete: storage gave no answer.\n"  # in JSON, an error
_HEADERS = {
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"same-origin",  # with "no-referrer" browsers hide the Origin of the console's own forms
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), geolocation=(), microphone=()",
}


class Console:
    """Pages on a guard's customers: `app.mount("/console", Console(guard, password=...))`.

    Args:
        guard: Whose customers and records are shown.
        password: Who has it may look and change.
        read_only_password: Who has it may look.
        auth: The host app's own authentication instead of passwords: called with the connection, returns a `User` or
            None; may be async.
        open_to_all: No authentication: anybody who reaches the app may look and change.
        read_only: Nobody may change anything.
        panels: More panels for the system page: async functions of the guard that return a `Panel` or None.

    Raises:
        ConfigurationError: It is not said who may use it, or a password has fewer than 8 characters.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        password: str | None = None,
        read_only_password: str | None = None,
        auth: Auth | None = None,
        open_to_all: bool = False,
        read_only: bool = False,
        panels: Sequence[panels.PanelSource] = (),
    ) -> None:
        self._guard = guard
        self._panels = panels
        self._remembered = Remembered(guard)
        self._access = access = Access(guard, password, read_only_password, auth, open_to_all)
        self._pages = Pages(guard, access)
        self._gate = gate = Gate(access, self._pages, read_only)
        get, post = gate.reading, gate.writing
        self._app = Starlette(
            routes=[
                Route("/", get(self._dashboard)),
                Route("/users", get(self._users)),
                Route("/users.csv", get(self._users_export)),
                Route("/users.json", get(self._users_export)),
                Route("/user", get(self._user)),
                Route("/user-standing", get(self._standing)),
                Route("/user-new", get(self._new, writes=True), methods=["GET"]),
                Route("/user-new", post(self._create), methods=["POST"]),
                Route("/user-save", post(self._save), methods=["POST"]),
                Route("/user-block", post(self._block), methods=["POST"]),
                Route("/user-delete", get(self._ask_delete, writes=True), methods=["GET"]),
                Route("/user-delete", post(self._delete), methods=["POST"]),
                Route("/logs", get(self._logs)),
                Route("/logs.csv", get(self._logs_export)),
                Route("/logs.jsonl", get(self._logs_export)),
                Route("/record", get(self._record)),
                Route("/system", get(self._system)),
                Route("/signin", gate.sign_in, methods=["GET", "POST"]),
                Route("/signout", gate.sign_out, methods=["POST"]),
                Mount("/static", self._pages.static),
            ],
            exception_handlers={
                HTTPException: self._failed, BackendError: self._no_answer, RevisionConflict: self._conflict,
            },
        )  # fmt: skip
        self._app.router.redirect_slashes = False  # it would send people to the address that a proxy hides

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"] = list(message["headers"])
                headers += _HEADERS.items()
                if not any(name == b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
            await send(message)

        with localcontext(EXACT):  # the host app's own may have few digits
            await self._app(scope, receive, with_headers)

    # -- pages ------------------------------------------------------------------------------------

    async def _render(self, request: Request, user: User, template: str, status: int = 200, **context: Any) -> Response:
        return self._pages.render(
            request, user, template, status, write=self._gate.may_write(user),
            token=await self._access.token(request), **context,
        )  # fmt: skip

    async def _dashboard(self, request: Request, user: User) -> Response:
        span = range_from(request.query_params, self._guard)
        found = await dashboard(self._guard, span, self._remembered)
        return await self._render(request, user, "dashboard.html", span=span, **found)

    async def _users(self, request: Request, user: User) -> Response:
        view = users.UsersView.from_query(request.query_params)
        found = await users.users(self._guard, view, self._remembered)
        return await self._render(request, user, "users.html", view=view, **found)

    async def _users_export(self, request: Request, user: User) -> Response:
        view = users.UsersView.from_query(request.query_params)
        if request.url.path.endswith(".csv"):
            return await _download(users.users_csv(self._guard, view), "text/csv", "users.csv")
        return await _download(users.users_json(self._guard, view), "application/json", "users.json")

    async def _logs(self, request: Request, user: User) -> Response:
        view, span = view_from(request.query_params, self._guard)
        found = await logs.logs(self._guard, view, span)
        return await self._render(request, user, "logs.html", view=view, span=span, pills=PILLS, **found)

    async def _logs_export(self, request: Request, user: User) -> Response:
        view, span = view_from(request.query_params, self._guard)
        if request.url.path.endswith(".csv"):
            return await _download(log_exports.logs_csv(self._guard, view, span), "text/csv", "logs.csv")
        return await _download(log_exports.logs_jsonl(self._guard, view, span), "application/x-ndjson", "logs.jsonl")

    async def _record(self, request: Request, user: User) -> Response:
        seq = request.query_params.get("seq", "")
        found = await logs.record(self._guard, int(seq)) if re.fullmatch(r"[0-9]{1,18}", seq) else None
        if found is None:
            raise HTTPException(404, "There is no such record; it may have been pruned.")
        return await self._render(request, user, "record.html", stored=found.stored, marked=found.marked)

    async def _system(self, request: Request, user: User) -> Response:
        return await self._render(request, user, "system.html", panels=await panels.system(self._guard, self._panels))

    # -- one customer -----------------------------------------------------------------------------

    async def _user(self, request: Request, user: User) -> Response:
        return await self._user_page(request, user, _identifier(request.query_params))

    async def _user_page(
        self, request: Request, user: User, identifier: str, status: int = 200, **edited: Any
    ) -> Response:
        span = range_from(request.query_params, self._guard)
        found = await one.customer(self._guard, identifier, span)
        if found is None:
            raise _unknown()
        stored = one.shown(found["row"].params)
        context = {"span": span, "groups": one.FIELDS, "durations": one.DURATIONS, "was": stored, "values": stored}
        return await self._render(request, user, "user.html", status, **found, **(context | edited))

    async def _standing(self, request: Request, user: User) -> Response:
        found = await one.standing(self._guard, _identifier(request.query_params))
        if found is None:
            raise _unknown()
        return await self._render(request, user, "standing.html", **found)

    async def _new(self, request: Request, user: User) -> Response:
        return await self._new_page(request, user, {"customer_identifier": "", **one.shown(None)})

    async def _new_page(
        self, request: Request, user: User, values: Mapping[str, str], status: int = 200, **error: str
    ) -> Response:
        return await self._render(
            request, user, "user_new.html", status, groups=one.FIELDS, durations=one.DURATIONS, was={}, values=values,
            **error,
        )  # fmt: skip

    async def _create(self, request: Request, user: User) -> Response:
        form = await form_of(request)
        try:
            identifier = not_reserved(normalise_identifier(form.get("customer_identifier", "")))
            fields = one.changes_from(form, all_fields=True)
            made = Customer.model_validate({"customer_identifier": identifier, **fields})
            await self._guard.customers.create(made, actor=f"console:{user.name}")
        except InvalidInput as error:
            return await self._new_page(request, user, form, 400, error=str(error), wrong=error.field or "")
        return RedirectResponse(f"user?id={quote(identifier, safe='')}&done=created", 303)

    async def _save(self, request: Request, user: User) -> Response:
        form = await form_of(request)
        identifier = await self._known(form)
        try:
            changes = one.changes_from(form)
            if changes:
                await self._guard.customers.update(
                    identifier, changes, actor=f"console:{user.name}", check=partial(one.expect, form, changes)
                )
        except (InvalidInput, RevisionConflict) as error:
            was = {name.removeprefix("was_"): text for name, text in form.items() if name.startswith("was_")}
            if isinstance(error, one.ChangedMeanwhile):
                was |= error.now
            return await self._user_page(
                request, user, identifier, 400 if isinstance(error, InvalidInput) else 409, error=str(error),
                wrong=getattr(error, "field", None) or "", values={**one.shown(None), **form},
                was={**one.shown(None), **was},
            )  # fmt: skip
        done = "saved" if changes else "unchanged"
        return RedirectResponse(f"user?id={quote(identifier, safe='')}&done={done}", 303)

    async def _block(self, request: Request, user: User) -> Response:
        form = await form_of(request)
        identifier = await self._known(form)
        if form.get("blocked") not in ("0", "1"):
            raise HTTPException(400)
        blocked = form["blocked"] == "1"
        await self._guard.update_customer(identifier, actor=f"console:{user.name}", blocked=blocked)
        done = "blocked" if blocked else "unblocked"
        return RedirectResponse(f"user?id={quote(identifier, safe='')}&done={done}", 303)

    async def _ask_delete(self, request: Request, user: User) -> Response:
        identifier = await self._known(request.query_params)
        return await self._render(request, user, "user_delete.html", identifier=identifier)

    async def _delete(self, request: Request, user: User) -> Response:
        form = await form_of(request)
        identifier = await self._known(form)
        if form.get("confirm", "").strip() != identifier:
            return await self._render(
                request, user, "user_delete.html", 400, identifier=identifier,
                error="That is not the identifier of this customer. Nothing was deleted.",
            )  # fmt: skip
        await self._guard.delete_customer(identifier, actor=f"console:{user.name}")
        return RedirectResponse("users?done=deleted", 303)

    async def _known(self, given: Mapping[str, str]) -> str:
        """The customer that a form or link is about."""
        identifier = _identifier(given)
        row = await self._guard.lane().call(lambda backend: backend.get(identifier))
        if row is None or not is_shown(row):
            raise _unknown()
        return identifier

    # -- what goes wrong --------------------------------------------------------------------------

    async def _failed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = error.status_code in (401, 403, 404, 405)
        user = self._gate.known(request) if error.status_code != 401 else None
        text = error.detail if known else "The console can't do this."
        if error.status_code == 404 and error.detail == "Not Found":
            text = "There is no such page."
        return self._pages.render(
            request, user, "error.html", error.status_code, text=text, headers=dict(error.headers or {})
        )

    async def _no_answer(self, request: Request, error: Exception) -> Response:
        logger.warning("the console can't answer %r: %s", request.url.path, error)
        return self._pages.render(  # without the error: storage knows who asks, and it names hosts and users
            request, None, "error.html", 503, text="Storage gave no answer. Try again in a moment; the log says why.",
            headers={"retry-after": "5"}, refresh=5 if request.method == "GET" else 0,  # the live tail without scripts
        )  # fmt: skip

    async def _conflict(self, request: Request, error: Exception) -> Response:
        return self._pages.render(
            request, self._gate.known(request), "error.html", 409,
            text="Others change this customer all the time. Nothing was changed; try again.",
        )  # fmt: skip


async def _download(lines: AsyncIterator[str], media_type: str, name: str) -> Response:
    """A file. Its first page is fetched before the answer begins, so that storage that is down is no empty file."""
    first = await anext(lines, "")

    async def whole() -> AsyncIterator[str]:
        yield first
        try:
            async for line in lines:
                yield line
        except BackendError as error:
            logger.warning("the console can't go on with %s: %s", name, error)
            yield _BROKE_OFF

    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(whole(), media_type=f"{media_type}; charset=utf-8", headers=headers)


def _identifier(given: Mapping[str, str]) -> str:
    """The customer that a form or link names; "" is nobody."""
    try:
        return normalise_identifier(given["id"]) if given.get("id") else ""
    except InvalidInput:
        raise _unknown() from None


def _unknown() -> HTTPException:
    return HTTPException(404, "There is no customer with that identifier.")
