"""`respan-guard demo` shows the main job, checks itself, and can be left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from respan_guard import Usage, UsageRecord
from respan_guard.cli import demo
from respan_guard.testing.provider import MeteredCall

UNREACHABLE = "http://127.0.0.1:9"
COMMAND = [sys.executable, "-m", "respan_guard", "demo"]


def environment(place: Path) -> dict[str, str]:
    """An environment that would lead astray whoever heeds it: a proxy that isn't there, other settings, a real key."""
    hostile = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), UNREACHABLE)
    hostile |= {"OPENAI_API_KEY": "sk-real", "OPENAI_BASE_URL": UNREACHABLE, "TMPDIR": str(place)}
    hostile |= {"RESPAN_GUARD_MODE": "off", "RESPAN_GUARD_BUDGET_STATUS_CODE": "429", "COLUMNS": "80"}
    clean = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    return {**clean, **hostile}


def test_customers_meet_their_limits_and_the_books_agree(tmp_path: Path) -> None:
    """One meets a 429, one a 402, the others nothing; the ledger is the meter; exit code 0, and no file is left."""
    ran = subprocess.run(COMMAND, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == ""
    rows = {line.split()[0]: line for line in ran.stdout.splitlines() if line.strip()}
    assert "429 RateLimitError, code rate_limit" in rows["bolt"]
    assert "402 APIStatusError, code total_budget" in rows["crux"]
    assert rows["acme"].rstrip().endswith("-")
    assert rows["newcomer"].rstrip().endswith("-")
    (booked, charged) = re.findall(r"(\d+) (?:records|calls), ([\d.]+) USD", ran.stdout)
    assert booked == charged
    assert Decimal(booked[1]) > 0
    assert "Equal, call by call" in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_it_can_be_left_running(tmp_path: Path) -> None:
    """With --serve the printed request works: three pass, the fourth is a 429. SIGTERM ends it tidily."""
    process = subprocess.Popen(
        [*COMMAND, "--serve"], stdout=subprocess.PIPE, text=True, env=environment(tmp_path), cwd=tmp_path
    )
    assert process.stdout is not None
    try:
        printed = ""
        while not printed.rstrip().endswith("}}'"):
            line = process.stdout.readline()
            assert line, printed
            printed += line
        found = re.search(r"curl -i (http://127\.0\.0\.1:\d+/\S+) .* -d '(.*)'", printed, re.DOTALL)
        assert found is not None
        headers = {"authorization": "Bearer demo", "content-type": "application/json"}
        with httpx2.Client(trust_env=False, headers=headers) as client:
            replies = [client.post(found[1], content=found[2]).status_code for _ in range(4)]
        assert replies == [200, 200, 200, 429]
        console = re.search(r"console is at (\S+) and the password for this run is (\S+)", printed)
        assert console is not None
        with httpx2.Client(trust_env=False, headers={"sec-fetch-site": "same-origin"}) as browser:
            browser.post(f"{console[1]}signin", data={"password": console[2]})
            assert "acme" in browser.get(f"{console[1]}users").text
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
        process.stdout.close()
    assert code == 0
    assert list(tmp_path.iterdir()) == []


def call(**changes: Any) -> MeteredCall:
    """A call as the provider books it."""
    facts: dict[str, Any] = {
        "request_id": "req_1",
        "response_id": "chatcmpl-1",
        "endpoint": "chat.completions",
        "provider": "openai",
        "model": "gpt-4o",
        "stream": False,
        "status": 200,
        "input_tokens": 10,
        "output_tokens": 20,
        "cost": Decimal("0.1"),
    }
    return MeteredCall(**(facts | changes))


def record(identifier: str = "chatcmpl-1", cost: str = "0.1", output_tokens: int = 20) -> UsageRecord:
    """A call as the ledger has it."""
    usage = Usage("gpt-4o", 10, output_tokens, response_id=identifier)
    return UsageRecord(f"openai:{identifier}", "acme", datetime.now(UTC), "2026-01-15", usage, Decimal(cost))


@pytest.mark.parametrize(
    ("records", "calls", "complaint"),
    [
        ([record()], [call()], None),
        ([], [call()], "is not booked"),
        ([record(), record()], [call()], "twice"),
        ([record(cost="0.2")], [call()], "the provider charges 0.1"),
        ([record(output_tokens=21)], [call()], "the provider charges"),
        ([record(), record("chatcmpl-2")], [call()], "never charged"),
        ([record("presumed-1")], [call()], "is not booked"),
    ],
)
def test_differences_are_found(records: list[UsageRecord], calls: list[MeteredCall], complaint: str | None) -> None:
    """A call missing, doubled, invented or booked at another price does not pass for equal."""
    found = demo._differences(records, calls)
    assert (found == []) == (complaint is None)
    assert complaint is None or complaint in " ".join(found)


def test_a_missing_example_is_named() -> None:
    """An installation without its example says which file it lacks."""
    with pytest.raises(FileNotFoundError, match=r"examples/nothing\.py"):
        demo._example("nothing")
