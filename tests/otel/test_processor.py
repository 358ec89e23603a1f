"""The processor among its kind: what ends twice, never, elsewhere, within a collection, in a child process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from respan_guard import Guard
from respan_guard.backends import registry
from respan_guard.errors import ConfigurationError
from respan_guard.otel import GuardSpanProcessor
from respan_guard.testing import FakeClock
from tests.guard.faulty import FaultyBackend

from .conftest import MakeMetered
from .support import LANGCHAIN, OFFICIAL, RESPONSE_ID, Metered, call

ROOT = Path(__file__).parents[2]


def test_a_call_is_recorded_with_its_price(metered: Metered) -> None:
    """Tokens, model, provider, ids and the customer in force; priced as any other record."""
    with metered.guard.on_behalf_of("org_1"):
        span = metered.see(call())
    (record,) = metered.records()
    assert record.customer_identifier == "org_1"
    assert record.cost == Decimal("0.004")
    assert record.id == f"openai:{RESPONSE_ID}"
    assert (record.source, record.kind, record.model, record.provider) == ("span", "usage", "gpt-4o", "openai")
    usage = record.usage
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens) == (1000, 200, 400)
    assert usage.span_id == f"{span.get_span_context().span_id:016x}"
    assert usage.trace_id == f"{span.get_span_context().trace_id:032x}"
    assert usage.response_model == "gpt-4o-2024-08-06"


def test_other_spans_are_none_of_ours(metered: Metered) -> None:
    """Spans of requests, queries, agents, tools and chains make no record, even with token counts on them."""
    metered.see({"http.request.method": "POST", "gen_ai.usage.input_tokens": 5})
    for operation in (
        "invoke_agent",
        "invoke_workflow",
        "create_agent",
        "execute_tool",
        "plan",
        "retrieval",
        "search_memory",
    ):
        metered.see(call(gen_ai__operation__name=operation))
    metered.see({"openinference.span.kind": "AGENT", "llm.token_count.prompt": 5}, LANGCHAIN)
    metered.see({"langfuse.observation.type": "span"}, "langfuse-sdk")
    assert metered.records() == []


def test_ended_twice_is_once(metered: Metered) -> None:
    """A span that a buffer hands in again is not counted again, also where no response id tells."""
    ended: list[ReadableSpan] = []

    class Keep(SimpleSpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    metered.provider.add_span_processor(Keep(InMemorySpanExporter()))
    metered.see(call(gen_ai__response__id=None))
    metered.processor.on_end(ended[0])
    assert len(metered.records()) == 1


def test_without_a_start(metered: Metered) -> None:
    """Spans that are handed in finished are read as any other, with no scope, no context, plain or no attributes."""
    metered.processor.on_end(ReadableSpan("x", None))
    context = trace.SpanContext(7, 8, is_remote=False)
    metered.processor.on_end(ReadableSpan("x", context, attributes=None))
    context = trace.SpanContext(7, 9, is_remote=False)
    metered.processor.on_end(ReadableSpan("x", context, attributes=call(user__id="org_9"), end_time=5, start_time=1))
    (record,) = metered.records()
    assert record.customer_identifier == "org_9"


def test_what_was_not_seen_to_start_takes_nobody_from_where_it_ends(metered: Metered) -> None:
    """A collection may end a span anywhere: the customer of that code is not the span's."""
    with metered.guard.on_behalf_of("somebody_else"):
        context = trace.SpanContext(7, 9, is_remote=False)
        metered.processor.on_end(ReadableSpan("x", context, attributes=call(), end_time=5, start_time=1))
    (record,) = metered.records()
    assert record.customer_identifier == ""


def test_respan_hands_in_spans_from_where_the_call_was_made(metered: Metered) -> None:
    """Respan's OpenAI instrumentation never starts a span; the customer is who is in force where it hands it in."""
    attributes = call(gen_ai__operation__name=None, llm__request__type="chat", respan__entity__log_type="chat")
    with metered.guard.on_behalf_of("org_1"):
        context = trace.SpanContext(7, 9, is_remote=False)
        metered.processor.on_end(ReadableSpan("x", context, attributes=attributes, end_time=5, start_time=1))
    (record,) = metered.records()
    assert record.customer_identifier == "org_1"


def test_nothing_that_a_span_holds_raises(metered: Metered, caplog: pytest.LogCaptureFixture) -> None:
    """Values of every wrong kind make the usage unknown; the app sees no exception, the log no error."""
    odd: list[Any] = ["None", "", "many", -1, 1e300, float("nan"), True, ("a",), b"x", "1" * 400, 2**70]
    for number, value in enumerate(odd):
        attributes = call(gen_ai__response__id=f"chatcmpl-odd-{number:020d}")
        for name in list(attributes):
            if name not in ("gen_ai.operation.name", "gen_ai.response.id"):
                attributes[name] = value
        metered.processor.on_end(
            ReadableSpan("x", trace.SpanContext(7, number + 1, is_remote=False), attributes=attributes)
        )
    assert {record.kind for record in metered.records()} == {"presumed"}
    assert not [line for line in caplog.records if line.levelname == "ERROR"]


@pytest.mark.parametrize(
    "took",
    [float("nan"), float("inf"), 1e300, -1.0, 10**5000, "long"],
    ids=["no number", "infinite", "too long", "negative", "too many digits", "text"],
)
def test_a_duration_that_can_be_none(took: Any, metered: Metered) -> None:
    """Logfire's log says how long its call took; where it can't have, the call is recorded all the same."""
    metered.see(call(logfire__span_type="log", duration=took), "logfire.openai")
    (record,) = metered.records()
    assert record.cost == Decimal("0.004")
    assert (record.usage.latency_ms or 0) < 86_400_000


def test_counts_as_text_and_floats(metered: Metered) -> None:
    """Some write counts as "1000" or 1000.0."""
    metered.see(call(gen_ai__usage__input_tokens="1000", gen_ai__usage__output_tokens=200.0))
    (record,) = metered.records()
    assert record.cost == Decimal("0.004")


def test_a_stream_that_is_read_in_another_thread(metered: Metered) -> None:
    """Who started the call pays, not whoever works where the stream ends."""
    with metered.guard.on_behalf_of("org_1"):
        span = metered.start(call())

    def finish() -> None:
        with metered.guard.on_behalf_of("org_2"):
            span.end()

    thread = threading.Thread(target=finish)
    thread.start()
    thread.join()
    (record,) = metered.records()
    assert record.customer_identifier == "org_1"


def test_attributes_that_were_pushed_out(make_metered: MakeMetered) -> None:
    """A span may hold 128 attributes, and drops the oldest: what named the customer at its start is still known."""
    metered = make_metered()
    provider = TracerProvider(shutdown_on_exit=False, span_limits=SpanLimits(max_attributes=12))
    provider.add_span_processor(metered.processor)
    span = provider.get_tracer(OFFICIAL).start_span("chat", attributes={"user.id": "org_7"})
    for number in range(20):
        span.set_attribute(f"filler.{number}", "x")
    for name, value in call().items():
        span.set_attribute(name, value)
    span.end()
    assert "user.id" not in span.attributes  # type: ignore[attr-defined]  # the SDK's has them
    (record,) = metered.records()
    assert record.customer_identifier == "org_7"


def test_ten_thousand_spans_ended_within_collections(make_metered: MakeMetered) -> None:
    """Abandoned streams end their spans in the garbage collector, wherever that runs: none is lost, nothing hangs."""
    metered = make_metered(default_limits={"rate_limit": "1000000/minute"})
    count = 10_000

    class Stream:
        def __init__(self, number: int) -> None:
            self.me = self  # only a collection gets at it
            attributes = call(gen_ai__response__id=f"chatcmpl-{number:024d}", gen_ai__usage__input_tokens=1000 + number)
            self.span = metered.start(attributes)

        def __del__(self) -> None:
            self.span.end()

    gc.collect()
    threshold = gc.get_threshold()
    gc.set_threshold(50, 5, 5)  # collections within everything, our own code included
    try:
        with metered.guard.on_behalf_of("org_1"):
            for number in range(count):
                Stream(number)
                if number % 100 == 0:
                    with metered.guard.sync.admit("org_1"):
                        pass
        gc.collect()
    finally:
        gc.set_threshold(*threshold)
    records = metered.records()
    assert len(records) == count
    assert {record.customer_identifier for record in records} == {"org_1"}


def test_a_collection_while_the_lock_is_held(metered: Metered) -> None:
    """Ending a span, an admission, or flushing from within our own work neither waits for itself nor loses anything."""
    inbox = metered.processor._inbox
    admitted = metered.guard.sync.admit("org_1")
    with metered.guard.on_behalf_of("org_1"):
        span = metered.start(call())
    entered = admitted.__enter__()

    def within() -> bool:
        span.end()
        entered.release()
        metered.processor.force_flush()
        return True

    assert inbox.do(within)
    admitted.__exit__(None, None, None)
    (record,) = metered.records()
    assert record.customer_identifier == "org_1"


def test_abandoned_spans_take_their_memory_with_them(metered: Metered) -> None:
    """Spans that are dropped without an end leave nothing behind."""
    for _ in range(100):  # what is cached once
        metered.start({"a": 1}, "some.scope")
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10_000):
            metered.start({"a": 1}, "some.scope")
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(metered.processor._running) == 0
    assert grown < 200_000


def test_abandoned_streams_do_not_pile_up(make_metered: MakeMetered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that are dropped faster than they can be read wait in bounded number: new ones make way."""
    monkeypatch.setattr("respan_guard.otel.inbox._MOST_WAITING", 200, raising=False)
    metered = make_metered()
    most = 0
    for _ in range(8_000):
        metered.start({"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o"}, context=Context())
        most = max(most, len(metered.processor._inbox._items))
    assert most < 1_000
    assert len(metered.records()) == 8_000


def test_spans_wait_while_storage_is_slow(make_metered: MakeMetered, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes of spans does not pile up in front of a slow store: they are read as it takes their records."""
    monkeypatch.setattr("respan_guard.otel.processor._CROWD", 600)
    monkeypatch.setitem(registry._BUILT_IN, "faulty", f"{FaultyBackend.__module__}:FaultyBackend")
    metered, store = make_metered("faulty://slow"), FaultyBackend("faulty://slow")
    store.delay = 0.3
    most = 0
    for number in range(6_000):
        with metered.guard.on_behalf_of("org_1"):
            metered.see(call(gen_ai__response__id=f"chatcmpl-{number:0>32}"))
    home = metered.guard.lane().home
    assert home is not None
    for _ in range(100):
        most = max(most, home.waiting)
        time.sleep(0.01)
    assert len(metered.processor._inbox._items) > 0
    assert most < 2_000
    store.delay = 0
    assert metered.processor.force_flush()
    assert len(metered.records()) == 6_000
    FaultyBackend.stores.clear()


def test_no_home_and_no_thread_for_one_stops_no_spans(
    make_metered: MakeMetered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process at the limit of its threads goes on reading spans."""
    metered = make_metered()

    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(metered.guard, "lane", refuse)
        assert not metered.processor._crowded()
    metered.see(call())
    assert len(metered.records()) == 1


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_a_million_abandoned_streams(tmp_path: Path) -> None:
    """A million streams, known for calls, dropped while running at full speed: each is recorded, memory stays flat.

    Nobody flushes, and storage is slower than they come: what waits for it is bounded, and the rest is on disk.
    """
    guard = Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path)
    processor = GuardSpanProcessor(guard)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    tracer = provider.get_tracer(OFFICIAL)
    begun = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o", "gen_ai.input.messages": "x" * 500}
    waiting, sizes = [], []
    parts, each = 10, 100_000
    for _ in range(parts):
        for number in range(each):
            tracer.start_span("chat", context=Context(), attributes=begun)
            if number % 1000 == 0:
                waiting.append(len(processor._inbox._items))
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert max(waiting) < 10_000
    assert sizes[-1] - sizes[1] < 50_000_000
    assert processor.force_flush(900_000)
    assert sum(row.calls for row in guard.sync.usage("customer")) == parts * each
    guard.sync.close()


def test_a_call_whose_span_never_ends_is_marked(metered: Metered) -> None:
    """It was begun, so it may have been paid for: recorded with unknown cost, for who began it."""
    with metered.guard.on_behalf_of("org_1"):
        metered.start({"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o"})
    gc.collect()
    (record,) = metered.records()
    assert (record.customer_identifier, record.kind, record.cost, record.model) == ("org_1", "presumed", None, "gpt-4o")
    assert record.usage.metadata == {"span": "never ended", "usage": "missing"}


def test_a_thread_starts_ends_and_starts_again(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads spans is there while there are some, and nothing is flushed by hand."""
    monkeypatch.setattr("respan_guard.otel.inbox._IDLE", 0.05)

    def recorded() -> int:
        return len(list(metered.guard.sync.records()))

    with metered.guard.on_behalf_of("org_1"):
        metered.see(call())
        wait_for(lambda: recorded() == 1)
        inbox = metered.processor._inbox
        wait_for(lambda: not inbox._draining.locked())
        metered.see(call(gen_ai__response__id="chatcmpl-another-0123456789abcdef"))
        wait_for(lambda: recorded() == 2)


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until it is so."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)


def test_shutdown_stores_and_later_spans_are_taken(metered: Metered) -> None:
    """After `shutdown` all that ended is stored; a span that ends behind it is still a call that was paid for."""
    metered.see(call())
    metered.provider.shutdown()
    assert len(list(metered.guard.sync.records())) == 1
    metered.see(call(gen_ai__response__id="chatcmpl-another-0123456789abcdef"))
    assert len(metered.records()) == 2


def test_a_store_that_stalls_holds_nothing_up(make_metered: MakeMetered, tmp_path: Path) -> None:
    """Spans end at once while storage does not answer, nothing is lost, and `force_flush` says that it isn't stored."""
    path = tmp_path / "guard.db"
    metered = make_metered(f"sqlite:///{path}", storage_timeout=0.2)
    with metered.guard.on_behalf_of("org_1"):
        metered.see(call())
    assert len(metered.records()) == 1
    import sqlite3

    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        started = time.monotonic()
        with metered.guard.on_behalf_of("org_1"):
            for number in range(500):
                metered.see(call(gen_ai__response__id=f"chatcmpl-{number:024d}"))
        assert time.monotonic() - started < 5
        assert not metered.processor.force_flush(500)
    finally:
        other.execute("ROLLBACK")
        other.close()
    wait_for(lambda: len(list(metered.guard.sync.records())) == 501)


async def test_flushing_on_the_guards_own_loop_says_so(tmp_path: Path) -> None:
    """It can't wait for the loop that it blocks; the records are in the guard's inbox."""
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path) as guard:
        processor = GuardSpanProcessor(guard)
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(processor)
        provider.get_tracer(OFFICIAL).start_span("chat", attributes=call(user__id="org_1")).end()
        assert not processor.force_flush()
        await guard.flush()
        assert [record.customer_identifier async for record in guard.records()] == ["org_1"]


SCRIPT = """
import os, sys
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from respan_guard import Guard, GuardSpanProcessor
sys.path.insert(0, {root!r})
from tests.guard.faulty import FaultyBackend
from tests.otel.support import OFFICIAL, call
guard = Guard({storage!r}, journal_dir={journal!r})
provider = TracerProvider(sampler=ALWAYS_ON)
provider.add_span_processor(GuardSpanProcessor(guard))
tracer = provider.get_tracer(OFFICIAL)

def see(number):
    tracer.start_span("chat", attributes=call(gen_ai__response__id=f"chatcmpl-{{number:024d}}", user__id="c")).end()
"""


def run(body: str, tmp_path: Path) -> list[str]:
    """Run a script that meters into a file; which calls are recorded in the end."""
    storage = f"sqlite:///{tmp_path / 'guard.db'}"
    script = SCRIPT.format(root=str(ROOT), storage=storage, journal=str(tmp_path / "journal")) + textwrap.dedent(body)
    # From Python 3.12 on, a fork of a process with threads is warned of; these are about what comes of one.
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    guard = Guard(storage, journal_dir=tmp_path / "journal")
    guard.sync.flush()
    found = sorted(record.id.removeprefix("openai:chatcmpl-").lstrip("0") for record in guard.sync.records())
    guard.sync.close()
    return found


@pytest.mark.parametrize("shutdown", ["", "provider._atexit_handler = None"])
def test_the_interpreter_exits(shutdown: str, tmp_path: Path) -> None:
    """What ended just before is stored, whether or not the tracer provider shuts down at exit."""
    assert run(f"{shutdown}\nfor n in range(1, 6): see(n)", tmp_path) == ["1", "2", "3", "4", "5"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_after_the_start(tmp_path: Path) -> None:
    """Preloading servers fork: parent and children each record their own spans, none of them twice."""
    body = """
    see(1)
    children = []
    for child in (2, 3):
        pid = os.fork()
        if not pid:
            see(child)
            provider.force_flush()
            os._exit(0)
        children.append(pid)
    see(4)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    """
    assert run(body, tmp_path) == ["1", "2", "3", "4"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("child", ["del span; gc.collect()", "span.set_attributes(call()); span.end()", "see(2)"])
def test_a_fork_while_a_call_is_under_way(child: str, tmp_path: Path) -> None:
    """The parent's call is the parent's to record, whatever becomes of the child's copy of its span."""
    body = f"""
    import gc
    span = tracer.start_span("chat", attributes={{"gen_ai.operation.name": "chat", "user.id": "c"}})
    pid = os.fork()
    if not pid:
        {child}
        provider.force_flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    span.set_attributes(call(gen_ai__response__id="chatcmpl-" + "1".zfill(24)))
    span.end()
    """
    assert run(body, tmp_path) == (["1", "2"] if child == "see(2)" else ["1"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_goes_on_within_its_parents_span(tmp_path: Path) -> None:
    """Whose the work is that a forked worker does is still known by the span that it was forked in."""
    body = """
    from opentelemetry.trace import set_span_in_context
    around = provider.get_tracer("app").start_span("job", attributes={"user.id": "c"})
    pid = os.fork()
    if not pid:
        tracer.start_span("chat", attributes=call(), context=set_span_in_context(around)).end()
        provider.force_flush()
        assert [record.customer_identifier for record in guard.sync.records()] == ["c"]
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    """
    assert run(body, tmp_path) == [RESPONSE_ID.removeprefix("chatcmpl-").lstrip("0")]


def test_the_kill_switch_is_obeyed(metered: Metered) -> None:
    """Switched off, calls that end are not metered; switched back, they are."""
    metered.guard.sync.switch("off")
    metered.see(call())
    assert metered.records() == []
    metered.guard.sync.switch(None)
    metered.see(call())
    assert len(metered.records()) == 1


def test_off_means_off(make_metered: MakeMetered) -> None:
    """With `mode="off"` nothing is read or kept."""
    metered = make_metered(mode="off")
    metered.see(call())
    assert metered.processor.force_flush()
    assert not metered.processor._running


def test_two_tracer_providers_one_guard(make_metered: MakeMetered) -> None:
    """An app and Logfire may each have their own: a call that both see is one record."""
    metered = make_metered()
    second = TracerProvider(shutdown_on_exit=False)
    second.add_span_processor(GuardSpanProcessor(metered.guard))
    with metered.guard.on_behalf_of("org_1"):
        outer = metered.start(call(gen_ai__response__id=None))
        second.get_tracer(LANGCHAIN).start_span("x", attributes=call(gen_ai__response__id=None)).end()
        outer.end()
    assert len(metered.records()) == 1


def test_the_sdk_is_needed_and_named(tmp_path: Path) -> None:
    """Without the SDK the error says what to install, and everything else works."""
    (tmp_path / "opentelemetry").mkdir()
    code = """
    import sys
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("opentelemetry.sdk"):
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Missing())
    from respan_guard import Guard, ConfigurationError_ if False else Guard
    """
    code = textwrap.dedent(code).replace(", ConfigurationError_ if False else Guard", "")
    code += textwrap.dedent("""
    from respan_guard.errors import ConfigurationError
    try:
        from respan_guard import GuardSpanProcessor
    except ConfigurationError as error:
        print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "GuardSpanProcessor needs OpenTelemetry's SDK: pip install 'respan-guard[otel]'"


def test_arguments_that_cant_work(metered: Metered) -> None:
    """They are named."""
    with pytest.raises(ConfigurationError, match="must be a Guard"):
        GuardSpanProcessor("guard")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="must be a list"):
        GuardSpanProcessor(metered.guard, customer_sources="user.id")


def test_time_is_the_guards(make_metered: MakeMetered) -> None:
    """A record's time and day come from the guard's clock, not from the span's."""
    clock = FakeClock()
    metered = make_metered(clock=clock)
    metered.see(call())
    (record,) = metered.records()
    assert record.time.timestamp() * 1000 == clock.now_ms()


def test_only_this_part_needs_the_sdk() -> None:
    """No module outside of `respan_guard/otel` imports OpenTelemetry's SDK."""
    package = ROOT / "respan_guard"
    found = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if "opentelemetry.sdk" in path.read_text()
        and "import opentelemetry.sdk" in path.read_text().replace("from", "import")
    }
    assert found <= {"otel"}
