"""Which spans are LLM calls, and what is special about whose: one row per family of instrumentations.

What a row says was measured on real spans (`tests/data/otel`); the names of attributes are in `names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FAMILIES", "LITELLM", "MARKERS", "UNKNOWN", "Family", "family_of", "is_call"]

Layer = Literal["sdk", "framework", "callback", "native"]


@dataclass(frozen=True, slots=True)
class Family:
    """One family of instrumentations, as what differs from the rule that counts are inclusive and complete.

    Attributes:
        name: What people call it.
        scopes: Beginnings of its instrumentation scopes' names.
        layer: What it instruments. One call may be seen at several layers, by one family each.
        exclusive: Its input tokens leave cached and cache-write ones out (Anthropic's way to count).
        lacks: Token kinds that it never reports; a record made from it says so.
        extra_output: Streams report so many output tokens too many: the placeholder that a stream begins with is
            added to its last word.
        thoughts_apart: Output leaves thoughts out, which the total has.
        ends_in_log: A stream's span has no usage; a second span, of type "log", brings it when the stream is over.
        injects: It hands in finished spans, from where the call was made: no start is ever seen.
        reply_json: Its `output.value` is the provider's reply, which has the response id that no attribute has. What
            others have there is the answer's text, hence a user's word, that must not choose ids.
        invents_ids: Its response ids may be its own, not the provider's.
        aside: Its spans are not current while the call is made, or are made behind it: those of other families that see
            the same call stand beside them, not within.
        stops: What an exception at a span's start does: "yes", "no", or "late" if the call has been made by then.
    """

    name: str
    scopes: tuple[str, ...] = ()
    layer: Layer = "sdk"
    exclusive: bool = False
    lacks: tuple[str, ...] = ()
    extra_output: int = 0
    thoughts_apart: bool = False
    ends_in_log: bool = False
    injects: bool = False
    reply_json: bool = False
    invents_ids: bool = False
    aside: bool = False
    stops: Literal["yes", "no", "late"] = "no"


_CACHE = ("cache_read_tokens", "cache_write_tokens", "reasoning_tokens")

FAMILIES = (
    Family("Anthropic's own spans", ("com.anthropic.sdk.python",), "native", aside=True),
    Family("OpenTelemetry: openai-v2", ("opentelemetry.instrumentation.openai_v2",), lacks=_CACHE, stops="yes"),
    Family("OpenTelemetry: LangChain", ("opentelemetry.instrumentation.genai.langchain",), "framework"),
    Family("OpenTelemetry: openai-agents", ("opentelemetry.instrumentation.genai.openai_agents",), "framework"),
    Family("OpenTelemetry: google-genai", ("opentelemetry.instrumentation.google_genai",), stops="yes"),
    Family(
        "OpenTelemetry: OpenAI, Anthropic",
        ("opentelemetry.instrumentation.genai", "opentelemetry.util.genai"),
        stops="yes",
    ),
    Family(
        "Traceloop: LangChain",
        ("opentelemetry.instrumentation.langchain",),
        "framework",
        lacks=("cache_write_tokens", "reasoning_tokens"),
        aside=True,
    ),
    Family("Traceloop: openai-agents", ("opentelemetry.instrumentation.openai_agents",), "framework"),
    Family("Traceloop: LiteLLM", ("opentelemetry.instrumentation.litellm",), "framework", lacks=_CACHE),
    Family("Traceloop: OpenAI", ("opentelemetry.instrumentation.openai",), stops="yes"),
    Family(
        "Traceloop: Anthropic",
        ("opentelemetry.instrumentation.anthropic",),
        extra_output=1,
        aside=True,
        stops="yes",
    ),
    Family(
        "Traceloop: Google",
        ("opentelemetry.instrumentation.google_generativeai", "opentelemetry.instrumentation.vertexai"),
        thoughts_apart=True,
        stops="yes",
    ),
    Family(
        "Traceloop: others",
        (
            "opentelemetry.instrumentation.bedrock",
            "opentelemetry.instrumentation.cohere",
            "opentelemetry.instrumentation.groq",
            "opentelemetry.instrumentation.mistralai",
            "opentelemetry.instrumentation.ollama",
            "opentelemetry.instrumentation.together",
        ),
    ),
    Family("OpenInference: LiteLLM", ("openinference.instrumentation.litellm",), "framework"),
    Family("OpenInference: openai-agents", ("openinference.instrumentation.openai_agents",), "framework", lacks=_CACHE),
    Family(
        "OpenInference: frameworks",
        (
            "openinference.instrumentation.langchain",
            "openinference.instrumentation.pydantic_ai",
            "openinference.instrumentation.llama_index",
            "openinference.instrumentation.crewai",
            "openinference.instrumentation.agno",
            "openinference.instrumentation.dspy",
            "openinference.instrumentation.smolagents",
        ),
        "framework",
        aside=True,
    ),
    Family(
        "OpenInference: SDKs",
        ("openinference.instrumentation.openai", "openinference.instrumentation.anthropic"),
        reply_json=True,
    ),
    Family("OpenInference: others", ("openinference.instrumentation",)),
    Family("pydantic-ai", ("pydantic-ai",), "framework", stops="yes"),
    Family("Logfire", ("logfire.openai", "logfire.anthropic"), ends_in_log=True),
    Family("LiteLLM's callback", ("litellm",), "callback", invents_ids=True, aside=True, stops="late"),
    Family("Langfuse", ("langfuse-sdk",), aside=True),
    Family(
        "Respan: Anthropic",
        ("respan_instrumentation_anthropic", "respan-instrumentation-anthropic"),
        exclusive=True,
        lacks=("reasoning_tokens",),
        aside=True,
    ),
    Family(
        "Respan: OpenAI",
        ("respan_instrumentation_openai", "respan-instrumentation-openai"),
        lacks=_CACHE,
        injects=True,
        aside=True,
        stops="late",
    ),
)
UNKNOWN = Family("any other")
_RESPAN = {family.name: family for family in FAMILIES if family.name.startswith("Respan")}
_BY_SCOPE: dict[str, Family] = {}
_MOST_SCOPES = 4096  # scopes are names in code; whoever makes them up must not fill our memory


def family_of(scope: str | None, attributes: Mapping[str, Any] | None = None) -> Family:
    """The row of a span, by its instrumentation scope; Respan's hand in spans without one."""
    if not scope:
        if attributes is not None and "respan.entity.log_type" in attributes:
            claude = attributes.get("gen_ai.system") == "anthropic"
            return _RESPAN["Respan: Anthropic" if claude else "Respan: OpenAI"]
        return UNKNOWN
    found = _BY_SCOPE.get(scope)
    if found is None:
        found = next((f for f in FAMILIES if any(_within(scope, name) for name in f.scopes)), UNKNOWN)
        if len(_BY_SCOPE) < _MOST_SCOPES:
            _BY_SCOPE[scope] = found
    return found


def _within(scope: str, name: str) -> bool:
    return scope == name or scope.startswith(f"{name}.")


# -- which spans are calls -----------------------------------------------------------------------------

MARKERS = frozenset(
    {"gen_ai.operation.name", "openinference.span.kind", "langfuse.observation.type", "llm.request.type"}
)
"""A span without any of these is no LLM call, whatever else it carries."""

LITELLM = {"completion": "chat", "embedding": "embeddings", "responses": "chat", "anthropic_messages": "chat"}
LITELLM |= {name: name for name in ("generate_content", "image_generation", "rerank", "speech", "transcription")}
LITELLM |= {f"a{name}": operation for name, operation in LITELLM.items()} | {"atext_completion": "text_completion"}
"""LiteLLM writes the name of its function where the operation belongs, with an "a" before it for event loops."""

_CALLS = frozenset(
    {"chat", "text_completion", "generate_content", "embeddings", "image_generation", "rerank", *LITELLM}
)
_NO_CALLS = frozenset(
    {"create_agent", "execute_tool", "fetch_response", "invoke_agent", "invoke_workflow", "plan", "retrieval"}
)
_KINDS = {
    "openinference.span.kind": frozenset({"LLM", "EMBEDDING"}),
    "langfuse.observation.type": frozenset({"generation", "embedding"}),
    "llm.request.type": frozenset(
        {"chat", "completion", "embedding", "rerank", "acompletion", "aembedding", "arerank"}
    ),
}


def is_call(attributes: Mapping[str, Any]) -> bool:
    """Whether a span is one LLM call, and not an agent, a chain or a tool around some.

    The first of operation name, OpenInference's kind, Langfuse's type and request type decides. Usage alone makes no
    call: spans of agents carry the sums of their children.
    """
    operation = attributes.get("gen_ai.operation.name")
    if isinstance(operation, str):
        if operation in _CALLS:
            return True
        if operation in _NO_CALLS or operation.endswith("_memory"):
            return False
    for name, kinds in _KINDS.items():
        kind = attributes.get(name)
        if isinstance(kind, str):
            return kind in kinds
    return False
