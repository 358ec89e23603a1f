"""The README is true: each of its code blocks runs, one after another, and does what the text around it says."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from opentelemetry.sdk.trace import TracerProvider
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

from respan_guard import Customer, Guard, RateLimitExceeded, Usage
from respan_guard.testing import StandInProvider

README = Path(__file__).parent.parent / "README.md"
AUTHORIZED = {"authorization": "Bearer acme"}


class ApiKeys(AuthenticationBackend):
    """The README's reader's own: a bearer key is a user."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        """Who is it?"""
        key = conn.headers.get("authorization", "").removeprefix("Bearer ")
        return (AuthCredentials(), SimpleUser(key)) if key else None


class User:
    """The README's reader's own."""

    org_id = "org_7"


async def forward_to_provider(request: Request) -> JSONResponse:
    """A provider's reply of three dollars."""
    usage = {"prompt_tokens": 0, "completion_tokens": 300_000, "total_tokens": 300_000}
    reply = {"id": f"chatcmpl-{await request.body()!r:>40}", "object": "chat.completion", "model": "gpt-4o"}
    return JSONResponse(reply | {"choices": [], "usage": usage})


async def paint(prompt: str) -> str:
    """A picture."""
    return f"<{prompt}>"


def blocks() -> Sequence[Example]:
    """The README's Python, in order."""
    sybil = Sybil(parsers=[CodeBlockParser("python", evaluator=lambda example: None)])
    return list(sybil.parse(README).examples())


async def run(example: Example, names: dict[str, Any]) -> None:
    """Run one block, which may await at its top level, as the text of an async function would."""
    code = compile(
        example.parsed, f"{README.name}:{example.line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    waiting = eval(code, names)
    if inspect.isawaitable(waiting):
        await waiting


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a reader has: imports, an app of their own, a provider."""
    monkeypatch.chdir(tmp_path)
    provider = StandInProvider(strict=False)
    with provider.serve() as url:
        monkeypatch.setenv("GUARD_API_KEY", "a reader's own")
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        monkeypatch.setenv("CONSOLE_PASSWORD", "a reader's own")
        yield {
            "ApiKeys": ApiKeys,
            "AuthenticationMiddleware": AuthenticationMiddleware,
            "Customer": Customer,
            "Decimal": Decimal,
            "HTTPConnection": HTTPConnection,
            "OpenAI": openai.OpenAI,
            "Route": Route,
            "Starlette": Starlette,
            "RateLimitExceeded": RateLimitExceeded,
            "Usage": Usage,
            "User": User,
            "current_user": User,
            "forward_to_provider": forward_to_provider,
            "messages": [{"role": "user", "content": "Hi"}],
            "monday": datetime(2026, 1, 5, tzinfo=UTC),
            "paint": paint,
            "prompt": "a red fox",
            "provider": TracerProvider(shutdown_on_exit=False),
            "pytest": pytest,
            "stand_in": provider,
        }


async def test_the_readme_runs_from_top_to_bottom(names: dict[str, Any]) -> None:
    """Every Python block runs as it stands, with nothing but the names a reader would have."""
    for example in blocks():
        await run(example, names)
    await names["test_the_third_question_is_refused"]()
    await names["guard"].aclose()


async def test_a_spent_budget_is_answered_as_the_readme_shows(names: dict[str, Any]) -> None:
    """A customer past its five dollars gets the 402 that is printed there, word for word but for the date."""
    await run(blocks()[0], names)
    await run(blocks()[1], names)

    def drive() -> Any:
        with TestClient(names["app"]) as client:
            body = {"model": "gpt-4o", "messages": [], "max_tokens": 200_000}
            assert client.post("/v1/chat/completions", json=body, headers=AUTHORIZED).status_code == 200
            again = client.post("/v1/chat/completions", json=body | {"max_tokens": 1000}, headers=AUTHORIZED)
            assert client.post("/v1/chat/completions", json=body).status_code == 401
            return client.post("/v1/chat/completions", json=body, headers=AUTHORIZED) if again.is_success else again

    answer = await asyncio.to_thread(drive)
    [shown] = re.findall(r"```http\n(.*?)\n\n(.*?)```", README.read_text(), re.DOTALL)
    head, body = shown
    status, *fields = head.splitlines()
    assert status == f"HTTP/1.1 {answer.status_code} Payment Required"
    for field in fields:
        name, _, value = field.partition(": ")
        assert answer.headers[name] == value
    dates = re.compile(r"\d{4}-\d{2}-\d{2}")
    expected, given = (json.loads(dates.sub("DATE", text)) for text in (body, answer.text))
    expected["error"]["message"] = given["error"]["message"]  # cut short in the README
    assert given.pop("instance", None) is None
    assert given["error"].items() >= expected["error"].items()
    assert {**given, "error": expected["error"]} == expected


async def test_the_first_example_guards_each_call_of_its_client(names: dict[str, Any]) -> None:
    """The provider's own meter is what the organisation was charged, and the 61st request of a minute is a 429."""
    await run(blocks()[0], names)

    def drive() -> list[int]:
        with TestClient(names["app"]) as client:
            return [client.post("/ask", params={"question": "Why?"}).status_code for _ in range(61)]

    assert await asyncio.to_thread(drive) == [200] * 60 + [429]
    meter = names["stand_in"].meter
    async with names["guard"] as guard:
        status = await guard.status("org_7")
        assert (status.total_calls, status.total_spend) == (60, meter.total_cost)
        assert len(meter.calls) == 60
        assert {record.source async for record in guard.records()} == {"client"}


async def test_the_worker_example_charges_whom_it_names(names: dict[str, Any]) -> None:
    """A worker's call is on the bill of the organisation it works for."""
    for example in blocks()[:3]:
        await run(example, names)
    assert await asyncio.to_thread(names["summarise"], "org_9", "A long text.")
    async with names["guard"] as guard:
        await guard.flush()
        assert (await guard.status("org_9")).total_calls == 1


def test_the_commands_of_the_readme_exist() -> None:
    """Each `make` target and each subcommand named in the README is one."""
    text = README.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (README.parent / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", text)) <= targets
    assert uvicorn.__version__  # the demo's server is there
    assert Guard is not None
