"""The SDKs' previous majors, which stand on httpx, and the oldest FastAPI, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from respan_guard import Guard
from respan_guard.testing import StandInProvider
from tests.environments import python_with

from .support import records, same

ROOT = Path(__file__).parents[2]
# The oldest FastAPI that runs on the oldest Starlette that respan_guard does.
WANTED = ["openai>=2,<3", "anthropic<1", "fastapi==0.133.0"]


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> str:
    """A Python with the previous majors."""
    return python_with(request.config, "previous_majors", WANTED)


def test_previous_majors_are_guarded(python: str, provider: StandInProvider, url: str, tmp_path: Path) -> None:
    """Sync and async, whole and streamed: recorded as metered; a refusal is theirs; they do stand on httpx."""
    storage = f"sqlite:///{tmp_path / 'guard.db'}"
    script = Path(__file__).parent / "previous_majors.py"
    done = subprocess.run(
        [python, str(script), url, storage, str(tmp_path / "journal")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "made_of": ["httpx", "httpx"],
        "refused": [402, 402],
        "openai": 2,
        "anthropic": 0,
    }
    guard = Guard(storage, journal_dir=tmp_path / "journal")
    found = records(guard)
    same(found, provider)
    assert sorted(record.customer_identifier for record in found) == ["async"] * 8 + ["sync"] * 8
    guard.sync.close()


def test_calls_and_requests_are_guarded_on_the_oldest(python: str) -> None:
    """What `test_calls.py` and `test_requests.py` say holds there, too: every call, every way to admit."""
    some = "memory and not inside and not outside"
    files = ["tests/clients/test_calls.py", "tests/clients/test_requests.py"]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    said = "import fastapi, openai, anthropic; print(fastapi.__version__, openai.VERSION[0], anthropic.__version__[0])"
    versions = subprocess.run([python, "-c", said], capture_output=True, text=True, timeout=60, check=True)
    assert versions.stdout.split() == ["0.133.0", "2", "0"]
