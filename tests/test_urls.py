"""Passwords of storage URLs: whatever is in them, no message, log or traceback has a piece of one."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from itertools import product
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from respan_guard import Guard
from respan_guard.backends.registry import backend_factory
from respan_guard.cli.app import app
from respan_guard.errors import ConfigurationError
from respan_guard.rate_storage import RateStorage
from respan_guard.settings import Settings
from respan_guard.urls import mask_url

PASSWORDS = [
    f"Zk8wq{odd}Vr7xj"
    for odd in ("", *"/#?[]@:%&=;,+ \\^|\"'<>`{}~!$*()", "[q]", "%zz", "%", "//", "://", "@/", "/@", "#@", "?@", "?x=@",
                "@7/", ":7/", "℀", "é", "\udcff", "\t", "\n", "\x1b", "?timeout=", "?password=", "&host=")
]  # fmt: skip
PASSWORDS += [
    "1234/Zk8wqVr7xj",
    "1234?Zk8wqVr7xj",
    "1234?Zk8wqVr7xj=",
    "1234?timeout=Zk8wqVr7xj",
    "1234#Zk8wqVr7xj",
    "1234@Zk8wqVr7xj",
    "[::1]Zk8wqVr7xj",
    "Zk8wqVr7xj==",
    "%5BZk8wqVr7xj",
    "/Zk8wqVr7xj",
]
FORMS = [
    *(
        f"{scheme}://{login}@127.0.0.1:1/0"
        for scheme, login in product(
            ("redis", "rediss", "valkey", "redis+cluster", "redis+unix", "redis+sentinel"), ("app:{}", "{}")
        )
    ),
    "redis://:{}@127.0.0.1:1/zero",
    "redis://:{}@127.0.0.1:port/0",
    "redis://127.0.0.1:1/0?password={}",
    "redis://127.0.0.1:1/0?password={}&timeout=x",
    "redis+unix:///no/sock?password={}",
    "redis+unix://:{}@/no/sock",
    "redis+cluster://app:{}@127.0.0.1:1,127.0.0.1:2",
    "redis:///:{}@127.0.0.1:1/0",
    "redis://app:{}",
    "redis://:{}",
    "postgresql://app:{}@127.0.0.1:1/guard",
    "postgresql://app:{}@127.0.0.1:port/guard",
    "postgresql://app:{}@127.0.0.1:1/guard?nonsense=1",
    "postgresql://app:{}@127.0.0.1:1/guard%zz",
    "postgresql://app:{}@127.0.0.1:1,127.0.0.1:2/guard?sslmode=disable",
    "postgresql://app@127.0.0.1:1/guard?password={}",
    "postgresql://app@127.0.0.1:1/guard?sslpassword={}&nonsense=1",
    "postgresql://app:{}",
    "postgresql:app:{}@127.0.0.1:1/guard",
    "postgresql:///app:{}@127.0.0.1:1/guard",
    "postgres://app:{}@127.0.0.1:1/guard",
    "sqlite://app:{}@127.0.0.1/guard.db",
    "sqlite:///app:{}@127.0.0.1/guard.db",
    "memory://app:{}@127.0.0.1",
    "memcached://app:{}@127.0.0.1:1",
    "nosuch://app:{}@127.0.0.1/guard",
    "async+redis://app:{}@127.0.0.1:1/0",
    "app:{}@127.0.0.1/guard",
    "host=127.0.0.1 password={}",
    "host=127.0.0.1 port=1 password='{}' user=app",
]


def pieces(password: str) -> set[str]:
    """All of a password that must not be shown: four characters in a row, also as they are escaped."""
    texts = {password, repr(password)[1:-1], json.dumps(password)[1:-1], quote(password, safe="", errors="replace")}
    ours = "?password= ?timeout= &host= "
    return {text[i : i + 4] for text in texts for i in range(len(text) - 3) if text[i : i + 4] not in ours}


def leaks(shown: str, password: str) -> list[str]:
    """The pieces of a password that are in what is shown."""
    return sorted(piece for piece in pieces(password) if piece in shown)


def said(error: BaseException) -> str:
    """What a log or a terminal shows of an error; of the code around it, no more than its lines."""
    chain: traceback.TracebackException | None = traceback.TracebackException.from_exception(error)
    lines: list[str] = []
    while chain is not None:
        lines += list(chain.format_exception_only())
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    return "\n".join([str(error), repr(error), *lines])


def attempts(url: str) -> list[Callable[[], object]]:
    """Every door that a URL comes in by."""
    return [
        lambda: Settings.load(storage=url).sources()["storage"],
        lambda: Settings.load(storage="memory://", rate_limit_storage=url.encode("utf-8", "replace")),
        lambda: backend_factory(url),
        lambda: RateStorage(url, "fixed-window", "default").shown,
    ]


@pytest.mark.parametrize("form", FORMS)
def test_no_piece_of_a_password_is_in_what_is_shown(form: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of no store's URL, however odd the password: the error, its traceback, the settings and the guard's repr."""
    caplog.set_level(logging.DEBUG)
    for password in PASSWORDS:
        if form.endswith(":{}") and ("@" in password or password[:4] == "1234"):
            continue  # it is a host, or a port, in every respect
        if "/{}" in form and ":" in password:
            continue  # and that is a user
        url = form.format(password)
        assert leaks(mask_url(url), password) == [], url
        for attempt in attempts(url):
            try:
                shown = repr(attempt())
            except ConfigurationError as error:
                shown = said(error)
            assert leaks(shown + caplog.text, password) == [], url
            caplog.clear()


@pytest.mark.parametrize(
    "form", ["redis://:{}@127.0.0.1:1/0", "redis+cluster://:{}@127.0.0.1:1", "postgresql://app:{}@127.0.0.1:1/guard"]
)
async def test_nor_in_what_an_outage_says(form: str, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is away is named without the password, in the error and its causes."""
    caplog.set_level(logging.DEBUG)
    for password in PASSWORDS:
        for url in {form.format(password), form.format(quote(password, safe="", errors="replace"))}:
            try:
                backend = backend_factory(url)()
            except ConfigurationError:
                continue
            with pytest.raises(Exception, match="127") as caught:
                await backend.open()
            await backend.close()
            assert leaks(said(caught.value) + caplog.text, password) == [], url
            caplog.clear()


def test_a_password_that_is_encoded_is_taken() -> None:
    """What the error asks for works, whatever is in the password."""
    for password in PASSWORDS:
        encoded = quote(password, safe="", errors="replace")
        for form in FORMS[:3]:
            backend_factory(form.format(encoded))()
        backend_factory(f"postgresql://app:{encoded}@127.0.0.1:1/guard")()
        RateStorage(f"redis://app:{encoded}@127.0.0.1:1/0", "fixed-window", "default")


def test_the_error_says_what_to_do() -> None:
    """An unescaped character in a password is the likely cause where a URL can't be read."""
    for url in ("postgresql://app:a/b@h/db", "redis://:a[b@h/0", "postgresql://app:a%zz@h/db", "redis://:a#b@h"):
        with pytest.raises(ConfigurationError, match="password must be percent-encoded"):
            Guard(url)


@pytest.mark.parametrize("url", ["postgresql://app:{}@127.0.0.1:1/guard", "redis://:{}@h/0", "host=h password={}"])
def test_the_command_shows_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`respan-guard check` and its exit, where the URL is in the environment."""
    for password in ("Zk8/wqVr7xj", "Zk8[wqVr7xj", "Zk8[q]wqVr7xj", "Zk8%zzwqVr7xj", "Zk8?wqVr7xj", "Zk8℀wqVr7xj"):
        monkeypatch.setenv("RESPAN_GUARD_STORAGE", url.format(password))
        for command in (["check"], ["check", "--json"], ["usage"]):
            result = CliRunner().invoke(app, command)
            assert result.exit_code != 0
            assert isinstance(result.exception, SystemExit)
            assert leaks(result.output, password) == []
