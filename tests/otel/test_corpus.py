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


def differences(records: list[UsageRecord], case: dict[str, Any]) -> list[str]:
    """What is wrong with the records of a case: number, customer, tokens, cost, and what is marked as unknown."""
    unseen = any((family, case["case"]) in UNSEEN for family in case["families"])
    served: list[dict[str, Any]] = [] if unseen else list(case["served"])
    wrong = []
    if len(records) != len(served):
        wrong.append(f"{len(records)} records of {len(served)} calls: {[record.id for record in records]}")
    if any(record.customer_identifier != "c1" for record in records):
        wrong.append(f"customers {[record.customer_identifier for record in records]}")
    marked = [record for record in records if record.kind == "presumed"]
    if bool(marked) != (untold(case) and bool(served)) or not all(record.usage.estimated for record in marked):
        wrong.append(f"marked as unknown: {[record.usage.to_dict() for record in marked]}")
    for record in records:
        if record.kind == "usage":
            found = next((one for one in served if same(record, one, case["families"])), None)
            if found is None:
                wrong.append(f"no call was {record.model} for {record.cost}: {record.usage.to_dict()}")
            else:
                served.remove(found)
    if len(served) != len(marked):
        wrong.append(f"not recorded: {served}")
    return wrong


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_call_is_one_record(case: dict[str, Any], make_metered: MakeMetered) -> None:
    """Recorded calls are calls served; tokens and cost are the provider's, or are marked as not known."""
    metered = make_metered()
    with metered.guard.on_behalf_of("c1"):
        replay(metered.processor, case["events"])
    assert differences(metered.records(), case) == []


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
