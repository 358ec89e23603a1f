"""What the console answers when storage, a file, or the app's own authentication fails, and to what names nothing."""

from __future__ import annotations

import json
import re
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from respan_guard import Guard, Usage
from respan_guard.console import User
from respan_guard.console import log_exports as log_exports_module
from respan_guard.console import users as users_module
from respan_guard.errors import StorageUnavailable

from .support import SAME, client_of, fill, make_guard, signed_in

EXPORTS = ["/users.csv", "/users.json", "/logs.csv", "/logs.jsonl"]


async def test_what_does_not_exist_needs_no_storage(
    guard: Guard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does the page that says so; addresses with a slash too many do not, and are sent nowhere.

    A page that needs it is asked for again, also without scripts; a form is not.
    """
    client = signed_in(guard)
    monkeypatch.setattr(guard.lane(), "call", Mock(side_effect=StorageUnavailable("down")))
    assert client.get("/nosuch").status_code == client.get("/users/").status_code == 404
    assert client.post("/nosuch", headers=SAME).status_code == 404
    assert client.post("/users", headers=SAME).status_code == 405
    page = client.get("/users")
    assert page.status_code == 503
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in page.text
    form = client.post("/user-block", headers=SAME)
    assert form.status_code == 503
    assert "refresh" not in form.text


@pytest.mark.parametrize("path", ["user", "user-standing", "user-delete"])
async def test_what_names_no_customer_is_not_found(guard: Guard, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that no customer can have never come to storage; some stores can't take them."""
    client = client_of(guard, open_to_all=True)
    monkeypatch.setattr(guard.lane(), "call", Mock(side_effect=AssertionError("asked")))
    for name in ("%00", "a%00b", "x" * 5000, "%ed%a0%80%00", "%20"):
        assert client.get(f"/{path}?id={name}").status_code == 404, name


@pytest.mark.parametrize("path", EXPORTS)
async def test_a_file_that_can_not_be_begun_is_none(guard: Guard, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that is down is a 503, not a file that looks empty."""
    await fill(guard)
    client = client_of(guard, open_to_all=True)
    monkeypatch.setattr(guard.lane(), "call", Mock(side_effect=StorageUnavailable("down")))
    answer = client.get(path)
    assert answer.status_code == 503
    assert "Storage gave no answer" in answer.text


@pytest.mark.parametrize("path", EXPORTS)
async def test_a_file_that_breaks_off_says_so(
    guard: Guard, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In its last line, behind what there was until then; no program takes it for a whole one."""
    for number in range(4):
        await guard.record(Usage(model="m", cost=1), f"who{number}")
    monkeypatch.setattr(users_module, "_EXPORT_PAGE", 2)
    monkeypatch.setattr(log_exports_module, "_PAGE", 2)
    client = client_of(guard, open_to_all=True)
    whole = client.get(path).text
    call, answers = guard.lane().call, iter([True])

    async def once(*given: Any) -> Any:
        if next(answers, False):
            return await call(*given)
        raise StorageUnavailable("no 10.1.2.3")

    monkeypatch.setattr(guard.lane(), "call", once)
    answer = client.get(path)
    assert answer.status_code == 200
    begun, last, end = answer.text.rsplit("\n", 2)
    assert (last, end) == ("This file broke off here and is not complete: storage gave no answer.", "")
    assert whole.startswith(begun.rstrip())
    assert len(set(re.findall(r"who\d", begun))) == 2
    assert "can't go on with" in caplog.text
    with pytest.raises(json.JSONDecodeError):
        json.loads(last)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_the_apps_own_authentication_may_answer_itself(status: int) -> None:
    """What it raises is the answer, on every page, in the console's own headers."""

    def auth(connection: HTTPConnection) -> User:
        raise HTTPException(status, "not for you", {"x-why": "because"})

    client = client_of(make_guard(), auth=auth)
    for answer in (client.get("/users"), client.get("/user-new"), client.post("/user-save", headers=SAME)):
        assert answer.status_code == status
        assert "not for you" in answer.text
        assert answer.headers["x-why"] == "because"
        assert "content-security-policy" in answer.headers
