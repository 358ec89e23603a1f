"""Which paths are guarded, and that no spelling of a path slips by."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Host, Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from respan_guard import Guard, GuardMiddleware
from respan_guard.errors import ConfigurationError
from respan_guard.middleware.paths import GuardedPaths, route_path


def scope(path: str, root_path: str = "") -> dict[str, Any]:
    """An HTTP scope, as far as paths go."""
    return {"type": "http", "method": "GET", "path": path, "root_path": root_path, "headers": [], "query_string": b""}


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("/*", ["/", "/a", "", "/a/b"], []),
        ("/v1/*", ["/v1/", "/v1/chat", "/v1", "/V1/chat"], ["/v10/chat", "/v", "/"]),
        ("/v1*", ["/v1", "/v10", "/v1/chat"], ["/v"]),
        ("/ask", ["/ask", "/ask/"], ["/ask/more", "/asks", "/"]),
        ("/", ["/", ""], ["/a"]),
    ],
)
def test_patterns(pattern: str, inside: list[str], outside: list[str]) -> None:
    """A pattern matches exactly what its documentation says."""
    paths = GuardedPaths([pattern])
    assert [path for path in inside if not paths.guards(scope(path))] == []
    assert [path for path in outside if paths.guards(scope(path))] == []


@pytest.mark.parametrize("bad", ["v1/*", "", "/v1/*/chat", "/v1?x=1", "/v1 ", "https://host/v1", 7, None])
def test_patterns_that_match_nothing_are_errors(bad: Any) -> None:
    """A pattern that can't match is an error at once, with an example of a right one."""
    with pytest.raises(ConfigurationError, match=r"/v1/\*"):
        GuardedPaths([bad])


def test_a_string_is_no_list_of_patterns() -> None:
    """A lone string, whose characters would be taken for patterns, is an error."""
    with pytest.raises(ConfigurationError, match="must be a list"):
        GuardedPaths("/v1/*")


def test_exclude_takes_out_of_include() -> None:
    """An excluded path is not guarded; a spelling that may be read as another path stays guarded."""
    paths = GuardedPaths(["/v1/*"], ["/v1/models"])
    assert not paths.guards(scope("/v1/models"))
    assert paths.guards(scope("/v1/chat"))
    assert paths.guards(scope("/v1/models/../chat"))
    assert paths.guards(scope("/v1/models%2f..%2fchat"))
    assert paths.guards(scope("/v1//models/..;/chat"))
    public = GuardedPaths(["/v1/*"], ["/v1/public/*"])
    assert not public.guards(scope("/v1/public/x"))
    assert not public.guards(scope("/v1/public//x"))
    assert public.guards(scope("/v1/public/../chat"))


def test_the_case_of_a_path_opens_nothing() -> None:
    """A host that takes `/OpenAI` for `/openai` stands behind a guard that does so, too; what is excluded is exact."""
    paths = GuardedPaths(["/openai/*", "/v1/Ask", "/V2*"], ["/openai/models"], roots=["/api"])
    for path in ("/OpenAI/x", "/openAI", "/OPENAI//x", "/api/OPENAI/x", "/v1/ask", "/V1/ASK/", "/v2x"):
        assert paths.guards(scope(path)), path
    assert not paths.guards(scope("/openai/models"))
    assert paths.guards(scope("/openai/Models"))
    assert paths.guards(scope("/OpenAI/models"))
    assert GuardedPaths(["/k"]).guards(scope("/\u212a")), "the sign for kelvin, which lower case makes a k"


def test_long_paths_are_not_remembered() -> None:
    """Clients choose them, so what is kept of them has an end; what is decided of them is the same each time."""
    paths = GuardedPaths(["/v1/*"])
    for number in range(2_000):
        long = "x" * 600 + str(number)
        assert paths.guards(scope("/v1/" + long))
        assert not paths.guards(scope("/v2/" + long))
        paths.guards(scope(f"/v1/{number}"))
    assert 0 < len(paths._known) <= 1024
    assert max(len(path) for path, _ in paths._known) <= 512


def test_paths_are_relative_to_the_root_path() -> None:
    """A mount and a server's root path are taken off, as the router takes them off."""
    paths = GuardedPaths(["/v1/*"])
    assert paths.guards(scope("/api/v1/chat", "/api"))
    assert paths.guards(scope("/v1/chat", "/api")), "a server that tells a root path without prefixing it"
    assert not paths.guards(scope("/apiv1/chat", "/api"))


def test_the_root_path_of_an_app_further_in_counts() -> None:
    """An app that sets its own root path behind the guard is guarded under both readings."""
    paths = GuardedPaths(["/v1/*"], roots=["/api"])
    assert paths.guards(scope("/api/v1/chat"))
    assert paths.guards(scope("/v1/chat"))
    assert not paths.guards(scope("/api/health"))


def test_route_path_agrees_with_starlette() -> None:
    """The path below the root is what Starlette's router would take, for all overlaps of path and root."""
    from starlette._utils import get_route_path

    parts = ["", "/", "/a", "/a/", "/ab", "/a/b", "//a", "a"]
    for root, path in itertools.product(parts, [left + right for left in parts for right in parts]):
        assert (route_path(path, root) if root else path) == get_route_path(scope(path, root)), (root, path)


def encodings(rng: random.Random) -> list[str]:
    """Spellings of the guarded path as they may come over the wire, 600 of them."""
    base = "/v1/chat/completions"
    found = {base, base + "/", "/" + base, base + "//", "/./v1/chat/completions", "/x/../v1/chat/completions"}
    found |= {"/v1/chat/completions%00", "/v1/chat/completions;a=b", "/v1;x/chat/completions", "/api" + base}
    found |= {base + "%0A", base + "/%0A", base + "%0A%0A", base + "%0D%0A", base + "%20", base + "%3Fa", base + "%23"}
    while len(found) < 600:
        text = "".join(f"%{ord(c):02x}" if rng.random() < 0.2 else c for c in base)
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(text) + 1)
            text = (
                text[:at]
                + rng.choice(["/", "//", "/./", "%2f", "%2F", "/../", "%25", "\\", ";", "..", " ", "%0A"])
                + text[at:]
            )
        found.add(text)
    return sorted(found)


@pytest.mark.parametrize(
    "include", [["/v1/*", "/mounted/v1/*"], ["/v1/chat/completions", "/mounted/v1/chat/completions"]]
)
@pytest.mark.parametrize("server_root", ["", "/api"])
def test_what_reaches_the_endpoint_was_guarded(server_root: str, include: list[str]) -> None:
    """Differential test: whenever Starlette's router reaches the endpoint, the guard ran, mounts and root paths too."""

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("paid")

    routes: list[BaseRoute] = [
        Route("/v1/chat/completions", endpoint),
        Mount("/mounted", routes=[Route("/v1/chat/completions", endpoint)]),
    ]
    if "/v1/*" in include:
        routes.insert(1, Route("/v1/{rest:path}", endpoint))
    app = Starlette(routes=routes)
    paths = GuardedPaths(include)
    reached = 0
    for prefix, raw in itertools.product(("", "/mounted"), encodings(random.Random(10))):
        path = server_root + unquote(prefix + raw)  # what a server makes of it
        for candidate in (path, unquote(prefix + raw)):
            hit = scope(candidate, server_root)
            if _reaches(app, hit, endpoint):
                reached += 1
                assert paths.guards(scope(candidate, server_root)), candidate
    assert reached > (200 if "/v1/*" in include else 5)


@pytest.mark.parametrize("end", ["\n", "/\n", "\r\n", " ", "?a=1", "#a", ";a", "%0A", "\x00"])
def test_an_end_that_routers_or_providers_overlook_opens_nothing(end: str) -> None:
    """A route's `$` matches before a final newline, and an app that forwards a path makes a URL of it."""
    paths = GuardedPaths(["/v1/chat/completions", "/v2/*"], ["/v2/models"])
    for path in ("/v1/chat/completions", "/v2", "/v2/models"):
        assert paths.guards(scope(path + end)), path


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_newline_behind_the_path_opens_nothing(kind: str) -> None:
    """Over the wire: what Starlette routes to the endpoint of `/ask`, the guard has identified."""
    guard = Guard("memory://")

    async def ask(request: Request) -> PlainTextResponse:
        return PlainTextResponse("paid")

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    app = Starlette(routes=[Route("/ask", ask, methods=["POST"]), WebSocketRoute("/talk", talk)])
    app.add_middleware(GuardMiddleware, guard=guard, identify="header:x-customer", include=["/ask", "/talk"])
    client = TestClient(app)
    for end in ("", "%0A"):
        if kind == "http":
            assert client.post("/ask" + end).status_code == 401
            assert client.post("/ask" + end, headers={"x-customer": "org_1"}).text == "paid"
        else:
            with pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)), client.websocket_connect("/talk" + end):
                pass


def _reaches(app: Starlette, hit: dict[str, Any], endpoint: Any) -> bool:
    """Whether the router leads this scope to the endpoint (and not to a redirect or a 404)."""
    from starlette.routing import Match

    routes: Any = app.routes
    while True:
        for route in routes:
            match, child = route.matches(hit)
            if match is Match.FULL:
                if isinstance(route, Mount):
                    hit = {**hit, **child}
                    routes = route.routes
                    break
                return bool(child["endpoint"] is endpoint)
        else:
            return False


def test_the_host_header_has_no_say() -> None:
    """A malformed Host, which changes `request.url.path` in old Starlette, does not change what is guarded."""
    paths = GuardedPaths(["/v1/*"])
    for host in (b"a/v1/../health?", b"", b"evil/health#", b"[::1", b"x y"):
        assert paths.guards({**scope("/v1/chat"), "headers": [(b"host", host)]})
        assert not paths.guards({**scope("/health"), "headers": [(b"host", b"x/v1/chat")]})


def _behind_a_function(app: Any) -> Any:
    async def function(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return function


class _Holder:
    """A middleware that calls the app that it holds by a name of its own."""

    def __init__(self, app: Any) -> None:
        self._next = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._next(scope, receive, send)


@pytest.mark.parametrize(
    "around",
    [
        lambda app: app,
        lambda app: Starlette(routes=[Mount("/", app)]),
        lambda app: Starlette(routes=[Host("{name}", app)]),
        _behind_a_function,
        lambda app: _behind_a_function(Starlette(routes=[Mount("/", _Holder(app))])),
        lambda app: functools.partial(_Holder.__call__, _Holder(app)),
        lambda app: Starlette(routes=[Mount("/", Starlette(routes=[Mount("", app)]))]),
    ],
    ids=["bare", "mounted", "hosted", "function", "function, mount and holder", "partial", "mounted twice"],
)
def test_an_app_that_sets_its_root_path_is_guarded_wherever_it_stands(around: Any) -> None:
    """`FastAPI(root_path=...)` takes its prefix off also when mounted, or behind middleware of any make."""
    inner = FastAPI()
    inner.root_path = "/proxy"  # as the argument of that name sets it, which newer versions warn about
    guard = Guard("memory://")

    @inner.get("/v1/ask")
    async def ask() -> bool:
        return guard.current() is not None

    client = TestClient(GuardMiddleware(around(inner), guard, identify=lambda _: "org_1", include=["/v1/*"]))
    for path in ("/v1/ask", "/proxy/v1/ask"):
        assert client.get(path).json() is True, path


def test_an_app_that_nothing_leads_to_tells_its_root_path_at_startup() -> None:
    """What can't be found by looking is learned from the lifespan, which passes through the same apps."""
    inner = FastAPI()
    inner.root_path = "/proxy"  # as the argument of that name sets it, which newer versions warn about
    guard = Guard("memory://")
    hidden = {"app": inner}

    @inner.get("/v1/ask")
    async def ask() -> bool:
        return guard.current() is not None

    async def function(scope: Any, receive: Any, send: Any) -> None:
        await hidden["app"](scope, receive, send)

    with TestClient(GuardMiddleware(function, guard, identify=lambda _: "org_1", include=["/v1/*"])) as client:
        assert client.get("/proxy/v1/ask").json() is True
