"""Lists of logs and users: order, pages that stay put, filters, bounds."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.api import search, users
from respan_guard.testing import FakeClock

from .support import KEY, MOUNT, Client, mounted


async def fill(guard: Guard, clock: FakeClock, count: int, **fields: Any) -> None:
    """Record calls, a second apart."""
    for number in range(count):
        clock.advance(1)
        usage = {"model": "m", "cost": Decimal(number % 7), "input_tokens": number, **fields}
        await guard.record(Usage(**usage), f"c{number % 3}", entry_id=f"e{number}")


class Forgetful(Client):
    """Keeps no cookie."""

    async def __call__(self, *args: Any, **given: Any) -> Any:
        """Call like somebody new."""
        self.http.cookies.clear()
        return await super().__call__(*args, **given)


def ids(rows: list[Any]) -> list[str]:
    """The records' own ids."""
    return [row["record_id"] for row in rows]


async def test_newest_first_and_every_one_once(api: Client, guard: Guard, clock: FakeClock) -> None:
    """By default; `sort_by=id` is the other way round; `next` and `previous` lead through all pages."""
    await fill(guard, clock, 23)
    expected = [f"own:e{number}" for number in range(23)]
    assert ids(await api.follow(await api.logs(page_size=5))) == expected[::-1]
    assert ids(await api.follow(await api.logs(page_size=5, sort_by="id"))) == expected
    second = await api("POST", (await api.logs(page_size=5))["next"], {})
    first = await api("POST", second["previous"], {})
    assert ids(first["results"]) == expected[:17:-1]
    assert first["previous"] is None
    assert (first["count"], second["count"]) == (5, 5)


async def test_the_last_page_says_so(api: Client, guard: Guard, clock: FakeClock) -> None:
    """`next` is null; a page behind it is empty, as the official client expects that counts up page numbers."""
    await fill(guard, clock, 4)
    page = await api.logs(page_size=2, page=2)
    assert ids(page["results"]) == ["own:e1", "own:e0"]
    beyond = await api.logs(page_size=2, page=3)
    assert (beyond["results"], beyond["next"], beyond["count"]) == ([], None, 0)
    assert (await api.logs(page_size=4))["next"] in (None, api.last.json()["next"])
    assert await api.follow(await api.logs(page_size=4)) == (await api.logs())["results"]
    empty = await api.logs({"model": {"value": ["none"]}})
    assert (empty["results"], empty["next"], empty["previous"]) == ([], None, None)


@pytest.mark.parametrize("sort", ["-id", "id", "-cost", "latency", "-timestamp", "-prompt_tokens", "stream"])
@pytest.mark.parametrize("by_number", [False, True])
async def test_pages_are_stable_while_rows_come_in(
    api: Client, guard: Guard, clock: FakeClock, sort: str, by_number: bool
) -> None:
    """Whatever was there at the first page is seen exactly once, by `next` and by page numbers alike."""
    await fill(guard, clock, 17)
    seen: list[str] = []
    page = await api.logs(page_size=3, sort_by=sort)
    number = 1
    while page["results"]:
        seen += ids(page["results"])
        for _ in range(2):
            clock.advance(1)
            await guard.record(Usage(model="m", cost=random.randrange(9), input_tokens=random.randrange(30)), "new")
        number += 1
        if by_number:
            page = await api.logs(page_size=3, sort_by=sort, page=number)
        elif page["next"] is None:
            break
        else:
            page = await api("POST", page["next"], {"filters": {}})
        if number > 30:  # new rows in ascending order may follow for ever
            break
    assert len(seen) == len(set(seen))
    assert {f"own:e{n}" for n in range(17)} <= set(seen)


@pytest.mark.parametrize("first_step", [0, 1])
async def test_readers_by_number_with_one_key(guard: Guard, clock: FakeClock, first_step: int) -> None:
    """Each sees each row of its first page's moment once, however they alternate: a cookie says who is who."""
    await fill(guard, clock, 9)
    transport = httpx2.ASGITransport(mounted(guard))
    http = [httpx2.AsyncClient(transport=transport, base_url=f"http://guard{MOUNT}") for _ in range(3)]
    readers = [Client(one) for one in http]
    seen: list[list[str]] = [[], [], []]
    for number in range(1, 6):
        for step in range(3):
            which = (step + first_step * number) % 3
            seen[which] += ids((await readers[which].logs(page_size=3, page=number))["results"])
            await guard.record(Usage(model="m"), "new", entry_id=f"new{number}{step}")
    for rows in seen:
        assert len(rows) == len(set(rows))
        old = [row for row in rows if "new" not in row]
        assert old == [f"own:e{n}" for n in range(8, -1, -1)]
        assert rows[-9:] == old
    for one in http:
        await one.aclose()


async def test_the_cookie_says_who_reads_and_nothing_else(api: Client, guard: Guard, clock: FakeClock) -> None:
    """It is asked for once, is for one list, and what is none of ours is not taken."""

    def named() -> list[str]:
        return [cookie for cookie in api.last.headers.get_list("set-cookie") if "_reader" in cookie]

    await fill(guard, clock, 4)
    await api.logs(page_size=2)
    (cookie,) = named()
    assert re.fullmatch("respan_guard_reader=[0-9a-f]{32}; HttpOnly; SameSite=strict", cookie)
    second = ids((await api.logs(page_size=2, page=2))["results"])
    assert named() == []
    await api.users()
    assert named()
    api.http.cookies.clear()
    for odd in ("x", "0" * 33, "../../etc"):
        api.http.cookies.set("respan_guard_reader", odd)
        assert ids((await api.logs(page_size=2, page=2))["results"]) == second
        assert named()
        api.http.cookies.clear()
    api.http.cookies.set("respan_guard_reader", "0" * 32)  # whom nobody knows here: another process does
    assert ids((await api.logs(page_size=2, page=2))["results"]) == second


@pytest.mark.parametrize("odd", ["", "x", "WzIsW10sIiJd", "!" * 200, "A" * 5_000])
async def test_a_place_that_is_none_of_ours_is_not_gone_by(
    api: Client, guard: Guard, clock: FakeClock, odd: str
) -> None:
    """A cookie that was made up, or is another list's, says nothing: the page is the one of that number."""
    await fill(guard, clock, 6)
    api.http.cookies.set("respan_guard_next", odd)
    assert ids((await api.logs(page_size=2, page=2))["results"]) == ["own:e3", "own:e2"]
    await api.logs(page_size=3)  # a cookie for its page 2
    assert ids((await api.logs(page_size=2, page=2))["results"]) == ["own:e3", "own:e2"]
    await api.logs(page_size=2)
    assert ids((await api.logs(page_size=2, page=3))["results"]) == ["own:e1", "own:e0"]


@pytest.mark.parametrize("cookies", [True, False])
async def test_pages_that_several_processes_serve(guard: Guard, clock: FakeClock, cookies: bool) -> None:
    """The cookie has the place of the next page, as `next` has it: rows that come in repeat none, whoever answers."""
    await fill(guard, clock, 9)
    processes = itertools.cycle([mounted(guard), mounted(guard), mounted(guard)])

    async def balanced(scope: Any, receive: Any, send: Any) -> None:
        await next(processes)(scope, receive, send)

    transport = httpx2.ASGITransport(balanced)
    async with httpx2.AsyncClient(transport=transport, base_url=f"http://guard{MOUNT}") as http:
        reader = Client(http) if cookies else Forgetful(http)
        seen: list[str] = []
        for number in range(1, 5):
            seen += ids((await reader.logs(page_size=3, page=number))["results"])
            await guard.record(Usage(model="m"), "new", entry_id=f"new{number}")
    once = [f"own:e{n}" for n in range(8, -1, -1)]
    assert seen == once if cookies else set(seen) > set(once[:-3])


async def test_readers_with_one_key(api: Client, guard: Guard, clock: FakeClock) -> None:
    """By `next` each sees each row once; by numbers, who keeps no cookie may see a row again, and misses none."""
    await fill(guard, clock, 9)
    api = Forgetful(api.http)
    old = await api.logs(page_size=3)
    await guard.record(Usage(model="m"), "new", entry_id="new")
    new = await api.logs(page_size=3)
    assert ids(new["results"])[0] == "own:new"
    second = await api.logs(page_size=3, page=2)  # of the newer reader
    for page in (new, old):
        rows = ids(await api.follow(page))
        assert len(rows) == len(set(rows))
        assert {f"own:e{n}" for n in range(9)} <= set(rows)
    numbered = ids(second["results"])
    for number in (3, 4):
        numbered += ids((await api.logs(page_size=3, page=number))["results"])
    assert {f"own:e{n}" for n in range(9)} <= {*ids(old["results"]), *numbered}
    assert ids(new["results"]) + numbered == ["own:new", *(f"own:e{n}" for n in range(8, -1, -1))]


async def test_a_page_that_nobody_remembers_is_counted_out(guard: Guard, clock: FakeClock) -> None:
    """Another process serves page 3, having seen no other."""
    from httpx2 import ASGITransport, AsyncClient

    from .support import MOUNT, mounted

    await fill(guard, clock, 10)
    async with AsyncClient(transport=ASGITransport(mounted(guard)), base_url=f"http://guard{MOUNT}") as http:
        api = Client(http)
        assert ids((await api.logs(page_size=3, page=3))["results"]) == ["own:e3", "own:e2", "own:e1"]
        assert ids((await api.logs(page_size=3, page=3, sort_by="-prompt_tokens"))["results"])[0] == "own:e3"
        assert (await api.logs(page_size=3, page=9))["results"] == []


async def test_any_field_sorts(api: Client, guard: Guard, clock: FakeClock) -> None:
    """Up and down, what has no value first (going up), equal ones in a fixed order."""
    for number in range(12):
        clock.advance(1)
        cost = None if number % 4 == 0 else number % 3
        latency = None if number % 5 == 0 else number % 4 * 100
        await guard.record(
            Usage(model="ab"[number % 2], cost=cost, input_tokens=number % 5, latency_ms=latency), f"c{number % 3}"
        )
    for field in ("cost", "prompt_tokens", "latency", "model", "timestamp", "status", "customer_identifier"):
        for descending in (False, True):
            rows = await api.follow(await api.logs(page_size=5, sort_by="-" * descending + field))
            values = [row[field] for row in rows]
            assert len(rows) == 12
            order = sorted(values, key=lambda v: (v is not None, v if v is not None else 0), reverse=descending)
            assert values == order, field


FILTERS: list[tuple[dict[str, Any], list[int]]] = [
    ({"cost": {"operator": "gte", "value": [4]}}, [4, 5]),
    ({"cost": {"operator": "lt", "value": ["1.5"]}}, [0, 1]),
    ({"cost": [{"operator": "gt", "value": [1]}, {"operator": "lte", "value": [3]}]}, [2, 3]),
    ({"total_cost": {"value": [2]}}, [2]),
    ({"input_tokens": {"operator": "in", "value": [10, 30]}}, [1, 3]),
    ({"prompt_tokens": {"operator": "not_in", "value": [10, 30, 40, 50]}}, [0, 2]),
    ({"model": {"operator": "", "value": ["m1"]}}, [1, 3, 5]),
    ({"model": {"value": "m1"}}, [1, 3, 5]),
    ({"model": {"operator": "not", "value": ["m1"]}}, [0, 2, 4]),
    ({"model": {"operator": "contains", "value": ["0"]}}, [0, 2, 4]),
    ({"model": {"operator": "not_contains", "value": ["0"]}}, [1, 3, 5]),
    ({"model": {"operator": "icontains", "value": ["M1"]}}, [1, 3, 5]),
    ({"model": {"operator": "contains", "value": ["M1"]}}, []),
    ({"model": {"operator": "startswith", "value": ["m"]}}, [0, 1, 2, 3, 4, 5]),
    ({"model": {"operator": "not_endswith", "value": ["1"]}}, [0, 2, 4]),
    ({"customer_identifier": {"value": ["a/b"]}, "model": {"value": ["m0"]}}, [0]),
    ({"customer_identifier": {"operator": "in", "value": ["a/b", "c d"]}}, [0, 1, 3, 4]),
    ({"customer_identifier": {"operator": "empty", "value": [""]}}, [2, 5]),
    ({"customer_identifier": {"operator": "not_empty", "value": [""]}}, [0, 1, 3, 4]),
    ({"trace_unique_id": {"value": ["t1"]}}, [1, 4]),
    ({"trace_id": {"value": ["t1"]}}, [1, 4]),
    ({"custom_identifier": {"operator": "startswith", "value": ["id"]}}, [0, 1, 2, 3, 4, 5]),
    ({"custom_identifier": {"value": ["id3"]}}, [3]),
    ({"status": {"value": ["failed"]}}, [5]),
    ({"status": {"value": ["success"]}}, [0, 1, 2, 3, 4]),
    ({"status_code": {"operator": "not", "value": [200]}}, [5]),
    ({"stream": {"value": [True]}}, [0, 2, 4]),
    ({"stream": {"value": ["false"]}}, [1, 3, 5]),
    ({"latency": {"operator": "gte", "value": [0.3]}}, [3, 4, 5]),
    ({"log_type": {"value": ["chat"]}}, [0, 1, 2, 3, 4, 5]),
    ({"metadata__plan": {"value": ["pro"]}}, [0, 3]),
    ({"metadata__plan": {"operator": "not", "value": ["pro"]}}, [1, 4]),
    ({"metadata__plan": {"operator": "empty", "value": [""]}}, [2, 5]),
    ({"thread_identifier": {"value": ["th0"]}}, [0, 2, 4]),
    ({"environment": {"value": ["test"]}}, []),
    ({"environment": {"value": ["prod"]}}, [0, 1, 2, 3, 4, 5]),
    ({"model": None}, [0, 1, 2, 3, 4, 5]),
]


async def test_every_operator(api: Client, clock: FakeClock) -> None:
    """Alone and together; the query's parameters besides; a GET has them as JSON."""
    for n in range(6):
        clock.advance(1)
        body: dict[str, Any] = {
            "model": f"m{n % 2}", "cost": n, "prompt_tokens": n * 10, "stream": n % 2 == 0, "latency": n / 10,
            "trace_unique_id": f"t{n % 3}", "custom_identifier": f"id{n}", "thread_identifier": f"th{n % 2}",
            "status_code": 500 if n == 5 else 200,
        }  # fmt: skip
        if n % 3 != 2:
            body |= {"customer_identifier": ["a/b", "c d"][n % 3], "metadata": {"plan": ["pro", "free"][n % 3]}}
        await api.log(body)
    for filters, expected in FILTERS:
        rows = (await api.logs(filters, sort_by="id"))["results"]
        assert [int(row["custom_identifier"][2:]) for row in rows] == expected, filters
    (row,) = (await api.logs({"custom_identifier": {"value": ["id4"]}}))["results"]
    assert (await api.logs({"unique_id": {"value": [row["unique_id"]]}}))["results"] == [row]
    got = await api("GET", "/api/request-logs/list/", filters='{"cost": {"operator": "gte", "value": [4]}}')
    assert got["count"] == 2
    assert (await api.logs(log_type="embedding"))["count"] == 0
    start = "2026-01-15T12:00:03Z"
    assert (await api.logs(start_time=start))["count"] == 4
    assert (await api.logs(end_time=start))["count"] == 2
    assert (await api.logs(end_time=start, environment="test"))["count"] == 0
    few = (await api.logs(include_fields="cost, model", page_size=1))["results"][0]
    assert set(few) == {"id", "cost", "model"}


async def test_metadata_of_any_kind_is_filtered_as_the_text_it_is_shown_as(api: Client, guard: Guard) -> None:
    """The app itself may note numbers, flags, lists; every operator on texts answers."""
    for value in (5, True, ["a"], {"x": 1}, "pro", None):
        await guard.record(Usage(model="m", cost=1, metadata={"plan": value}), "ann")
    for operator, value, count in (
        ("", "5", 1), ("in", "true", 1), ("contains", "a", 1), ("icontains", "A", 1), ("startswith", "{", 1),
        ("endswith", "]", 1), ("not", "5", 4), ("not_contains", "r", 3), ("not_startswith", "p", 4),
        ("not_endswith", "o", 4), ("empty", "", 1), ("not_empty", "", 5),
    ):  # fmt: skip
        found = await api.logs({"metadata__plan": {"operator": operator, "value": [value]}})
        assert found["count"] == count, operator


REFUSED_FILTERS: list[Any] = [
    {"nonsense": {"value": [1]}}, {"metadata__": {"value": ["x"]}}, {"cost": {"operator": "like", "value": [1]}},
    {"cost": {"operator": "gt", "value": ["x"]}}, {"cost": {"operator": "gt", "value": [1, 2]}},
    {"cost": {"operator": "contains", "value": ["1"]}}, {"model": {"operator": "lt", "value": ["m"]}},
    {"cost": 5}, {"cost": {"value": []}}, {"cost": {"value": [True]}}, {"stream": {"value": ["perhaps"]}},
    {"model": {"value": [["m"]]}}, {"model": {"operator": 5, "value": ["m"]}}, {"cost": {"value": ["NaN"]}},
    {"deployment_name": {"value": ["x"]}}, {"model": [{"value": ["x"]}] * 60}, {"cost": {"value": [1] * 1001}},
]  # fmt: skip
REFUSED_QUERIES: list[dict[str, Any]] = [
    {"page": 0}, {"page": -1}, {"page": "x"}, {"page_size": 0}, {"page_size": 1001}, {"sort_by": "nonsense"},
    {"sort_by": "--cost"}, {"cursor": "x"}, {"cursor": "W10"}, {"cursor": "WzEsWyJhIl1d"}, {"start": "2026"},
    {"start_time": "soon"}, {"cursor": "ü"},
]  # fmt: skip


async def test_what_can_not_be_filtered_by_is_said(api: Client) -> None:
    """Fields, operators and values that are not known: a 400, never a list that ignores them."""
    for filters in REFUSED_FILTERS:
        for call in (api.logs, api.users):
            refused = await call(filters, status=400)
            assert refused["field"] == "filters", filters


async def test_queries_that_can_not_be_meant(api: Client) -> None:
    """Are answered 400 with the parameter's name."""
    for query in REFUSED_QUERIES:
        refused = await api.logs(status=400, **query)
        assert refused["field"] == next(iter(query)), query


async def test_cursors_are_of_their_list(api: Client, guard: Guard, clock: FakeClock) -> None:
    """One of another list, or bent by hand, is refused, never read as something else."""
    await fill(guard, clock, 5)
    by_id = (await api.logs(page_size=2))["next"]
    cursor = by_id.split("cursor=")[1]
    assert (await api.logs(status=400, sort_by="-cost", cursor=cursor))["field"] == "cursor"
    assert (await api.users(status=400, cursor=cursor))["field"] == "cursor"
    filters = {"cost": {"operator": "gte", "value": [0]}}
    filtered = await api.logs(filters, page_size=2)
    assert (await api("GET", filtered["next"], status=400))["field"] == "cursor"  # it would show what was filtered out
    assert (await api("POST", filtered["next"], {"filters": filters}))["count"] == 2
    longer = filtered["next"].replace("page_size=2", "page_size=9")
    assert (await api("POST", longer, {"filters": filters}))["count"] == 3
    by_text = (await api.logs(page_size=2, sort_by="model"))["next"].split("cursor=")[1]
    assert (await api.logs(status=400, sort_by="-cost", cursor=by_text))["field"] == "cursor"


async def test_work_is_bounded(api: Client, guard: Guard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search goes so far; with something found it ends in a short page that `next` goes on from, else in a 400."""
    monkeypatch.setattr(search, "MAX_RECORDS", 10)
    monkeypatch.setattr(search, "_PAGE", 5)
    await fill(guard, clock, 4, model="rare")
    await fill(guard, clock, 30)
    await api.log(custom_identifier="first", cost=99, customer_identifier="c1")
    everything = await api.follow(await api.logs())
    assert len(everything) == 31  # the first four have the ids of later ones, and count once
    pricey = {"cost": {"operator": "gte", "value": [99]}}
    page = await api.logs(pricey)
    assert page["count"] == 1
    assert page["next"] is not None
    refused = await api("POST", page["next"], {"filters": pricey}, 400)
    assert "10 records" in refused["detail"]
    assert "narrow" in refused["detail"]
    assert (await api.logs({"cost": {"operator": "gt", "value": [99]}}, status=400))["field"] == "filters"
    assert (await api.logs(sort_by="-cost", status=400))["field"] == "filters"
    assert (await api("POST", "/api/request-logs/summary/", {"filters": pricey}, 400))["field"] == "filters"
    assert (await api("POST", "/api/request-logs/groups/", {}, 400, group_by="provider_id"))["field"] == "filters"
    monkeypatch.setattr(search, "MAX_RECORDS", 11)
    assert (await api.logs({"customer_identifier": {"value": ["c2"]}}, sort_by="-cost"))["count"] == 10


async def test_one_record_is_found_at_once(
    api: Client, guard: Guard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, or by its customer and custom identifier, however many there are."""
    logged = await api.log(custom_identifier="x", customer_identifier="ann", cost=5, model="m")
    await fill(guard, clock, 30)
    monkeypatch.setattr(search, "MAX_RECORDS", 0)
    by_name = {"unique_id": {"value": [logged["unique_id"]]}}
    by_both = {"customer_identifier": {"value": ["ann"]}, "custom_identifier": {"value": ["x"]}}
    for filters in (by_name, by_both):
        page = await api.logs(filters)
        assert [row["cost"] for row in page["results"]] == [5]
        assert page["next"] is None
        assert (await api.logs({**filters, "model": {"value": ["other"]}}))["count"] == 0
        assert (await api.logs(filters, page=2))["count"] == 0
    for value in ("x", "YQBi", "\\", ""):
        assert (await api.logs({"unique_id": {"value": [value]}}))["count"] == 0


async def test_storage_searches_in_windows(
    api: Client, guard: Guard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What storage can tell it looks for itself, window by window, up to a bound of its own."""
    monkeypatch.setattr(search, "_WINDOW", 7)
    await guard.record(Usage(model="rare", cost=1), "ann")
    await fill(guard, clock, 60)
    await guard.record(Usage(model="rare", cost=2), "ann")
    rare = {"model": {"value": ["rare"]}}
    for sort in ("id", "-id"):
        rows = await api.follow(await api.logs(rare, sort_by=sort, page_size=1))
        assert sorted(row["cost"] for row in rows) == [1, 2]
    monkeypatch.setattr(search, "MAX_PLACES", 30)
    page = await api.logs(rare)
    assert page["count"] == 1
    assert (await api.logs({"model": {"value": ["never"]}}, status=400))["field"] == "filters"
    monkeypatch.setattr(search, "MAX_PLACES", 100)
    assert (await api.logs({"model": {"value": ["never"]}}))["count"] == 0
    assert (await api.logs(start_time="2026-01-15T12:00:58Z", sort_by="id"))["count"] == 4
    assert (await api.logs(end_time="2026-01-15T12:00:02Z", sort_by="id"))["count"] == 2
    assert (await api.logs(start_time="2027-01-01"))["count"] == 0


SORTS = [
    "customer_identifier", "name", "email", "first_seen", "last_active_timeframe", "number_of_requests",
    "total_requests", "total_cost", "cost", "total_tokens", "tokens", "active_days", "average_latency",
    "average_ttft", "total_prompt_tokens", "total_completion_tokens", "average_monthly_cost",
]  # fmt: skip


async def test_users_sort(api: Client, guard: Guard, clock: FakeClock) -> None:
    """By every field, up and down; each user on one page."""
    for number in range(11):
        clock.advance(86_400 * (number % 3))
        name = f"c{number * 7 % 11}"
        fields = {"name": f"N{number % 4}", "email": f"{number % 5}@x"} if number % 2 else {}
        await guard.put_customer(Customer(customer_identifier=name, **fields))  # type: ignore[arg-type]
        for _ in range(number % 3):
            usage = Usage(model="m", cost=number % 4, input_tokens=number, output_tokens=number % 2)
            usage.latency_ms, usage.ttft_ms = (number * 10, number) if number % 2 else (None, None)
            await guard.record(usage, name)
    for sort in SORTS:
        for descending in (False, True):
            rows = await api.follow(await api.users(page_size=4, sort_by="-" * descending + sort))
            assert len({row["customer_identifier"] for row in rows}) == len(rows) == 11
            values = [row[sort] or "" if sort == "name" else row[sort] for row in rows]
            order = sorted(values, key=lambda v: (v is not None, v if v is not None else 0), reverse=descending)
            assert values == order, sort


async def test_users_show_and_filter_everything(api: Client, guard: Guard, clock: FakeClock) -> None:
    """Every field and alias of a user; filters on each; usage of nobody's and deleted users are no users."""
    await guard.put_customer(
        Customer(customer_identifier="ann", name="Ann A", email="ann@acme.dev", period_budget=5, markup_percentage=50)
    )
    await guard.record(
        Usage(model="m", cost="0.3", input_tokens=10, output_tokens=2, latency_ms=100, ttft_ms=50), "ann"
    )
    clock.advance(86_400)
    await guard.record(Usage(model="m", cost="0.3", input_tokens=10, output_tokens=2, latency_ms=200), "ann")
    await guard.record(Usage(model="m", cost=1), "bob")
    await guard.record(Usage(model="m", cost=1))
    await guard.record(Usage(model="m", cost=1), "gone")
    await guard.delete_customer("gone")
    bob, ann = (await api.users())["results"]
    assert bob["customer_identifier"] == "bob"
    assert ann == {
        "id": "annproddefault", "customer_identifier": "ann", "unique_organization_id": "default",
        "environment": "prod", "name": "Ann A", "email": "ann@acme.dev", "first_seen": "2026-01-15T12:00:00Z",
        "last_active_timeframe": "2026-01-16T12:00:00Z", "active_days": 2, "number_of_requests": 2,
        "total_requests": 2, "total_tokens": 24, "tokens": 24, "total_prompt_tokens": 20,
        "total_completion_tokens": 4, "total_cost": Decimal("0.6"), "cost": Decimal("0.6"),
        "total_cost_with_markup": Decimal("0.9"), "average_latency": Decimal("0.15"), "average_ttft": Decimal("0.05"),
        "average_monthly_cost": Decimal("0.6"), "period_budget": 5, "budget_duration": "monthly",
        "total_budget": None, "blocked": False,
    }  # fmt: skip
    for filters, expected in (
        ({"total_cost": {"operator": "gte", "value": [1]}}, ["bob"]),
        ({"email": {"operator": "endswith", "value": ["@acme.dev"]}}, ["ann"]),
        ({"name": {"operator": "icontains", "value": ["aNN"]}}, ["ann"]),
        ({"name": {"operator": "contains", "value": ["aNN"]}}, []),
        ({"name": {"operator": "empty", "value": [""]}}, ["bob"]),
        ({"customer_identifier": {"value": ["ann"]}}, ["ann"]),
        ({"customer_identifier": {"operator": "in", "value": ["ann", "bob"]}}, ["bob", "ann"]),
        ({"customer_identifier": {"operator": "not", "value": ["ann"]}}, ["bob"]),
        ({"active_days": {"operator": "gt", "value": [1]}}, ["ann"]),
        ({"total_tokens": {"operator": "lt", "value": [24]}}, ["bob"]),
        ({"average_latency": {"operator": "gt", "value": [0]}}, ["ann"]),
        ({"environment": {"value": ["prod"]}, "number_of_requests": {"value": [1]}}, ["bob"]),
        ({"environment": {"value": ["test"]}}, []),
    ):  # fmt: skip
        rows = (await api.users(filters))["results"]
        assert [row["customer_identifier"] for row in rows] == expected, filters
    got = await api("GET", "/api/users/list/", filters='{"name": {"operator": "empty", "value": [""]}}', sort_by="name")
    assert [row["customer_identifier"] for row in got["results"]] == ["bob"]
    assert (await api.users(status=400, sort_by="metadata"))["field"] == "sort_by"


async def test_pages_of_users_are_stable(api: Client, guard: Guard, clock: FakeClock) -> None:
    """While others come in and the sort value of those that are there stays."""
    for number in range(9):
        clock.advance(1)
        await guard.record(Usage(model="m", cost=number), f"c{number}")
    for sort in ("-first_seen", "-total_cost", "customer_identifier", "-active_days"):
        seen: list[str] = []
        page = 1
        while rows := (await api.users(page_size=2, page=page, sort_by=sort))["results"]:
            seen += [row["customer_identifier"] for row in rows]
            if page < 4:
                clock.advance(1)
                await guard.record(Usage(model="m", cost=20), f"new-{sort}-{page}")
            page += 1
        assert {f"c{number}" for number in range(9)} <= set(seen)
        assert len(seen) == len(set(seen))


async def test_work_on_users_is_bounded(api: Client, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order without an index, or a filter that finds nothing, looks at so many users and no more."""
    monkeypatch.setattr(users, "MAX_CUSTOMERS", 6)
    monkeypatch.setattr(users, "_PAGE", 3)
    for number in range(10):
        await guard.record(Usage(model="m", cost=number), f"c{number}")
    assert (await api.users(status=400, sort_by="email"))["field"] == "filters"
    assert (await api.users({"total_cost": {"operator": "gt", "value": [99]}}, status=400))["field"] == "filters"
    rows = await api.follow(await api.users({"total_cost": {"operator": "gte", "value": [2]}}, sort_by="total_cost"))
    assert [row["total_cost"] for row in rows] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert (await api.users({"customer_identifier": {"value": ["c9"]}}, sort_by="email"))["count"] == 1


async def test_many_at_once(api: Client, guard: Guard, clock: FakeClock) -> None:
    """Clients that read and write at the same time disturb nobody."""
    await fill(guard, clock, 20)

    async def work(number: int) -> None:
        await api.log(customer_identifier=f"w{number % 3}", cost=1, custom_identifier=f"x{number}")
        await api.logs(page_size=3, page=1 + number % 3)
        await api.users(page_size=2)

    await asyncio.gather(*(work(number) for number in range(20)))
    summary = await api("POST", "/api/request-logs/summary/", {})
    assert summary["number_of_requests"] == 40
    assert KEY not in api.last.text
