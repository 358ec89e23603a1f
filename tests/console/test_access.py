"""Who gets in, who may change what, and what a form must show."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from respan_guard import Guard
from respan_guard.console import Console, User, access
from respan_guard.errors import ConfigurationError
from respan_guard.testing import FakeClock

from .support import PASSWORD, SAME, VIEWER, client_of, fill, make_guard, signed_in, token_in

READS = ["/", "/users", "/users.csv", "/users.json", "/user?id=ann", "/user-standing?id=ann", "/logs", "/logs.csv",
         "/logs.jsonl", "/record?seq=1", "/system"]  # fmt: skip
WRITING_PAGES = ["/user-new", "/user-delete?id=ann"]
WRITES: dict[str, dict[str, str]] = {
    "/user-new": {"customer_identifier": "eve"},
    "/user-save": {"id": "ann", "period_budget": "9", "was_period_budget": "5"},
    "/user-block": {"id": "ann", "blocked": "1"},
    "/user-delete": {"id": "ann", "confirm": "ann"},
}


async def state(guard: Guard) -> Any:
    """All that a write could have changed."""
    rows = await guard.list_customers()
    return [(row.customer, row.cost) for row in rows]


@pytest.mark.parametrize(
    "options",
    [{}, {"password": ""}, {"password": "short"}, {"password": PASSWORD, "open_to_all": True},
     {"password": PASSWORD, "auth": lambda _: None}, {"password": PASSWORD, "read_only_password": PASSWORD},
     {"read_only": True}],
)  # fmt: skip
def test_it_must_be_said_who_may_use_it(options: dict[str, Any]) -> None:
    """Without a way to sign in, with two of them, or with a password that is none, there is no console."""
    with pytest.raises(ConfigurationError):
        Console(make_guard(), **options)


@pytest.mark.parametrize("path", READS + WRITING_PAGES)
async def test_strangers_are_sent_to_sign_in(guard: Guard, path: str) -> None:
    """Every page, export and fragment: nothing of it is shown, and the way back is kept; parts of pages have none."""
    await fill(guard)
    answer = client_of(guard).get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("signin")
    assert "ann" not in answer.text
    fragment = client_of(guard).get(path, headers={"hx-request": "true"})
    assert fragment.status_code == 401
    page = path.partition("?")[0] not in ("/user-standing", "/users.csv", "/users.json", "/logs.csv", "/logs.jsonl")
    assert fragment.headers.get("hx-redirect", "").startswith("signin") is page


def test_passwords_are_kept_as_salted_hashes(real_passwords: None) -> None:
    """Nothing that the console holds has the password in it, and the same one is hashed the same."""
    guard = make_guard()
    console = Console(guard, password=PASSWORD)
    assert PASSWORD not in repr(vars(console._gate._access))
    assert access.hashed(PASSWORD) == access.hashed(PASSWORD) != access.hashed(VIEWER)
    assert signed_in(guard).get("/").status_code == 200


def test_nobody_is_sent_elsewhere() -> None:
    """The way back is one of our own pages, whatever a link says."""
    client = client_of(make_guard())
    for evil in (
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "signin",
        "users\n",
    ):
        answer = client.post("/signin", params={"next": evil}, data={"password": PASSWORD}, headers=SAME)
        assert answer.headers["location"] == "./", evil
    answer = client.post("/signin", params={"next": "users?q=a"}, data={"password": PASSWORD}, headers=SAME)
    assert answer.headers["location"] == "./users?q=a"


@pytest.mark.parametrize("page", ["", "?range=7d", "users?q=a", "user?id=ann&range=90d"])
async def test_who_signs_in_is_where_they_wanted_to_be(guard: Guard, page: str) -> None:
    """Also on the dashboard of another time; and who is signed in already has nothing to do on that page."""
    await fill(guard)
    client = client_of(guard, "/console")
    asked = client.get(f"/{page}")
    signin = asked.url.join(asked.headers["location"])
    assert signin.path == "/console/signin"
    answer = client.post(signin, data={"password": PASSWORD}, headers=SAME)
    for _ in range(2):
        there = answer.url.join(answer.headers["location"])
        assert str(there) == f"http://console.example/console/{page}"
        assert client.get(there).status_code == 200
        answer = client.get(signin)
        assert answer.status_code == 303


def test_the_cookie_is_signed_and_out_of_reach() -> None:
    """Scripts and other sites can't read or send it, over TLS only TLS carries it, and a changed one is none."""
    guard = make_guard()
    client = client_of(guard)
    answer = client.post("/signin", data={"password": PASSWORD}, headers=SAME)
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert "Path" not in cookie
    assert PASSWORD not in cookie
    secure = client.post("https://console.example/signin", data={"password": PASSWORD}, headers=SAME)
    assert "; Secure" in secure.headers["set-cookie"]
    value = cookie.split(";")[0].split("=", 1)[1]
    assert client_of(guard).get("/", headers={"cookie": f"respan_guard_console={value}"}).status_code == 200
    payload, signature = value.rsplit(".", 1)
    other = "A" if signature[0] != "A" else "B"
    for forged in (f"{payload}.{other}{signature[1:]}", f"e{payload}.{signature}", payload, "x", ""):
        assert client_of(guard).get("/", headers={"cookie": f"respan_guard_console={forged}"}).status_code == 303


def test_sessions_are_the_workers_and_end() -> None:
    """Two consoles on one store share them; after 12 hours, by signing out, or with another password they are over."""
    guard = make_guard()
    client = signed_in(guard)
    cookie = {"cookie": f"respan_guard_console={client.cookies['respan_guard_console']}"}
    assert client_of(guard).get("/", headers=cookie).status_code == 200
    other = {"password": "another one altogether", "read_only_password": VIEWER}
    assert client_of(guard, **other).get("/", headers=cookie).status_code == 303
    assert client.post("/signout", headers=SAME).status_code == 303
    assert client.get("/").status_code == 303
    assert client_of(guard).get("/", headers=cookie).status_code == 303
    later = signed_in(guard)
    cookie = {"cookie": f"respan_guard_console={later.cookies['respan_guard_console']}"}
    assert client_of(guard).get("/", headers=cookie).status_code == 200
    assert isinstance(guard.clock, FakeClock)
    guard.clock.advance(12 * 3600 + 1)
    assert client_of(guard).get("/", headers=cookie).status_code == 303


async def test_a_cookie_is_worth_nothing_after_its_session(guard: Guard) -> None:
    """Also in other hands, in every worker, for reading and for changes; of sessions long over nothing is kept."""
    await fill(guard)
    client, other = signed_in(guard), signed_in(guard)
    cookie = {"cookie": f"respan_guard_console={client.cookies['respan_guard_console']}"}
    form = {"id": "ann", "blocked": "1", "token": token_in(client.get("/user?id=ann").text)}
    assert client.post("/signout", headers=SAME).status_code == 303
    assert client_of(guard).get("/", headers=cookie).status_code == 303
    assert client_of(guard).post("/user-block", data=form, headers={**SAME, **cookie}).status_code == 401
    assert other.get("/").status_code == 200
    assert isinstance(guard.clock, FakeClock)
    guard.clock.advance(12 * 3600 + 1)
    assert signed_in(guard).post("/signout", headers=SAME).status_code == 303
    assert len(await guard.lane().call(lambda backend: backend.facts("console-ended"))) == 1


def test_passwords_are_tried_a_few_times_only() -> None:
    """Ten wrong ones, then even the right one waits; five minutes later it is let in. Others are not kept out."""
    guard = make_guard()
    client = client_of(guard)
    for _ in range(10):
        assert client.post("/signin", data={"password": "wrong"}, headers=SAME).status_code == 401
    answer = client.post("/signin", data={"password": PASSWORD}, headers=SAME)
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 301
    assert isinstance(guard.clock, FakeClock)
    guard.clock.advance(301)
    assert client.post("/signin", data={"password": PASSWORD}, headers=SAME).status_code == 303


def test_who_signed_in_before_is_not_kept_out_by_others() -> None:
    """A hundred wrong passwords from all over, and new addresses wait; those known do not. A network is one address."""
    guard = make_guard()
    console = Console(guard, password=PASSWORD)

    def sign_in(address: str, password: str = PASSWORD) -> int:
        client = TestClient(console, base_url="http://console.example", follow_redirects=False, client=(address, 1))
        return client.post("/signin", data={"password": password}, headers=SAME).status_code

    assert sign_in("192.0.2.1") == 303
    assert [sign_in(f"2001:db8::{number:x}", "wrong") for number in range(11)] == [401] * 10 + [429]
    assert sign_in("2001:db8:0:1::1") == 303
    assert sign_in("::ffff:198.51.100.1", "wrong") == 401
    assert sign_in("198.51.100.2") == 303
    assert [sign_in(f"203.0.113.{number}", "wrong") for number in range(90)] == [401] * 89 + [429]
    assert sign_in("203.0.113.99") == 429
    assert sign_in("192.0.2.1") == sign_in("2001:db8:0:1::2") == 303
    assert [sign_in("192.0.2.1", "wrong") for _ in range(11)] == [401] * 10 + [429]
    assert isinstance(guard.clock, FakeClock)
    guard.clock.advance(301)
    assert sign_in("203.0.113.99") == 303


async def test_many_tries_at_once_are_many(guard: Guard) -> None:
    """Thirty wrong passwords sent together: ten are looked at; right ones do not count."""
    console = Console(guard, password=PASSWORD)
    transport = httpx2.ASGITransport(app=console)
    async with httpx2.AsyncClient(transport=transport, base_url="http://console.example", headers=SAME) as client:
        for _ in range(12):
            assert (await client.post("/signin", data={"password": PASSWORD})).status_code == 303
        answers = await asyncio.gather(*(client.post("/signin", data={"password": f"no {n}"}) for n in range(30)))
    assert Counter(answer.status_code for answer in answers) == {401: 10, 429: 20}


async def test_tries_whose_password_is_yet_to_come_are_many(guard: Guard) -> None:
    """Eighty forms that are begun together and finished later: ten passwords are looked at, not all of them."""
    console = Console(guard, password=PASSWORD)
    come = asyncio.Event()

    async def form(number: int) -> AsyncIterator[bytes]:
        yield b"password="
        await come.wait()
        yield b"no %d" % number

    transport = httpx2.ASGITransport(app=console)
    async with httpx2.AsyncClient(transport=transport, base_url="http://console.example", headers=SAME) as client:
        tries = [asyncio.create_task(client.post("/signin", content=form(number))) for number in range(80)]
        await asyncio.sleep(0.1)
        come.set()
        answers = await asyncio.gather(*tries)
    assert Counter(answer.status_code for answer in answers) == {401: 10, 429: 70}


@pytest.mark.parametrize("path", WRITES)
async def test_writes_need_a_session_that_may(guard: Guard, path: str) -> None:
    """Without one, with a read-only one, or in a read-only console, every change is refused and nothing changes."""
    await fill(guard)
    before = await state(guard)
    viewer = signed_in(guard, VIEWER)
    frozen = signed_in(guard, read_only=True)
    page = viewer.get("/user?id=ann").text
    assert 'name="token"' not in page or "disabled" in page
    for client, status in (
        (client_of(guard), 401), (viewer, 403),
        (client_of(guard, auth=lambda _: User("eve", read_only=True)), 403),
        (client_of(guard, auth=lambda _: None), 401),
    ):  # fmt: skip
        assert client.post(path, data=WRITES[path], headers=SAME).status_code == status
    assert frozen.post(path, data=WRITES[path], headers=SAME).status_code == 403
    assert await state(guard) == before


@pytest.mark.parametrize("path", WRITING_PAGES)
async def test_who_may_only_look_sees_no_forms(guard: Guard, path: str) -> None:
    """Pages for changes are not for them."""
    await fill(guard)
    viewer = signed_in(guard, VIEWER)
    assert viewer.get(path).status_code == 403
    assert viewer.get("/user?id=ann").status_code == 200
    assert "user-new" not in viewer.get("/users").text


@pytest.mark.parametrize("path", WRITES)
async def test_other_sites_change_nothing(guard: Guard, path: str) -> None:
    """A form from elsewhere, with the right cookie and even the right token, is refused; so is one without a token."""
    await fill(guard)
    client = signed_in(guard)
    before = await state(guard)
    token = token_in(client.get("/user?id=ann").text)
    right = {**WRITES[path], "token": token}
    for headers in (
        {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"sec-fetch-site": "none"},
        {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://console.example.evil.example"}, {},
        {"origin": "http://["}, {"origin": ""},
    ):  # fmt: skip
        assert client.post(path, data=right, headers=headers).status_code == 403, headers
    for token in ("", "0" * 64, "ü"):
        assert client.post(path, data={**WRITES[path], "token": token}, headers=SAME).status_code == 403
    assert client.post(path, data=WRITES[path], headers=SAME).status_code == 403
    assert client.get(path, params=right, headers=SAME).status_code in (200, 404, 405)
    assert await state(guard) == before
    assert client.post(path, data=right, headers={"origin": "http://console.example"}).status_code == 303
    assert await state(guard) != before


async def test_tokens_are_a_sessions_own(guard: Guard) -> None:
    """Another session's token is refused."""
    await fill(guard)
    ours, theirs = signed_in(guard), signed_in(guard)
    token = token_in(theirs.get("/user?id=ann").text)
    assert ours.post("/user-block", data={"id": "ann", "blocked": "1", "token": token}, headers=SAME).status_code == 403


def test_signing_in_and_out_from_elsewhere_is_refused() -> None:
    """Nobody is signed in as somebody else, or out, by another site."""
    guard = make_guard()
    client = signed_in(guard)
    for path in ("/signin", "/signout"):
        for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "null"}, {"origin": "http://evil.example"}, {}):
            answer = client.post(path, data={"password": PASSWORD}, headers=headers)
            assert answer.status_code == 403
            assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("wrapped", [False, True])
async def test_the_apps_own_authentication(guard: Guard, wrapped: bool) -> None:
    """A callable, async or not, says who it is; what they change is in the history under their name."""
    await fill(guard)

    def who(connection: HTTPConnection) -> User | None:
        name = connection.headers.get("x-user")
        return User(name, read_only=name != "ada") if name else None

    async def asking(connection: HTTPConnection) -> User | None:
        return who(connection)

    auth: Callable[..., Any] = asking if wrapped else who
    client = client_of(guard, auth=auth)
    assert client.get("/").status_code == 403
    assert client.get("/signin").status_code == 303
    assert client.get("/", headers={"x-user": "bob"}).status_code == 200
    page = client.get("/user?id=ann", headers={"x-user": "ada"}).text
    form = {"id": "ann", "blocked": "1", "token": token_in(page)}
    assert client.post("/user-block", data=form, headers={**SAME, "x-user": "bob"}).status_code == 403
    assert client.post("/user-block", data=form, headers={**SAME, "x-user": "ada"}).status_code == 303
    assert "console:ada" in client.get("/user?id=ann", headers={"x-user": "ada"}).text


def test_open_to_all_is_open() -> None:
    """Told so, it asks nobody; forms of other sites are refused all the same."""
    guard = make_guard()
    client = client_of(guard, open_to_all=True)
    token = token_in(client.get("/user-new").text)
    form = {"customer_identifier": "ann", "token": token}
    assert client.post("/user-new", data=form, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.post("/user-new", data=form, headers=SAME).status_code == 303


async def test_large_and_broken_forms_are_refused(guard: Guard) -> None:
    """A form of megabytes, of thousands of fields, or that is no text is an answer, not an error."""
    await fill(guard)
    client = signed_in(guard)
    head = {**SAME, "content-type": "application/x-www-form-urlencoded"}
    for body in (b"a=" + b"x" * 200_000, b"&".join(b"f%d=1" % n for n in range(500)), b"a=%ff%fe&token=\xff"):
        assert client.post("/user-save", content=body, headers=head).status_code in (400, 403, 413)
