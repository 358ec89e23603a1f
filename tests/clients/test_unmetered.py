"""What costs money and can't be metered passes, and is told of."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from respan_guard import Guard
from respan_guard.providers import unmetered

from .support import CHAT, CLAUDE, records

REQUESTS: list[tuple[str, Callable[[Any], Any]]] = [
    ("batches", lambda c: c.batches.create(input_file_id="f", endpoint="/v1/responses", completion_window="24h")),
    ("videos", lambda c: c.videos.create(prompt="x", model="sora-2")),
    ("videos", lambda c: c.videos.create(prompt="x", model="sora-2", input_reference=io.BytesIO(b"x"))),
    ("videos", lambda c: c.videos.remix("video_1", prompt="x")),
    ("fine-tuning", lambda c: c.fine_tuning.jobs.create(model=CHAT, training_file="f")),
    ("searches of vector stores", lambda c: c.vector_stores.search("vs_1", query="q")),
    ("files in vector stores", lambda c: c.vector_stores.create(name="x")),
    ("evals", lambda c: c.evals.runs.create("eval_1", data_source={"type": "jsonl", "source": {}})),
    ("containers", lambda c: c.containers.create(name="x")),
    ("realtime and live sessions", lambda c: c.realtime.client_secrets.create()),
    ("assistants' runs", lambda c: c.beta.threads.runs.create(thread_id="t", assistant_id="a")),
    ("assistants' runs", lambda c: c.beta.threads.create_and_run(assistant_id="a")),
]


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unmetered, "_said", set())


def answer(request: httpx2.Request) -> httpx2.Response:
    """Anything."""
    return httpx2.Response(200, json={"id": "x", "object": "list", "data": []})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("kind", "ask"), REQUESTS, ids=map(str, range(len(REQUESTS))))
def test_what_cannot_be_metered_is_told_of_once(
    guard: Guard, caplog: pytest.LogCaptureFixture, kind: str, ask: Callable[[Any], Any]
) -> None:
    """The request passes, nothing is recorded, and the log names the kind and what to do, once."""
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = guard.wrap(openai.OpenAI(api_key="k", base_url="http://p/v1", http_client=http), customer="c1")
    with caplog.at_level(logging.WARNING, "respan_guard"):
        ask(client)
        ask(client)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{kind} cost money and are not metered")
    assert "guard.record" in said
    assert records(guard) == []


def test_anthropics_batches_are_told_of(guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    """Message batches too; counting tokens, files and lists are free and say nothing."""
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = guard.wrap(anthropic.Anthropic(api_key="k", base_url="http://p", http_client=http), customer="c1")
    message: Any = {"model": CLAUDE, "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    with caplog.at_level(logging.WARNING, "respan_guard"):
        client.messages.count_tokens(model=CLAUDE, messages=message["messages"])
        client.messages.batches.list()
        assert not caplog.records
        client.messages.batches.create(requests=[{"custom_id": "1", "params": message}])
    assert [record.getMessage().partition(" cost")[0] for record in caplog.records] == ["batches"]
