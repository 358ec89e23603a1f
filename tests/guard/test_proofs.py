"""The proofs that anybody can run, in small: `make prove-overspend` and `make prove-kill`."""

from __future__ import annotations

import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from tests.backends.postgres_server import given_or_started, new_store
from tests.backends.redis_server import RedisServer

ROOT = Path(__file__).parent.parent.parent


def prove(name: str, *arguments: str) -> str:
    """What a proof prints; it must have held."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("proof", "rounds", "verdict"),
    [
        ("prove_overspend", 2, "exactly 10 admitted in every round"),
        ("prove_kill", 3, "nothing acknowledged was lost"),
    ],
)
def test_the_proof_holds(proof: str, rounds: int, verdict: str) -> None:
    """Several processes on one SQLite file: no budget overspent, nothing acknowledged lost over kill -9."""
    printed = prove(proof, "--rounds", str(rounds))
    assert verdict in printed
    assert printed.count("round") >= rounds


@pytest.mark.parametrize("storage", ["sqlite", "redis", "postgres"])
def test_what_is_spent_is_bounded_on_every_store_that_processes_share(storage: str) -> None:
    """Not a nano-USD over the budget where upper bounds are held; where not, no more than the printed bound."""
    where: list[str] = []
    if storage != "sqlite":  # which is a file of its own where nothing is said
        where = ["--storage", RedisServer().url if storage == "redis" else new_store(given_or_started())]
    few = ["--rounds", "1", "--full", "--tasks", "6", "--requests", "12"]
    printed = prove("prove_overspend", *few, *where)
    found = re.findall(r"([\d,]+) admitted, (\S+) of (\S+) USD spent, at most (\S+) can be, 0 disc", printed)
    (_, spent, budget, most), (_, beyond, same, bound) = found
    assert Decimal(spent) <= Decimal(budget) == Decimal(most) == Decimal(same)
    assert Decimal(budget) < Decimal(beyond) <= Decimal(bound)  # it is over, or the run would show nothing
