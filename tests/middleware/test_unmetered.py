"""A gateway tells of what costs money and can't be metered, as wrapped clients do."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from respan_guard.providers import unmetered
from tests.middleware.support import call, gateway, make_guard
from tests.middleware.test_door import hello

GEMINI = "/v1/models/imagen-4.0-ultra-generate-001"


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unmetered, "_said", set())


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The kinds that the log names."""
    return [record.getMessage().partition(" cost money")[0] for record in caplog.records if record.levelno > 20]


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/batches", b'{"input_file_id": "f", "endpoint": "/v1/chat/completions"}', "batches"),
        ("/v1/messages/batches/", b'{"requests": []}', "batches"),
        ("/v1//Batches", b"{}", "batches"),
        ("/v1/models/gemini-2.5-pro:batchGenerateContent", b'{"batch": {}}', "batches"),
        (GEMINI + ":predict", b'{"instances": []}', "images and videos by Imagen and Veo"),
        (GEMINI + ":predictLongRunning", b'{"instances": []}', "images and videos by Imagen and Veo"),
        ("/v1/videos", b'{"model": "sora-2", "prompt": "x"}', "videos"),
        ("/v1/videos", b"--x\r\n", "videos"),
        ("/v1/fine_tuning/jobs", b'{"model": "gpt-4o", "training_file": "f"}', "fine-tuning"),
        ("/v1/threads/t/runs", b'{"assistant_id": "a"}', "assistants' runs"),
    ],
)
@pytest.mark.parametrize("mode", ["enforce", "shadow"])
async def test_what_cannot_be_metered_is_told_of_once(
    path: str, body: bytes, kind: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The request passes, nothing is booked, and the log names the kind and what to do, once."""
    guard, ledger = make_guard(mode=mode)
    app = gateway(hello, guard)
    with caplog.at_level(logging.WARNING, "respan_guard"):
        for _ in range(2):
            assert (await call(app, path, customer="org_1", body=body)).status == 200
    assert told(caplog) == [kind]
    assert "guard.record" in caplog.text
    assert ledger.entries == []


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/batches", {"method": "GET", "http_version": "2"}),
        ("/v1/batches/b", {}),
        ("/v1/files", {"body": b"x"}),
        ("/v1/chat/completions", {}),
        ("/elsewhere/batches", {}),
    ],
)
async def test_what_costs_nothing_or_is_metered_says_nothing(
    path: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Lists, uploads, calls, and what is not guarded."""
    guard, _ = make_guard()
    with caplog.at_level(logging.WARNING, "respan_guard"):
        await call(gateway(hello, guard), path, customer="org_1", **fields)
    assert told(caplog) == []


async def test_what_is_refused_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """It did not pass."""
    guard, _ = make_guard(default_limits={"rate_limit": 0})
    with caplog.at_level(logging.WARNING, "respan_guard"):
        assert (await call(gateway(hello, guard), "/v1/batches", customer="org_1")).status == 429
    assert told(caplog) == []
