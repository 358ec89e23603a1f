"""The examples with wrapped clients run, and do what they say."""

from __future__ import annotations

import runpy
from decimal import Decimal
from pathlib import Path

import httpx2
import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from respan_guard import Customer, Guard, GuardMiddleware
from respan_guard.testing import StandInProvider
from tests.gateway_support import EXAMPLES, load_example

from .support import arecords, async_open_ai, facts, open_ai, records, same

ACME, BOLT = ({"authorization": f"Bearer key-of-{name}"} for name in ("acme", "bolt"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that examples make go to a directory of the test's own, and no key of the developer's is used."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "RESPAN_GUARD_STORAGE"):
        monkeypatch.delenv(name, raising=False)


def test_the_saas_answers_refuses_and_shows_the_standing() -> None:
    """Whole and streamed answers are charged to the caller's organisation; a spent budget and a full rate refuse."""
    example = load_example("fastapi_saas")
    with TestClient(example.app) as client:
        assert client.post("/ask?question=moon", headers=ACME).status_code == 200
        assert client.post("/tell?question=moon", headers=ACME).text
        example.guard.sync.flush()  # a call is booked behind its response
        standing = client.get("/me/usage", headers=ACME).json()
        assert (standing["total_requests"], standing["total_calls"]) == (2, 2)
        assert Decimal(standing["total_spend"]) > 0
        for path in ("/ask", "/tell"):
            # Room for a request without a call, not for the call.
            example.guard.sync.update_customer("bolt", total_budget="0.0000001")
            refused = client.post(f"{path}?question=moon", headers=BOLT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (402, "total_budget")
        example.guard.sync.update_customer("acme", rate_limit=2)
        assert client.post("/ask?question=moon", headers=ACME).status_code == 429
        assert client.post("/ask?question=moon").status_code == 401
        assert len(records(example.guard)) == 2


def test_the_worker_serves_who_can_pay(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten jobs of acme's are done, ten of bolt's refused, from four threads."""
    runpy.run_path(str(EXAMPLES / "worker.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "acme: 10 calls" in out
    assert "refused: {'bolt': 10}" in out


def test_the_workers_jobs_are_metered(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Each job is one record of its organisation's."""
    example = load_example("worker")
    with guard.wrap(open_ai(url)) as client:
        assert example.work(guard, client, [example.Job(f"o{n % 3}", "text") for n in range(9)]) == {}
    found = records(guard)
    same(found, provider)
    assert sorted(record.customer_identifier for record in found) == sorted(f"o{n % 3}" for n in range(9))


async def test_the_agent_is_stopped_mid_run(guard: Guard, provider: StandInProvider, url: str) -> None:
    """A budget for some calls: the run makes those, then stops with the refusal; spend is below the budget."""
    pytest.importorskip("pydantic_ai")
    example = load_example("agent")
    budget = Decimal("0.002")
    async with guard, async_open_ai(url) as client:
        await guard.put_customer(Customer(customer_identifier="acme", total_budget=budget))
        said = await example.run(guard, client, "acme", "How far is the moon?")
        assert said == "stopped: The total budget has less left than this could cost."
        found = await arecords(guard)
        same(found, provider)
        assert len(found) > 3
        assert provider.meter.total_cost <= budget
        assert (await guard.status("acme")).total_requests == len(found)
        assert facts(found[0])[0] == example.MODEL


async def test_an_agents_refusal_becomes_the_apps(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The framework raises its own error from the SDK's; the app answers 402 all the same; the run is one request."""
    pytest.importorskip("pydantic_ai")
    example = load_example("agent")
    app = FastAPI()
    app.add_middleware(GuardMiddleware, guard=guard)
    async with guard, guard.wrap(async_open_ai(url)) as client:
        agent = example.make_agent(client)

        @app.post("/research")
        async def research() -> str:
            await guard.admit("acme")
            return str((await agent.run("How far is the moon?", model_settings={"max_tokens": 200})).output)

        await guard.put_customer(Customer(customer_identifier="acme", total_budget=Decimal("0.002")))
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://app") as http:
            answer = await http.post("/research")
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "total_budget")
        found = await arecords(guard)
        same(found, provider)
        assert (await guard.status("acme")).total_requests == 1
        assert isinstance(client, openai.AsyncOpenAI)
