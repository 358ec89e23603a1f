"""Frameworks that take a wrapped client, or an HTTP client with a guarded transport, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from respan_guard import Guard
from respan_guard.testing import StandInProvider
from tests.environments import python_with

from .support import records, same

ROOT = Path(__file__).parents[2]
WANTED = [
    "langchain-openai==1.7.4",
    "langchain-anthropic==1.7.10",
    "litellm==1.110.2",
    "openai-agents==0.24.0",
    "openai==3.57.0",
]
CALLS = {
    "langchain-openai": 6,
    "langchain-anthropic": 2,
    "litellm-openai": 3,
    "litellm-anthropic": 2,
    "langchain-openai-async": 2,
    "langchain-anthropic-async": 2,
    "litellm-openai-async": 2,
    "agents-chat-async": 2,
    "agents-responses-async": 2,
}


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> str:
    """A Python with the frameworks."""
    return python_with(request.config, "frameworks", WANTED)


@pytest.mark.soak  # it installs half a gigabyte
@pytest.mark.timeout(400)
def test_frameworks_are_guarded(python: str, provider: StandInProvider, url: str, tmp_path: Path) -> None:
    """LangChain, LiteLLM and the Agents SDK, sync and async, whole and streamed: every call is recorded as metered.

    A customer without money is refused in each, with the guard's reason behind the framework's error, and none of
    those calls reaches the provider, whatever the framework retries.
    """
    storage = f"sqlite:///{tmp_path / 'guard.db'}"
    script = Path(__file__).parent / "frameworks.py"
    done = subprocess.run(
        [python, str(script), url, storage, str(tmp_path / "journal")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(refused) == set(CALLS)
    assert {reason for reasons in refused.values() for reason in reasons} == {"exhausted"}
    guard = Guard(storage, journal_dir=tmp_path / "journal")
    found = records(guard)
    same(found, provider)
    assert Counter(record.customer_identifier for record in found) == CALLS
    assert len(provider.meter.calls) == sum(CALLS.values())
    guard.sync.close()
