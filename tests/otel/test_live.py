"""Real instrumentations, live: real SDKs, real spans, a real guard, the stand-in provider's meter.

Those that install quickly beside what is here; the others are played from recordings (`test_corpus.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.environments import python_with

ROOT = Path(__file__).parents[2]
WANTED = [
    "opentelemetry-instrumentation-genai-openai==1.3b0",
    "opentelemetry-instrumentation-genai-anthropic==1.3b0",
    "openinference-instrumentation-openai==0.1.66",
    "openinference-instrumentation-anthropic==3.1.0",
]


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> str:
    """A Python with these instrumentations."""
    return python_with(request.config, "instrumentations", WANTED)


@pytest.mark.parametrize(
    "what",
    [
        "openai official-openai",
        "openai openinference-openai",
        "openai official-openai openinference-openai",
        "anthropic official-anthropic anthropic-native",
        "anthropic openinference-anthropic anthropic-native",
        "pydantic-ai pydantic-ai official-openai",
    ],
)
def test_live_calls_are_recorded_once(what: str, python: str) -> None:
    """Every kind of call, alone and two instrumentations at a time: recorded as metered."""
    done = subprocess.run(
        [python, "-m", "tests.otel.live", *what.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 6
    assert {case: wrong for case, wrong in found.items() if wrong} == {}
