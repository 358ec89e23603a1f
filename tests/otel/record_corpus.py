"""Record the spans that `test_corpus.py` plays: run each real instrumentation in an environment that fits it.

python -m tests.otel.record_corpus [DIRECTORY FOR ENVIRONMENTS] [ONLY ...]

Takes about ten minutes and a package index. What comes out differs from run to run in ids and times only; what should
be looked at after a run with newer versions is what `test_corpus.py` then says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "tests" / "data" / "otel"
# What the guard and the stand-in provider need themselves.
_BASE = ["starlette", "limits", "pydantic-settings", "aiosqlite", "genai-prices", "uvicorn", "opentelemetry-sdk"]
_LANGCHAIN = ["langchain", "langchain-openai", "langchain-anthropic"]

ENVIRONMENTS: dict[str, tuple[list[str], list[str]]] = {
    "current": (
        [
            "--pre",
            *(f"opentelemetry-instrumentation-genai-{name}" for name in ("openai", "anthropic", "langchain")),
            "opentelemetry-instrumentation-genai-openai-agents",
            *(f"openinference-instrumentation-{name}" for name in ("openai", "anthropic", "langchain")),
            "openinference-instrumentation-openai-agents",
            "pydantic-ai-slim[openai,anthropic]",
            "openai-agents",
            "logfire",
            "langfuse",
            "openai>=3",
            "anthropic>=2",
            *_LANGCHAIN,
        ],
        [
            "openai official-openai",
            "openai openinference-openai",
            "openai logfire",
            "openai official-openai openinference-openai",
            "openai logfire openinference-openai",
            "langfuse langfuse",
            "langfuse langfuse openinference-openai",
            "anthropic official-anthropic",
            "anthropic openinference-anthropic",
            "anthropic logfire",
            "anthropic anthropic-native",
            "anthropic official-anthropic anthropic-native",
            "anthropic openinference-anthropic anthropic-native",
            "anthropic logfire anthropic-native",
            "anthropic official-anthropic openinference-anthropic",
            "langchain official-langchain",
            "langchain openinference-langchain",
            "langchain official-langchain official-openai",
            "langchain openinference-langchain openinference-openai",
            "langchain openinference-langchain openinference-openai openinference-anthropic",
            "langchain openinference-langchain official-openai",
            "langchain openinference-langchain anthropic-native",
            "pydantic-ai pydantic-ai",
            "pydantic-ai pydantic-ai official-openai",
            "pydantic-ai pydantic-ai openinference-openai",
            "pydantic-ai pydantic-ai anthropic-native",
            "pydantic-ai pydantic-ai official-anthropic anthropic-native",
            "agents openinference-agents",
            "agents official-agents official-openai",
            "agents openinference-agents openinference-openai",
            "agents openinference-agents official-openai",
        ],
    ),
    "traceloop": (
        [
            *(f"opentelemetry-instrumentation-{name}" for name in ("openai", "anthropic", "langchain")),
            "openinference-instrumentation-openai",
            "openai>=3",
            "anthropic>=2",
            *_LANGCHAIN,
        ],
        [
            "openai traceloop-openai",
            "openai traceloop-openai openinference-openai",
            "anthropic traceloop-anthropic",
            "anthropic traceloop-anthropic anthropic-native",
            "langchain traceloop-langchain",
            "langchain traceloop-langchain traceloop-openai",
            "langchain traceloop-langchain anthropic-native",
        ],
    ),
    "respan": (
        ["respan-tracing", "respan-instrumentation-openai", "respan-instrumentation-anthropic", "openai", "anthropic"],
        [
            "openai respan-openai",
            "anthropic respan-anthropic",
            "anthropic respan-anthropic anthropic-native",
        ],
    ),
    "litellm": (
        [
            "litellm",
            "openinference-instrumentation-litellm",
            "openinference-instrumentation-openai",
            "opentelemetry-exporter-otlp-proto-http",
        ],
        [
            "litellm litellm",
            "litellm openinference-litellm",
            "litellm openinference-litellm openinference-openai",
            "litellm litellm openinference-openai",
            "litellm litellm openinference-litellm",
        ],
    ),
    "google": (
        [
            "--pre",
            "opentelemetry-instrumentation-google-genai",
            "openinference-instrumentation-google-genai",
            "opentelemetry-instrumentation-google-generativeai",
            "google-genai<3",
        ],
        [
            "google official-google",
            "google openinference-google",
            "google traceloop-google",
            "google official-google openinference-google",
        ],
    ),
    "previous": (
        ["--pre", "opentelemetry-instrumentation-openai-v2", "openai<3", "opentelemetry-util-genai==0.4b0"],
        ["openai openai-v2"],
    ),
}
# Nothing reads them, and they are long.
_LEFT_OUT = (
    "llm.input_messages.",
    "llm.output_messages.",
    "embedding.embeddings.",
    "logfire.json_schema",
    "code.",
    "gen_ai.tool.definitions",
    "pydantic_ai.all_messages",
    "exception.stacktrace",
    "llm.tools.",
)


def _trimmed(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for case in cases:
        for event in case["events"]:
            for holder in (event, *event.get("events", ())):
                holder["attributes"] = {
                    name: value for name, value in holder["attributes"].items() if not name.startswith(_LEFT_OUT)
                }
    return cases


def main() -> None:
    """Make environments, run, write."""
    home = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    only = sys.argv[2:]
    for name, (wanted, runs) in ENVIRONMENTS.items():
        if only and name not in only:
            continue
        python = home / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(home / name)], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *_BASE, *wanted], check=True)
        for run in runs:
            done = subprocess.run(
                [python, "-m", "tests.otel.capture", *run.split()],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=True,
                timeout=200,
            )
            cases = _trimmed(json.loads(done.stdout))
            sys.stderr.write(f"{run}: {len(cases)} cases {done.stderr[-200:]}\n")
            lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
            (TARGET / f"{run.replace(' ', '+')}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
