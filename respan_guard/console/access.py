"""Who may see the console, and who may change things in it."""

from __future__ import annotations

import hashlib
import hmac
import inspect
import secrets
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from itsdangerous import BadData, URLSafeSerializer
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from respan_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from respan_guard.backends.base import Backend
    from respan_guard.guard import Guard

__all__ = ["COOKIE", "Access", "Auth", "Throttle", "User", "same_origin"]

COOKIE = "respan_guard_console"
_SESSION_MS = 12 * 3_600_000
_SHORTEST = 8
_SPACE, _KEY = "console", "secret"
_ENDED = "console-ended"


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who uses the console.

    Args:
        name: What the history of changes calls them.
        read_only: Whether they may look and not touch.
    """

    name: str
    read_only: bool = False


Auth = Callable[[HTTPConnection], User | Awaitable[User | None] | None]
"""The host app's own authentication: who this is, or None."""


class Access:
    """Passwords, sessions, and tokens that show that a form is ours.

    Cookies are signed with a secret that is made once and kept in the store, so that all workers share it, and with
    the passwords, so that changing one ends its sessions. Sessions that were ended by signing out are kept there until
    they would be over.
    """

    def __init__(
        self, guard: Guard, password: str | None, read_only_password: str | None, auth: Auth | None, open_to_all: bool
    ) -> None:
        ways = [password is not None or read_only_password is not None, auth is not None, open_to_all]
        if sum(ways) != 1:
            raise ConfigurationError(
                "say who may use the console, in one way: password=... (with read_only_password=... for who may only"
                " look), auth=... (your app's own), or open_to_all=True"
            )
        self._guard = guard
        self._auth = auth
        self._open = open_to_all
        self._roles: list[tuple[str, bool, bytes]] = []  # name, read only, hash
        for name, given, read_only in (("admin", password, False), ("viewer", read_only_password, True)):
            if given is not None:
                if len(given) < _SHORTEST:
                    raise ConfigurationError(f"a password of the console must have at least {_SHORTEST} characters")
                self._roles.append((name, read_only, hashed(given)))
        if password is not None and password == read_only_password:
            raise ConfigurationError("password and read_only_password must differ: they tell who may change things")
        self._print = hashlib.sha256("\n".join(filter(None, (password, read_only_password))).encode()).digest()
        self._secret: bytes | None = None
        self.throttle = Throttle(guard)

    @property
    def by_password(self) -> bool:
        """Whether people sign in here."""
        return bool(self._roles)

    async def user(self, request: Request) -> User | None:
        """Who makes the request."""
        if self._open:
            return User("anybody")
        if self._auth is not None:
            found = self._auth(request)
            return await found if inspect.isawaitable(found) else found
        session = await self._session(request)
        if session is None:
            return None
        name = session["name"]
        return next((User(role, read_only) for role, read_only, _ in self._roles if role == name), None)

    async def check(self, password: str) -> User | None:
        """Who has this password. Takes as long whether somebody has or not."""
        given = await run_in_threadpool(hashed, password[:1024])
        found = None
        for name, read_only, right in self._roles:
            if hmac.compare_digest(given, right):
                found = User(name, read_only)
        return found

    async def sign_in(self, request: Request, response: Response, user: User) -> None:
        """Give a session. The cookie has no path of its own, so that it is sent to where the console is mounted."""
        until = self._guard.clock.now_ms() + _SESSION_MS
        value = (await self._signer()).dumps({"name": user.name, "until": until, "id": secrets.token_hex(8)})
        response.headers.append(
            "set-cookie",
            f"{COOKIE}={value}; Max-Age={_SESSION_MS // 1000}; HttpOnly; SameSite=Lax"
            + ("; Secure" if request.url.scheme == "https" else ""),
        )

    async def sign_out(self, request: Request, response: Response) -> None:
        """End the session, whoever has its cookie, and take the cookie back."""
        session = await self._session(request)
        if session is not None:
            await self._guard.lane().call(lambda backend: self._end(backend, session))
        response.headers.append("set-cookie", f"{COOKIE}=; Max-Age=0; HttpOnly; SameSite=Lax")

    async def token(self, request: Request) -> str:
        """What a form must carry: bound to the session, or to the user whom the host app names."""
        session = await self._session(request)
        if session is not None:
            who = str(session["id"])
        else:
            user = None if self.by_password else await self.user(request)
            who = f"name:{user.name}" if user is not None else "nobody"
        return hmac.new(await self._key(), f"form:{who}".encode(), hashlib.sha256).hexdigest()

    async def _end(self, backend: Backend, session: dict[str, str]) -> None:
        """Remember that a session has ended, and forget those that are over anyway."""
        await backend.set_fact(_ENDED, session["id"], str(session["until"]))
        for ended, until in await backend.facts(_ENDED):
            if int(until) <= self._guard.clock.now_ms():
                await backend.set_fact(_ENDED, ended, None)

    async def _session(self, request: Request) -> dict[str, str] | None:
        cookie = request.cookies.get(COOKIE)
        if not cookie or not self.by_password:
            return None
        try:
            session: dict[str, str] = (await self._signer()).loads(cookie)
            if int(session["until"]) <= self._guard.clock.now_ms():
                return None
            ended = session["id"]
        except (BadData, KeyError, TypeError, ValueError):
            return None
        return None if await self._guard.lane().call(lambda backend: backend.fact(_ENDED, ended)) else session

    async def _signer(self) -> URLSafeSerializer:
        return URLSafeSerializer(await self._key(), signer_kwargs={"digest_method": hashlib.sha256})

    async def _key(self) -> bytes:
        if self._secret is None:
            made = secrets.token_hex(32)

            async def work(backend: Backend) -> str:
                await backend.set_fact(_SPACE, _KEY, made, expected=None)
                return await backend.fact(_SPACE, _KEY) or made

            stored = await self._guard.lane().call(work)
            self._secret = hmac.new(stored.encode(), self._print, hashlib.sha256).digest()
        return self._secret


class Throttle:
    """Lets an address try few passwords: `allowed` in `seconds`, and all together ten times that.

    IPv6 addresses of one network of 64 bits are one. Who signed in from an address before does not wait for others.
    """

    def __init__(self, guard: Guard, allowed: int = 10, seconds: float = 300.0, remembered: int = 10_000) -> None:
        self._clock = guard.clock
        self._allowed = allowed
        self._seconds = seconds
        self._remembered = remembered
        self._all: deque[float] = deque()
        self._tries: OrderedDict[str, deque[float]] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until the address may try again; 0 if it may."""
        address = _network(address)
        now = self._clock.monotonic()
        waits = [0.0]
        for tries, allowed in ((self._tries.get(address, deque()), self._allowed), (self._all, 10 * self._allowed)):
            while tries and tries[0] <= now - self._seconds:
                tries.popleft()
            if len(tries) >= allowed and not (tries is self._all and address in self._known):
                waits.append(tries[0] + self._seconds - now)
        return max(waits)

    def tried(self, address: str) -> None:
        """Count a password."""
        address = _network(address)
        now = self._clock.monotonic()
        self._all.append(now)
        self._tries.setdefault(address, deque()).append(now)
        _keep(self._tries, address, self._remembered)

    def forgive(self, address: str) -> None:
        """The last one was right."""
        address = _network(address)
        for tries in (self._tries.get(address), self._all):
            if tries:
                tries.pop()
        self._known[address] = None
        _keep(self._known, address, self._remembered)


def _keep(found: OrderedDict[str, Any], name: str, most: int) -> None:
    """Make a name the last to be forgotten."""
    found.move_to_end(name)
    while len(found) > most:
        found.popitem(last=False)


def _network(address: str) -> str:
    """Whom an address stands for: of IPv6 anybody has as many as they like."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv6Address):
        return str(found.ipv4_mapped or IPv6Network((int(found) >> 64 << 64, 64)))
    return address


def same_origin(request: Request) -> bool:
    """Whether a page of this site made the request; browsers say so, and no page can make them lie."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    try:
        origin = urlsplit(request.headers.get("origin", ""))
    except ValueError:
        return False
    return bool(origin.netloc) and origin.netloc == request.headers.get("host")


@cache
def _salt() -> bytes:
    return secrets.token_bytes(16)


def hashed(password: str) -> bytes:
    """A password as it is kept: salted anew in each process."""
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=_salt(), n=2**14, r=8, p=1)
