"""Random runs: every backend answers what the oracle answers, and holds what the oracle holds."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from respan_guard.backends.base import (
    REPLAY_MS,
    Backend,
    CustomerQuery,
    Entry,
    Limit,
    Op,
    Put,
    Record,
    RecordQuery,
    Release,
    StoredEntry,
    UsageQuery,
)
from tests.backends.conftest import BACKENDS, new_store
from tests.backends.strategies import (
    DAY_MS,
    FIRST_DAY,
    START,
    TTL_MS,
    WINDOW_MS,
    OpMaker,
    admissions,
    admits,
    amounts,
    customers,
    ends,
    limits,
    models,
    records,
)
from tests.oracle import Oracle

PANEL = (
    Limit("rate", "rate", "requests", 1, WINDOW_MS),
    Limit("rate", "rate", "requests", 1, 6 * WINDOW_MS),
    Limit("cost", "total", "cost", 1),
    Limit("tokens", "total", "tokens", 1),
    Limit("everybody", "span", "cost", 1, first_day=FIRST_DAY, end_day=FIRST_DAY + 2, scope="model"),
)
"""What is looked at after every step."""


class Machine(RuleBasedStateMachine):
    """The same calls to a backend and to the oracle."""

    backend_name = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.backend: Backend = new_store(self.backend_name, self.directory)()
        self.wait(self.backend.open())
        self.oracle = Oracle()
        self.now = START
        self.history: list[list[Op]] = []
        self.policy: dict[str, tuple[Limit, ...]] = {"ann": (), "bob": ()}
        self.puts = itertools.count()

    def wait(self, answer: Any) -> Any:
        """Run a coroutine of the backend to its end."""
        return self.runner.run(answer)

    def teardown(self) -> None:
        """Close the store."""
        self.wait(self.backend.close())
        self.runner.close()
        shutil.rmtree(self.directory)

    @property
    def day(self) -> int:
        """The day it is, in UTC."""
        return self.now // DAY_MS + 719_163

    def apply(self, ops: list[Op], now: int) -> None:
        """Both answer; the answers are the same."""
        note(f"{ops} at {now}")
        # The oracle's first: a store that kept the op itself, not its values, would be found out by the next one.
        expected = self.oracle.apply([_own(op) for op in ops], now)
        given = self.wait(self.backend.apply([_own(op) for op in ops], now))
        assert given == expected, f"{ops} at {now}"

    # -- rules -------------------------------------------------------------------------------------

    @initialize(ann=limits, bob=limits)
    def policies(self, ann: tuple[Limit, ...], bob: tuple[Limit, ...]) -> None:
        """What each customer is asked for by default, so that limits are met more than once."""
        self.policy = {"ann": ann, "bob": bob}

    @rule(make=admits())
    def admit(self, make: OpMaker) -> None:
        """Ask for an admission."""
        self.do([make(self)])

    @rule(make=records())
    def record(self, make: OpMaker) -> None:
        """Book an entry."""
        self.do([make(self)])

    @rule(make=ends())
    def end(self, make: OpMaker) -> None:
        """Release or renew."""
        self.do([make(self)])

    @rule(makes=st.lists(st.one_of(admits(), records(), ends()), min_size=2, max_size=6))
    def batch(self, makes: list[OpMaker]) -> None:
        """Several in one transaction."""
        self.do([make(self) for make in makes])

    @rule(customer=customers, hold_id=admissions, cost=st.sampled_from([3, 10, 40]), late=amounts, model=models)
    def presume(self, customer: str, hold_id: str, cost: int, late: int, model: str) -> None:
        """An admission ends without usage, which comes after all: what a guard sends for a broken stream."""
        presumed = Entry(f"presumed:{hold_id}", customer, self.day, self.now, cost, 0, 0, model, hold_id, "presumed")
        usage = Entry(f"late-{hold_id}", customer, self.day, self.now, late, 1, 1, model, hold_id)
        self.do([Record(presumed), Release(customer, hold_id)])
        self.do([Record(usage)])

    def do(self, ops: list[Op]) -> None:
        """Apply, and remember for replays."""
        self.history.append(ops)
        self.apply(ops, self.now)

    @precondition(lambda self: self.history)
    @rule(back=st.integers(0, 40), times=st.integers(1, 2))
    def replay(self, back: int, times: int) -> None:
        """Send an earlier batch again, as after a lost answer."""
        for _ in range(times):
            self.apply(self.history[-1 - back % len(self.history)], self.now)

    @rule(make=admits(), back=st.sampled_from([1, 20_000, 2 * DAY_MS]))
    def clock_went_back(self, make: OpMaker, back: int) -> None:
        """The caller's clock is behind the store's."""
        self.apply([], self.now)  # whether reading moves a store's time is its own affair
        self.apply([make(self)], self.now - back)

    @rule(
        step=st.sampled_from(
            [1, 400, 3_000, WINDOW_MS, 2 * WINDOW_MS, TTL_MS - 1, TTL_MS, REPLAY_MS, REPLAY_MS + TTL_MS, DAY_MS]
        )
    )
    def wait_for(self, step: int) -> None:
        """Time goes on: within a window, past it, past expiry, past replays, past midnight."""
        self.advance(step)

    def advance(self, step: int) -> None:
        """Time goes on."""
        if self.now + step < START + 5 * DAY_MS:  # a store may forget what expired a week ago
            self.now += step

    @rule(which=st.integers(0, 7), early=st.booleans())
    def advance_to(self, which: int, early: bool) -> None:
        """Time goes on to the moment at which something changes, or to 1 ms before."""
        moments = {self.now - self.now % DAY_MS + DAY_MS}
        for hold in self.oracle.holds.values():
            moments |= {hold.expires, (hold.expires if hold.ended is None else hold.ended) + REPLAY_MS}
        for (_, width), (start, _, _) in self.oracle.rates.items():
            moments |= {start + width, start + 2 * width}
        later = sorted(moment for moment in moments if moment > self.now)
        self.advance(later[which % len(later)] - self.now - early)

    @rule(customer=customers, name=st.sampled_from(["A", "B"]), check=st.booleans(), policy=limits)
    def put(self, customer: str, name: str, check: bool, policy: tuple[Limit, ...]) -> None:
        """Change a customer; its limits change with it."""
        known = self.oracle.known.get(customer)
        before = known.revision if known else ""
        answer = self.wait(
            self.backend.put(customer, {"name": name}, if_revision=before if check else None, now=self.now)
        )
        assert isinstance(answer, Put)
        changed = self.oracle.put(customer, {"name": name}, answer.revision, self.now)
        assert answer.changed == changed
        assert (answer.revision != before) == changed
        if changed:
            self.policy[customer] = policy

    @rule(customer=customers)
    def put_on_an_old_revision(self, customer: str) -> None:
        """Somebody else was faster."""
        known = self.oracle.known.get(customer)
        answer = self.wait(self.backend.put(customer, {"name": "C"}, if_revision="another", now=self.now))
        self.oracle.now = max(self.oracle.now, self.now)
        assert (answer.revision, answer.params) == ((known.revision, known.params) if known else ("", None))
        assert not isinstance(answer, Put)

    @rule(customer=customers)
    def delete(self, customer: str) -> None:
        """Forget a customer; what it spent is found under a label."""
        before = {row.customer for row in self.all_customers()}
        existed = self.wait(self.backend.delete(customer, now=self.now))
        self.oracle.now = max(self.oracle.now, self.now)
        assert existed == (customer in self.oracle.known)
        if existed:
            (label,) = {row.customer for row in self.all_customers()} - before
            assert label.startswith("deleted-")
            self.oracle.delete(customer, label, self.now)

    @rule(days=st.integers(0, 2), read=st.sampled_from([True, True, False]))
    def prune(self, days: int, read: bool) -> None:
        """Delete entries of days before; one reader has read all or nothing."""
        read_to = self.oracle.seq if read else 0
        self.wait(self.backend.set_cursor("reader", read_to))
        before = self.day - days
        assert self.wait(self.backend.prune(before)) == self.oracle.prune(before, read_to)

    @rule(customer=customers, asked=limits, model=models)
    def standing(self, customer: str, asked: tuple[Limit, ...], model: str) -> None:
        """Look without asking."""
        given = self.wait(self.backend.standing(customer, asked, model, now=self.now))
        self.oracle.now = max(self.oracle.now, self.now)
        assert given == self.oracle.standing(customer, asked, model)

    # -- after every step --------------------------------------------------------------------------

    def all_customers(self) -> list[Any]:
        """Every customer there is."""
        rows: list[Any] = self.wait(self.backend.customers(CustomerQuery(limit=10_000)))
        return rows

    @invariant()
    def agrees(self) -> None:
        """What the store shows is what the oracle has, and the store finds no fault with itself."""
        self.sums_agree()
        self.customers_agree()
        self.holds_agree()
        self.log_agrees()
        assert self.wait(self.backend.verify()) == []

    def sums_agree(self) -> None:
        """Sums of each customer, model and day are those of the oracle."""
        rows = self.wait(self.backend.usage(UsageQuery(by=("customer", "model", "day"))))
        assert {(row.customer, row.model, row.day): row.amounts for row in rows} == self.oracle.sums()

    def customers_agree(self) -> None:
        """The same customers are known, by the same revision, times and totals."""
        rows = self.all_customers()
        found = {row.customer: (row.first_seen_ms, row.last_seen_ms, row.revision, row.params) for row in rows}
        assert found == {
            customer: (known.first_seen, known.last_seen, known.revision, known.params)
            for customer, known in self.oracle.known.items()
        }
        for row in rows:
            mine = {key: sums for key, sums in self.oracle.sums().items() if key[0] == row.customer}
            assert row.active_days == len({day for _, _, day in mine})
            assert row.totals.cost == sum(sums.cost for sums in mine.values())
            assert row.totals.requests == sum(sums.requests for sums in mine.values())

    def holds_agree(self) -> None:
        """The same holds live, the same have expired, and none counts that is not listed."""
        self.oracle.now = max(self.oracle.now, self.now)
        for state in ("live", "expired"):
            rows = self.wait(self.backend.holds(state=state, now=self.now))
            assert rows == self.oracle.hold_rows(state)
        for customer in ("ann", "bob"):
            for model in ("", "small"):
                given = self.wait(self.backend.standing(customer, PANEL, model, now=self.now))
                assert given == self.oracle.standing(customer, PANEL, model)

    def log_agrees(self) -> None:
        """The log has the same entries in the same order, at places that grow."""
        found = self.wait(self.backend.entries(RecordQuery(limit=10_000)))
        assert [_without_seq(stored) for stored in found] == [_without_seq(s) for s in self.oracle.log()]
        assert [stored.seq for stored in found] == [stored.seq for stored in self.oracle.log()]


def _own(op: Op) -> Op:
    """A copy: neither side may see what the other does to an operation."""
    return Record(copy(op.entry)) if isinstance(op, Record) else copy(op)


def _without_seq(stored: StoredEntry) -> StoredEntry:
    return replace(stored, seq=0)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_a_backend_answers_as_the_oracle_does(backend_name: str) -> None:
    """Over random runs of every operation, answers, sums, holds and log are the oracle's after each step."""
    machine = type("Machine", (Machine,), {"backend_name": backend_name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples={"memory": 200, "sqlite": 80, "redis": 30, "postgresql": 15}[backend_name],
            stateful_step_count=35,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
