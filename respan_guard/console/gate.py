"""In front of every page: who is it, may they, and was the form one of ours."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl, urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from respan_guard.console.access import Access, User, same_origin
from respan_guard.console.pages import Pages

__all__ = ["Gate", "form_of"]

_MAX_BODY = 128 * 1024
_NEXT = re.compile(r"(?:users|user|user-new|user-delete|logs|record|system)?(?:\?[^\\\x00-\x20]*)?")
Handler = Callable[[Request, User], Awaitable[Response]]


class Gate:
    """Lets requests through to handlers."""

    def __init__(self, access: Access, pages: Pages, read_only: bool) -> None:
        self._access = access
        self._pages = pages
        self._read_only = read_only

    async def user(self, request: Request) -> User | None:
        """Who makes the request; `known` tells it again."""
        user = request.state.console_user = await self._access.user(request)
        return user

    def known(self, request: Request) -> User | None:
        """Who makes the request, as far as that was found out: what went wrong may be just that."""
        found: User | None = getattr(request.state, "console_user", None)
        return found

    def may_write(self, user: User) -> bool:
        """Whether somebody may change things."""
        return not (self._read_only or user.read_only)

    def reading(self, handler: Handler, *, writes: bool = False) -> Callable[[Request], Awaitable[Response]]:
        """A page for whoever may look, or (`writes`) for whoever may change what it is about."""

        async def endpoint(request: Request) -> Response:
            user = await self.user(request)
            if user is None:
                return self._stranger(request)
            if writes and not self.may_write(user):
                raise HTTPException(403, "You may look, and not change anything.")
            return await handler(request, user)

        return endpoint

    def writing(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """A change: only by whoever may, and only from a form of ours."""

        async def endpoint(request: Request) -> Response:
            user = await self.user(request)
            if user is None:
                raise HTTPException(401, "Sign in first.")
            if not self.may_write(user):
                raise HTTPException(403, "You may look, and not change anything.")
            await self._check_form(request)
            return await handler(request, user)

        return endpoint

    async def _check_form(self, request: Request) -> None:
        form = await form_of(request)
        right = await self._access.token(request)
        if not same_origin(request) or not hmac.compare_digest(form.get("token", "").encode(), right.encode()):
            raise HTTPException(403, "This form was not sent from the console, or its session is over. Load it again.")

    def _stranger(self, request: Request) -> Response:
        if not self._access.by_password:
            raise HTTPException(403, "You are not signed in, or may not see the console.")
        here = request.url.path.rsplit("/", 1)[-1]
        target = f"{here}?{request.url.query}" if request.url.query else here
        page = _NEXT.fullmatch(target) is not None
        signin = f"signin?{urlencode({'next': target})}" if target and page else "signin"
        if request.headers.get("hx-request"):  # a part of a page is no reason to leave it: somebody may be typing there
            return Response(status_code=401, headers={"hx-redirect": signin} if page else {})
        return RedirectResponse(signin, 303)

    async def sign_in(self, request: Request) -> Response:
        """The page to sign in on, and its form."""
        access = self._access
        if not access.by_password:
            return RedirectResponse("./", 303)
        target = request.query_params.get("next", "")
        target = target if _NEXT.fullmatch(target) else ""
        if request.method != "POST":
            if await access.user(request) is not None:
                return RedirectResponse(f"./{target}", 303)
            return self._pages.render(request, None, "signin.html", next=target)
        if not same_origin(request):
            raise HTTPException(403, "This form was not sent from the console.")
        address = request.client.host if request.client else ""
        wait = access.throttle.wait(address)
        if wait > 0:
            return self._pages.render(
                request, None, "signin.html", 429, next=target, error="Too many tries. Wait a few minutes.",
                headers={"retry-after": str(int(wait) + 1)},
            )  # fmt: skip
        access.throttle.tried(address)  # before anything is awaited, so that many at once are many
        password = (await form_of(request)).get("password", "")
        user = await access.check(password)
        if user is None:
            return self._pages.render(request, None, "signin.html", 401, next=target, error="That is not the password.")
        access.throttle.forgive(address)
        response = RedirectResponse(f"./{target}", 303)  # not the bare query: that would be of this page
        await access.sign_in(request, response, user)
        return response

    async def sign_out(self, request: Request) -> Response:
        """End the session."""
        if not same_origin(request):
            raise HTTPException(403, "This form was not sent from the console.")
        response = RedirectResponse("signin", 303)
        await self._access.sign_out(request, response)
        return response


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form. Read once, kept on the request."""
    known: dict[str, str] | None = getattr(request.state, "console_form", None)
    if known is not None:
        return known
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise HTTPException(413, "The form is too large.")
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200, errors="strict")
    except (ValueError, UnicodeDecodeError):
        raise HTTPException(400, "The form can't be read.") from None
    request.state.console_form = dict(pairs)
    return request.state.console_form  # type: ignore[no-any-return]
