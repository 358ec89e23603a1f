"""What goes wrong with the stand-in provider when it is told to, over a real connection."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from respan_guard.errors import InvalidInput
from respan_guard.providers import read_reply
from respan_guard.testing import FakeClock, StandInProvider
from respan_guard.testing.provider import Answer, FaultKind, Gate
from respan_guard.testing.serving import serve

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
STREAM: dict[str, Any] = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
MESSAGE = {"model": "claude-sonnet-4-6", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
HEADERS = {"authorization": "Bearer key", "anthropic-version": "2023-06-01"}
CHAT_PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[StandInProvider, str]]:
    """A provider on a real socket, and its URL."""
    provider = StandInProvider(clock=FakeClock())
    with provider.serve() as url:
        yield provider, url


@pytest.fixture
def provider(served: tuple[StandInProvider, str]) -> StandInProvider:
    """The provider, as new."""
    served[0].reset()
    return served[0]


@pytest.fixture
def client(served: tuple[StandInProvider, str]) -> Iterator[httpx2.Client]:
    """A client of the provider."""
    with httpx2.Client(base_url=served[1], headers=HEADERS, verify=False) as client:
        yield client


def receive(client: httpx2.Client, body: dict[str, Any]) -> tuple[bytes, bool]:
    """What arrives of an answer, and whether the connection broke."""
    found = b""
    try:
        with client.stream("POST", CHAT_PATH, json=body) as reply:
            for part in reply.iter_raw():
                found += part
    except httpx2.TransportError:
        return found, True
    return found, False


# -- the connection --------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["reply", "stream"])
@pytest.mark.parametrize("kind", ["drop-before", "drop-after-start", "drop-middle", "drop-before-usage"])
def test_the_connection_breaks_once(
    client: httpx2.Client, provider: StandInProvider, kind: FaultKind, body: dict[str, Any]
) -> None:
    """The answer does not arrive whole, the work is charged all the same, and the next call is well again."""
    whole, _ = receive(client, body)
    provider.fault(kind)
    found, broken = receive(client, body)
    again, well = receive(client, body)
    assert broken
    assert len(found) < len(whole)
    assert (found == b"") == (kind == "drop-before")
    assert not well
    assert len(again) == len(whole)
    assert [call.completed for call in provider.meter.calls] == [True, False, True]
    assert {call.total_tokens for call in provider.meter.calls} == {38}


def test_dropping_before_the_usage_withholds_just_that(client: httpx2.Client, provider: StandInProvider) -> None:
    """The text has all arrived, the chunk that tells the usage has not."""
    provider.fault("drop-before-usage")
    found, broken = receive(client, STREAM)
    assert broken
    assert b'"finish_reason":"stop"' in found
    assert b'"completion_tokens"' not in found


async def test_without_a_connection_dropping_raises() -> None:
    """Called directly there is no connection to cut, so the client's transport gets the error a cut would be."""
    provider = StandInProvider()
    provider.fault("drop-before")
    transport = httpx2.ASGITransport(app=provider)
    async with httpx2.AsyncClient(transport=transport, headers=HEADERS, base_url="http://provider") as client:
        with pytest.raises(ConnectionError, match="told to"):
            await client.post(CHAT_PATH, json=CHAT)


@pytest.mark.parametrize(("kind", "arrived"), [("stall-before", False), ("stall-middle", True)])
def test_a_stall_ends_when_it_is_let_go(
    client: httpx2.Client, provider: StandInProvider, kind: FaultKind, arrived: bool
) -> None:
    """Nothing comes, or nothing more, until the fault's gate opens; then the answer is whole."""
    fault = provider.fault(kind)
    found = bytearray()
    first = threading.Event()

    def ask() -> None:
        with client.stream("POST", CHAT_PATH, json=STREAM) as reply:
            for part in reply.iter_raw():
                found.extend(part)
                first.set()

    asking = threading.Thread(target=ask)
    asking.start()
    fault.gate.wait_for_arrival()
    assert first.wait(10 if arrived else 0.05) is arrived
    assert b"[DONE]" not in found
    fault.gate.open()
    asking.join()
    assert b"[DONE]" in found
    assert provider.meter.calls[0].completed


def test_a_client_that_leaves_is_noticed(client: httpx2.Client, provider: StandInProvider) -> None:
    """The call is charged, and is not completed."""
    gate = Gate()
    provider.script(Answer(gate=gate))
    with client.stream("POST", CHAT_PATH, json=STREAM) as reply:
        next(reply.iter_raw())
        gate.wait_for_arrival()
    client.close()
    gate.open()
    assert not provider.meter.calls[0].completed
    assert provider.meter.calls[0].total_tokens == 38


def test_a_gate_lets_a_stream_go_on_piece_by_piece(client: httpx2.Client, provider: StandInProvider) -> None:
    """Each piece after the first waits for its own permit."""
    gate = Gate()
    provider.script(Answer(text="abc", chunks=3, gate=gate))
    with client.stream("POST", CHAT_PATH, json={**CHAT, "stream": True}) as reply:
        lines = (line for line in reply.iter_lines() if line)
        said = [json.loads(next(lines)[6:])["choices"][0]["delta"]["content"]]
        for arrivals, expected in enumerate("abc", 1):
            gate.wait_for_arrival(arrivals)
            gate.release()
            said.append(json.loads(next(lines)[6:])["choices"][0]["delta"]["content"])
            assert said[-1] == expected
        gate.open()
        assert list(lines)[-1] == "data: [DONE]"
    assert said == ["", "a", "b", "c"]


async def test_a_gate_holds_back_a_reply() -> None:
    """A reply that is no stream waits whole; loop and server may share a thread."""
    provider, gate = StandInProvider(), Gate()
    provider.script(Answer(gate=gate))
    async with provider.serve_async() as url, httpx2.AsyncClient(base_url=url, headers=HEADERS, verify=False) as client:
        asking = asyncio.create_task(client.post(CHAT_PATH, json=CHAT))
        await gate.arrival()
        assert not asking.done()
        gate.release()
        assert (await asking).status_code == 200


def test_waiting_at_a_gate_in_vain_ends() -> None:
    """A test whose request never comes fails instead of hanging."""
    with pytest.raises(TimeoutError, match="0 of 1"):
        Gate().wait_for_arrival(timeout=0.01)


# -- the answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/messages"])
@pytest.mark.parametrize("status", [400, 401, 429, 500, 503, 529])
def test_errors_have_the_providers_shape(
    client: httpx2.Client, provider: StandInProvider, path: str, status: int
) -> None:
    """The status asked for, an error object, `Retry-After` where wanted, and no charge."""
    provider.fault("error", status=status, retry_after=7, message="No.")
    reply = client.post(path, json=MESSAGE)
    assert (reply.status_code, reply.json()["error"]["message"]) == (status, "No.")
    assert reply.headers["retry-after"] == "7"
    assert (reply.json().get("type") == "error") == (path == "/v1/messages")
    assert provider.meter.total_tokens == 0
    assert client.post(path, json=MESSAGE).status_code == 200


@pytest.mark.parametrize(
    ("kind", "count"),
    [("usage-negative", -33), ("usage-string", "32"), ("usage-huge", 32 + 10**18), ("no-usage", None)],
)
def test_usage_can_be_nonsense(
    client: httpx2.Client, provider: StandInProvider, kind: FaultKind, count: object
) -> None:
    """The counts are wrong in reply and stream, the meter is not, and the guard's reader takes them for no usage."""
    provider.fault(kind, times=2)
    reply = client.post(CHAT_PATH, json=CHAT).json()
    stream = client.post(CHAT_PATH, json=STREAM).text
    assert reply.get("usage", {}).get("completion_tokens") == count
    assert (f'"completion_tokens":{json.dumps(count)}' in stream) == (count is not None)
    assert read_reply(reply) is None
    assert [call.output_tokens for call in provider.meter.calls] == [32, 32]


def test_usage_can_be_no_number(client: httpx2.Client, provider: StandInProvider) -> None:
    """NaN, which JSON doesn't have, but Python's parser reads."""
    provider.fault("usage-nan")
    assert '"completion_tokens":NaN' in client.post(CHAT_PATH, json=CHAT).text


def test_usage_can_come_twice(client: httpx2.Client, provider: StandInProvider) -> None:
    """The chunk that tells it is sent twice; in a reply the name stands twice."""
    provider.fault("usage-twice", times=2)
    assert client.post(CHAT_PATH, json=STREAM).text.count('"completion_tokens":32') == 2
    assert client.post(CHAT_PATH, json=CHAT).text.count('"usage":{') == 2


def test_anthropic_streams_without_usage(client: httpx2.Client, provider: StandInProvider) -> None:
    """Both the start and the delta leave it out."""
    provider.fault("no-usage")
    text = client.post("/v1/messages", json={**MESSAGE, "stream": True}).text
    assert "message_delta" in text
    assert "usage" not in text


def test_json_can_be_cut_short(client: httpx2.Client, provider: StandInProvider) -> None:
    """A reply is no JSON; of a stream only the last object is none."""
    provider.fault("invalid-json", times=2)
    with pytest.raises(ValueError, match=r".+"):
        client.post(CHAT_PATH, json=CHAT).json()
    chunks = [line[6:] for line in client.post(CHAT_PATH, json=STREAM).text.splitlines() if line]
    json.loads(chunks[-3])
    with pytest.raises(ValueError, match=r".+"):
        json.loads(chunks[-2])


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["reply", "stream"])
def test_odd_but_correct_answers(client: httpx2.Client, provider: StandInProvider, body: dict[str, Any]) -> None:
    """Compressed, byte by byte, or with a wrong content type, it says the same as ever."""
    scripted = httpx2.Headers({"x-stand-in-text": "Grüß Gott, 世界", "x-stand-in-chunks": "1"}, encoding="utf-8")
    plain = client.post(CHAT_PATH, json=body, headers=scripted)
    assert "Gott, 世界" in plain.text
    provider.fault("gzip")
    packed = client.post(CHAT_PATH, json=body, headers=scripted)
    provider.fault("one-byte-chunks")
    crumbs = client.post(CHAT_PATH, json=body, headers=scripted)
    provider.fault("wrong-content-type")
    mistyped = client.post(CHAT_PATH, json=body, headers=scripted)
    assert packed.headers["content-encoding"] == "gzip"
    assert mistyped.headers["content-type"] == "text/plain"
    ids = [call.response_id or "" for call in provider.meter.calls]
    texts = [reply.text.replace(i, "ID") for reply, i in zip((plain, packed, crumbs, mistyped), ids, strict=True)]
    assert len({text for text in texts if text}) == 1


def test_ids_can_be_short(client: httpx2.Client, provider: StandInProvider) -> None:
    """As from servers that number their answers, to test that they are not taken for unique."""
    provider.fault("short-ids", times=None)
    ids = [client.post(CHAT_PATH, json=CHAT).json()["id"] for _ in range(3)]
    assert all(len(i) <= len("chatcmpl-999") for i in ids)


def test_faults_choose_their_calls(client: httpx2.Client, provider: StandInProvider) -> None:
    """`match` picks the calls, `times` how many of them; a reset calls the rest off."""
    provider.fault("error", status=503, times=2, match=lambda request: request.model == "gpt-4o")
    models = ["gpt-4o-mini", "gpt-4o", "gpt-4o", "gpt-4o"]
    found = [client.post(CHAT_PATH, json={**CHAT, "model": model}).status_code for model in models]
    assert found == [200, 503, 503, 200]
    provider.fault("error", times=None)
    provider.reset()
    assert client.post(CHAT_PATH, json=CHAT).status_code == 200


def test_unknown_faults_are_refused(provider: StandInProvider) -> None:
    """A misspelt fault would otherwise be a test that tests nothing."""
    with pytest.raises(InvalidInput, match="drop-before"):
        provider.fault("dorp-before")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(InvalidInput, match="400 to 599"):
        provider.fault("error", status=200)


# -- serving ---------------------------------------------------------------------------------------


def test_it_listens_on_loopback_only_and_stops() -> None:
    """Inside the block it answers on 127.0.0.1, behind it nobody does, and it can be served again."""
    provider = StandInProvider()
    for _ in range(2):
        with provider.serve() as url:
            assert url.startswith("http://127.0.0.1:")
            assert httpx2.get(f"{url}/v1/models", headers=HEADERS, verify=False).status_code == 200
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/v1/models", headers=HEADERS, verify=False)


def test_an_app_that_does_not_start_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever serves an app that fails to start hears of it at once."""

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no storage"})

    with (
        caplog.at_level(logging.CRITICAL),
        pytest.raises(ValueError, match="did not start"),
        serve(failing),
    ):
        pytest.fail("it was served")
