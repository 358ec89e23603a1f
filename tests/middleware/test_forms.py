"""A gateway in front of calls that are sent as forms: held, priced and refused as those that are JSON."""

from __future__ import annotations

import json
import threading
from decimal import Decimal
from typing import Any

import httpx
import pytest

from respan_guard.money import from_nano
from respan_guard.providers import form_call
from tests.middleware.support import Ledger, call, gateway, make_guard

EDITS, AUDIO = "/v1/images/edits", "/v1/audio/transcriptions"
PNG = b"\x89PNG\r\n\r\n{" + bytes(range(256)) * 9
DRAWN = {
    "created": 1,
    "data": [{"b64_json": "aGk="}],
    "usage": {
        "input_tokens": 300,
        "output_tokens": 6_200,
        "input_tokens_details": {"text_tokens": 10, "image_tokens": 290},
    },
}
HEARD = {"text": "hi", "usage": {"type": "tokens", "input_tokens": 14_000, "output_tokens": 4_500}}
TIMED = {"text": "hi", "usage": {"type": "duration", "seconds": 3_600}}
PRICES = {"whisper-1": {"input": 10, "output": 10}}


def form(model: str, file: bytes = PNG, **fields: str) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A form as a client sends it, and its header."""
    request = httpx.Request("POST", "http://x", data={"model": model} | fields, files={"image": ("a.png", file)})
    return request.read(), [(b"content-type", request.headers["content-type"].encode())]


class Provider:
    """An app that answers with a reply, and keeps what it was sent."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.seen: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            self.seen.append(message.get("body", b""))
            more = message.get("more_body", False)
        events = isinstance(self.answer, bytes)
        kind = b"text/event-stream" if events else b"application/json"
        body = self.answer if events else json.dumps(self.answer).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body})


def costs(ledger: Ledger) -> list[tuple[str, str, Decimal]]:
    """What was booked."""
    return [(entry.kind, entry.model, from_nano(entry.cost or 0)) for entry in ledger.entries]


@pytest.mark.parametrize(
    ("path", "model", "answer", "kind", "cost"),
    [
        (EDITS, "gpt-image-1", DRAWN, "usage", "0.25095"),
        ("/v1/images/variations/", "gpt-image-1", DRAWN, "usage", "0.25095"),
        ("/v1/openai/deployments/gpt-image-1/images/edits", "cheap", DRAWN, "usage", "0.25095"),
        (AUDIO, "gpt-4o-transcribe", HEARD, "usage", None),
        (AUDIO, "whisper-1", TIMED, "presumed", None),
        ("/v1/audio/translations", "whisper-1", TIMED, "presumed", None),
        (EDITS, "gpt-image-1", b'data: {"type":"image_edit.completed","usage":%s}\n\n'
         % json.dumps(DRAWN["usage"]).encode(), "usage", "0.25095"),
    ],
)  # fmt: skip
async def test_a_form_is_held_and_booked(path: str, model: str, answer: Any, kind: str, cost: str | None) -> None:
    """The form names the model, which no reply does; what a reply leaves open is presumed; a spent budget stops it."""
    guard, ledger = make_guard(prices=PRICES)
    app = Provider(answer)
    body, headers = form(model, prompt="a cat")
    parts = [body[at : at + 700] for at in range(0, len(body), 700)]
    gate = gateway(app, guard)
    assert (await call(gate, path, customer="org_1", body=parts, headers=headers)).status == 200
    assert app.seen == parts, "byte for byte, cut as it came"
    await ledger.settled(1)
    ((booked, named, spent),) = costs(ledger)
    assert (booked, named) == (kind, "gpt-image-1" if "deployments" in path else model)
    assert spent > 0
    assert cost is None or spent == Decimal(cost)
    assert from_nano(ledger.admits[0].cost) >= (0 if cost is None else spent)
    await guard.update_customer("org_1", total_budget=0)
    assert (await call(gate, path, customer="org_1", body=parts, headers=headers)).status == 402
    assert len(app.seen) == len(parts)


async def test_a_budget_holds_all_images_that_a_form_asks_for() -> None:
    """Ten images that a budget has no room for are refused; one passes."""
    guard, _ = make_guard(default_limits={"total_budget": "1.2"})
    for n, status in (("10", 402), ("1", 200)):
        body, headers = form("gpt-image-1", n=n)
        answer = await call(gateway(Provider(DRAWN), guard), EDITS, customer="org_1", body=body, headers=headers)
        assert answer.status == status


async def test_json_on_a_path_of_forms_is_read_alike() -> None:
    """Image edits come as JSON, too: that holds what the form holds, and is booked under the model that it names."""
    guard, ledger = make_guard()
    asked = {"model": "gpt-image-1", "prompt": "a cat", "images": [{"file_id": "f"}], "n": 2}
    await call(gateway(Provider(DRAWN), guard), EDITS, customer="org_1", body=json.dumps(asked).encode())
    body, headers = form("gpt-image-1", b"x", n="2", prompt="a cat")
    await call(gateway(Provider(DRAWN), guard), EDITS, customer="org_1", body=body, headers=headers)
    await ledger.settled(2)
    assert [entry.model for entry in ledger.entries] == ["gpt-image-1"] * 2
    one, other = (from_nano(op.cost) for op in ledger.admits)
    assert abs(one - other) < Decimal("0.01")
    assert one > 2 * Decimal("0.65")


FIELD = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
KIND = [(b"content-type", b"multipart/form-data; boundary=x")]


@pytest.mark.parametrize("path", [EDITS, AUDIO, "/v1//audio/transcriptions", AUDIO + "\n", "/v1/Images/Variations;a"])
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (FIELD % (b"model", b"m") + FIELD % (b"model", b"m") + b"--x--", KIND, 400),
        (FIELD % (b"model", b"m"), KIND, 400),
        (FIELD % (b"model", b"m") + b"--x--", [], 400),
        (FIELD % (b"model", b"m") + b"--x--", KIND * 2, 400),
        (b"RIFF\x00\x00", [(b"content-type", b"audio/wav")], 400),
        (b"model=m", [(b"content-type", b"application/x-www-form-urlencoded")], 400),
        (b'{"model":"a","model":"b"}', KIND, 400),
        (b"\x1f\x8b", [*KIND, (b"content-encoding", b"gzip")], 400),
        (FIELD % (b"a", b"") * 1_001 + b"--x--", KIND, 413),
        (FIELD % (b"file", b"x" * 99_999) + b"--x--", KIND, 413),
        (b"-", [*KIND, (b"content-length", b"99999")], 413),
    ],
    ids=["twice", "cut", "no type", "two types", "sound", "urlencoded", "json", "gzip", "parts", "large", "declared"],
)
async def test_a_form_that_cannot_be_read_is_refused(path: str, body: bytes, headers: Any, status: int) -> None:
    """What a provider might understand and we can't would hold nothing, so it does not pass."""
    guard, ledger = make_guard()
    app = gateway(Provider({}), guard, max_body_bytes=70_000)
    parts = [body[:9], body[9:]] if len(body) > 9 else [body]
    assert (await call(app, path, customer="org_1", body=parts, headers=headers)).status == status
    assert ledger.admits == []


async def test_a_form_elsewhere_is_left_alone() -> None:
    """Uploads to other paths pass unread at any length, and a path of forms without a body asks for nothing."""
    guard, ledger = make_guard()
    gate = gateway(Provider({}), guard, max_body_bytes=1_000)
    body, headers = form("m", b"x" * 9_000)
    assert (await call(gate, "/v1/files", customer="c", body=body, headers=headers)).status == 200
    assert (await call(gate, EDITS, customer="c", body=b"")).status == 200
    assert (await call(gate, EDITS, customer="c", method="GET", http_version="2")).status == 200
    assert [op.cost for op in ledger.admits] == [0] * 3


async def test_the_longest_audio_passes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI takes files of 25 MB; they are looked at on another thread, and the copy made for that is let go."""
    threads: list[int] = []

    def watched(*given: Any) -> Any:
        threads.append(threading.get_ident())
        return form_call(*given)

    monkeypatch.setattr("respan_guard.middleware.gate.form_call", watched)
    guard, ledger = make_guard()
    kept: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kept.append(scope["respan_guard"].body.form)
        await Provider(HEARD)(scope, receive, send)

    body, headers = form("gpt-4o-transcribe", b"\xff\xfb\x90\x00" * (25 * 256 * 1024))
    parts = [body[at : at + 1_000_000] for at in range(0, len(body), 1_000_000)]
    assert (await call(gateway(app, guard), AUDIO, customer="org_1", body=parts, headers=headers)).status == 200
    assert ledger.admits[0].cost > 0
    assert threads != [threading.get_ident()]
    assert len(threads) == 1
    assert kept == [None]


async def test_in_shadow_mode_a_form_passes_whatever_it_is() -> None:
    """What would be refused reaches the app as it came."""
    guard, _ = make_guard(mode="shadow")
    app = Provider({})
    parts = [FIELD % (b"model", b"m"), FIELD % (b"model", b"m"), b"--x--"]
    assert (await call(gateway(app, guard), EDITS, customer="org_1", body=parts, headers=KIND)).status == 200
    assert app.seen == parts
