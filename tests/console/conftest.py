"""A browser, a served console, and what went wrong in its pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from respan_guard import Guard, LimitExceeded
from respan_guard.console import Console, access, remembered
from respan_guard.testing.serving import serve

from .support import PASSWORD, VIEWER, fill

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-proxy-server",
    "--host-resolver-rules=MAP guard.test 127.0.0.1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick_passwords(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash that costs nothing, but where the real one is what a test is about."""
    if "real_passwords" not in request.fixturenames:
        monkeypatch.setattr(access, "hashed", lambda password: sha256(password.encode()).digest())


@pytest.fixture(autouse=True)
def patient_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the time that a busy machine takes to count."""
    monkeypatch.setattr(remembered, "_PATIENCE", 30)


@pytest.fixture
def real_passwords() -> None:
    """Keeps the real hash."""


@pytest.fixture
async def guard(tmp_path: Path) -> Any:
    """A guard in memory."""
    from .support import make_guard

    async with make_guard(journal_dir=tmp_path) as made:
        yield made


@pytest.fixture(scope="module")  # it holds the thread's event loop while it is open, which other tests need
def chromium() -> Iterator[Any]:
    """Debian's Chromium; without it tests are skipped, but not where everything is checked."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium; on Debian: apt-get install chromium")
        pytest.skip("no Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Served:
    """A console on a server, with the app beside it that its customers use."""

    def __init__(self, url: str, guard: Guard) -> None:
        self.url = url
        self.guard = guard


def ask(served: Served, customer: str) -> int:
    """What the app beside the console answers a customer."""
    try:
        with build_opener(ProxyHandler({})).open(f"{served.url}/ask?id={customer}") as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """The console at /console of an app whose /ask admits who asks and records a call."""
    from contextlib import asynccontextmanager

    from respan_guard import Usage

    guard = Guard(
        f"sqlite:///{tmp_path / 'x.db'}", default_limits={"rate_limit": 60, "period_budget": 5}, journal_dir=tmp_path
    )

    async def ask(request: Request) -> PlainTextResponse:
        try:
            async with guard.admit(request.query_params["id"]) as admission:
                await admission.record(Usage(model="gpt-4o", provider="openai", input_tokens=900, output_tokens=80))
        except LimitExceeded as refused:
            return PlainTextResponse(str(refused), 402)
        return PlainTextResponse("ok")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        async with guard:
            await fill(guard)
            yield

    console = Console(guard, password=PASSWORD, read_only_password=VIEWER)
    app = Starlette(routes=[Route("/ask", ask), Mount("/console", console)], lifespan=lifespan)
    with serve(app) as url:
        yield Served(url, guard)


class Watched:
    """A page, and all that should not happen in it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.origin = url
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", self._asked)
        self.context.on("request", self._seen)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def _asked(self, dialog: Any) -> None:
        self.faults.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def _seen(self, request: Any) -> None:
        if not request.url.startswith((self.origin, "data:")):
            self.faults.append(f"request to {request.url}")

    def go(self, path: str) -> Any:
        """Open a page."""
        return self.page.goto(f"{self.origin}{path}")

    def sign_in(self, password: str = PASSWORD, path: str = "/console/") -> None:
        """Sign in by the form."""
        self.go(path)
        self.page.fill("#password", password)
        self.page.click("text=Sign in >> nth=-1")
        self.page.wait_for_url(lambda url: "signin" not in url)


@pytest.fixture
def watch(chromium: Any, served: Served) -> Iterator[Any]:
    """Opens watched pages; at the end none of them had a fault."""
    opened: list[Watched] = []

    def open_one(**options: Any) -> Watched:
        opened.append(Watched(chromium, served.url, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.context.close()
    assert [fault for one in opened for fault in one.faults] == []
