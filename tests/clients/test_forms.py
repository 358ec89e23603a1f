"""Calls that are sent as forms, and calls whose body can't be read: what they hold, and at which price."""

from __future__ import annotations

import gzip
import json
import logging
import tracemalloc
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest

from respan_guard import Guard
from respan_guard.providers import unmetered
from respan_guard.providers.forms import form_call, is_form_path

from .support import CHAT, open_ai, records

PNG = b"\x89PNG\r\n\r\n" + bytes(range(256)) * 4
EDITS = "/v1/images/edits"
BODY = json.dumps({"model": CHAT, "messages": [], "max_tokens": 9}).encode()


def images(count: int) -> dict[str, Any]:
    """A reply with so many images."""
    details = {"text_tokens": 50, "image_tokens": 950}
    usage = {"input_tokens": 1000, "output_tokens": 6000 * count, "input_tokens_details": details}
    return {"created": 1, "data": [{"b64_json": "aGk="}] * count, "usage": usage}


def client(guard: Guard, count: int = 1, seen: list[bytes] | None = None) -> openai.OpenAI:
    """A guarded client of a server that draws."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        if seen is not None:
            seen.append(request.read())
        return httpx2.Response(200, json=images(count))

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    return guard.wrap(open_ai("http://p", http_client=http), customer="c1")


def test_a_prompt_chooses_no_price(guard: Guard) -> None:
    """What an end user writes into a form looks like a field of it: only a part's own header names a part."""
    drawing = client(guard)
    for prompt in ("a cat", 'a cat name="model"\r\n\r\ngpt-5-nano\r\n'):
        drawing.images.edit(model="gpt-image-1", image=PNG, prompt=prompt)
    one, other = records(guard)
    assert (one.model, other.model) == ("gpt-image-1", "gpt-image-1")
    assert one.cost == other.cost == Decimal("0.24975")


def test_all_images_that_a_form_asks_for_are_held(guard: Guard) -> None:
    """Ten drawn images are held as ten, so a budget for fewer does not let them through."""
    seen: list[bytes] = []
    drawing = client(guard, 10, seen)
    guard.sync.update_customer("c1", total_budget="1.2")
    with pytest.raises(openai.APIStatusError):
        drawing.images.edit(model="gpt-image-1", image=PNG, prompt="a cat", n=10)
    drawing.images.edit(model="gpt-image-1", image=PNG, prompt="a cat")
    assert len(seen) == 1


def part(name: str, value: str) -> bytes:
    """A part of a form whose boundary is x."""
    return f"--x\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; {name}\r\n\r\n{value}\r\n".encode()


FORM = "multipart/form-data; boundary=x"
MODEL = part('name="model"', "m")


@pytest.mark.parametrize(
    ("kind", "content", "model", "choices"),
    [
        (FORM, MODEL + b"--x--", "m", 1),
        ('Multipart/Form-Data; boundary="x"', part("name=model", "m") + b"--x--", "m", 1),
        (FORM, b"before\r\n" + part('name="n"', "3") + MODEL + b"--x--\r\n", "m", 3),
        (FORM, part('name="image"; filename="a"', 'name="model"\r\n\r\nz\r\n\r\n') + MODEL + b"--x--", "m", 1),
        (FORM, MODEL + part('name="model"', "z") + b"--x--", "", 1),
        (FORM, MODEL[:-9], "", 1),
        ("multipart/form-data", MODEL + b"--x--", "", 1),
        (FORM, b"", "", 1),
        ("application/json", b'{"model": "m", "n": 2, "prompt": "x"}', "m", 2),
        ("application/json", b"[1]", "", 1),
    ],
)
def test_fields_of_forms(kind: str, content: bytes, model: str, choices: int) -> None:
    """A form as any client writes it, or the JSON that some of these paths take; what is unclear names no model."""
    call, unclear = form_call(EDITS, kind, content)
    assert (call.model, call.choices, call.operation) == (model, choices, "image_generation")
    assert (unclear is None) is bool(model)


def test_a_large_form_is_not_copied() -> None:
    """Of 64 MiB of a file nothing is kept, however much in it looks like the beginning of a part."""
    content = part('name="image"; filename="a"', "\r\n--y\r\n\r\n" * 6_000_000) + MODEL + b"--x--"
    tracemalloc.start()
    call, _ = form_call(EDITS, FORM, content)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert call.model == "m"
    assert most < 1_000_000


def test_a_deployment_in_the_path_is_the_model() -> None:
    """Azure serves what the path names, whatever the form says."""
    content = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ncheap\r\n--x--'
    call, _ = form_call("/openai/deployments/dear/images/edits/", "multipart/form-data; boundary=x", content)
    assert (call.provider, call.model) == ("azure", "dear")


@pytest.mark.parametrize("path", [EDITS, "/v1/audio/transcriptions/", "/v1/Audio/Translations"])
def test_paths_of_forms(path: str) -> None:
    """A slash at the end and the case of a path make no difference."""
    assert is_form_path(path)
    assert not is_form_path("/v1/files")


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"content": BODY}),
    ("/v1/chat/completions", {"content": gzip.compress(BODY), "headers": {"content-encoding": "gzip"}}),
    ("/v1/chat/completions", {"content": b"\xef\xbb\xbf" + BODY}),
    ("/v1/chat/completions", {"content": b"nonsense"}),
    ("/v1/audio/transcriptions/", {"data": {"model": "gpt-4o-transcribe"}, "files": {"file": b"RIFF"}}),
    ("/v1/audio/transcriptions", {"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}}),
]


@pytest.mark.parametrize(("path", "options"), REQUESTS)
def test_no_call_passes_unread(guard: Guard, path: str, options: dict[str, Any]) -> None:
    """A path says that this is a call: whatever its body, a spent budget stops it."""
    guard.sync.update_customer("c1", total_budget=0)
    sent: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200, json={})

    with httpx2.Client(transport=guard.transport(httpx2.MockTransport(answer), customer="c1")) as http:
        assert http.post(f"http://p{path}", **options).status_code >= 400
    assert sent == []
    assert records(guard) == []


def test_a_body_that_is_made_while_it_is_sent_is_read_first(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives as it would have, is held for and recorded; an upload to elsewhere is not touched."""
    seen: list[list[bytes]] = []
    usage = {"prompt_tokens": 3, "completion_tokens": 2}

    def answer(self: httpx2.MockTransport, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.SyncByteStream)
        seen.append(list(request.stream))
        return httpx2.Response(200, json={"object": "chat.completion", "model": CHAT, "usage": usage})

    monkeypatch.setattr(httpx2.MockTransport, "handle_request", answer)  # which else would read it
    server = httpx2.MockTransport(lambda _: httpx2.Response(500))
    with httpx2.Client(transport=guard.transport(server, customer="c1")) as http:
        http.post("http://p/v1/chat/completions", content=iter([BODY[:5], BODY[5:]]))
        http.post("http://p/v1/files", content=iter([b"a", b"b"]))
    assert seen == [[BODY], [b"a", b"b"]]
    [record] = records(guard)
    assert (record.model, record.usage.output_tokens) == (CHAT, 2)


async def test_a_body_that_is_made_on_a_loop_is_read_first(guard: Guard) -> None:
    """The same for clients of event loops."""

    async def body() -> AsyncIterator[bytes]:
        yield BODY

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={"object": "chat.completion", "usage": {"prompt_tokens": 3}})

    async with guard:
        transport = guard.async_transport(httpx2.MockTransport(answer), customer="c1")
        async with httpx2.AsyncClient(transport=transport) as http:
            assert (await http.post("http://p/v1/chat/completions", content=body())).status_code == 200
        await guard.flush()
        assert [record.model async for record in guard.records()] == [CHAT]


def test_a_call_that_is_not_read_is_told_of_once(
    make_guard: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no budget applies it passes, costs what its reply says, and the log says so once."""
    monkeypatch.setattr(unmetered, "_said", set())
    guard = make_guard()
    usage = {"prompt_tokens": 1000, "completion_tokens": 0}
    reply = httpx2.Response(200, json={"object": "chat.completion", "model": CHAT, "usage": usage})
    transport = guard.transport(httpx2.MockTransport(lambda _: reply), customer="c1")
    with httpx2.Client(transport=transport) as http, caplog.at_level(logging.WARNING, "respan_guard"):
        for _ in range(2):
            http.post("http://p/v1/chat/completions", content=gzip.compress(BODY))
    assert sum("can't be read" in record.getMessage() for record in caplog.records) == 1
    assert [record.cost for record in records(guard)] == [Decimal("0.00015")] * 2
