"""The logs page reaches every row that its pills count, once, and its files hold the same rows."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from html import unescape
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from respan_guard import Guard, Usage
from respan_guard.backends.base import RefusalRow
from respan_guard.console import log_search
from respan_guard.testing import FakeClock

from .support import client_of


@pytest.fixture(params=["memory", "sqlite"])
async def guard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Guard]:
    """A guard on a clock that stands still."""
    storage = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}?synchronous=normal"
    async with Guard(storage, clock=FakeClock(), journal_dir=tmp_path / "journal") as made:
        yield made


async def refuse(guard: Guard, name: str, reason: str, *minutes: int) -> None:
    """Refusals of as many customers, each so many minutes ago."""
    now = guard.now_ms() // 60_000
    rows = [RefusalRow(f"{name}{number}", reason, now - ago, 1) for number, ago in enumerate(minutes)]
    await guard.lane().call(lambda backend: backend.add_refusals(rows))


async def call(guard: Guard, customer: str, model: str = "m", cost: int = 1, **ago: int) -> None:
    """A call that ended some time ago and is recorded now."""
    when = datetime.fromtimestamp(guard.now_ms() / 1000, UTC) - timedelta(**ago)
    await guard.record(Usage(model=model, cost=cost, time=when), customer)


def walk(client: TestClient, query: str, most: int = 40) -> tuple[Counter[str], Counter[str], list[int]]:
    """Places of records, customers of refusals, and how many rows each page has, over all pages."""
    path: str | None = f"/logs?{query}"
    records, refused, sizes = Counter[str](), Counter[str](), []
    while path is not None:
        page = client.get(path).text
        rows = re.findall(r"<tr.*?</tr>", page.partition("<tbody>")[2], re.DOTALL)
        sizes.append(len(rows))
        for row in rows:
            seq = re.search(r'href="record\?seq=(\d+)"', row)
            (records if seq else refused)[seq[1] if seq else re.findall(r"<bdi>([^<]*)</bdi>", row)[0]] += 1
        following = re.search(r'href="(logs\?[^"]*)" rel="next"', page)
        path = None if following is None else "/" + unescape(following[1])
        assert len(sizes) < most
    return records, refused, sizes


def pills(page: str) -> dict[str, int]:
    """What the pills count."""
    found = re.findall(r'>([\w ]+) <span class="muted">([\d,]+)</span></a>', page)
    return {name: int(count.replace(",", "")) for name, count in found}


async def test_logs_are_filtered_and_paged(guard: Guard) -> None:
    """Every record and refusal comes once, newest first, through whatever filter; pills count what they show."""
    assert isinstance(guard.clock, FakeClock)
    for number in range(130):
        guard.clock.advance(60)
        status = "error" if number % 13 == 0 else "ok"
        who = "ann" if number % 2 else "bob"
        price = None if number % 26 == 1 else 1
        await guard.record(Usage(model=f"m{number % 3}", cost=price, status=status, provider="p"), who)
        if number % 10 == 0:
            row = RefusalRow("ann", "rate_limit" if number % 20 else "total_budget", guard.now_ms() // 60_000, 2)
            await guard.lane().call(lambda backend, row=row: backend.add_refusals([row]))  # type: ignore[misc]
    client = client_of(guard, open_to_all=True)

    def walk(query: str) -> tuple[list[str], int]:
        path, found, refusals = f"/logs?{query}", [], 0
        for _ in range(20):
            page = client.get(path).text
            found += re.findall(r'href="record\?seq=(\d+)"', page)
            refusals += page.count("refused</td>")
            following = re.search(r'href="(logs\?[^"]*)" rel="next"', page)
            if following is None:
                break
            path = "/" + following[1].replace("&amp;", "&")
        return found, refusals

    assert walk("") == ([str(number) for number in range(130, 0, -1)], 13)
    assert walk("customer=ann") == ([str(number + 1) for number in range(129, -1, -1) if number % 2], 13)
    assert walk("model=m1")[0] == [str(number + 1) for number in range(129, -1, -1) if number % 3 == 1]
    assert walk("status=error") == ([str(number + 1) for number in range(129, -1, -1) if number % 13 == 0], 0)
    assert walk("status=rate") == ([], 6)
    assert walk("status=budget") == ([], 7)
    assert walk("status=unpriced") == ([str(n + 1) for n in range(129, -1, -1) if n % 26 == 1], 0)
    page = client.get("/logs").text
    pills = dict(re.findall(r'>(All|OK|Rate limited|Over budget|Error|Unpriced) <span class="muted">([^<]*)<', page))
    assert pills == {
        "All": "156",
        "OK": "120",
        "Rate limited": "12",
        "Over budget": "14",
        "Error": "10",
        "Unpriced": "5",
    }
    rows = list(csv.DictReader(io.StringIO(client.get("/logs.csv?customer=ann").text)))
    assert [row["sequence"] for row in rows if row["sequence"]] == [str(n + 1) for n in range(129, -1, -1) if n % 2]
    lines = [json.loads(line) for line in client.get("/logs.jsonl?status=budget").text.splitlines()]
    assert sum(line["count"] for line in lines) == 14
    for odd in ("before=x", "before=" + "9" * 40, "range=x", "range=custom&from=0001-01-01&to=9999-12-31", "late=-1",
                "refused=x", "refused=[1]", "refused=[true,1,2]", 'refused=[-9,"a","b"]', "refused=" + "[" * 9999,
                'refused=[9,"%5Cud800","%5Cu0000"]', "customer=%00&model=%00"):  # fmt: skip
        assert client.get(f"/logs?{odd}").status_code == 200


async def test_refusals_of_a_kind_are_found_behind_others(guard: Guard) -> None:
    """However many of another kind are newer."""
    await refuse(guard, "rate", "rate_limit", *range(1500))
    await refuse(guard, "budget", "period_budget", *range(3000, 3070))
    client = client_of(guard, open_to_all=True)
    assert pills(client.get("/logs?range=7d").text)["Over budget"] == 70
    _, refused, sizes = walk(client, "status=budget&range=7d")
    assert refused == Counter(f"budget{number}" for number in range(70))
    assert sizes == [50, 20]
    assert len(client.get("/logs.csv?status=budget&range=7d").text.splitlines()) == 71


async def test_a_search_among_refusals_can_go_on(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops after so many of another kind, and says where it goes on."""
    monkeypatch.setattr(log_search, "_ENOUGH", 100)
    monkeypatch.setattr(log_search, "_REFUSALS", 20)
    await refuse(guard, "rate", "rate_limit", *([7] * 130), *range(20, 900))
    await refuse(guard, "budget", "total_budget", *range(3000, 3003))
    client = client_of(guard, open_to_all=True)
    _, refused, sizes = walk(client, "status=budget&range=7d")
    assert refused == Counter(f"budget{number}" for number in range(3))
    assert sizes[0] == 0
    assert "Search further back" in client.get("/logs?status=budget&range=7d").text
    assert len(client.get("/logs.jsonl?status=budget&range=7d").text.splitlines()) == 3


@pytest.mark.parametrize("status", ["", "rate", "refused"])
async def test_many_are_refused_within_a_minute(guard: Guard, status: str) -> None:
    """Each of them is shown, over as many pages as it takes."""
    await refuse(guard, "a", "rate_limit", *([5] * 420), *range(9, 20))
    _, refused, sizes = walk(client_of(guard, open_to_all=True), f"status={status}&range=7d")
    assert refused == Counter(f"a{number}" for number in range(431))
    assert sizes == [50] * 8 + [31]


async def test_records_and_refusals_are_paged_together(guard: Guard) -> None:
    """Many refusals between two records, records of long ago, both at once: every row once, newest first."""
    for hours in range(120, 0, -2):
        await call(guard, "normal", hours=hours)
    await refuse(guard, "mid", "rate_limit", *range(2000, 2600))
    for number in range(70):
        await call(guard, "backfilled", days=6, minutes=number)
    client = client_of(guard, open_to_all=True)
    records, refused, sizes = walk(client, "range=7d")
    assert records == Counter(map(str, range(1, 131)))
    assert refused == Counter(f"mid{number}" for number in range(600))
    assert sizes == [50] * 14 + [30]
    rows = list(csv.DictReader(io.StringIO(client.get("/logs.csv?range=7d").text)))
    assert Counter(row["sequence"] for row in rows if row["sequence"]) == records
    assert Counter(row["customer_identifier"] for row in rows if row["refused_by"]) == refused
    lines = [json.loads(line) for line in client.get("/logs.jsonl?range=7d").text.splitlines()]
    assert [str(line["time_ms"]) for line in lines] == [row["time_ms"] for row in rows]
    assert {(line["status"], line["kind"], line["count"]) for line in lines if line["refused_by"]} == {
        ("rate", "refusal", 1)
    }


@pytest.mark.parametrize("customer", ["", "backfilled"])
async def test_a_custom_range_has_what_was_logged_later(
    guard: Guard, customer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that were reported weeks after the day they belong to, behind those of the day itself."""
    monkeypatch.setattr(log_search, "_WINDOW", 5)
    for days in range(20, -1, -1):
        await call(guard, "norm", days=days)
    for number in range(60):
        await call(guard, "backfilled", days=15, minutes=-number)
    for _ in range(40):
        await call(guard, "norm")
    day = (datetime.fromtimestamp(guard.now_ms() / 1000, UTC) - timedelta(days=15)).date()
    query = f"range=custom&from={day}&to={day}&customer={customer}"
    client = client_of(guard, open_to_all=True)
    records, _, _ = walk(client, query)
    wanted = [] if customer else ["6"]
    assert records == Counter([*wanted, *map(str, range(22, 82))])
    assert pills(client.get(f"/logs?{query}").text)["All"] == len(records)
    assert len(client.get(f"/logs.csv?{query}").text.splitlines()) == len(records) + 1


async def test_a_search_for_what_is_rare_goes_on_behind_a_backfilled_record(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of long ago at the edge of what is looked at in one go says nothing about those before it."""
    monkeypatch.setattr(log_search, "_WINDOW", 20)
    for _ in range(10):
        await call(guard, "r", "rare")
    await call(guard, "old", days=90)
    for _ in range(100):
        await call(guard, "b", "x", 0)
    client = client_of(guard, open_to_all=True)
    records, _, sizes = walk(client, "range=7d&model=rare")
    assert records == Counter(map(str, range(1, 11)))
    assert sizes == [0, 10]
    assert "Search further back" in client.get("/logs?range=7d&model=rare").text


async def test_pills_of_24_hours_count_hours(guard: Guard) -> None:
    """What ended yesterday, before them, is neither counted nor shown; of one customer hours are not kept."""
    for hours in (1, 2, 25, 26, 30):
        await call(guard, "ann", hours=hours)
    await refuse(guard, "a", "rate_limit", 5, 60 * 30)
    client = client_of(guard, open_to_all=True)
    for query in ("range=24h", "range=24h&model=m"):
        records, refused, _ = walk(client, query)
        assert pills(client.get(f"/logs?{query}").text)["OK"] == len(records) == 2
        assert pills(client.get(f"/logs?{query}").text)["All"] == 2 + len(refused)
    assert pills(client.get("/logs?range=24h&customer=ann").text) == {"Rate limited": 0, "Over budget": 0}
