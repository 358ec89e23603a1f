"""Webhooks: signed so that the official library verifies them, sent to public addresses only, never redirected."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

import respan_guard.exporters
from respan_guard import Customer, Usage, UsageRecord
from respan_guard.clock import SystemClock
from respan_guard.errors import ConfigurationError
from respan_guard.exporters import BatchRefused, ExportFailed, WebhookExporter
from respan_guard.exporters.http import Answer, Sender, is_public
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .sink import Posted, Sink, book, check_nothing_is_lost, dead, delivery, pending

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
OLD_SECRET = "whsec_" + base64.b64encode(b"an older one of thirty-two bytes").decode()
SCHEMA = json.loads((Path(respan_guard.exporters.__file__).parent / "webhook.schema.json").read_text())
VALID = jsonschema_rs.validator_for(SCHEMA, validate_formats=True)


def hook(sink: Sink, **options: Any) -> WebhookExporter:
    """An exporter to the sink."""
    return WebhookExporter(sink.url, SECRET, **({"allow_private": True} | options))


def delivered(sink: Sink, status: int = 200) -> set[str]:
    """Ids of all records that were posted."""
    return {row["id"] for posted in sink.posted for row in posted.json["data"]["records"]}


async def test_the_official_library_verifies_it(make_guard: MakeGuard, sink: Sink) -> None:
    """`standardwebhooks` takes each event, with the secret in use and, during a rotation, with the one before."""
    async with make_guard(clock=SystemClock()) as guard:
        await book(guard, 3)
        way = delivery(guard, WebhookExporter(sink.url, [SECRET, OLD_SECRET], allow_private=True, batch_size=1))
        for _ in range(3):
            await way.step()
        await way.close()
    assert len(sink.posted) == 3
    for posted in sink.posted:
        for secret in (SECRET, OLD_SECRET):
            assert Webhook(secret).verify(posted.body, posted.headers) == posted.json
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(posted.body + b" ", posted.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(posted.body, posted.headers | {"webhook-id": "other"})


async def test_the_body_is_what_the_schema_says(make_guard: MakeGuard, sink: Sink) -> None:
    """Every kind of record validates against `webhook.schema.json`; money is an exact decimal string."""
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="Käse/1", markup_percentage=10, total_budget=1))
        await guard.record(Usage(model="gpt-4o", cost="0.000000001", metadata={"a": [1, {"b": None}]}), "Käse/1")
        await guard.record(Usage(model="nobody-knows-it", input_tokens=7, latency_ms=3, status="error"), "c2")
        await guard.record(Usage(cost="8999999.123456789"))
        await guard.adjust("Käse/1", Decimal("-0.5"), "a gift")
        await guard.flush()
        await delivery(guard, hook(sink)).step()
    [posted] = sink.posted
    VALID.validate(posted.json)
    rows = posted.json["data"]["records"]
    assert [row["cost"] for row in rows] == ["0.000000001", None, "8999999.123456789", "-0.5"]
    assert rows[0]["cost_with_markup"] == "0.0000000011"
    assert rows[0]["metadata"] == {"a": [1, {"b": None}]}
    with pytest.raises(jsonschema_rs.ValidationError):
        VALID.validate(posted.json | {"data": {"records": [rows[0] | {"cost": 1.5}]}})


async def test_a_batch_that_comes_again_has_the_same_id(make_guard: MakeGuard, clock: FakeClock, sink: Sink) -> None:
    """`webhook-id` is the batch's, over retries; the timestamp is that of the attempt."""
    sink.answer = lambda posted: (503, {}, b"") if len(sink.posted) < 3 else (200, {}, b"")
    async with make_guard() as guard:
        await book(guard, 2)
        way = delivery(guard, hook(sink, clock=clock))
        while await pending(guard, "webhook"):
            clock.advance(await way.step())
    assert len({posted.headers["webhook-id"] for posted in sink.posted}) == 1
    assert len({posted.headers["webhook-timestamp"] for posted in sink.posted}) == 3


TRY_AGAIN: list[tuple[int, dict[str, str], bytes] | str] = [
    (301, {"location": "http://127.0.0.1:1/"}, b""),
    (307, {"location": "/elsewhere"}, b""),
    (401, {}, b""),
    (403, {}, b""),
    (404, {}, b""),
    (408, {}, b""),
    (410, {}, b""),
    (429, {}, b""),
    (429, {"retry-after": "20"}, b""),
    (429, {}, b'{"detail": "slow down", "retry_after": 20}'),
    (500, {}, b"x" * 3_000_000),
    (502, {}, b"<html>"),
    (503, {"retry-after": "nonsense"}, b""),
    (504, {}, b""),
    "reset",
    "garbage",
]


@pytest.mark.parametrize("answer", TRY_AGAIN, ids=lambda answer: str(answer)[:40])
async def test_what_may_be_mended_is_tried_again(
    make_guard: MakeGuard, clock: FakeClock, sink: Sink, answer: tuple[int, dict[str, str], bytes] | str
) -> None:
    """Neither redirects nor wrong keys nor server errors make dead letters; once it is mended, all arrive."""
    broken = True
    sink.answer = lambda posted: answer if broken else (204, {}, b"")
    async with make_guard() as guard:
        ids = await book(guard, 3)
        exporter = hook(sink)
        way = delivery(guard, exporter)
        for _ in range(3):
            clock.advance(await way.step())
            await check_nothing_is_lost(guard, "webhook", set())
        assert await pending(guard, "webhook") == set(ids)
        assert all(posted.path == "/hook" for posted in sink.posted), "no redirect was followed"
        assert way.error
        if "20" in str(answer):
            assert len(sink.posted) == 1, "before the time that was named nothing is sent again"
        broken = False
        for _ in range(30):
            clock.advance(await way.step())
        await way.close()
        assert await pending(guard, "webhook") == set()
        assert await dead(guard, "webhook") == {}


@pytest.mark.parametrize("status", [200, 201, 202, 204])
async def test_any_2xx_is_taken(make_guard: MakeGuard, sink: Sink, status: int) -> None:
    """Whatever its body is."""
    sink.answer = lambda posted: (status, {}, b"" if status == 204 else b"{garbage")
    async with make_guard() as guard:
        await book(guard, 1)
        await delivery(guard, hook(sink)).step()
        assert await pending(guard, "webhook") == set()


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_what_is_too_large_or_wrong_is_split(make_guard: MakeGuard, sink: Sink, status: int) -> None:
    """A batch that is refused is halved; a row that is refused alone is a dead letter, the others arrive."""
    taken: set[str] = set()

    def answer(posted: Posted) -> tuple[int, dict[str, str], bytes]:
        ids = {row["id"] for row in posted.json["data"]["records"]}
        if len(ids) > 3 or "own:r4" in ids:
            return (status, {}, b"")
        taken.update(ids)
        return (200, {}, b"")

    sink.answer = answer
    async with make_guard() as guard:
        ids = await book(guard, 10)
        way = delivery(guard, hook(sink))
        for _ in range(40):
            await way.step()
        assert await dead(guard, "webhook") == {"own:r4": f"HTTP {status}"}
        assert taken == set(ids) - {"own:r4"}
        await check_nothing_is_lost(guard, "webhook", taken)


async def test_who_never_answers_is_given_up_on(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs costs its timeout, and counts as failed."""
    monkeypatch.setattr("respan_guard.exporters.http._TIMEOUT", 0.2)
    sink.answer = lambda posted: "hang"
    exporter = hook(sink)
    with pytest.raises(ExportFailed, match=r"no answer within 0\.2 s"):
        await exporter.export(await one_record())
    await exporter.close()


async def one_record() -> Sequence[UsageRecord]:
    """A batch."""
    clock = FakeClock()
    return [UsageRecord(id="r", customer_identifier="c", time=clock.now, day="2026-01-15", usage=Usage(), cost=None)]


PRIVATE = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
           "[::1]", "[fe80::1]", "[fc00::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
           "224.0.0.1", "[fec0::1]", "[::127.0.0.1]", "[64:ff9b:1::7f00:1]", "[::ffff:0:127.0.0.1]", "[5f00::1]",
           "[3fff::1]", "[2001:db8::1]", "[4000::1]", "[ff0e::1]"]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_addresses_that_are_not_public_are_refused(host: str) -> None:
    """At once, whatever they are wrapped in; `allow_private=True` takes them."""
    with pytest.raises(ConfigurationError, match="not a public address"):
        WebhookExporter(f"http://{host}/", SECRET)
    WebhookExporter(f"http://{host}/", SECRET, allow_private=True)


def test_public_addresses_are_public() -> None:
    """Of either family."""
    assert is_public("93.184.215.14")
    assert is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")
    assert is_public("3fff:1000::1")
    assert is_public("64:ff9b::93.184.215.14")
    assert is_public("2002:5db8:d70e::1")


async def test_a_name_that_leads_to_a_private_address_is_refused(sink: Sink) -> None:
    """`localhost` is a name like any other: it is looked up, and nothing is sent. It is no dead letter either."""
    exporter = WebhookExporter(f"http://localhost:{sink.port}/", SECRET)
    with pytest.raises(ExportFailed, match=r"leads to .*, which is not a public address"):
        await exporter.export(await one_record())
    assert sink.posted == []


async def test_the_connection_goes_to_the_address_that_was_looked_at(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is looked up once, and not by whoever connects: one that means something else a moment later (DNS
    rebinding) leads nowhere else. Here 127.0.0.1 stands for a public address, and the second answer for a trap.
    """
    lookups: list[str] = []
    real = asyncio.BaseEventLoop.getaddrinfo

    async def looked_up(self: asyncio.BaseEventLoop, host: Any, port: Any, **how: Any) -> Any:
        if host == "rebinding.example":
            lookups.append(host)
            address = "127.0.0.1" if len(lookups) == 1 else "10.255.255.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]
        return await real(self, host, port, **how)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", looked_up)
    monkeypatch.setattr("respan_guard.exporters.http.is_public", lambda address: address == "127.0.0.1")
    exporter = WebhookExporter(f"http://rebinding.example:{sink.port}/hook", SECRET)
    await exporter.export(await one_record())
    assert lookups == ["rebinding.example"]
    assert sink.posted[0].headers["host"] == f"rebinding.example:{sink.port}"
    with pytest.raises(ExportFailed, match=r"10\.255\.255\.1, which is not a public address"):
        await exporter.export(await one_record())
    await exporter.close()


async def test_an_address_that_swallows_packets_leaves_time_for_the_next(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a host with several addresses of the one family that leads nowhere, one of the other is reached in time."""
    found = ["::1", "::2", "::3", "::4", "127.0.0.1"]
    tried: list[tuple[str, float]] = []
    send = Sender._send

    async def addresses(self: Sender) -> list[str]:
        return found

    async def sent(self: Sender, request: Any, *rest: Any) -> Answer:
        tried.append((request.url.host, request.extensions["timeout"]["connect"]))
        if request.url.host != "127.0.0.1":
            raise httpx2.ConnectTimeout("no answer")
        return await send(self, request, *rest)

    monkeypatch.setattr(Sender, "_resolve", addresses)
    monkeypatch.setattr(Sender, "_send", sent)
    exporter = WebhookExporter(f"http://two-families.example:{sink.port}/hook", SECRET)
    await exporter.export(await one_record())
    assert [host for host, _ in tried] == ["::1", "::2", "127.0.0.1"]
    assert sum(seconds for _, seconds in tried) < 15
    assert len(sink.posted) == 1
    del found[2:]
    with pytest.raises(ExportFailed, match="ConnectTimeout"):
        await exporter.export(await one_record())


async def test_cookies_are_not_kept(sink: Sink) -> None:
    """What a server sets never comes back: no request can be told to be of the one before."""
    sink.answer = lambda posted: (200, {"set-cookie": "sid=abc; Path=/"}, b"")
    exporter = hook(sink)
    for _ in range(2):
        await exporter.export(await one_record())
    assert ["cookie" in posted.headers for posted in sink.posted] == [False, False]


async def test_no_proxy_of_the_environment_is_used(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would look up the name on its own."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    exporter = hook(sink)
    await exporter.export(await one_record())
    await exporter.close()
    assert len(sink.posted) == 1


@pytest.mark.parametrize(
    ("url", "secret", "match"),
    [
        ("ftp://example.com/", SECRET, "must begin with https"),
        ("example.com/hook", SECRET, "must begin with https"),
        ("https://me:pass@example.com/", SECRET, "must not hold a user"),
        ("https://example.com:99999/", SECRET, "can't be read"),
        ("https://example.com/", "secret", "whsec_"),
        ("https://example.com/", "whsec_c2hvcnQ=", "24 to 64"),
        ("https://example.com/", [], "needs a secret"),
    ],
)
def test_what_cannot_work_is_an_error_at_once(url: str, secret: str | list[str], match: str) -> None:
    """URL and secret are looked at when the exporter is made; no secret is in a message."""
    with pytest.raises(ConfigurationError, match=match) as refused:
        WebhookExporter(url, secret)
    assert "pass" not in str(refused.value).replace("password", "")


def test_a_missing_library_says_what_to_install() -> None:
    """Files need nothing; what sends over HTTP names its extra."""
    program = f"""
import sys
sys.modules["httpx2"] = None
from respan_guard.exporters import JSONLExporter, WebhookExporter
JSONLExporter("x.jsonl")
try:
    WebhookExporter("https://example.com/", {SECRET!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "ConfigurationError" in done.stdout
    assert "pip install 'respan-guard[exporters]'" in done.stdout


def test_refusals_are_errors_of_their_own() -> None:
    """An exporter of one's own raises the same two."""
    assert not issubclass(BatchRefused, ExportFailed)
