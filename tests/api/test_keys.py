"""Who may do what: keys, and nobody without one."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from respan_guard import Guard
from respan_guard.api import RespanAPI
from respan_guard.api.app import OPERATIONS
from respan_guard.api.operation import Operation
from respan_guard.errors import ConfigurationError

from .support import KEY, MOUNT, READ_KEY, Client, mounted

WRITES = [operation for operation in OPERATIONS if operation.writes]
READS = [operation for operation in OPERATIONS if not operation.writes]
BODIES: dict[str, Any] = {
    "createRequestLog": {"model": "m", "cost": 1},
    "createRequestLogLegacy": {"model": "m", "cost": 1},
    "bulkCreateRequestLogs": {"logs": [{"model": "m", "cost": 1}]},
    "createUser": {"customer_identifier": "new"},
    "updateUser": {"name": "x"},
    "updateUserLegacy": {"name": "x"},
}
STRANGERS: dict[str, dict[str, str | bytes]] = {
    "none": {},
    "wrong": {"authorization": "Bearer sk-wrong"},
    "prefix": {"authorization": f"Bearer {KEY[:-1]}"},
    "longer": {"authorization": f"Bearer {KEY}x"},
    "empty": {"authorization": "Bearer "},
    "nothing": {"authorization": ""},
    "no scheme": {"authorization": KEY},
    "basic": {"authorization": f"Basic {KEY}"},
    "non-ascii": {"authorization": "Bearer schlüssel".encode()},
    "bytes": {"authorization": b"Bearer \xff\xfe\x00"},
    "two": {"authorization": f"Bearer {KEY}, Bearer {KEY}"},
    "x-api-key": {"x-api-key": KEY},
}


def path_of(operation: Operation) -> str:
    """A path of the operation, of a user that is there."""
    return operation.path.replace("{customer_identifier:path}", "ann").replace("{unique_id:path}", "x")


async def send(http: httpx2.AsyncClient, operation: Operation, headers: Any) -> httpx2.Response:
    """Call an operation with a body that it would take."""
    content = json.dumps(BODIES[operation.name]) if operation.name in BODIES else None
    kind = {"content-type": "application/json"} if content else {}
    sent = [
        (name.encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in {**kind, **headers}.items()
    ]
    return await http.request(operation.method, path_of(operation), content=content, headers=sent)


def test_every_route_that_changes_something_is_here() -> None:
    """What writes says so: all but lists and sums."""
    reading = {"list", "summary", "groups", "users", "total-users", "breakdown"}
    for operation in OPERATIONS:
        last = operation.path.rstrip("/").rsplit("/", 1)[-1]
        assert operation.writes == (operation.method != "GET" and last not in reading), operation.name
    assert len(WRITES) == 9


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
async def test_strangers_get_nothing(api: Client, guard: Guard, operation: Operation) -> None:
    """No key, a wrong one, an empty one, one that is no text: 401, and nothing has changed."""
    await seed(guard)
    for who, headers in STRANGERS.items():
        answer = await send(api.http, operation, headers)
        assert answer.status_code == 401, who
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json() == {"detail": "a key is needed: send Authorization: Bearer KEY"}
        await unchanged(guard)


@pytest.mark.parametrize("operation", WRITES, ids=lambda operation: operation.name)
async def test_a_key_that_may_read_changes_nothing(api: Client, guard: Guard, operation: Operation) -> None:
    """403 for every route that changes something; the full key may."""
    await seed(guard)
    answer = await send(api.http, operation, {"authorization": f"Bearer {READ_KEY}"})
    assert answer.status_code == 403
    await unchanged(guard)
    assert (await send(api.http, operation, {"authorization": f"bearer  {KEY} "})).status_code in (200, 201, 204)


@pytest.mark.parametrize("operation", READS, ids=lambda operation: operation.name)
async def test_a_key_that_may_read_reads_everything(api: Client, guard: Guard, operation: Operation) -> None:
    """Lists and sums, also where they are a POST."""
    await seed(guard)
    answer = await send(api.http, operation, {"authorization": f"Bearer {READ_KEY}"})
    assert answer.status_code == (404 if operation.name == "retrieveRequestLog" else 200)


async def seed(guard: Guard) -> None:
    """A user to be attacked."""
    await guard.update_customer("ann", name="Ann")


async def unchanged(guard: Guard) -> None:
    """That user is alone, has its name, and nothing was spent."""
    (report,) = await guard.list_customers()
    assert (report.customer.name, report.customer.blocked, report.calls) == ("Ann", False, 0)
    assert [record async for record in guard.records()] == []


class TestKeys:
    """How an API gets its keys."""

    def test_none_has_to_be_spelled_out(self) -> None:
        """Without `api_key` it is not built."""
        with pytest.raises(TypeError, match="api_key"):
            RespanAPI(Guard("memory://"))  # type: ignore[call-arg]

    @pytest.mark.parametrize("key", ["", " ", [], (), [""], ["a", ""], "a\nb", " a", "a\r"])
    def test_empty_keys_are_none(self, key: Any) -> None:
        """An environment variable that is set to nothing opens no door."""
        with pytest.raises(ConfigurationError, match="api_key"):
            RespanAPI(Guard("memory://"), api_key=key)

    def test_open_and_closed_at_once(self) -> None:
        """Who lets everybody in has no use for a key that may only read."""
        with pytest.raises(ConfigurationError, match="read_only_key"):
            RespanAPI(Guard("memory://"), api_key=None, read_only_key="x")
        with pytest.raises(ConfigurationError, match="max_body_bytes"):
            RespanAPI(Guard("memory://"), api_key="x", max_body_bytes=0)

    async def test_open_to_everybody(self, guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
        """`api_key=None` needs no key, and says so in the log."""
        with caplog.at_level(logging.WARNING):
            app = mounted(guard, api_key=None, read_only_key=())
        assert "api_key=None" in caplog.text
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=f"http://x{MOUNT}") as http:
            answer = await http.post("/api/request-logs/", json={"model": "m", "cost": 1})
            assert answer.status_code == 201

    async def test_several_keys(self, guard: Guard) -> None:
        """Each of several works, also with characters beyond ASCII, which are compared as UTF-8."""
        app = mounted(guard, api_key=["one", "zwölf"], read_only_key=["three", "four"])
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=f"http://x{MOUNT}") as http:
            for key, status in (("one", 201), ("zwölf", 201), ("three", 403), ("four", 403), ("five", 401)):
                header = f"Bearer {key}".encode()
                answer = await http.post(
                    "/api/request-logs/", json={"model": "m", "cost": 1}, headers={b"authorization": header}
                )
                assert answer.status_code == status, key


@pytest.fixture
async def alone(guard: Guard) -> AsyncIterator[httpx2.AsyncClient]:
    """The API without an app around it."""
    app = RespanAPI(guard, api_key=KEY)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x") as http:
        yield http


async def test_the_document(api: Client, alone: httpx2.AsyncClient) -> None:
    """It is OpenAPI 3.1, names where it is mounted, and needs a key like everything else."""
    answer = await api.http.get("/openapi.json", headers={"authorization": f"Bearer {READ_KEY}"})
    found = answer.json()
    assert (found["openapi"], found["servers"]) == ("3.1.0", [{"url": MOUNT}])
    assert len(found["paths"]) == len({operation.path for operation in OPERATIONS})
    answer = await alone.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"})
    assert answer.json()["servers"] == [{"url": "/"}]
    assert (await alone.get("/openapi.json")).status_code == 401


async def test_other_methods_and_paths(api: Client) -> None:
    """405 with what is allowed, 404 for what is not there, as JSON, and only for who has a key."""
    answer = await api.http.put("/api/users/ann/", headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) >= {"GET", "PATCH", "DELETE"}
    assert (await api("GET", "/api/nothing/", status=404))["detail"]
    assert (await api.http.get("/api/nothing/")).status_code == 401
    await api.log(customer_identifier="ann", cost=1)
    head = await api.http.head("/api/users/ann/", headers={"authorization": f"Bearer {KEY}"})
    assert head.status_code == 200
