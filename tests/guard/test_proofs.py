"""The proofs that anybody can run, in small: `make prove-overspend` and `make prove-kill`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("proof", "rounds", "verdict"),
    [
        ("prove_overspend", 2, "exactly 10 admitted in every round"),
        ("prove_kill", 3, "nothing acknowledged was lost"),
    ],
)
def test_the_proof_holds(proof: str, rounds: int, verdict: str) -> None:
    """Several processes on one SQLite file: no budget overspent, nothing acknowledged lost over kill -9."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{proof}", "--rounds", str(rounds)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdict in done.stdout
    assert done.stdout.count("round") >= rounds
