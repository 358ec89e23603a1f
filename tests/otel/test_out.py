"""What the guard writes on the app's own spans."""

from __future__ import annotations

import asyncio
import base64
import sys
import types
from collections.abc import Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import openai
import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from respan_guard import Guard, GuardMiddleware, Usage, UsageRecord
from respan_guard.exporters.webhook import SignedSender
from respan_guard.notifications import BudgetEvent, BudgetWebhook
from respan_guard.testing import FakeClock
from respan_guard.tracing import untraced

from .conftest import MakeMetered
from .support import Metered, call

CUSTOMER = "respan.customer_params.customer_identifier"


class Traced:
    """What an ASGI instrumentation does: a server span around the app."""

    def __init__(self, app: Any, provider: TracerProvider) -> None:
        self.app = app
        self.tracer = provider.get_tracer("opentelemetry.instrumentation.asgi")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self.tracer.start_as_current_span(f"POST {scope['path']}", kind=SpanKind.SERVER):
            await self.app(scope, receive, send)


@contextmanager
def served(metered: Metered, endpoint: Any, **options: Any) -> Any:
    """A traced app behind the guard: a client, and the server spans that ended."""
    exporter = InMemorySpanExporter()
    metered.provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = Starlette(routes=[Route("/ask", endpoint, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=metered.guard, **options)

    def spans() -> list[ReadableSpan]:
        return [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]

    with TestClient(Traced(app, metered.provider)) as client:
        yield client, spans


def test_an_admitted_request(make_metered: MakeMetered) -> None:
    """Customer and decision at once, what spans in it cost when it is over; children inherit the customer."""
    metered = make_metered(default_limits={"period_budget": 10})

    async def ask(request: Request) -> Response:
        await metered.guard.admit("org_1")
        for number in (1, 2):
            metered.see(call(gen_ai__response__id=f"chatcmpl-{number:024d}"))
        return JSONResponse({})

    with served(metered, ask) as (client, spans):
        assert client.post("/ask").status_code == 200
        (span,) = spans()
    assert dict(span.attributes) == {
        CUSTOMER: "org_1",
        "respan_guard.decision": "allowed",
        "respan_guard.cost": 0.008,
    }
    assert {record.customer_identifier for record in metered.records()} == {"org_1"}


def test_a_refused_request(make_metered: MakeMetered) -> None:
    """The decision, the limits that refused, and an event; the answer is the refusal."""
    metered = make_metered(default_limits={"total_budget": 0})

    async def ask(request: Request) -> Response:
        return JSONResponse({})

    with served(metered, ask, identify="header:x-customer", include=["/*"]) as (client, spans):
        assert client.post("/ask", headers={"x-customer": "org_1"}).status_code == 402
        (span,) = spans()
    attributes = dict(span.attributes)
    assert attributes == {
        CUSTOMER: "org_1",
        "respan_guard.decision": "refused",
        "respan_guard.limit": ("total_budget",),
    }
    (event,) = span.events
    assert event.name == "respan_guard.refusal"
    assert dict(event.attributes or {}) == {
        "respan_guard.limit": ("total_budget",),
        "respan_guard.reason": "exhausted",
    }


def test_shadow_mode_shows(make_metered: MakeMetered) -> None:
    """Let in against a limit: the span says so."""
    metered = make_metered(default_limits={"total_budget": 0}, mode="shadow")

    async def ask(request: Request) -> Response:
        await metered.guard.admit("org_1")
        return JSONResponse({})

    with served(metered, ask) as (client, spans):
        assert client.post("/ask").status_code == 200
        (span,) = spans()
    assert span.attributes["respan_guard.decision"] == "shadow"
    assert span.attributes["respan_guard.limit"] == ("total_budget",)


def test_a_wrapped_clients_calls_are_in_the_cost(make_metered: MakeMetered, url: str) -> None:
    """The cost is that of all calls within the request, by hand, by a wrapped client or seen as spans."""
    metered = make_metered(default_limits={"period_budget": 10})
    first = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k")
    client = metered.guard.wrap(first)

    async def ask(request: Request) -> Response:
        admission = await metered.guard.admit("org_1")
        await client.embeddings.create(model="text-embedding-3-small", input="hello " * 100)
        await admission.record(Usage(model="tool", cost=Decimal("0.5")))
        await first.close()
        return JSONResponse({})

    with served(metered, ask) as (browser, spans):
        assert browser.post("/ask").status_code == 200
        (span,) = spans()
    total = sum((record.cost or Decimal(0) for record in metered.records()), Decimal(0))
    assert total > Decimal("0.5")
    assert span.attributes["respan_guard.cost"] == float(total)


def test_a_refused_call_is_an_event_where_it_was_made(make_metered: MakeMetered, url: str) -> None:
    """A wrapped client's refusal is on the span that is current, in a worker, too."""
    metered = make_metered(default_limits={"total_budget": 0})
    first = openai.OpenAI(base_url=f"{url}/v1", api_key="k")
    with first, metered.guard.wrap(first) as client, metered.guard.on_behalf_of("org_1"):
        span = metered.start({}, "worker", kind=SpanKind.INTERNAL)
        with trace.use_span(span, end_on_exit=True), pytest.raises(openai.APIStatusError):
            client.embeddings.create(model="text-embedding-3-small", input="hello")
    assert isinstance(span, ReadableSpan)
    assert [event.name for event in span.events] == ["respan_guard.refusal"]


def test_respans_propagation_is_told(make_metered: MakeMetered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Respan's SDK is loaded, its propagation carries the customer within the request, and only there."""
    told: list[str] = []

    @contextmanager
    def propagate_attributes(**attributes: str) -> Any:
        told.append(f"in {attributes['customer_identifier']}")
        yield
        told.append("out")

    factory = types.ModuleType("respan_tracing.utils.span_factory")
    factory.propagate_attributes = propagate_attributes  # type: ignore[attr-defined]  # as in respan-tracing 2.24
    factory.read_propagated_attributes = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "respan_tracing", types.ModuleType("respan_tracing"))
    monkeypatch.setitem(sys.modules, "respan_tracing.utils.span_factory", factory)
    metered = make_metered()

    async def ask(request: Request) -> Response:
        told.append("app")
        return JSONResponse({})

    with served(metered, ask, identify="header:x-customer", include=["/*"]) as (client, _):
        assert client.post("/ask", headers={"x-customer": "org_1"}).status_code == 200
    assert told == ["in org_1", "app", "out"]


def test_without_tracing_nothing_is_written(make_metered: MakeMetered) -> None:
    """No span is current, or none that is recorded: no attribute, no exception."""
    metered = make_metered()

    async def ask(request: Request) -> Response:
        await metered.guard.admit("org_1")
        return JSONResponse({})

    app = Starlette(routes=[Route("/ask", ask, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=metered.guard)
    with TestClient(app) as client:
        assert client.post("/ask").status_code == 200


def seen() -> set[object]:
    """What instrumentations are told here, under the keys that they look for."""
    return {context.get_value(key) for key in ("suppress_instrumentation", "suppress_http_instrumentation")}


def test_untraced_tells_instrumentations() -> None:
    """Within `untraced` instrumentations see that they are not wanted, and behind it that they are."""
    with untraced():
        assert seen() == {True}
    assert seen() == {None}


async def test_exports_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What exporters and webhooks send makes no spans; a function that is told of budgets is the app's own work."""
    found: dict[str, set[object]] = {}

    class Mine:
        name = "mine"

        async def export(self, batch: Sequence[UsageRecord]) -> None:
            found[self.name] = seen()

    async def send(*_: object) -> None:
        found["webhook"] = seen()

    def told(event: BudgetEvent) -> None:
        found["function"] = seen()

    async with Guard("memory://", default_limits={"total_budget": 1}, clock=FakeClock()) as guard:
        guard.add_exporter(Mine())
        monkeypatch.setattr(SignedSender, "send", send)
        secret = f"whsec_{base64.b64encode(bytes(32)).decode()}"
        guard.on_budget(BudgetWebhook("https://hooks.example/budgets", secret), name="post")
        guard.on_budget(told, name="function")
        await asyncio.sleep(0.05)  # so that both begin before there is news
        await guard.record(Usage(model="m", cost=1), "c1")
    assert found == {"mine": {True}, "webhook": {True}, "function": {None}}
