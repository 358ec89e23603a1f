"""`respan-guard demo`: the example gateway, a stand-in provider, the official client, customers that meet limits."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import openai

from respan_guard.backends.base import RecordQuery
from respan_guard.cli.output import FAILED, columns, print_table, say, usd
from respan_guard.cli.seed import seed
from respan_guard.cli.session import opened, told
from respan_guard.clock import SystemClock
from respan_guard.console import Console
from respan_guard.errors import InvalidInput
from respan_guard.guard import Guard
from respan_guard.settings import mask_url
from respan_guard.testing.provider import MeteredCall, StandInProvider
from respan_guard.testing.serving import serve as serve_app
from respan_guard.usage import UsageRecord

__all__ = ["run_demo", "run_seed"]

DEFAULT_LIMITS = {"rate_limit": 60, "budget_duration": "monthly", "period_budget": 5}
ANSWER_TOKENS = 400
_OK = 200


@dataclass(slots=True)
class Visitor:
    """A customer of the demo, how often it calls at most, and how it fared.

    A visitor goes on until it is refused.
    """

    identifier: str
    limits: Mapping[str, Any]
    calls: int
    statuses: list[int] = field(default_factory=list)
    refusal: str = ""
    streamed: int = 0

    @property
    def shown_limits(self) -> str:
        """The limits for people."""
        if not self.limits:
            return "none of its own: the default limits"
        period = f" {self.limits.get('budget_duration', '')}".rstrip()
        return ", ".join(
            f"{name}={value}{period if name == 'period_budget' else ''}"
            for name, value in self.limits.items()
            if name != "budget_duration"
        )


def run_demo(*, serve: bool = False, seeded: bool = False) -> int:
    """Run the demo.

    Args:
        serve: Keep the gateway running afterwards, until Ctrl-C, with the console beside it.
        seeded: Begin with a store that has 60 days of traffic in it.

    Returns:
        The exit code: 0 if a customer met 429, one met 402, and the ledger is the provider's meter to the last digit.
    """
    if os.environ.get("OPENAI_API_KEY"):
        say("OPENAI_API_KEY is not used here: the demo costs nothing. `python examples/gateway.py` uses it.")
    visitors = [
        Visitor("acme", {"rate_limit": 100, "budget_duration": "monthly", "period_budget": 25}, calls=4),
        Visitor("bolt", {"rate_limit": 3}, calls=6),
        Visitor("crux", {"total_budget": 0.02}, calls=12),
        Visitor("newcomer", {}, calls=2),
    ]
    password = secrets.token_urlsafe(9) if serve else None
    with _direct_connections(), _gateway_running(password, seeded=seeded) as (url, guard, provider):
        say(f"A gateway at {url}, guarded, on SQLite; behind it a stand-in provider. Four customers call gpt-4o.")
        say("")
        began = _now()
        for visitor in visitors:
            _visit(visitor, f"{url}/v1", lambda: _settled(guard, len(provider.meter.charged), began))
        right = _report(visitors, guard, provider, began)
        if password:
            _keep_serving(url, password)
    return 0 if right else FAILED


def run_seed(storage: str | None) -> int:
    """Fill a store with 60 days of traffic; one of the demo's own is then shown in the console until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="respan-guard-demo-") as place:
        url = storage or f"sqlite:///{Path(place, 'guard.db')}?synchronous=normal"
        _fill(url)
        if storage is None:
            _show_console(url, place)
    return 0


def _fill(url: str) -> None:
    with told():
        opened(_must_be_empty, url, create=True)
    say("Making 60 days of traffic of 200 customers; this takes half a minute.")
    with told():
        calls = asyncio.run(seed(url, until=_now() - timedelta(minutes=1)))
    say(f"{calls:,} calls are in {mask_url(url)}.")
    say("")


async def _must_be_empty(guard: Guard) -> None:
    """Refuse a store that somebody uses: its customers' limits would be overwritten.

    Raises:
        InvalidInput: There is a customer or a record in it.
    """
    lane = guard.lane()
    customers = await lane.call(lambda backend: backend.count_customers())
    records = await lane.call(lambda backend: backend.entries(RecordQuery(limit=1)))
    if customers or records:
        url = guard.settings.sources()["storage"][0]
        raise InvalidInput(f"{url} is not empty ({customers} customers): --seed fills a store that nobody uses yet")


def _now() -> datetime:
    return datetime.fromtimestamp(SystemClock().now_ms() / 1000, UTC)


def _show_console(storage: str, journal: str) -> None:
    from respan_guard.cli.serve import console_app

    password = secrets.token_urlsafe(9)
    guard = Guard(storage, mode="enforce", default_limits=DEFAULT_LIMITS, retention=None, journal_dir=journal)
    with serve_app(console_app(guard, password)) as url:
        say("")
        say(f"The console is at {url}/ and the password for this run is {password}. Ctrl-C ends it.")
        _wait()


@contextmanager
def _direct_connections() -> Iterator[None]:
    """Reach this machine's own servers without the proxy that the environment may name."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    listed = ",".join(filter(None, (*before.values(), "127.0.0.1")))
    os.environ.update(dict.fromkeys(before, listed))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _gateway_running(password: str | None, *, seeded: bool) -> Iterator[tuple[str, Guard, StandInProvider]]:
    gateway = _example("gateway")
    provider = StandInProvider(default_output_tokens=ANSWER_TOKENS)
    with tempfile.TemporaryDirectory(prefix="respan-guard-demo-") as place, provider.serve() as provider_url:
        storage = f"sqlite:///{Path(place, 'guard.db')}"
        if seeded:
            _fill(f"{storage}?synchronous=normal")
        guard = Guard(
            storage,
            trust_customer_params=True,  # the demo is the gateway's only caller
            default_limits=DEFAULT_LIMITS,
            journal_dir=place,
            # What the environment or a respan_guard.toml say is for other guards.
            mode="enforce",
            hold="upper_bound",
            prices={},
            unknown_customers="admit",
            budget_status_code=402,
            retention=None,
        )
        app = gateway.create_app(guard, base_url=f"{provider_url}/v1", api_key="demo")
        if password:
            app.mount("/console", Console(guard, password=password))
        with serve_app(app) as url:
            yield url, guard, provider


def _example(name: str) -> ModuleType:
    """An example of the checkout; an installed wheel has a copy beside this module."""
    here = Path(__file__)
    for path in (here.parents[2] / "examples" / f"{name}.py", here.with_name(f"{name}.py")):
        if path.exists():
            spec = importlib.util.spec_from_file_location(f"respan_guard_example_{name}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise FileNotFoundError(f"examples/{name}.py is missing from this installation")


def _visit(visitor: Visitor, base_url: str, settle: Callable[[], object]) -> None:
    """Call until the calls are done or refused; every other answer is streamed.

    Each call waits until the one before is settled. A budget that is only held by it would be a 429, not a 402.
    """
    with openai.OpenAI(base_url=base_url, api_key="demo", max_retries=0) as client:
        for number in range(visitor.calls):
            request: dict[str, Any] = {
                "model": "gpt-4o",
                "max_tokens": 500,
                "messages": [{"role": "user", "content": "Where does the river go?"}],
                "extra_body": {
                    "customer_params": {"customer_identifier": visitor.identifier, **visitor.limits},
                },
            }
            try:
                if number % 2:
                    for _ in client.chat.completions.create(stream=True, **request):
                        pass
                    visitor.streamed += 1
                else:
                    client.chat.completions.create(**request)
            except openai.APIStatusError as refused:
                visitor.statuses.append(refused.status_code)
                visitor.refusal = f"{refused.status_code} {type(refused).__name__}, code {refused.code}"
                return
            visitor.statuses.append(_OK)
            settle()


def _report(visitors: list[Visitor], guard: Guard, provider: StandInProvider, began: datetime) -> bool:
    """Print how everyone fared, and compare the ledger with the provider's own books, call by call."""
    records = _settled(guard, len(provider.meter.charged), began)
    table = columns("customer", "~limits in its requests", ">answered", ">streamed", ">spent (USD)", "~then")
    rows = []
    for visitor in visitors:
        spent = sum((r.cost or Decimal(0) for r in records if r.customer_identifier == visitor.identifier), Decimal(0))
        answered = visitor.statuses.count(_OK)
        ending = visitor.refusal or "-"
        rows.append(
            (visitor.identifier, visitor.shown_limits, answered, visitor.streamed, usd(spent.normalize()), ending)
        )
    print_table(table, rows, "")
    differences = _differences(records, provider.meter.charged) + [str(found) for found in guard.sync.verify()]
    booked = sum((record.cost or Decimal(0) for record in records), Decimal(0))
    say(f"ledger:           {len(records)} records, {usd(booked.normalize())} USD")
    say(f"provider's meter: {len(provider.meter.charged)} calls, {usd(provider.meter.total_cost.normalize())} USD")
    for difference in differences:
        say(f"DIFFERENT: {difference}")
    met = {status for visitor in visitors for status in visitor.statuses}
    right = not differences and booked == provider.meter.total_cost and met == {200, 402, 429}
    say("Equal, call by call, to the last digit." if right else f"Not as it should be; statuses met: {sorted(met)}")
    return right


def _settled(guard: Guard, count: int, began: datetime) -> list[UsageRecord]:
    """All records since, once there are so many: a client has its answer a moment before the gateway's request ends."""
    records: list[UsageRecord] = []
    for _ in range(500):
        guard.sync.flush()
        records = list(guard.sync.records(since=began))
        if len(records) >= count:
            break
        time.sleep(0.01)
    return records


def _differences(records: list[UsageRecord], charged: list[MeteredCall]) -> list[str]:
    """What the ledger and the provider's books disagree on."""
    booked = {record.usage.response_id: record for record in records}
    found = [] if len(booked) == len(records) else ["a call is booked twice"]
    for call in charged:
        record = booked.pop(call.response_id, None)
        if record is None:
            found.append(f"{call.response_id} is not booked")
        elif (record.usage.input_tokens, record.usage.output_tokens, record.cost) != (
            call.input_tokens,
            call.output_tokens,
            call.cost,
        ):
            found.append(f"{call.response_id} is booked with {record.cost} USD, the provider charges {call.cost}")
    return found + [f"{identifier} is booked, but the provider never charged it" for identifier in booked]


_CURL = """\
curl -i {url}/v1/chat/completions -H 'Authorization: Bearer demo' -H 'Content-Type: application/json' -d '
  {{"model": "gpt-4o-mini", "messages": [{{"role": "user", "content": "Hello"}}],
   "customer_params": {{"customer_identifier": "me", "rate_limit": 3}}}}'"""


def _keep_serving(url: str, password: str) -> None:
    say("")
    say(f"The console is at {url}/console/ and the password for this run is {password}")
    say("Still running. Three of these pass, the fourth is a 429. Ctrl-C ends it.")
    say("")
    for line in _CURL.format(url=url).splitlines():
        say(line)
    _wait()


def _wait() -> None:
    """Until Ctrl-C or the signal that ends services."""
    ended = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        while not ended.wait(0.5):  # in slices, so that a signal is handled
            pass
    except KeyboardInterrupt:
        say("")
    finally:
        signal.signal(signal.SIGTERM, previous)
