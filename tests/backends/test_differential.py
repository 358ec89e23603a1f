"""The same random operations on every backend: the same answers, and the same store in the end."""

from __future__ import annotations

import random
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from respan_guard.backends.base import (
    Admit,
    AuditRow,
    Backend,
    Conflict,
    CustomerQuery,
    Limit,
    Op,
    Put,
    RecordQuery,
    RefusalRow,
    Release,
    Renew,
    Stale,
    StoredEntry,
    UsageQuery,
)
from respan_guard.backends.registry import backend_factory
from respan_guard.testing.contract_support import DAY, DAY_MS, NOW, admit, budget, dump, rate, record, total
from respan_guard.usage import Usage
from tests.backends import postgres_server, redis_server
from tests.backends.conftest import BACKENDS, new_store

CUSTOMERS = ["ann", "bob", "eve", "日本"]
MODELS = ["", "m", "gpt:4"]
LIMITS: list[Limit] = [
    rate(3, 10_000),
    rate(9),
    budget(60),
    budget(500, end=DAY + 1),
    budget(90, scope="customer+model"),
    budget(400, scope="model"),
    total(300),
    total(40, "tokens"),
    total(30, "requests"),
    total(900, scope="all"),
]


@pytest.fixture
async def stores(tmp_path: Path) -> AsyncIterator[dict[str, Backend]]:
    """One open, empty store of each kind."""
    found = {name: new_store(name, tmp_path)() for name in BACKENDS}
    for version in list(postgres_server.installations())[1:]:  # older ones, where there are any
        url = postgres_server.new_store(postgres_server.given_or_started(version))
        found[f"postgresql {version}"] = backend_factory(url)()
    for name, path in list(redis_server.binaries().items())[1:]:  # other servers of that protocol
        url = redis_server.shared_server(path).url
        found[name] = backend_factory(url, namespace=f"test-{secrets.token_hex(6)}")()
    for store in found.values():
        await store.open()
    yield found
    for store in found.values():
        await store.close()


class Run:
    """One sequence of operations, told to each backend in its own revisions."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = NOW
        self.count = 0

    def pick(self, *values: Any) -> Any:
        return self.random.choice(values)

    def name(self, kind: str) -> str:
        """A new name mostly, one that was used before sometimes."""
        self.count += self.random.random() < 0.7
        return f"{kind}{self.count}"

    def op(self) -> Op:
        customer, model, day = self.pick(*CUSTOMERS), self.pick(*MODELS), DAY + self.pick(0, 0, 0, -1, 1, -50)
        kind = self.random.random()
        if kind < 0.45:
            limits = self.random.sample(LIMITS, self.random.randrange(4))
            held = {"cost": self.pick(0, 5, 20), "tokens": self.pick(0, 0, 4), "requests": self.pick(1, 1, 2, 0)}
            return admit(
                self.name("a"), *limits, customer=customer, model=model, day=day, ttl_ms=self.pick(1000, 600_000),
                free=self.pick(False, False, True), revision="REVISION", **held,
            )  # fmt: skip
        if kind < 0.8:
            admission = self.pick(None, self.name("a"), self.name("a"))
            what = self.pick("usage", "usage", "usage", "presumed") if admission else self.pick("usage", "adjustment")
            usage = Usage(
                status=self.pick("ok", "error"), cache_read_tokens=self.pick(0, 2),
                metadata=self.pick(None, {"k": "ü"}), latency_ms=self.pick(None, 7), provider=self.pick(None, "openai"),
            )  # fmt: skip
            name = f"presumed:{admission}" if what == "presumed" else self.name("e")
            return record(
                name, self.pick(0, 1, 9, 30, None), customer=customer, model=model, day=day, admission=admission,
                kind=what, input_tokens=self.pick(0, 3), output_tokens=self.pick(0, 2), usage=usage,
                at_ms=self.now - self.pick(0, 5, 9_999_999),
            )  # fmt: skip
        if kind < 0.9:
            return Release(customer, self.name("a"))
        return Renew(customer, self.name("a"), 9_000)

    async def step(self, stores: dict[str, Backend]) -> dict[str, Any]:
        """Do one thing to each; what each answered."""
        step = self.pick(0, 1, 500, 5_000, 61_000, 3_600_000, DAY_MS // 3)
        if self.now + step < NOW + 5 * DAY_MS:  # a store may forget what expired a week ago
            self.now += step
        customer, kind = self.pick(*CUSTOMERS), self.random.random()
        if kind < 0.86:
            ops = [self.op() for _ in range(self.pick(1, 1, 2, 5, 60))]
            return {name: await self.apply(store, ops) for name, store in stores.items()}
        if kind < 0.92:
            params = {
                "name": self.pick("A", "B"),
                "blocked": self.pick(True, False),
                "metadata": {"n": self.pick(1, 2)},
            }
            return {name: await self.put(store, customer, params) for name, store in stores.items()}
        if kind < 0.94:
            return {name: await store.delete(customer, now=self.now) for name, store in stores.items()}
        if kind < 0.96:
            read, before = self.pick(0, 10**12), DAY - self.pick(40, 60)
            found = {}
            for name, store in stores.items():
                await store.set_cursor("reader", read)
                found[name] = await store.prune(before)
            return found
        rows = [RefusalRow(customer, self.pick("rate", "held"), self.now // 60_000, self.pick(1, 4))]
        audit = AuditRow(self.now, customer, "adjust", "x", None, {"n": 1})
        for store in stores.values():
            await store.add_refusals(rows)
            await store.add_audit(audit)
        return dict.fromkeys(stores)

    async def apply(self, store: Backend, ops: list[Op]) -> Any:
        """With the revision that this store has given."""
        own: list[Op] = []
        for op in ops:
            if isinstance(op, Admit):
                row = await store.get(op.customer)
                own.append(replace(op, revision="" if row is None else row.revision))
            else:
                own.append(op)
        outcomes = await store.apply(own, self.now)
        return [replace(outcome, revision="") if isinstance(outcome, Stale) else outcome for outcome in outcomes]

    async def put(self, store: Backend, customer: str, params: dict[str, Any]) -> Any:
        answer = await store.put(customer, params, actor="x", now=self.now)
        assert isinstance(answer, (Put, Conflict))
        return answer.changed if isinstance(answer, Put) else answer.params


async def picture(store: Backend, now: int) -> str:
    """All that can be read, with names that a store makes up at random replaced by their order."""
    found: list[Any] = await dump(store, now, *LIMITS)
    assert found.pop() == [], "verify"
    rows = [replace(row, revision="") for row in found.pop(0)]
    found[-1] = list(zip(rows, found[-1], strict=True))  # where the limits of each stand
    labels = sorted(
        (row for row in rows if row.customer.startswith("deleted-")),
        key=lambda row: (row.first_seen_ms, row.last_seen_ms, repr(row.totals)),
    )
    by: tuple[tuple[str, ...], ...] = (("day",), ("model",), ("hour",), ("model", "day"), ())
    found.extend([await store.usage(UsageQuery(by=names)) for names in by])
    found.append(await store.usage(UsageQuery(by=("day",), distinct=True)))
    found.append(await store.count_customers(blocked=True))
    found.append(sorted((await store.refusal_sums()).items()))
    every = RecordQuery(limit=100_000)
    queries = RecordQuery(customer="ann"), RecordQuery(model="m", descending=True), RecordQuery(status="error", limit=7)
    found.extend([await store.entries(query) for query in queries])
    found.append([row.customer for row in await store.customers(CustomerQuery(sort="cost", limit=1000))])
    named = {row.customer: f"deleted-{number}" for number, row in enumerate(labels)}

    places = {row.seq: number for number, row in enumerate(sorted(await store.entries(every), key=lambda row: row.seq))}

    def told(value: Any) -> str:
        if isinstance(value, AuditRow):
            value = replace(value, seq=0)  # a place says no more than what is before what
        elif isinstance(value, StoredEntry):
            value = replace(value, seq=places[value.seq])
        return re.sub("deleted-[0-9a-f]{16}", lambda label: named[label[0]], repr(value))

    lines = []
    for part in found:
        items = [told(item) for item in part] if isinstance(part, list) else [told(part)]
        lines += sorted(items) if any("deleted-" in item for item in items) else items  # labels have no order
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(6))
async def test_the_same_operations_give_the_same_store(stores: dict[str, Backend], seed: int) -> None:
    """150 random steps: every answer is the same on all backends, and so is all that can be read afterwards."""
    run = Run(seed)
    for number in range(150):
        answers = await run.step(stores)
        first, *others = answers.values()
        assert all(other == first for other in others), (number, answers)
    pictures = {name: await picture(store, run.now) for name, store in stores.items()}
    first, *others = pictures
    for other in others:
        assert pictures[other].splitlines() == pictures[first].splitlines(), (first, other)
