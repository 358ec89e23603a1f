"""What pages, exports and forms show and do, without a browser."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from collections.abc import Sequence
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from respan_guard import Customer, Guard, Usage, UsageRecord
from respan_guard import console as package
from respan_guard.backends.base import RefusalRow
from respan_guard.console import Console, Panel
from respan_guard.errors import InvalidInput, StorageUnavailable
from respan_guard.exporters import ExportResult

from .support import PASSWORD, SAME, client_of, fill, make_guard, signed_in, token_in

HERE = Path(package.__file__).parent
PAGES = ["/", "/?range=24h", "/?range=period", "/?range=custom&from=2025-12-30&to=2026-01-20", "/users", "/user-new",
         "/logs", "/logs?status=refused", "/logs?live=1", "/system"]  # fmt: skip
EVIL = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'-alert(1)-'", "</title><script>alert(1)</script>",
    "javascript:alert(1)", "{{7*7}}{%raw%}", "\u202egnp.exe", "x" * 254, "../../users", "a?b=c&d#e", "%2e%2e%2f",
    "=1+1", "<!--", "]]>", "\U0001f600é日本", "</textarea><script>alert(1)</script>", "`${alert(1)}`", "&lt;b&gt;",
]  # fmt: skip


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("full", [False, True])
async def test_pages_answer_full_and_empty(guard: Guard, path: str, full: bool) -> None:
    """Every page has something to say, also where there is nothing yet, and its headers let in nothing from outside."""
    if full:
        await fill(guard)
    answer = client_of(guard, open_to_all=True).get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|\son[a-z]+=|<style", answer.text)
    assert not re.search(r"(?:src|href|action)=\"(?:https?:|//|/)", answer.text)


@pytest.mark.parametrize("evil", EVIL)
async def test_hostile_text_is_text(guard: Guard, evil: str) -> None:
    """Whatever a customer, its fields, a model, a provider or metadata is called: no page lets it be more than text."""
    who = evil.replace("\u202e", "")  # identifiers have no marks that turn the direction; names may
    await guard.put_customer(
        Customer(customer_identifier=who, name=evil, email=evil, group_identifier=who, metadata={evil: evil}),
        actor=evil,
    )
    texts = ("provider", "status", "trace_id", "span_id", "operation", "response_id", "response_model", "service_tier")
    given: dict[str, Any] = dict.fromkeys(texts, evil)
    await guard.record(Usage(model=evil[:200], cost=Decimal(1), metadata={evil: evil}, **given), who)
    refusal = RefusalRow(who, evil, guard.now_ms() // 60_000, 1)
    await guard.lane().call(lambda backend: backend.add_refusals([refusal]))
    client = client_of(guard, open_to_all=True)
    users = client.get("/users").text
    [link] = set(re.findall(r'href="(user\?id=[^"]*)"', users))
    paths = ["/", "/users", "/logs", "/record?seq=1", f"/{link}", f"/{link.replace('user', 'user-delete', 1)}"]
    for path in [*paths, f"/users?q={link[8:]}", f"/logs?customer={link[8:]}&model={link[8:]}"]:
        answer = client.get(path)
        assert answer.status_code == 200, path
        if "<" in evil:
            assert evil not in answer.text, path
        assert not re.search(r"<script(?![^>]*\bsrc=)|<img|\sonerror=(?!alert)|href=\"javascript", answer.text), path
    assert 'href="user?id=' in client.get(f"/{link}").text or link in users
    rows = list(csv.reader(io.StringIO(client.get("/users.csv").text)))
    assert rows[1][0] == (f"'{evil}" if evil.startswith("=") else who)
    assert json.loads(client.get("/users.json").text)[0]["customer_identifier"] == who
    lines = [json.loads(line) for line in client.get("/logs.jsonl").text.splitlines()]
    assert [(line["customer_identifier"], line["refused_by"]) for line in lines] == [(who, None), (who, evil)]


@pytest.mark.parametrize("mount", ["", "/guard", "/a/b/console"])
async def test_it_works_where_it_is_mounted(guard: Guard, mount: str) -> None:
    """Under the root, a mount and a nested one, every link of every page leads to a page."""
    await fill(guard)
    client = signed_in(guard, path=mount)
    seen: set[str] = set()
    todo = [f"http://console.example{mount}/"]
    while todo:
        url = todo.pop()
        if url in seen or len(seen) > 120:
            continue
        seen.add(url)
        answer = client.get(url)
        assert answer.status_code == 200, url
        if "text/html" not in answer.headers["content-type"]:
            continue
        links = re.findall(r'(?:href|src|hx-get)="([^"#]*)', answer.text)
        todo += [str(answer.url.join(link.replace("&amp;", "&"))) for link in links]
    assert len(seen) > 40
    assert all(url.startswith(f"http://console.example{mount}/") for url in seen)


@pytest.mark.parametrize("told", [False, True])
async def test_it_works_behind_a_proxy_that_strips_a_prefix(guard: Guard, told: bool) -> None:
    """What the browser sees under /guard reaches the app without it, whether the server was told or not."""
    await fill(guard)
    inner = Starlette(routes=[Mount("/console", Console(guard, password=PASSWORD))])

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix("/guard")
            scope = {**scope, "path": scope["path"] if told else path, "root_path": "/guard" if told else ""}
        await inner(scope, receive, send)

    client = TestClient(proxy, base_url="http://front.example/guard", follow_redirects=True)
    page = client.get("/console/users?q=a")
    assert str(page.url) == "http://front.example/guard/console/signin?next=users%3Fq%3Da"
    action = re.search(r'action="([^"]*)"', page.text)
    assert action is not None
    inside = client.post(str(page.url.join(action[1])), data={"password": PASSWORD}, headers=SAME)
    assert str(inside.url) == "http://front.example/guard/console/users?q=a"
    assert "ann" in inside.text
    style = re.search(r'href="(static/console\.css[^"]*)"', inside.text)
    assert style is not None
    assert client.get(str(inside.url.join(style[1]))).headers["cache-control"].endswith("immutable")


async def test_customers_are_found_sorted_and_paged(guard: Guard) -> None:
    """A search, a filter, an order and the next page are in the URL, and every customer is on one page."""
    for number in range(60):
        await guard.put_customer(Customer(customer_identifier=f"c{number:02}", blocked=number % 10 == 0))
        await guard.record(Usage(model="m", cost=number % 7), f"c{number:02}")
    client = client_of(guard, open_to_all=True)

    def shown(path: str) -> list[str]:
        return list(dict.fromkeys(re.findall(r'href="user\?id=(c\d\d)"', client.get(path).text)))

    assert set(shown("/users?q=C0")) == {f"c0{number}" for number in range(10)}
    assert set(shown("/users?state=blocked")) == {f"c{number}0" for number in range(6)}
    assert shown("/users?sort=customer&dir=asc&size=50") == [f"c{number:02}" for number in range(50)]
    for sort in ("customer", "name", "last_seen", "requests", "tokens", "cost"):
        path, seen = f"/users?sort={sort}", []
        while True:
            page = client.get(path).text
            seen += list(dict.fromkeys(re.findall(r'href="user\?id=(c\d\d)"', page)))
            following = re.search(r'href="(users\?[^"]*)" rel="next"', page)
            if following is None:
                break
            path = "/" + following[1].replace("&amp;", "&")
        assert sorted(seen) == [f"c{number:02}" for number in range(60)], sort
    for odd in ("?after=x", "?after=[1,2,3]", "?after=[[],1]", "?sort=password&dir=x&size=9999&seen=1s&state=y"):
        assert client.get(f"/users{odd}").status_code == 200


async def test_no_place_in_a_link_is_trouble_for_storage(tmp_path: Path) -> None:
    """Numbers and texts that no store can keep are no place: the first page is shown, also of a file."""
    async with Guard(f"sqlite:///{tmp_path / 'x.db'}", journal_dir=tmp_path) as guard:
        await fill(guard)
        client = client_of(guard, open_to_all=True)
        for sort, after in (
            ("cost", "[99999999999999999999999,%22a%22]"), ("cost", "[1,%22%5Cud800%22]"), ("cost", "[true,%22a%22]"),
            ("cost", "[1e400,%22a%22]"), ("cost", "[1,%22%5Cu0000%22]"), ("name", "[%22%5Cud800%22,%22a%22]"),
            ("customer", "[%22a%22,1]"), ("customer", "[" * 5000), ("cost", "[1]"), ("cost", "[" + "9" * 5000 + ",1]"),
        ):  # fmt: skip
            for path in ("/users", "/users.csv"):
                answer = client.get(f"{path}?sort={sort}&after={after}")
                assert answer.status_code == 200, after
                assert "ann" in answer.text, after


async def test_no_text_makes_a_page_fail(guard: Guard) -> None:
    """Half of a surrogate pair, wherever one can be put."""
    await guard.record(Usage(model="a\ud800", provider="b\ud800", cost=1, metadata={"\ud800": "\ud800"}), "ann")
    await guard.put_customer(Customer(customer_identifier="ann"))
    with pytest.raises(InvalidInput, match="reason"):
        await guard.adjust("ann", Decimal(1), "why \ud800")
    await guard.adjust("ann", Decimal(1), "why")
    client = client_of(guard, open_to_all=True)
    for path in ("/", "/users", "/user?id=ann", "/logs", "/record?seq=1", "/record?seq=2", "/logs.csv", "/users.json"):
        assert client.get(path).status_code == 200, path
    [line, _] = client.get("/logs.jsonl").text.splitlines()[::-1]
    assert (json.loads(line)["model"], json.loads(line)["provider"]) == ("a?", "b?")


async def test_no_field_of_a_csv_file_is_a_formula(guard: Guard) -> None:
    """Also not behind a line break or a tab, which spreadsheets pass over."""
    for sign in ("=", "+", "-", "@", "\t=", "\r=", "\n="):
        await guard.record(Usage(model=f"{sign}1+1", provider=f"{sign}2", cost=1), "ann")
    await guard.put_customer(Customer(customer_identifier="=cmd", name="ok"))
    client = client_of(guard, open_to_all=True)
    for path in ("/logs.csv", "/users.csv"):
        for row in csv.reader(io.StringIO(client.get(path).text, newline="")):
            assert not [text for text in row if text[:1] in ("=", "@", "\t", "\r", "\n")], path
            assert not [text for text in row if text[:1] in ("+", "-") and not text[1:].isdigit()], path


async def test_a_limit_is_changed_with_a_history(guard: Guard) -> None:
    """What was typed holds, what others changed meanwhile stays, and the history says who changed what."""
    await fill(guard)
    client = signed_in(guard)
    page = client.get("/user?id=ann").text
    form = {"id": "ann", "token": token_in(page)}
    for name, text in re.findall(r'name="was_([a-z_]+)" value="([^"]*)"', page):
        form[f"was_{name}"] = form[name] = text.replace("&amp;", "&")
    await guard.update_customer("ann", email="new@example.com", actor="someone")
    form |= {"period_budget": "7.5", "rate_limit": "100/minute; 2000/hour", "metadata": '{"plan": "pro"}'}
    answer = client.post("/user-save", data=form, headers=SAME)
    assert answer.headers["location"] == "user?id=ann&done=saved"
    stored = await guard.get_customer("ann")
    assert stored is not None
    assert (stored.period_budget, stored.rate_limit) == (Decimal("7.5"), "100/minute; 2000/hour")
    assert (stored.email, stored.metadata, stored.name) == ("new@example.com", {"plan": "pro"}, "Ann & Co")
    history = client.get("/user?id=ann").text.split("History of changes")[1]
    assert "console:admin" in history
    assert "<del><bdi>5</bdi></del>" in history
    assert "<ins><bdi>7.5</bdi></ins>" in history
    form = {**form, "was_period_budget": "7.5", "period_budget": "", "was_rate_limit": "x"}
    client.post("/user-save", data=form, headers=SAME)
    assert (await guard.get_customer("ann")).period_budget is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("field", "text"),
    [("period_budget", "much"), ("rate_limit", "often"), ("metadata", "{"), ("period_start", "31.1.2026"),
     ("time_zone", "Mars"), ("markup_percentage", "-1"), ("budget_duration", "hourly"), ("total_budget", "1e99")],
)  # fmt: skip
async def test_what_can_not_work_is_shown_again(guard: Guard, field: str, text: str) -> None:
    """A bad value changes nothing; the form says what is wrong and keeps what was typed."""
    await fill(guard)
    client = signed_in(guard)
    form = {"id": "ann", "token": token_in(client.get("/user?id=ann").text), field: text, "name": "typed"}
    before = await guard.get_customer("ann")
    answer = client.post("/user-save", data=form, headers=SAME)
    assert answer.status_code == 400
    assert 'role="alert"' in answer.text
    assert 'value="typed"' in answer.text
    assert await guard.get_customer("ann") == before
    new = {**form, "customer_identifier": "eve"}
    assert client.post("/user-new", data=new, headers=SAME).status_code == 400
    assert await guard.get_customer("eve") is None


async def test_customers_are_made_blocked_and_deleted(guard: Guard) -> None:
    """Made once, refused while blocked, gone when the identifier was typed; unknown ones are not found."""
    client = signed_in(guard)
    token = token_in(client.get("/user-new").text)
    form = {"token": token, "customer_identifier": "a/b ü", "rate_limit": "5", "name": "A"}
    answer = client.post("/user-new", data=form, headers=SAME)
    assert answer.headers["location"] == "user?id=a%2Fb%20%C3%BC&done=created"
    assert client.get("/" + answer.headers["location"]).status_code == 200
    assert client.post("/user-new", data=form, headers=SAME).status_code == 400
    who = {"token": token, "id": "a/b ü"}
    client.post("/user-block", data={**who, "blocked": "1"}, headers=SAME)
    assert (await guard.try_admit("a/b ü")).decision.reason == "blocked"
    client.post("/user-block", data={**who, "blocked": "0"}, headers=SAME)
    assert (await guard.status("a/b ü")).blocked is False
    assert client.post("/user-delete", data={**who, "confirm": "a/b"}, headers=SAME).status_code == 400
    assert client.post("/user-delete", data={**who, "confirm": "a/b ü"}, headers=SAME).status_code == 303
    assert await guard.get_customer("a/b ü") is None
    for path in ("/user-save", "/user-block", "/user-delete"):
        assert client.post(path, data=who, headers=SAME).status_code == 404
    assert client.get("/user?id=nobody").status_code == 404
    assert client.get("/record?seq=99").status_code == 404
    assert client.get("/nothing").status_code == 404


async def test_the_system_page_masks_secrets_and_takes_panels(tmp_path: Path) -> None:
    """Settings show where they are from; a password in the storage URL is not shown; other parts add panels."""
    url = f"sqlite:///{tmp_path / 'x.db'}"

    async def exporters(guard: Guard) -> Panel | None:
        return Panel("Exporters", ("name", "lag"), [("jsonl", "3 records")], "near", warnings=["one is slow"])

    async def nothing(guard: Guard) -> Panel | None:
        return None

    async with Guard(url, journal_dir=tmp_path, time_zone="Europe/Berlin") as guard:
        client = client_of(guard, open_to_all=True, panels=[exporters, nothing])
        page = client.get("/system").text
    assert "Europe/Berlin" in page
    assert re.search(r"time_zone</th><td><bdi>Europe/Berlin</bdi></td><td><bdi>keyword", page)
    assert page.index("Journal") < page.index("Exporters") < page.index("Settings")
    assert "one is slow" in page
    assert "Nothing waits." in page


async def test_the_system_page_shows_exporters(tmp_path: Path) -> None:
    """Name, lag, dead letters and last error of each; without exporters there is no such panel."""

    class Picky:
        name = "picky"

        async def export(self, batch: Sequence[UsageRecord]) -> ExportResult:
            return ExportResult(dict.fromkeys(range(len(batch)), "not this one"))

    async with Guard(f"sqlite:///{tmp_path / 'x.db'}", journal_dir=tmp_path) as guard:
        client = client_of(guard, open_to_all=True)
        assert "Exporters" not in client.get("/system").text
        guard.add_exporter(Picky())
        await guard.record(Usage("m", cost=1), "ann")
        async with asyncio.timeout(20):
            while not (found := await guard.exporters()) or not found[0].dead_letters:
                await asyncio.sleep(0.05)
        page = client.get("/system").text
    assert re.search(r"picky</th><td><bdi>0</bdi></td><td><bdi>0 s</bdi></td><td><bdi>1</bdi>", page)
    assert "respan-guard export dead-letters list picky" in page


async def test_storage_that_is_down_is_a_page(tmp_path: Path) -> None:
    """Not a traceback: 503, and it can be asked again."""
    (tmp_path / "x.db").write_bytes(b"this is no database" * 1000)
    guard = Guard(f"sqlite:///{tmp_path / 'x.db'}", journal_dir=tmp_path)
    answer = client_of(guard, open_to_all=True).get("/users")
    assert answer.status_code == 503
    assert "Storage gave no answer" in answer.text


async def test_strangers_are_not_told_where_storage_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the cookie is worth, which only storage knows: the page says that there is no answer, the log why."""
    guard = Guard("memory://", journal_dir=tmp_path)
    monkeypatch.setattr(guard.lane(), "call", Mock(side_effect=StorageUnavailable("no 10.1.2.3 for user root")))
    answer = client_of(guard).get("/", headers={"cookie": "respan_guard_console=x"})
    assert answer.status_code == 503
    assert "10.1.2.3" not in answer.text
    assert "no 10.1.2.3 for user root" in caplog.text


def test_what_is_vendored_is_what_was_published() -> None:
    """Each file has the hash that is written beside it, a licence, and all static files together are small."""
    static = HERE / "static"
    listed = json.loads((static / "vendor" / "vendor.json").read_text())
    files = {path.name for path in (static / "vendor").iterdir()} - {"vendor.json"}
    assert files == {name for one in listed for name in (*one["files"], one["licence_file"])}
    for one in listed:
        for name, digest in one["files"].items():
            assert sha256((static / "vendor" / name).read_bytes()).hexdigest() == digest, name
        assert (static / "vendor" / one["licence_file"]).stat().st_size > 100
    assert sum(path.stat().st_size for path in static.rglob("*") if path.is_file()) < 150_000


def test_templates_have_no_inline_code() -> None:
    """No inline script, style or handler, and nothing that is marked safe."""
    for path in (HERE / "templates").iterdir():
        text = path.read_text()
        assert not re.search(
            r"<script(?![^>]*\bsrc=)|\sstyle=|\son[a-z]+=|<style|\|\s*safe|hx-on|js:|autoescape", text
        ), path


async def test_what_all_customers_share_is_told_apart() -> None:
    """A customer's page says where the app's budget stands; that it is used up makes no customer one that is over."""
    guard = make_guard(app_budgets={"total_budget": 3})
    await fill(guard)
    await guard.record(Usage(model="m", cost=3), "eve")
    client = signed_in(guard)
    page = client.get("/user?id=ann").text
    assert "The app&#39;s total budget" in page
    users = client.get("/users").text
    assert re.findall(r'class="badge (\w+)"', users) == ["ok", "ok", "ok"]
    await guard.try_admit("bob")
    await guard.flush()
    budget = client.get("/logs?status=budget").text
    assert "app_total_budget" in budget
    assert "app_total_budget" not in client.get("/logs?status=rate").text
