"""The spans of real instrumentations, alone and two at a time, against what the provider charged for.

`record_corpus.py` wrote them down: each family in an environment that it can be installed in.
"""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import UsageRecord

from .conftest import MakeMetered
from .replay import replay

DATA = Path(__file__).parents[1] / "data" / "otel"
CASES = [case for path in sorted(DATA.glob("*.json")) for case in json.loads(path.read_text())]
# What no span tells: the calls are charged, and recorded with their usage marked as unknown.
UNTOLD = {"chat-stream-no-usage", "chat-broken-off", "messages-broken-off"}
UNTOLD_BY = {
    # LangChain's callbacks get the output tokens of an Anthropic stream only.
    ("official-langchain", "messages-stream"),
    ("openinference-langchain", "messages-stream"),
    ("traceloop-langchain", "messages-stream"),
}
# Calls that make no span at all: nothing can be seen.
UNSEEN = {("openai-v2", "responses"), ("openai-v2", "responses-stream")}
# Counts that a family never tells of streams; no price depends on them.
REASONING_UNTOLD = {"traceloop-openai", "traceloop-langchain"}
KINDS = ("cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens", "reasoning_tokens")


def name_of(case: dict[str, Any]) -> str:
    """How a case is called."""
    return f"{'+'.join(case['families'])} {case['calls']} {case['case']}"


def untold(case: dict[str, Any]) -> bool:
    """Whether at least one of the case's calls is charged without any span that tells its usage."""
    if "anthropic-native" in case["families"] and case["case"] == "messages-stream":
        return False
    return case["case"] in UNTOLD or any((family, case["case"]) in UNTOLD_BY for family in case["families"])


def same(record: UsageRecord, served: dict[str, Any], families: list[str]) -> bool:
    """Whether a record says what the provider charged, but for what it says that it does not know."""
    usage = record.usage
    unknown = set((usage.metadata or {}).get("not_reported", ()))
    if REASONING_UNTOLD & set(families):
        unknown.add("reasoning_tokens")
    return (
        usage.input_tokens == served["input_tokens"]
        and usage.output_tokens == served["output_tokens"]
        and all(getattr(usage, kind) == served[kind] or kind in unknown for kind in KINDS)
        and (record.cost == Decimal(served["cost"]) or bool(unknown - {"reasoning_tokens"}))
        and record.model.startswith(served["model"])
        and usage.provider == served["provider"]
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_call_is_one_record(case: dict[str, Any], make_metered: MakeMetered) -> None:
    """Recorded calls are calls served; tokens and cost are the provider's, or are marked as not known."""
    metered = make_metered()
    with metered.guard.on_behalf_of("c1"):
        replay(metered.processor, case["events"])
    records = metered.records()
    served = [] if any((family, case["case"]) in UNSEEN for family in case["families"]) else list(case["served"])
    assert len(records) == len(served), [record.id for record in records]
    assert {record.customer_identifier for record in records} <= {"c1"}
    marked = [record for record in records if record.kind == "presumed"]
    assert bool(marked) == (untold(case) and bool(served))
    assert all(record.usage.estimated for record in marked)
    for record in records:
        if record.kind == "usage":
            (found, *_) = [one for one in served if same(record, one, case["families"])] or [None]
            assert found is not None, (record.model, record.cost, record.usage.to_dict())
            served.remove(found)
    assert len(served) == len(marked)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_played_twice_counts_once(case: dict[str, Any], make_metered: MakeMetered) -> None:
    """Spans that are handed in a second time (a buffer that is replayed) change nothing."""
    metered = make_metered()
    ends = [event for event in case["events"] if event["event"] == "end"]
    with metered.guard.on_behalf_of("c1"):
        replay(metered.processor, case["events"])
        before = Counter(record.id for record in metered.records())
        replay(metered.processor, ends)
    assert Counter(record.id for record in metered.records()) == before


def test_the_corpus_is_whole() -> None:
    """Every family that the issue names is in it, and the pairs that see one call twice."""
    families = {family for case in CASES for family in case["families"]}
    assert families >= {
        *(f"official-{name}" for name in ("openai", "anthropic", "langchain", "google", "agents")),
        *(f"traceloop-{name}" for name in ("openai", "anthropic", "langchain")),
        *(f"openinference-{name}" for name in ("openai", "anthropic", "langchain", "litellm", "agents")),
        *("openai-v2", "pydantic-ai", "logfire", "langfuse", "litellm"),
        *("respan-openai", "respan-anthropic", "anthropic-native"),
    }
    assert len(CASES) > 300
    assert sum(len(case["families"]) > 1 for case in CASES) > 120
