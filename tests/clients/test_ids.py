"""Replies whose ids are not their own: each exchange is a call, and what two doors see is one."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from respan_guard import Guard, Usage

from .support import ASK, CHAT, open_ai, records

USAGE = {"prompt_tokens": 1000, "completion_tokens": 1000}
TRACE = "0b9c8b1e-5c55-4d61-9a11-aaaaaaaaaaaa"


def server(request: httpx2.Request) -> httpx2.Response:
    """A server that makes its reply's id of the request's, as vLLM, or gives the same id always."""
    reply_id = f"chatcmpl-{request.headers.get('x-request-id', 'z' * 24)}"
    return httpx2.Response(200, json={"id": reply_id, "object": "chat.completion", "model": CHAT, "usage": USAGE})


def ask(guard: Guard, customer: str = "c1", **headers: str) -> None:
    """One call."""
    http = httpx2.Client(transport=httpx2.MockTransport(server))
    client = guard.wrap(open_ai("http://p", http_client=http), customer=customer)
    client.chat.completions.create(model=CHAT, messages=ASK, extra_headers=headers)


@pytest.mark.parametrize("headers", [{}, {"x-request-id": TRACE}])
def test_each_exchange_is_a_call_whatever_its_id(guard: Guard, headers: dict[str, str]) -> None:
    """One trace header over several calls, or a server with one id: each call is a record, and keeps the reply's id."""
    for _ in range(3):
        ask(guard, **headers)
    found = records(guard)
    assert len(found) == len({record.id for record in found}) == 3
    assert len({record.usage.response_id for record in found}) == 1


def test_an_id_that_the_request_brought_is_no_record_of_another_process(make_guard: Any) -> None:
    """Two processes over one store that send the same header meet its id first, each: neither's call is lost."""
    ids = []
    for _ in range(2):
        guard = make_guard()
        ask(guard, **{"x-request-id": TRACE})
        ids += [record.id for record in records(guard)]
    assert not any(TRACE in record_id for record_id in ids)


def test_what_the_app_records_of_a_reply_is_its_call(guard: Guard) -> None:
    """The first exchange keeps the provider's id, so that another door, or the app, that tells of it adds nothing."""
    ask(guard)
    usage = Usage(CHAT, 1000, 1000, provider="openai", response_id=f"chatcmpl-{'z' * 24}")
    guard.sync.record(usage, customer_identifier="c1")
    ask(guard, customer="c2")
    assert [record.customer_identifier for record in records(guard)] == ["c1", "c2"]
