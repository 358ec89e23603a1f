"""Random operations, made for the moment at which a run sends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from hypothesis import strategies as st

from respan_guard.backends.base import REPLAY_MS, Admit, Entry, Limit, Op, Record, Release, Renew
from respan_guard.usage import Usage
from tests.oracle import Oracle


class Run(Protocol):
    """What an operation is made from."""

    oracle: Oracle
    now: int
    policy: dict[str, tuple[Limit, ...]]

    @property
    def day(self) -> int:
        """The day it is, in UTC."""


OpMaker: TypeAlias = Callable[[Run], Op]

DAY_MS = 86_400_000
START = 20_000 * DAY_MS + 5 * 3_600_000
FIRST_DAY = 719_163 + 20_000  # the ordinal of the day START is on
WINDOW_MS = 10_000
TTL_MS = 30_000

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

    def make(m: Run) -> Admit:
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

    def make(m: Run) -> Record:
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
