"""Pages in a real browser when there is no answer, or no session any more; and charts of money below zero."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Any

import pytest
from playwright.sync_api import expect

from respan_guard import Usage
from respan_guard.console import customer as customer_module
from respan_guard.console import logs as logs_module
from respan_guard.errors import StorageUnavailable

from .conftest import Served, ask
from .support import PASSWORD


@pytest.mark.parametrize("status", [502, 503])
@pytest.mark.parametrize(("path", "part"), [("logs?live=1", "#results"), ("user?id=ann", "#standing")])
def test_what_renews_itself_survives_an_outage(
    watch: Any, served: Served, monkeypatch: pytest.MonkeyPatch, path: str, part: str, status: int
) -> None:
    """While there is no answer, from the app or a proxy, the page stays and says so; with the next one it goes on."""
    served.guard.sync.update_customer("ann", rate_limit=1000)
    one = watch()
    one.sign_in(path=f"/console/{path}")
    page, mark = one.page, one.page.locator("#no-answer")
    before = page.locator(part).inner_text()
    down = threading.Event()

    def failing(work: Any) -> Any:
        async def flaky(*given: Any) -> Any:
            if down.is_set():
                raise StorageUnavailable("down")
            return await work(*given)

        return flaky

    for module, name in ((logs_module, "logs"), (customer_module, "standing")):
        monkeypatch.setattr(module, name, failing(getattr(module, name)))
    expect(mark).to_be_hidden()
    if status == 503:
        down.set()
    else:
        page.route("**", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    expect(mark).to_be_visible(timeout=15_000)
    page.wait_for_timeout(100)
    assert page.locator("h1").count() == page.locator("header.top").count() == 1
    assert page.locator(part).locator("td").count() > 0
    assert page.url.endswith(path)
    down.clear()
    page.unroute_all()
    assert ask(served, "ann") == 200
    expect(mark).to_be_hidden(timeout=15_000)
    expect(page.locator(part)).not_to_have_text(before, use_inner_text=True, timeout=15_000)
    assert {fault for fault in one.faults if f"status of {status}" not in fault} == set()
    one.faults.clear()


def test_a_session_that_ends_takes_no_edits_along(watch: Any, served: Served) -> None:
    """The page of a customer stays, with what was typed, and says so; a list is left for the page to sign in on."""
    one = watch()
    one.sign_in(path="/console/user?id=ann")
    page = one.page
    page.fill("#f-name", "typed")
    one.context.clear_cookies()
    expect(page.locator("#session-over")).to_be_visible(timeout=15_000)
    assert page.input_value("#f-name") == "typed"
    assert page.locator("#standing td").count() > 0
    page.click("#session-over")
    page.fill("#password", PASSWORD)
    page.click("text=Sign in >> nth=-1")
    page.wait_for_url(lambda url: url.endswith("/console/user?id=ann"))
    one.go("/console/logs?live=1")
    one.context.clear_cookies()
    page.wait_for_url(lambda url: "signin" in url)
    assert {fault for fault in one.faults if "status of 401" not in fault} == set()
    one.faults.clear()


SHARES = """(canvas, names) => {
  const {width, height} = canvas;
  const copy = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
  const at = (x, y) => copy.getImageData(x, y, 1, 1).data.join();
  const colors = names.map((name) => {
    copy.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    copy.fillRect(0, 0, 1, 1);
    return at(0, 0);
  });
  copy.clearRect(0, 0, width, height);
  copy.drawImage(canvas, 0, 0);
  const rows = [...Array(height).keys()];
  const has = (x, color) => rows.some((y) => at(x, y) === color);
  const x = [...Array(width).keys()].find((x) => colors.every((color) => has(x, color)));
  return colors.map((color) => rows.filter((y) => at(x + 3, y) === color));
}"""
"""Of the bar that has all of some colors, the rows of pixels that each has."""


def test_money_below_zero_is_drawn_below_zero(watch: Any, served: Served) -> None:
    """Beside what is above it, and not from its top; the axis says so."""
    served.guard.sync.adjust("bob", Decimal(-3), reason="a gift")
    served.guard.sync.record(Usage(model="m", cost=2), "eve")
    served.guard.sync.flush()
    one = watch()
    one.sign_in()
    chart = one.page.locator("section:has(h2:has-text('Spend by user')) .chart canvas")
    above, below = chart.evaluate(SHARES, ["--c1", "--c3"])  # eve's and bob's; ann, between them, spent next to nothing
    assert min(below) > max(above)
    assert len(below) / len(above) == pytest.approx(2.96 / 2, rel=0.1)
