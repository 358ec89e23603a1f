"""One URL is as good as another: the same random operations, the same answers, the same store afterwards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from respan_guard.backends.base import (
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
    UsageQuery,
)
from respan_guard.backends.registry import backend_factory
from respan_guard.usage import Usage
from tests.backends import postgres_server
from tests.backends.conftest import BACKENDS, new_store

DAY_MS = 86_400_000
FIRST_DAY = 738_000
START = (FIRST_DAY - 719_163) * DAY_MS + 5 * 3_600_000
CUSTOMERS = [f"customer-{number}" for number in range(12)]
MODELS = ["", "gpt", "claude"]
LIMITS = (
    Limit("rate", "rate", "requests", 5, 10_000),
    Limit("slow", "rate", "requests", 30, 60_000),
    Limit("period", "span", "cost", 400, first_day=FIRST_DAY, end_day=FIRST_DAY + 2),
    Limit("tokens", "span", "tokens", 4000, first_day=FIRST_DAY, end_day=FIRST_DAY + 30),
    Limit("total", "total", "cost", 1000),
    Limit("model", "span", "cost", 300, first_day=FIRST_DAY, end_day=FIRST_DAY + 9, scope="customer+model"),
    Limit("calls", "total", "requests", 40),
)
OTHERS = sorted(set(BACKENDS) - {"memory"}) + [f"postgresql {version}" for version in postgres_server.installations()]


class Run:
    """A random run, made of its seed alone: batches of many customers, replays, params, deletions, pruning."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = START
        self.sent: list[list[Op]] = []
        self.revisions: dict[str, str] = {}
        self.labels: list[str] = []  # in order of the deletions

    async def steps(self, backend: Backend, steps: int) -> list[Any]:
        """Do so many steps; every answer, with what a store makes up at random told apart by when it was made."""
        answers: list[Any] = []
        for step in range(steps):
            self.now += self.chance.choice([0, 0, 0, 1, 500, 500, 3000, 3000, 10_000, 61_000, DAY_MS // 3])
            kind = self.chance.random()
            customer = self.chance.choice(CUSTOMERS)
            if kind < 0.85:
                ops = [self.op() for _ in range(self.chance.choice([1, 3, 20, 60]))]
                self.sent.append(ops)
                answers.append([self.known(outcome) for outcome in await backend.apply(ops, self.now)])
            elif kind < 0.9 and self.sent:
                answers.append(await backend.apply([], self.now))
                replayed = await backend.apply(self.chance.choice(self.sent[-20:]), self.now)
                answers.append([self.known(outcome) for outcome in replayed])
            elif kind < 0.95:
                put = await backend.put(customer, {"name": self.chance.choice("AB"), "n": step % 3}, now=self.now)
                assert isinstance(put, Put)
                self.revisions[customer] = put.revision
                answers.append(put.changed)
            elif kind < 0.97:
                answers.append(await self.delete(backend, customer))
            else:
                read = [stored.seq for stored in await backend.entries(RecordQuery(limit=100_000))]
                if read:
                    await backend.set_cursor("reader", read[len(read) // 2])
                days = self.chance.choice([2, 3])
                answers.append(await backend.prune((self.now - days * DAY_MS) // DAY_MS + 719_163))
        return answers

    async def delete(self, backend: Backend, customer: str) -> bool:
        """Delete; the label is told apart by its number."""
        before = {row.customer for row in await backend.customers(CustomerQuery(limit=1000))}
        done = await backend.delete(customer, now=self.now)
        self.revisions.pop(customer, None)
        after = {row.customer for row in await backend.customers(CustomerQuery(limit=1000))}
        self.labels += after - before
        return done

    def known(self, outcome: Any) -> Any:
        """An outcome; a revision is that of which customer."""
        if getattr(outcome, "revision", ""):
            whose = [customer for customer, revision in self.revisions.items() if revision == outcome.revision]
            return (outcome.now, whose, outcome.params)
        return outcome

    def op(self) -> Op:
        """An operation, often on what others were about."""
        chance = self.chance
        customer, model = chance.choice(CUSTOMERS), chance.choice(MODELS)
        day = self.now // DAY_MS + 719_163
        hold = f"a{chance.randrange(12)}"
        kind = chance.random()
        if kind < 0.45:
            limits = tuple(chance.sample(LIMITS, chance.randrange(len(LIMITS) + 1)))
            start = (day - 719_163) * DAY_MS
            return Admit(
                hold, customer, self.revisions.get(customer, ""), day, start, start + DAY_MS, limits, model,
                chance.choice([1, 1, 2, 0]), chance.choice([0, 5, 40, 100]), chance.choice([0, 0, 90]),
                chance.choice([1000, 30_000, 300_000]), chance.random() < 0.2,
            )  # fmt: skip
        if kind < 0.8:
            presumed = chance.random() < 0.1
            usage = Usage(
                model, provider=chance.choice([None, "openai"]), status=chance.choice(["ok", "error"]),
                latency_ms=chance.choice([None, 7]), ttft_ms=chance.choice([None, 3]),
                cache_read_tokens=chance.randrange(3), metadata=chance.choice([None, {"k": "'\"\\ é 🙂 {}"}]),
            )  # fmt: skip
            return Record(
                Entry(
                    f"presumed:{hold}" if presumed else f"e{chance.randrange(200)}", customer,
                    day - chance.choice([0, 0, 1, 4]), self.now - chance.choice([0, 0, 1, 90_000]),
                    chance.choice([None, 0, 3, 40, 90]), chance.randrange(50), chance.randrange(9), model,
                    hold if presumed else chance.choice([None, hold]), "presumed" if presumed else "usage", "test",
                    usage,
                )
            )  # fmt: skip
        return Release(customer, hold) if kind < 0.95 else Renew(customer, hold, 60_000)

    async def state(self, backend: Backend) -> list[Any]:
        """All that can be read of the store, the deleted by the number of their deletion."""
        rows = sorted(await backend.customers(CustomerQuery(limit=1000)), key=lambda row: self.name(row.customer))
        by = ("customer", "model", "day")
        usage = [(self.name(row.customer or ""), row.model, row.day, row.amounts)
                 for row in await backend.usage(UsageQuery(by=by))]  # fmt: skip
        entries = [(stored.rev, stored.late, self.name(stored.entry.customer), stored.entry.id, stored.entry.cost,
                    stored.entry.day, stored.entry.at_ms, stored.entry.usage.to_dict(), stored.entry.admission)
                   for stored in await backend.entries(RecordQuery(limit=100_000))]  # fmt: skip
        return [
            [(self.name(row.customer), row.first_seen_ms, row.last_seen_ms, row.totals, row.active_days, row.params)
             for row in rows],
            sorted(usage, key=lambda row: row[:3]),
            sorted(entries, key=lambda row: row[2:4]),
            await backend.holds(now=self.now),
            await backend.holds(state="expired", now=self.now),
            [await backend.standing(customer, LIMITS, "gpt", now=self.now) for customer in CUSTOMERS],
            await backend.usage(UsageQuery(by=("day", "model"))),
            await backend.usage(UsageQuery(by=("hour",))),
            await backend.usage(UsageQuery(by=("day",), distinct=True)),
            await backend.verify(),
        ]  # fmt: skip

    def name(self, customer: str) -> str:
        """A customer, or which deletion it went by."""
        return f"deleted {self.labels.index(customer)}" if customer in self.labels else customer


def factory(name: str, directory: Path) -> Any:
    """Makes a backend of that kind on an empty store."""
    kind, _, version = name.partition(" ")
    if version:
        return backend_factory(postgres_server.new_store(postgres_server.given_or_started(int(version))))
    return new_store(kind, directory)


async def played(name: str, directory: Path, seed: int, steps: int) -> tuple[list[Any], list[Any]]:
    """The answers of a run, and the store afterwards."""
    backend: Backend = factory(name, directory)()
    await backend.open()
    try:
        run = Run(seed)
        return await run.steps(backend, steps), await run.state(backend)
    finally:
        await backend.close()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", OTHERS)
async def test_a_backend_answers_as_memory_does(tmp_path: Path, name: str, seed: int) -> None:
    """Over a random run of large batches, every answer and everything that can be read is memory's, and verifies."""
    steps = 60
    (tmp_path / "other").mkdir()
    expected, state = await played("memory", tmp_path, seed, steps)
    answers, after = await played(name, tmp_path / "other", seed, steps)
    for step, (answer, right) in enumerate(zip(answers, expected, strict=True)):
        assert answer == right, step
    for part, right in zip(after, state, strict=True):
        assert part == right
    assert state[-1] == []
