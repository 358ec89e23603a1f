"""Calls that pay from a hold around them: one hold pays once, and no call spends what another one counts on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from respan_guard import Guard, GuardMiddleware, LimitExceeded
from respan_guard.clients.door import Door, RefusedCall
from respan_guard.clients.exchange import Exchange
from respan_guard.context import Slot, current_slot
from respan_guard.entering import entered
from respan_guard.money import from_nano
from respan_guard.providers import Call, call_from_request
from respan_guard.testing import FakeClock, StandInProvider

from .conftest import MakeGuard
from .support import ASK, CHAT, arecords, async_open_ai, holds

PRICES = {"m": {"input": 0, "output": 1_000_000}}
"""What a call of "m" costs in USD is the number of its output tokens."""
BUDGET = 24
BODY: dict[str, Any] = {"model": CHAT, "messages": ASK, "max_tokens": 50, "stream": False}


def call_of(most: int) -> Call:
    """A call that costs so many USD at most."""
    found = call_from_request("/v1/chat/completions", {"model": "m", "max_tokens": most, "messages": []})
    assert found is not None
    return found


def answer(exchange: Exchange, cost: int | None, number: int = 0) -> None:
    """The provider answers, with the usage that costs so many USD, or without any."""
    reply: dict[str, Any] = {"id": f"chatcmpl-{number:020d}", "object": "chat.completion", "model": "m", "choices": []}
    if cost is not None:
        reply["usage"] = {"prompt_tokens": 1, "completion_tokens": cost, "total_tokens": 1 + cost}
    feed = exchange.answered(200, "application/json", "")
    assert feed is not None
    feed(json.dumps(reply).encode())
    exchange.finish()


def limits(guard: Guard, customer: str = "c1") -> tuple[Decimal | int, Decimal | int]:
    """What is used and held of the budget."""
    guard.sync.flush()
    [limit] = guard.sync.status(customer).limits
    return limit.used, limit.held


# -- one hold pays once ----------------------------------------------------------------------------------------


async def test_a_hold_pays_for_one_call_of_unknown_usage(
    make_guard: MakeGuard, provider: StandInProvider, url: str
) -> None:
    """Within one admission each call without usage is presumed to have cost its hold: the next asks for its own."""
    guard = make_guard()
    bound = guard.estimator.of_call(call_from_request("/v1/chat/completions", BODY)).cost
    provider.fault("no-usage", times=6)
    async with guard, guard.wrap(async_open_ai(url)) as client:
        await guard.update_customer("c1", total_budget=from_nano(bound * 12 // 5))
        async with guard.admit("c1", estimate=from_nano(bound)):
            for _ in range(6):
                with suppress(openai.APIStatusError):
                    await client.chat.completions.create(**BODY)
        found = await arecords(guard)
        assert [record.kind for record in found] == ["presumed"] * 2
        assert len(provider.meter.calls) == 2
        assert (await guard.status("c1")).total_spend == from_nano(2 * bound)
        assert await holds(guard, "c1") == 0


async def test_retries_behind_the_door_are_paid_for_each(
    make_guard: MakeGuard, provider: StandInProvider, url: str
) -> None:
    """A gateway whose client tries again after a lost answer: the door's hold is for the first try only."""
    guard = make_guard()
    client = guard.wrap(async_open_ai(url, max_retries=4))

    async def forward(request: Request) -> JSONResponse:
        reply = await client.chat.completions.create(**await request.json())
        return JSONResponse(reply.model_dump(mode="json"))

    app = Starlette(routes=[Route("/v1/chat/completions", forward, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard, identify="header:x-user", include=["/v1/*"])
    bound = guard.estimator.of_call(call_from_request("/v1/chat/completions", BODY)).cost
    provider.fault("drop-before", times=5)
    async with guard, client, httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app") as http:
        await guard.update_customer("c1", total_budget=from_nano(bound * 6 // 5))
        reply = await http.post("/v1/chat/completions", json=BODY, headers={"x-user": "c1"})
        assert reply.status_code == 402
        assert len(provider.meter.calls) == 1
        found = await arecords(guard)
        assert [(record.kind, record.cost) for record in found] == [("presumed", from_nano(bound))]


def test_what_the_door_presumes_leaves_out_what_calls_claimed(make_guard: MakeGuard) -> None:
    """A request ends while its client's call is under way: that one books itself, and the door nothing for it."""
    guard = make_guard(default_limits={"total_budget": BUDGET}, prices=PRICES)
    call = call_of(10)
    slot = Slot(guard, is_request=True)
    admission = guard.sync.run(guard.admissions.request(slot, "c1", call))
    with entered(slot):
        exchange = guard.sync.run(Door(guard, None, include_usage=True).open(call))
    guard.admissions.end(slot, None, call, sent=True)
    assert limits(guard) == (0, 10)
    answer(exchange, 3)
    assert limits(guard) == (3, 0)
    assert admission.ended


def test_what_is_presumed_of_the_rest_leaves_claims_alone(make_guard: MakeGuard) -> None:
    """Of a hold that a call claimed four of, the six others are presumed for a call that spans tell of."""
    guard = make_guard(default_limits={"total_budget": BUDGET}, prices=PRICES)
    with guard.sync.admit("c1", estimate=Decimal(10)) as blocking:
        admission = blocking.admission
        exchange = guard.sync.run(Door(guard, None, include_usage=True).open(call_of(4)))
        admission.book(guard.admissions.presume(admission, call_of(1)))
        assert limits(guard) == (6, 4)
        assert admission.claim(1) is None
        answer(exchange, 4)
        assert limits(guard) == (10, 0)


# -- nobody spends another call's money ------------------------------------------------------------------------


def test_a_call_that_does_not_fit_spends_nothing_of_what_others_claimed(make_guard: MakeGuard) -> None:
    """Four of ten are claimed and a call for fifteen comes: it asks for all of them, and they must fit, too."""
    guard = make_guard(default_limits={"total_budget": BUDGET + 1}, prices=PRICES)
    door = Door(guard, None, include_usage=True)
    with guard.sync.admit("c1", estimate=Decimal(10)):
        small = guard.sync.run(door.open(call_of(4)))
        large = guard.sync.run(door.open(call_of(15)))
        assert limits(guard) == (0, 25)
        answer(large, 15)
        assert limits(guard) == (15, 10)
        with guard.on_behalf_of("c1"), pytest.raises(RefusedCall):
            guard.sync.run(door.open(call_of(7)))
        answer(small, 4, 1)
        assert limits(guard) == (19, 6)
    assert limits(guard) == (19, 0)
    assert guard.sync.status("c1").total_requests == 1


def test_a_first_call_asks_only_for_what_is_missing(make_guard: MakeGuard) -> None:
    """The door's hold was for this very call, which has grown behind it: it takes it all, and asks for the rest."""
    guard = make_guard(default_limits={"total_budget": 15}, prices=PRICES)
    door = Door(guard, None, include_usage=True)
    with guard.sync.admit("c1", estimate=Decimal(10)) as blocking:
        exchange = guard.sync.run(door.open(call_of(15)))
        assert limits(guard) == (0, 15)
        assert blocking.admission.claim(1) is None
        answer(exchange, 12)
        assert limits(guard) == (12, 0)


class Traffic:
    """Random calls of one customer: within admissions by hand and requests, beside them, and overlapping in any way.

    Each costs its bound at most. The books are held against what the provider has charged (`spent`) and may yet charge:
    the bounds of what is under way.
    """

    def __init__(self, guard: Guard, seed: int) -> None:
        self.guard = guard
        self.customer = f"c{seed}"
        self.random = random.Random(seed)
        self.door = Door(guard, None, include_usage=True)
        self.outside = copy_context()
        self.outside.run(current_slot.set, Slot(guard, customer=self.customer))
        self.open: list[tuple[Context, Callable[[], None]]] = []
        self.calls: list[tuple[Exchange, int]] = []
        self.spent = self.sent = 0

    def run(self, work: Any) -> Any:
        """Block for what the guard does."""
        return self.guard.sync.run(work)

    def admit(self) -> None:
        """Enter an admission by hand, or a request at the door."""
        context, most = copy_context(), self.random.randint(0, 14)
        if self.random.random() < 0.5:
            with suppress(LimitExceeded):
                admission = context.run(self.guard.sync.admit, self.customer, estimate=Decimal(most))
                context.run(admission.__enter__)
                self.open.append((context, lambda: context.run(admission.__exit__)))
            return
        slot, call = context.run(Slot, self.guard, is_request=True), call_of(max(1, most))
        context.run(current_slot.set, slot)
        with suppress(LimitExceeded):
            self.run(self.guard.admissions.request(slot, self.customer, call))
            sent = self.random.random() < 0.5
            self.open.append((context, lambda: self.guard.admissions.end(slot, None, call, sent=sent)))

    def call(self) -> None:
        """Make a call somewhere."""
        context = self.random.choice([self.outside, *[context for context, _ in self.open]])
        most = self.random.randint(1, 15)
        with suppress(RefusedCall):
            self.calls.append((context.run(self.run, self.door.open(call_of(most))), most))

    def end(self) -> None:
        """End an admission, whose calls may go on."""
        if self.open:
            self.open.pop(self.random.randrange(len(self.open)))[1]()

    def answer(self) -> None:
        """A call ends: with its usage, without, or in an error."""
        if self.calls:
            exchange, most = self.calls.pop(self.random.randrange(len(self.calls)))
            self.sent += 1
            match self.random.randrange(4):
                case 0:
                    self.spent += most
                    answer(exchange, None)
                case 1:
                    exchange.answered(500, "application/json", "")
                    exchange.finish()
                case _:
                    cost = self.random.randint(0, most)
                    self.spent += cost
                    answer(exchange, cost, self.sent)

    def step(self) -> None:
        """Do something: each call under way is held for, and all of them fit."""
        self.random.choice([self.admit, self.call, self.call, self.call, self.answer, self.answer, self.end])()
        used, held = limits(self.guard, self.customer)
        assert used + held <= BUDGET
        assert self.spent + sum(most for _, most in self.calls) <= used + held


def test_no_interleaving_of_calls_and_holds_overspends(make_guard: MakeGuard, storage: str) -> None:
    """Whatever overlaps, what was spent and what is under way fits the budget, and in the end nothing is held."""
    guard = make_guard(default_limits={"total_budget": BUDGET}, prices=PRICES, clock=FakeClock())
    admitted = 0
    for seed in range(300 if storage == "memory://" else 20):
        traffic = Traffic(guard, seed)
        for _ in range(60):
            traffic.step()
        while traffic.open or traffic.calls:
            traffic.end()
            traffic.answer()
        assert limits(guard, traffic.customer)[1] == 0
        admitted += traffic.sent
    assert admitted > 1000 or storage != "memory://"
    assert guard.renewer.live == []
    assert guard.sync.verify() == []


# -- what is told of presumed calls ----------------------------------------------------------------------------


def test_presumed_calls_are_in_the_cost_of_their_request(make_guard: MakeGuard) -> None:
    """The request's span tells what its calls cost, those too whose usage stayed unknown."""
    guard = make_guard(default_limits={"total_budget": BUDGET}, prices=PRICES)
    slot = Slot(guard, is_request=True)
    slot.costs = []
    door = Door(guard, None, include_usage=True)
    with entered(slot):
        guard.sync.admit("c1", estimate=Decimal(5))
        answer(guard.sync.run(door.open(call_of(5))), None)  # of the admission's hold
        answer(guard.sync.run(door.open(call_of(7))), None)  # of its own
        answer(guard.sync.run(door.open(call_of(7))), 1)
    guard.admissions.end(slot)
    assert [from_nano(cost) for cost in slot.costs] == [5, 7, 1]


def test_a_presumed_call_of_nobodys_is_not_late(make_guard: MakeGuard) -> None:
    """What has no hold in storage names none: nothing is late about a call for nobody, or in shadow mode."""
    guard = make_guard(prices=PRICES, default_limits={"total_budget": 1})
    door = Door(guard, None, include_usage=True)
    exchange = guard.sync.run(door.open(call_of(5)))
    assert guard.renewer.live == []  # there is no hold to keep alive
    answer(exchange, None)
    guard.sync.switch("shadow")
    with guard.on_behalf_of("c1"):
        answer(guard.sync.run(door.open(call_of(5))), None)
    guard.sync.flush()
    found = [(record.customer_identifier, record.kind, record.late) for record in guard.sync.records()]
    assert found == [("", "presumed", False), ("c1", "presumed", False)]
