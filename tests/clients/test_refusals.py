"""A refused call is the SDK's own exception; it never reaches the provider and is never tried again."""

from __future__ import annotations

import asyncio
import sys
import textwrap
import threading
from decimal import Decimal
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, Any

import anthropic
import openai
import pytest

from respan_guard import Customer, Guard, LimitExceeded, RateLimitExceeded, StorageUnavailable
from respan_guard.backends import registry
from respan_guard.testing import StandInProvider
from tests.guard.faulty import FaultyBackend

from .support import ASK, CHAT, CLAUDE, arecords, async_open_ai, claude, open_ai, records, same

CASES: list[tuple[dict[str, Any], int, type[openai.APIStatusError], type[anthropic.APIStatusError]]] = [
    ({"rate_limit": 0}, 429, openai.RateLimitError, anthropic.RateLimitError),
    ({"total_budget": 0}, 402, openai.APIStatusError, anthropic.APIStatusError),
    ({"blocked": True}, 403, openai.PermissionDeniedError, anthropic.PermissionDeniedError),
]


@pytest.mark.parametrize(("limits", "status", "of_openai", "of_anthropic"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_the_sdks_exception(
    guard: Guard,
    provider: StandInProvider,
    url: str,
    limits: dict[str, Any],
    status: int,
    of_openai: type[openai.APIStatusError],
    of_anthropic: type[anthropic.APIStatusError],
    stream: bool,
) -> None:
    """With the SDKs' retries on: one refusal, no request, no sleep; the exception carries status, body and ours."""
    guard.sync.put_customer(Customer(customer_identifier="c1", **limits))
    with (
        guard.wrap(open_ai(url, max_retries=2)) as client,
        guard.wrap(claude(url, max_retries=2)) as other,
        guard.on_behalf_of("c1"),
    ):
        with pytest.raises(of_openai) as caught:
            client.chat.completions.create(model=CHAT, messages=ASK, stream=stream)
        with pytest.raises(of_anthropic) as found:
            other.messages.create(model=CLAUDE, max_tokens=9, messages=ASK, stream=stream)
    assert caught.value.status_code == found.value.status_code == status
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.headers["content-type"] == "application/problem+json"
    refused = caught.value.response.extensions["respan_guard"]
    assert isinstance(refused, LimitExceeded)
    assert refused.decision.customer_identifier == "c1"
    assert str(refused) in caught.value.message
    assert provider.meter.calls == []
    assert records(guard) == []


async def test_an_async_refusal(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The same on an event loop; a rate tells when asking again makes sense."""
    async with guard, guard.wrap(async_open_ai(url, max_retries=2)) as client:
        await guard.put_customer(Customer(customer_identifier="c1", rate_limit=1))
        with guard.on_behalf_of("c1"):
            await client.responses.create(model=CHAT, input="hello")
            with pytest.raises(openai.RateLimitError) as caught:
                await client.responses.create(model=CHAT, input="hello")
        assert isinstance(caught.value.response.extensions["respan_guard"], RateLimitExceeded)
        assert 0 < float(caught.value.response.headers["retry-after"]) <= 60
        same(await arecords(guard), provider)
        assert len(provider.meter.calls) == 1


def test_a_model_without_a_price_is_refused_where_there_is_a_budget(
    guard: Guard, provider: StandInProvider, url: str
) -> None:
    """Nobody spends freely by naming a model that nobody can price; elsewhere it is recorded as unpriced."""
    with guard.wrap(open_ai(url)) as client:
        with guard.on_behalf_of("c1"), pytest.raises(openai.BadRequestError, match="no price is known"):
            client.chat.completions.create(model="no-such-model", messages=ASK)
        assert provider.meter.calls == []
        client.chat.completions.create(model="no-such-model", messages=ASK)
    (record,) = records(guard)
    assert record.unpriced


def test_storage_that_gives_no_answer_refuses(
    provider: StandInProvider, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that can't be checked is not spent: 503 as the SDK's exception, nothing sent, nothing retried."""
    monkeypatch.setitem(registry._BUILT_IN, "faulty", f"{FaultyBackend.__module__}:FaultyBackend")
    store = FaultyBackend("faulty://clients")
    guard = Guard("faulty://clients", default_limits={"total_budget": 1}, journal_dir=tmp_path)
    with guard.wrap(open_ai(url, max_retries=2)) as client, guard.on_behalf_of("c1"):
        store.error = StorageUnavailable("the test's")
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=CHAT, messages=ASK)
        assert caught.value.status_code == 503
        assert provider.meter.calls == []
        store.error = None
        client.chat.completions.create(model=CHAT, messages=ASK)
    same(records(guard), provider)
    guard.sync.close()


# -- overspend -------------------------------------------------------------------------------------------------

# 18 bytes of text bound the prompt; ten calls fit the budget, whatever their order.
ONE: dict[str, Any] = {"model": CHAT, "messages": ASK, "max_tokens": 100}


def cost_of_ten(guard: Guard) -> Decimal:
    """What ten calls hold together."""
    from respan_guard.money import from_nano
    from respan_guard.providers import call_from_request

    call = call_from_request("/v1/chat/completions", ONE)
    return from_nano(guard.estimator.of_call(call).cost * 10)


async def test_two_hundred_at_once_against_a_budget_for_ten(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Async: exactly ten calls reach the provider while all are in flight; the others are refused; no overspend."""
    from respan_guard.testing.provider import Answer, Gate

    gate = Gate()
    provider.script(*[Answer(output_tokens=100, gate=gate)] * 10)
    async with guard, guard.wrap(async_open_ai(url)) as client:
        budget = cost_of_ten(guard)
        await guard.put_customer(Customer(customer_identifier="c1", total_budget=budget))

        async def one() -> bool:
            try:
                await client.chat.completions.create(**ONE)
            except openai.RateLimitError:  # full of calls in flight, not spent
                return False
            return True

        with guard.on_behalf_of("c1"):
            tasks = [asyncio.create_task(one()) for _ in range(200)]
        await gate.arrival(10)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        while sum(task.done() for task in tasks) < 190:
            await asyncio.sleep(0.01)
        gate.open()
        assert sum(await asyncio.gather(*tasks)) == 10
        assert len(provider.meter.calls) == 10
        same(await arecords(guard), provider)
        assert provider.meter.total_cost <= budget


def test_threads_against_a_budget_for_ten(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Sync, from twenty threads, ten calls each, unlike the above with calls that end meanwhile: never over budget."""
    budget = cost_of_ten(guard)
    statuses: set[int] = set()
    guard.sync.put_customer(Customer(customer_identifier="c1", total_budget=budget))
    with guard.wrap(open_ai(url)) as client:

        def work() -> None:
            with guard.on_behalf_of("c1"):
                for _ in range(10):
                    try:
                        client.chat.completions.create(**ONE)
                    except openai.APIStatusError as error:
                        statuses.add(error.status_code)

        threads = [threading.Thread(target=work) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    same(records(guard), provider)
    assert statuses <= {402, 429}
    assert len(provider.meter.calls) >= 10
    assert provider.meter.total_cost <= budget


def test_processes_against_a_budget_for_ten(tmp_path: Path, provider: StandInProvider, url: str) -> None:
    """Two hundred calls from four processes, half sync and half async: ten get through, no more, none fewer."""
    storage = f"sqlite:///{tmp_path / 'guard.db'}"
    guard = Guard(storage, journal_dir=tmp_path / "journal", storage_timeout=20)
    budget = cost_of_ten(guard)
    guard.sync.put_customer(Customer(customer_identifier="c1", total_budget=budget))
    from respan_guard.testing.provider import Answer, Gate

    gate = Gate()
    provider.script(*[Answer(output_tokens=100, gate=gate)] * 200)
    script = textwrap.dedent(
        """
        import asyncio, os, sys, threading
        import openai
        from respan_guard import Guard
        storage, url, kind, journal = sys.argv[1:]
        guard = Guard(storage, storage_timeout=20, journal_dir=journal)
        one = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "How far is the moon?"}],
               "max_tokens": 100}
        done = []
        if kind == "async":
            async def main():
                async with guard:
                    client = guard.wrap(openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0))
                    async def call():
                        with guard.on_behalf_of("c1"):
                            try:
                                await client.chat.completions.create(**one)
                                done.append(True)
                            except openai.APIStatusError as error:
                                os.write(1, b"%d\\n" % error.status_code)
                    await asyncio.gather(*[call() for _ in range(50)])
            asyncio.run(main())
        else:
            client = guard.wrap(openai.OpenAI(base_url=url, api_key="k", max_retries=0))
            def call():
                with guard.on_behalf_of("c1"):
                    try:
                        client.chat.completions.create(**one)
                        done.append(True)
                    except openai.APIStatusError as error:
                        os.write(1, b"%d\\n" % error.status_code)
            threads = [threading.Thread(target=call) for _ in range(50)]
            [t.start() for t in threads]
            [t.join() for t in threads]
            guard.sync.close()
        os.write(1, b"done %d\\n" % len(done))
        """
    )
    running = [
        Popen(
            [sys.executable, "-c", script, storage, f"{url}/v1", kind, str(tmp_path / f"journal-{n}")],
            stdout=PIPE,
            text=True,
        )
        for n, kind in enumerate(["sync", "async", "sync", "async"])
    ]
    refused: list[str] = []
    served: list[str] = []

    def follow(out: IO[str]) -> None:
        with out:
            for line in out:
                (served if line.startswith("done") else refused).append(line)
                if len(refused) == 190:
                    gate.open()  # not before all others are refused: ten are in flight, and no more fit

    readers = [threading.Thread(target=follow, args=(process.stdout,)) for process in running]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [process.wait(30) for process in running] == [0] * 4
    assert refused == ["429\n"] * 190
    found = records(guard)
    assert sum(int(line.split()[1]) for line in served) == len(found) == len(provider.meter.calls) == 10
    same(found, provider)
    assert provider.meter.total_cost <= budget
    assert guard.sync.verify() == []
    guard.sync.close()
