"""Respan's request logs: its limits, its shapes, its answers; and our own mount, which answers as Respan does."""

from __future__ import annotations

import json
import logging
import warnings
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from respan_guard import Guard, Usage
from respan_guard.api import RespanAPI
from respan_guard.errors import ConfigurationError
from respan_guard.exporters import RespanExporter
from respan_guard.exporters.respan import GATEWAY_LOG
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .sink import Posted, Sink, book, check_nothing_is_lost, dead, delivery, pending

with warnings.catch_warnings():  # of its own use of pydantic
    warnings.simplefilter("ignore")
    from respan_sdk.respan_types.log_types import RespanFullLogParams  # type: ignore[import-untyped]

Answered = tuple[int, dict[str, str], bytes]


def bulk(posted: Posted, errors: dict[int, str] | None = None) -> Answered:
    """What Respan answers."""
    errors = errors or {}
    count = len(posted.json["logs"])
    told = {
        "success_count": count - len(errors),
        "error_count": len(errors),
        "errors": [{"index": index, "error": reason} for index, reason in errors.items()],
    }
    return (201, {"content-type": "application/json"}, json.dumps(told).encode())


def respan(sink: Sink) -> RespanExporter:
    """An exporter to the sink."""
    sink.answer = bulk
    return RespanExporter("key", base_url=f"http://127.0.0.1:{sink.port}")


async def test_a_call_becomes_a_request_log(make_guard: MakeGuard, sink: Sink) -> None:
    """Path, key and fields are Respan's, its own types validate the row, and no digit of the cost is lost."""
    exporter = respan(sink)
    async with make_guard() as guard:
        await guard.record(
            Usage(
                model="gpt-4o", input_tokens=100, output_tokens=20, cache_read_tokens=40, cost="1234567.123456789",
                latency_ms=1500, ttft_ms=250, trace_id="ab" * 16,
                metadata={"team": "a", "_respan": {"input": "secret"}},
            ),
            "c1",
            entry_id="one",
        )  # fmt: skip
        await delivery(guard, exporter).step()
    [posted] = sink.posted
    assert posted.path == "/api/request-logs/bulk/"
    assert posted.headers["authorization"] == "Bearer key"
    [log] = json.loads(posted.body, parse_float=Decimal)["logs"]
    assert log["custom_identifier"] == "own:one"
    assert log["cost"] == Decimal("1234567.123456789")
    assert (log["latency"], log["time_to_first_token"]) == (Decimal("1.500"), Decimal("0.250"))
    assert (log["timestamp"], log["start_time"]) == ("2026-01-15T12:00:00.000Z", "2026-01-15T11:59:58.500Z")
    assert log["metadata"] == {"team": "a", "respan_guard_record_id": "own:one"}
    assert log["usage"]["prompt_tokens_details"] == {"cached_tokens": 40}
    parsed = RespanFullLogParams.model_validate(posted.json["logs"][0])
    assert (parsed.customer_identifier, parsed.prompt_tokens, parsed.completion_tokens) == ("c1", 100, 20)


async def test_an_unknown_cost_is_left_out(make_guard: MakeGuard, sink: Sink) -> None:
    """Respan prices it, then; zero would say that it was free. What did cost nothing says so."""
    exporter = respan(sink)
    async with make_guard() as guard:
        await guard.record(Usage(model="nobody-knows-it"), "c1")
        await guard.record(Usage(model="gpt-4o", cost=0), "c1")
        await delivery(guard, exporter).step()
    assert ["cost" in log for log in sink.posted[0].json["logs"]] == [False, True]


async def test_metadata_may_have_names_that_are_no_text(make_guard: MakeGuard, sink: Sink) -> None:
    """A number as a name is sent as JSON spells it, from the store in memory as from any other."""
    exporter = respan(sink)
    async with make_guard() as guard:
        names: Any = {1: "x", "_hidden": "y"}
        await guard.record(Usage(model="m", cost=1, metadata=names), "c1")
        way = delivery(guard, exporter)
        await way.step()
        assert way.error == ""
    metadata = sink.posted[0].json["logs"][0]["metadata"]
    assert metadata.keys() == {"1", "respan_guard_record_id"}


async def test_what_must_not_be_there_twice_is_not_sent(make_guard: MakeGuard, sink: Sink) -> None:
    """Calls that Respan's gateway logged, corrections and presumed usage are left out; the cursor passes them."""
    exporter = respan(sink)
    async with make_guard() as guard:
        await guard.record(Usage(model="m", cost=1, metadata={GATEWAY_LOG: "log_1"}), "c1")
        await guard.adjust("c1", Decimal(-1), "a gift")
        now = guard.now_ms()
        day = guard.policies.get("c1").policy.day_of(now)
        await guard.lane().record(guard.recorder.presumed("a1", "a1", "c1", day, now, 1, Usage(model="m")))
        way = delivery(guard, exporter)
        await way.step()
        assert sink.posted == []
        assert await pending(guard, "respan") == set()


async def test_its_limits_are_respected(make_guard: MakeGuard, clock: FakeClock, sink: Sink) -> None:
    """At most 500 rows a request and 30 requests in any minute."""
    exporter = respan(sink)
    exporter.batch_size = 2  # so that there is much to send
    times: list[float] = []

    def answer(posted: Posted) -> Answered:
        times.append(clock.monotonic())
        return bulk(posted)

    sink.answer = answer
    assert RespanExporter.batch_size == 500
    async with make_guard() as guard:
        await book(guard, 80)
        way = delivery(guard, exporter)
        while await pending(guard, "respan"):
            clock.advance(min(await way.step(), 0.5))
    assert len(times) == 40
    assert max(sum(start <= time < start + 60 for time in times) for start in times) <= 30


async def test_rows_that_respan_rejects_become_dead_letters(make_guard: MakeGuard, sink: Sink) -> None:
    """Partial success is told row by row; the index counts the rows that were sent, not those left out."""
    exporter = respan(sink)
    sink.answer = lambda posted: bulk(posted, {1: "model is unknown"})
    async with make_guard() as guard:
        await guard.record(Usage(model="m", cost=1, metadata={GATEWAY_LOG: "log_1"}), "c1", entry_id="skipped")
        await book(guard, 3)
        await delivery(guard, exporter).step()
        assert await dead(guard, "respan") == {"own:r1": "model is unknown"}
        assert await pending(guard, "respan") == set()


async def test_rows_that_are_all_rejected_are_told_one_by_one(make_guard: MakeGuard, sink: Sink) -> None:
    """400 with an error for each row is an answer about rows, not about the batch."""
    exporter = respan(sink)
    sink.answer = lambda posted: (400, {}, bulk(posted, {0: "bad", 1: "worse"})[2])
    async with make_guard() as guard:
        await book(guard, 2)
        await delivery(guard, exporter).step()
        assert await dead(guard, "respan") == {"own:r0": "bad", "own:r1": "worse"}
        assert len(sink.posted) == 1


AGAIN = "storage is unavailable; send this row again"


async def test_rows_that_it_asks_for_again_come_again_alone(
    make_guard: MakeGuard, clock: FakeClock, sink: Sink
) -> None:
    """A partial answer may say so in words or by `retryable`: nothing is given up, and nothing is there twice."""
    exporter = respan(sink)
    asked = iter([{1: AGAIN, 2: "bad"}, {0: "upstream timed out"}, {}])
    sink.answer = lambda posted: bulk(posted, next(asked))
    async with make_guard() as guard:
        await book(guard, 4)
        way = delivery(guard, exporter)
        await way.step()
        assert way.error == AGAIN
        assert await dead(guard, "respan") == {"own:r2": "bad"}
        await book(guard, 1, start=4)
        while await pending(guard, "respan"):
            clock.advance(await way.step() + 0.01)
        sent = [[log["custom_identifier"] for log in posted.json["logs"]] for posted in sink.posted]
        assert sent == [[f"own:r{n}" for n in range(4)], ["own:r1", "own:r4"], ["own:r1"]]
        assert await dead(guard, "respan") == {"own:r2": "bad"}


@pytest.mark.parametrize("status", [400, 503])
async def test_an_outage_that_is_told_row_by_row_is_no_fault_of_the_rows(
    make_guard: MakeGuard, clock: FakeClock, sink: Sink, status: int
) -> None:
    """An answer that asks for all of them again is waited out, however long it takes."""
    exporter = respan(sink)
    down = True

    def answer(posted: Posted) -> Answered:
        count = len(posted.json["logs"])
        return (status, {}, bulk(posted, dict.fromkeys(range(count), AGAIN))[2]) if down else bulk(posted)

    sink.answer = answer
    async with make_guard() as guard:
        ids = await book(guard, 3)
        way = delivery(guard, exporter)
        for _ in range(300):
            clock.advance(await way.step())
        assert len(sink.posted) > 10
        assert (await dead(guard, "respan"), await pending(guard, "respan")) == ({}, set(ids))
        down = False
        clock.advance(300)
        await way.step()
        assert (await dead(guard, "respan"), await pending(guard, "respan")) == ({}, set())


async def test_a_row_that_is_asked_for_again_for_ever_is_a_dead_letter(
    make_guard: MakeGuard, clock: FakeClock, sink: Sink
) -> None:
    """Where others are taken it is the row, whatever the answer says: it must not hold them up."""
    exporter = respan(sink)

    def answer(posted: Posted) -> Answered:
        names = [log["custom_identifier"] for log in posted.json["logs"]]
        told = json.loads(bulk(posted, {names.index("own:r0"): "?"} if "own:r0" in names else {})[2])
        for error in told["errors"]:
            error["retryable"] = True
        return (201, {}, json.dumps(told).encode())

    sink.answer = answer
    async with make_guard() as guard:
        way = delivery(guard, exporter)
        for number in range(12):
            await book(guard, 1, start=number)
            await way.step()
            clock.advance(400)
        assert await dead(guard, "respan") == {"own:r0": "?"}
        assert await pending(guard, "respan") == set()
        assert sum(len(posted.json["logs"]) for posted in sink.posted) == 11 + 11


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"<html>", b'{"success_count": 1}', b'{"success_count": 2, "errors": [{"index": 9}]}',
     b'{"success_count": 1, "errors": [{"index": 9}]}', b'{"success_count": "2", "errors": []}', b"[" * 100_000],
    ids=range(9),
)  # fmt: skip
async def test_success_that_tells_nothing_is_none(
    make_guard: MakeGuard, clock: FakeClock, sink: Sink, body: bytes
) -> None:
    """A login page with status 200, or counts that don't add up: nothing is taken for delivered, all comes again."""
    exporter = respan(sink)
    sink.answer = lambda posted: (201, {}, body) if len(sink.posted) == 1 else bulk(posted)
    async with make_guard() as guard:
        ids = await book(guard, 2)
        way = delivery(guard, exporter)
        await way.step()
        assert await pending(guard, "respan") == set(ids)
        for _ in range(4):
            clock.advance(await way.step())
        assert await pending(guard, "respan") == set()
        await check_nothing_is_lost(guard, "respan", set(ids))


async def test_long_identifiers_are_told_of(
    make_guard: MakeGuard, sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    """Respan cuts at 120 characters: customers that would merge are warned of once, record ids stay different."""
    exporter = respan(sink)
    async with make_guard() as guard:
        for number in (1, 2):
            await guard.record(Usage(model="m", cost=1), "c" * 130, entry_id=f"{'x' * 130}{number}")
        with caplog.at_level(logging.WARNING, logger="respan_guard"):
            await delivery(guard, exporter).step()
    names = [log["custom_identifier"] for log in sink.posted[0].json["logs"]]
    assert len(set(names)) == 2
    assert max(map(len, names)) == 120
    assert sum("120 characters" in message for message in caplog.messages) == 1


async def test_our_own_mount_takes_it(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Exported to a `RespanAPI` of another store, every call is there, with its tokens and its exact cost; once, even
    if a batch comes twice.
    """
    async with make_guard() as guard, Guard("memory://", clock=clock) as other:
        exporter = RespanExporter("key", base_url="http://mount")
        exporter._sender._client = httpx2.AsyncClient(transport=httpx2.ASGITransport(RespanAPI(other, api_key="key")))
        await book(guard, 3, cost="0.000000003", output_tokens=5)
        batch = [record async for record in guard.records()]
        assert await exporter.export(batch) is not None
        await exporter.export(batch)
        await exporter.close()
        await other.flush()
        found: list[Any] = [record async for record in other.records()]
        assert [(r.customer_identifier, r.model, r.usage.input_tokens, r.usage.output_tokens) for r in found] == [
            ("c1", "gpt-4o", 10, 5)
        ] * 3
        assert [record.cost for record in found] == [Decimal("0.000000003")] * 3


@pytest.mark.parametrize("key", ["", "a b", "schlüssel", "a\nb"])
def test_a_key_that_cannot_be_one_is_refused(key: str) -> None:
    """At once, and without the key in the message."""
    with pytest.raises(ConfigurationError, match="api_key must be a key of Respan"):
        RespanExporter(key)
