"""The pages in a real browser: what people do, with scripts and without, and nothing from outside.

Each test fails on a violation of the policy, an error or warning in the console, a dialog, or a request elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from respan_guard import Customer, Usage

from .conftest import Served, ask
from .support import PASSWORD, VIEWER

PAGES = ["", "?range=24h", "users", "user?id=ann", "user-new", "user-delete?id=ann", "logs", "logs?status=refused",
         "record?seq=1", "system"]  # fmt: skip
AXE = Path(__file__).parent.parent / "data" / "axe-4.14.1.min.js"


@pytest.mark.parametrize("scripts", [True, False])
def test_a_budget_is_changed_and_the_next_request_refused(watch: Any, served: Served, scripts: bool) -> None:
    """Sign in, find the customer, set its budget to nothing, see its next request refused, raise it again."""
    served.guard.sync.update_customer("ann", rate_limit=1000)
    assert ask(served, "ann") == 200
    one = watch(java_script_enabled=scripts)
    one.sign_in(path="/console/users")
    page = one.page
    page.fill("#q", "NN &")
    if scripts:
        page.wait_for_url(lambda url: "q=NN" in url)
        page.wait_for_selector("a.id:has-text('bob')", state="detached")
    else:
        page.click("#filters >> text=Show")
    page.click("a.id:has-text('ann')")
    page.wait_for_selector("h1:has-text('ann')")
    page.fill("#f-period_budget", "0.000001")
    page.click("text=Save")
    page.wait_for_selector("text=Saved. It holds from the next request on.")
    assert page.input_value("#f-period_budget") == "0.000001"
    assert ask(served, "ann") == 402
    assert "admin" in page.text_content(".history")
    served.guard.sync.flush()
    page.reload()
    assert "Over" in page.text_content("h1")
    page.fill("#f-period_budget", "50")
    with page.expect_navigation():
        page.click("text=Save >> nth=-1")
    assert page.input_value("#f-period_budget") == "50"
    assert ask(served, "ann") == 200
    page.click("button:has-text('Block')")
    page.wait_for_selector("text=Every request is refused from now on.")
    assert ask(served, "ann") == 402
    page.click("button:has-text('Unblock')")
    page.wait_for_selector("text=Unblocked.")
    assert ask(served, "ann") == 200


@pytest.mark.parametrize("scripts", [True, False])
def test_logs_are_filtered_and_exported(watch: Any, scripts: bool) -> None:
    """Filter by customer, choose a pill, open a record, export what is shown."""
    one = watch(java_script_enabled=scripts, accept_downloads=True)
    one.sign_in(path="/console/logs")
    page = one.page
    assert page.locator("tbody tr").count() == 6
    page.fill("#customer", "ann")
    if scripts:
        page.wait_for_url(lambda url: "customer=ann" in url)
        expect(page.locator("tbody tr")).to_have_count(4)
    else:
        page.click("form.filters >> text=Show")
    assert page.locator("tbody tr").count() == 4
    page.click("nav.pills >> text=Rate limited")
    page.wait_for_url(lambda url: "status=rate" in url)
    assert page.locator("tbody tr").count() == 1
    assert "customer=ann" in page.url
    page.click("nav.pills >> text=OK")
    page.wait_for_url(lambda url: "status=ok" in url)
    assert page.locator("tbody tr").count() == 3
    with page.expect_download() as waiting:
        page.click("text=JSONL")
    lines = Path(waiting.value.path()).read_text().splitlines()
    assert [json.loads(line)["customer_identifier"] for line in lines] == ["ann"] * 3
    with page.expect_download() as waiting:
        page.click(".tools >> text=CSV")
    assert len(Path(waiting.value.path()).read_text().splitlines()) == 4
    page.click("tbody a >> nth=0")
    page.wait_for_selector("h1:has-text('Record')")
    assert "chatcmpl-" in page.content()


def test_the_live_tail_shows_new_calls(watch: Any, served: Served) -> None:
    """With Live on, a call shows up by itself; what was typed into a filter stays."""
    served.guard.sync.update_customer("ann", rate_limit=1000)
    one = watch()
    one.sign_in(path="/console/logs")
    one.page.click("#live")
    one.page.wait_for_selector("text=Live: on")
    before = one.page.locator("tbody tr").count()
    assert ask(served, "ann") == 200
    expect(one.page.locator("tbody tr")).to_have_count(before + 1, timeout=15_000)
    assert ask(served, "ann") == 200
    expect(one.page.locator("tbody tr")).to_have_count(before + 2, timeout=15_000)


def held(page: Any, selector: str, milliseconds: int) -> None:
    """Click as people do: the button is down for some time."""
    box = page.locator(selector).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.wait_for_timeout(milliseconds)
    page.mouse.up()


def test_a_click_after_typing_into_a_filter_is_not_lost(watch: Any) -> None:
    """Leaving the field doesn't load the list again under the pointer."""
    one = watch()
    one.sign_in(path="/console/users")
    one.page.fill("#q", "NN &")
    one.page.wait_for_url(lambda url: "q=NN" in url)
    one.page.wait_for_selector("a.id:has-text('bob')", state="detached")
    held(one.page, "a.id:has-text('ann')", 700)
    one.page.wait_for_selector("h1:has-text('ann')")


def test_a_click_into_the_live_tail_is_not_lost(watch: Any) -> None:
    """Rows don't change while a button is down on one; the tail goes on when it is up."""
    one = watch()
    one.sign_in(path="/console/logs?live=1")
    page = one.page
    page.evaluate("document.addEventListener('htmx:after:swap', () => (window.swaps = (window.swaps || 0) + 1))")
    held(page, "#results td.num >> nth=0", 5000)
    assert page.evaluate("window.swaps || 0") == 0
    with page.expect_response(lambda response: "/console/logs?" in response.url) as waiting:
        pass
    assert waiting.value.ok
    page.wait_for_timeout(500)
    assert page.evaluate("window.swaps || 0") > 0
    held(page, "tbody a >> nth=0", 5000)
    page.wait_for_selector("h1:has-text('Record')")


def test_the_live_tail_without_scripts_loads_again(watch: Any, served: Served) -> None:
    """The page asks the browser to."""
    served.guard.sync.update_customer("ann", rate_limit=1000)
    one = watch(java_script_enabled=False)
    one.sign_in(path="/console/logs?live=1")
    before = one.page.locator("tbody tr").count()
    assert ask(served, "ann") == 200
    for _ in range(100):
        one.page.wait_for_timeout(100)
        if one.page.locator("tbody tr").count() == before + 1:
            return
    pytest.fail("the page did not load again")


def test_standing_is_live(watch: Any, served: Served) -> None:
    """A customer's limits move while the page is open, and a reset counts down, though the browser's clock is wrong."""
    served.guard.sync.update_customer("ann", rate_limit=1000)
    one = watch()
    one.page.add_init_script("Date.now = () => 4e12")
    one.sign_in(path="/console/user?id=ann")
    row = one.page.locator("#standing tr:has-text('Rate') td[data-label=Used]")
    before = int(row.inner_text())
    assert re.search(r"in \d+ (s|min)", one.page.inner_text("#standing"))
    assert ask(served, "ann") == 200
    expect(row).to_have_text(str(before + 1), timeout=15_000)


WIDER = """() => [...document.querySelectorAll("html, .card, .tile, .card > .scroll")].filter(
  (box) => box.scrollWidth > box.clientWidth).map((box) => box.innerText.slice(0, 80))"""


@pytest.mark.parametrize(
    ("width", "scheme"), [(1440, "light"), (1280, "light"), (1024, "light"), (820, "dark"), (390, "dark")]
)
def test_every_page_is_accessible_and_fits(watch: Any, served: Served, width: int, scheme: str) -> None:
    """Axe finds nothing serious on any page, in either theme; nothing is wider than its card or the screen.

    Not even the longest names.
    """
    served.guard.sync.record(Usage("m" * 120, 10**6, 10**6, cost=765_432, provider="p" * 60), "x" * 180)
    served.guard.sync.flush()
    one = watch(viewport={"width": width, "height": 900}, color_scheme=scheme)
    one.go("/console/signin")
    check(one)
    one.sign_in()
    for path in (*PAGES, f"user?id={'x' * 180}"):
        one.go(f"/console/{path}")
        one.page.wait_for_timeout(100)
        check(one)
        assert one.page.evaluate(WIDER) == [], path


def check(one: Any) -> None:
    """Run axe; its script is let in past the policy by the debugger, as an extension's would be."""
    one.page.evaluate(AXE.read_text())
    result = one.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    bad = [
        (found["id"], [node["html"][:160] for node in found["nodes"][:3]])
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
    ]
    assert bad == [], one.page.url


@pytest.mark.parametrize("scripts", [True, False])
def test_charts_have_their_numbers_in_a_table(watch: Any, scripts: bool) -> None:
    """Drawn where there are scripts; the numbers are there in any case, one row for each day."""
    one = watch(java_script_enabled=scripts)
    one.sign_in()
    assert one.page.locator("[data-chart] canvas").count() == (3 if scripts else 0)
    if scripts:
        assert not one.page.is_visible(".numbers table >> nth=0")
        one.page.click(".numbers summary >> nth=0")
    assert one.page.is_visible(".numbers table >> nth=0")
    assert one.page.locator(".numbers >> nth=0 >> tbody tr").count() == 30


def test_the_theme_is_chosen_and_kept(watch: Any) -> None:
    """The button turns light into dark, on this page and the next, and charts follow."""
    one = watch(color_scheme="light")
    one.sign_in()
    light = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
    one.page.click("#theme")
    dark = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert light != dark
    one.page.click("nav.main >> text=Users")
    one.page.wait_for_url(lambda url: url.endswith("users"))
    assert one.page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_who_may_only_look_can_only_look(watch: Any) -> None:
    """No button that changes anything, and fields that can't be typed into."""
    one = watch()
    one.sign_in(VIEWER, "/console/user?id=ann")
    assert one.page.locator("text=read only").count() == 1
    assert one.page.locator("main button, main .danger").count() == 0
    assert one.page.is_disabled("#f-period_budget")


def test_hostile_text_runs_nothing(watch: Any, served: Served) -> None:
    """A customer named like an attack, on every page that shows it: the browser runs none of it."""
    evil = "\"'><img src=x onerror=alert(1)><script>alert(1)</script>"
    served.guard.sync.put_customer(
        Customer(customer_identifier=evil, name=evil, email=evil, metadata={evil: evil}, rate_limit=1), actor=evil
    )
    one = watch()
    one.sign_in()
    for path in ("users", "logs", ""):
        one.go(f"/console/{path}")
        one.page.wait_for_timeout(200)
    one.go("/console/users?q=onerror")
    one.page.click("a.id >> nth=0")
    one.page.wait_for_selector("h1:has-text('onerror')")
    one.page.click(".danger")
    one.page.fill("#confirm", evil)
    one.page.click("button:has-text('Delete')")
    one.page.wait_for_selector("text=The customer was deleted")


def test_every_page_is_there_without_scripts(watch: Any) -> None:
    """The same pages, headings and links, with JavaScript off; buttons that need it are not shown."""
    one = watch(java_script_enabled=False)
    one.sign_in()
    for path in PAGES:
        assert one.go(f"/console/{path}").status == 200, path
        assert one.page.is_visible("h1"), path
        assert one.page.is_visible("nav.main >> text=Logs"), path
        assert not one.page.is_visible("#theme"), path


def test_it_works_without_tls_on_a_name_of_its_own(chromium: Any, served: Served) -> None:
    """Where a browser says nothing but the Origin of a form: signing in, a change, signing out."""
    context = chromium.new_context()
    page = context.new_page()
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    page.goto(served.url.replace("127.0.0.1", "guard.test") + "/console/user?id=ann")
    page.fill("#password", PASSWORD)
    page.click("text=Sign in >> nth=-1")
    page.click("button:has-text('Block')")
    page.wait_for_selector("text=Blocked. Every request is refused")
    assert served.guard.sync.get_customer("ann").blocked is True  # type: ignore[union-attr]
    page.click("button[aria-label='Sign out']")
    page.wait_for_selector("#password")
    assert [request.url.rsplit("/", 1)[1].split("?")[0] for request in sent] == ["signin", "user-block", "signout"]
    assert not any("sec-fetch-site" in request.all_headers() for request in sent)
    context.close()


def test_a_page_of_another_site_changes_nothing(chromium: Any, served: Served) -> None:
    """A form on another origin, sent by a browser that is signed in, is refused."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{served.url}/console/")
    page.fill("#password", PASSWORD)
    page.click("text=Sign in >> nth=-1")
    page.wait_for_selector("h1:has-text('Dashboard')")
    other = served.url.replace("127.0.0.1", "localhost")
    page.goto(f"{other}/ask?id=bob")
    page.set_content(
        f"<form method=post action='{served.url}/console/user-block'><input name=id value=ann>"
        "<input name=blocked value=1><button>Win</button></form>"
    )
    with page.expect_navigation() as waiting:
        page.click("button")
    assert waiting.value.status in (401, 403)
    assert served.guard.sync.get_customer("ann").blocked is False  # type: ignore[union-attr]
    context.close()
