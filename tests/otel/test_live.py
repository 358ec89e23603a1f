"""Real instrumentations, live: real SDKs, real spans, a real guard, the stand-in provider's meter.

Those that install quickly beside what is here; the others are played from recordings (`test_corpus.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WANTED = [
    "opentelemetry-instrumentation-genai-openai>=1.3b0",
    "opentelemetry-instrumentation-genai-anthropic>=1.3b0",
    "openinference-instrumentation-openai>=0.1.66",
    "openinference-instrumentation-anthropic>=3.1",
]


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> str:
    """A Python with these instrumentations, over the packages that are installed here; made once, kept in the cache.

    Without a package index it can't be made: that skips the tests, but fails them in CI.
    """
    assert request.config.cache is not None
    what = zlib.crc32(repr([sys.prefix, sys.version, WANTED]).encode())
    home = Path(request.config.cache.mkdir("instrumentations")) / f"{what:08x}"
    found = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = home / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, timeout=60)
        pip = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *WANTED]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=100, check=False)
        if done.returncode and not os.environ.get("CI"):
            pytest.skip(f"no package index: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr
        (site,) = home.glob("**/site-packages")
        (site / "zz_main.pth").write_text(sysconfig.get_path("purelib"))  # behind its own packages
        ready.touch()
    return str(found)


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
