"""Random runs: every backend answers what the oracle answers, and holds what the oracle holds."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

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
    Admit,
    Backend,
    CustomerQuery,
    Entry,
    Limit,
    Op,
    Put,
    Record,
    RecordQuery,
    Release,
    Renew,
    StoredEntry,
    UsageQuery,
)
from respan_guard.backends.registry import backend_factory
from respan_guard.usage import Usage
from tests.backends.conftest import BACKENDS, storage_url
from tests.oracle import Oracle

T = TypeVar("T")
OpMaker: TypeAlias = Callable[["Machine"], Op]

DAY_MS = 86_400_000
START = 20_000 * DAY_MS + 5 * 3_600_000
FIRST_DAY = 719_163 + 20_000  # the ordinal of the day START is on
WINDOW_MS = 10_000
TTL_MS = 30_000
PANEL = (
    Limit("rate", "rate", "requests", 1, WINDOW_MS),
    Limit("rate", "rate", "requests", 1, 6 * WINDOW_MS),
    Limit("cost", "total", "cost", 1),
    Limit("tokens", "total", "tokens", 1),
    Limit("everybody", "span", "cost", 1, first_day=FIRST_DAY, end_day=FIRST_DAY + 2, scope="model"),
)
"""What is looked at after every step."""

customers = st.sampled_from(["ann", "ann", "ann", "bob"])
models = st.sampled_from(["", "", "small"])
admissions = st.sampled_from(["a1", "a2"])
entry_ids = st.sampled_from(["e1", "e2", "e3", "e4", "e5"])
amounts = st.sampled_from([0, 1, 3, 10, 40])

limits = st.lists(
    st.one_of(
        st.builds(
            Limit,
            st.just("rate_limit"),
            st.just("rate"),
            st.just("requests"),
            st.sampled_from([0, 1, 3, 6, 20]),
            st.sampled_from([WINDOW_MS, 6 * WINDOW_MS]),
        ),
        st.builds(
            Limit,
            st.just("budget"),
            st.just("span"),
            st.sampled_from(["cost", "cost", "tokens", "requests"]),
            st.sampled_from([0, 5, 30, 100, 1000]),
            first_day=st.sampled_from([FIRST_DAY, FIRST_DAY + 1]),
            end_day=st.sampled_from([FIRST_DAY + 1, FIRST_DAY + 2, FIRST_DAY + 3]),
            scope=st.sampled_from(["customer", "customer", "customer+model", "model", "all"]),
        ),
        st.builds(
            Limit,
            st.just("total"),
            st.just("total"),
            st.sampled_from(["cost", "cost", "tokens", "requests"]),
            st.sampled_from([0, 5, 30, 100, 1000]),
            scope=st.sampled_from(["customer", "customer", "customer+model", "model", "all"]),
        ),
    ),
    max_size=4,
).map(tuple)


@st.composite
def admits(draw: st.DrawFn) -> OpMaker:
    """An admission: usually by the customer's present policy and day, sometimes by one that is stale."""
    hold_id, customer, model = draw(admissions), draw(customers), draw(models)
    asked = draw(st.none() | limits)
    cost, tokens = draw(amounts), draw(st.sampled_from([0, 0, 5]))
    requests = draw(st.sampled_from([1, 1, 1, 2, 0]))
    ttl, free = draw(st.sampled_from([TTL_MS, 1000, 3 * REPLAY_MS])), draw(st.sampled_from([False, False, True]))
    stale = draw(st.sampled_from(["", "", "", "", "revision", "yesterday", "tomorrow"]))

    def make(m: Machine) -> Admit:
        day = m.day
        start = (day - 719_163) * DAY_MS + {"yesterday": -DAY_MS, "tomorrow": DAY_MS}.get(stale, 0)
        known = m.oracle.known.get(customer)
        revision = "wrong" if stale == "revision" else known.revision if known else ""
        return Admit(
            hold_id, customer, revision, day, start, start + DAY_MS, m.policy[customer] if asked is None else asked,
            model, requests, cost, tokens, ttl, free,
        )  # fmt: skip

    return make


@st.composite
def records(draw: st.DrawFn) -> OpMaker:
    """An entry: on a live or ended or unknown admission or on none; late, unpriced, presumed or an adjustment."""
    entry_id, customer, model = draw(entry_ids), draw(customers), draw(models)
    admission = draw(st.none() | admissions | admissions)
    kind = draw(st.sampled_from(["usage", "usage", "usage", "presumed", "adjustment"]))
    cost: int | None = draw(st.sampled_from([0, 1, 3, 10, 40, None]))
    tokens_in, tokens_out = draw(st.sampled_from([(0, 0), (2, 1), (5, 3)]))
    days_back, at_back = draw(st.sampled_from([0, 0, 0, 1, 2])), draw(st.sampled_from([0, 0, 0, 1, 50_000]))
    status, cached = draw(st.sampled_from(["ok", "ok", "error"])), draw(st.sampled_from([0, 1]))
    if kind == "presumed":
        admission = admission or "a1"
        entry_id = f"presumed:{admission}"
    elif kind == "adjustment":
        admission = None
        entry_id = f"adjust-{entry_id}"
        cost = -(cost or 0)

    def make(m: Machine) -> Record:
        return Record(
            Entry(
                entry_id, customer, m.day - days_back, m.now - at_back, cost, tokens_in, tokens_out, model, admission,
                kind, "manual", Usage(cache_read_tokens=cached, status=status),
            )
        )  # fmt: skip

    return make


@st.composite
def ends(draw: st.DrawFn) -> OpMaker:
    """A release or a renewal."""
    hold_id, customer = draw(admissions), draw(customers)
    if draw(st.booleans()):
        return lambda m: Release(customer, hold_id)
    return lambda m: Renew(customer, hold_id, TTL_MS)


class Machine(RuleBasedStateMachine):
    """The same calls to a backend and to the oracle."""

    backend_name = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        factory = backend_factory(storage_url(self.backend_name, self.directory))
        self.backend: Backend = factory()
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
            max_examples=200 if backend_name == "memory" else 80,
            stateful_step_count=35,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
