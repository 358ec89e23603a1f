"""Real instrumentations, each switched on as its own documentation says, and real calls through what they instrument.

Runs in environments of its own, too (see `record_corpus.py`), so it imports nothing that only some of them have.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

CHAT = "gpt-4o"
CLAUDE = "claude-sonnet-4-6"
GEMINI = "gemini-2.5-flash"
EMBEDDINGS = "text-embedding-3-small"
ASK: Any = [{"role": "user", "content": "How far is the moon?"}]
COUNTS = {
    "x-stand-in-input-tokens": "1000",
    "x-stand-in-cache-read-tokens": "400",
    "x-stand-in-output-tokens": "200",
    "x-stand-in-reasoning-tokens": "50",
}
CLAUDE_COUNTS = {
    "x-stand-in-input-tokens": "1000",
    "x-stand-in-cache-read-tokens": "600",
    "x-stand-in-cache-write-tokens": "300",
    "x-stand-in-output-tokens": "200",
}
GEMINI_COUNTS = COUNTS
Calls = dict[str, Callable[[], Any]]


# -- instrumentations ----------------------------------------------------------------------------------


def _instrumentor(path: str, **options: Any) -> Callable[[Any], None]:
    def switch_on(provider: Any) -> None:
        module, _, name = path.partition(":")
        getattr(importlib.import_module(module), name)().instrument(tracer_provider=provider, **options)

    return switch_on


def _native(provider: Any) -> None:
    """Anthropic's own spans need nothing but a tracer provider; `run` takes them out for all others."""


def _pydantic_ai(provider: Any) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.instrumented import InstrumentationSettings

    Agent.instrument_all(InstrumentationSettings(tracer_provider=provider))


def _logfire(provider: Any) -> None:
    logfire = importlib.import_module("logfire")
    os.environ["LOGFIRE_IGNORE_NO_CONFIG"] = "1"
    logfire.configure(send_to_logfire=False, console=False, additional_span_processors=[provider.forward])
    logfire.instrument_openai()
    logfire.instrument_anthropic()


def _langfuse(provider: Any) -> None:
    langfuse: Any = importlib.import_module("langfuse")
    langfuse.Langfuse(public_key="pk", secret_key="sk", base_url="http://127.0.0.1:9", tracer_provider=provider)


def _litellm(provider: Any) -> None:
    kind = importlib.import_module("litellm.integrations.opentelemetry").OpenTelemetry
    litellm: Any = importlib.import_module("litellm")
    litellm.callbacks = [kind(tracer_provider=provider)]


def _respan(name: str) -> Callable[[Any], None]:
    def switch_on(provider: Any) -> None:
        module = importlib.import_module(f"respan_instrumentation_{name}")
        kind = getattr(module, {"openai": "OpenAIInstrumentor", "anthropic": "AnthropicInstrumentor"}[name])
        kind().activate()

    return switch_on


FAMILIES: dict[str, Callable[[Any], None]] = {
    "official-openai": _instrumentor("opentelemetry.instrumentation.genai.openai:OpenAIInstrumentor"),
    "official-anthropic": _instrumentor("opentelemetry.instrumentation.genai.anthropic:AnthropicInstrumentor"),
    "official-langchain": _instrumentor("opentelemetry.instrumentation.genai.langchain:LangChainInstrumentor"),
    "official-google": _instrumentor("opentelemetry.instrumentation.google_genai:GoogleGenAiSdkInstrumentor"),
    "openai-v2": _instrumentor("opentelemetry.instrumentation.openai_v2:OpenAIInstrumentor"),
    "traceloop-openai": _instrumentor("opentelemetry.instrumentation.openai:OpenAIInstrumentor"),
    "traceloop-anthropic": _instrumentor("opentelemetry.instrumentation.anthropic:AnthropicInstrumentor"),
    "traceloop-langchain": _instrumentor("opentelemetry.instrumentation.langchain:LangchainInstrumentor"),
    "traceloop-google": _instrumentor(
        "opentelemetry.instrumentation.google_generativeai:GoogleGenerativeAiInstrumentor"
    ),
    "openinference-openai": _instrumentor("openinference.instrumentation.openai:OpenAIInstrumentor"),
    "openinference-anthropic": _instrumentor("openinference.instrumentation.anthropic:AnthropicInstrumentor"),
    "openinference-langchain": _instrumentor("openinference.instrumentation.langchain:LangChainInstrumentor"),
    "openinference-litellm": _instrumentor("openinference.instrumentation.litellm:LiteLLMInstrumentor"),
    "openinference-agents": _instrumentor("openinference.instrumentation.openai_agents:OpenAIAgentsInstrumentor"),
    "openinference-google": _instrumentor("openinference.instrumentation.google_genai:GoogleGenAIInstrumentor"),
    "official-agents": _instrumentor("opentelemetry.instrumentation.genai.openai_agents:OpenAIAgentsInstrumentor"),
    "pydantic-ai": _pydantic_ai,
    "logfire": _logfire,
    "langfuse": _langfuse,
    "litellm": _litellm,
    "respan-openai": _respan("openai"),
    "respan-anthropic": _respan("anthropic"),
    "anthropic-native": _native,
}


# -- calls ---------------------------------------------------------------------------------------------


def openai_calls(url: str, module: Any = None) -> Calls:
    """Each way of calling OpenAI's SDK that providers charge for, and some that they don't."""
    openai = importlib.import_module("openai")
    kinds = module or openai
    make = {"base_url": f"{url}/v1", "api_key": "sk-test", "default_headers": COUNTS}
    client = kinds.OpenAI(**make, max_retries=0)
    patient = kinds.OpenAI(**make, max_retries=2)
    chat = client.chat.completions.create

    def drain(stream: Any) -> None:
        for _ in stream:
            pass

    def broken() -> None:
        stream = chat(model=CHAT, messages=ASK, stream=True, stream_options={"include_usage": True})
        for _ in stream:
            break
        stream.close()

    async def at_once() -> None:
        async with kinds.AsyncOpenAI(**make, max_retries=0) as many:
            ask = many.chat.completions.create
            await asyncio.gather(*[ask(model=CHAT, messages=ASK) for _ in range(3)])
            stream = await ask(model=CHAT, messages=ASK, stream=True, stream_options={"include_usage": True})
            async for _ in stream:
                pass

    def failed() -> None:
        with contextlib.suppress(openai.APIStatusError):
            chat(model=CHAT, messages=ASK, extra_headers={"x-fail": "503"})

    return {
        "chat": lambda: chat(model=CHAT, messages=ASK),
        "chat-stream": lambda: drain(
            chat(model=CHAT, messages=ASK, stream=True, stream_options={"include_usage": True})
        ),
        "chat-stream-no-usage": lambda: drain(chat(model=CHAT, messages=ASK, stream=True)),
        "chat-broken-off": broken,
        "responses": lambda: client.responses.create(model=CHAT, input="hello"),
        "responses-stream": lambda: drain(client.responses.create(model=CHAT, input="hello", stream=True)),
        "embeddings": lambda: client.embeddings.create(
            model=EMBEDDINGS,
            input="hello",
            extra_headers=dict.fromkeys(COUNTS, "0") | {"x-stand-in-input-tokens": "70"},
        ),
        "async": lambda: asyncio.run(at_once()),
        "failed": failed,
        "retried": lambda: patient.chat.completions.create(model=CHAT, messages=ASK, extra_headers={"x-fail": "once"}),
    }


def anthropic_calls(url: str) -> Calls:
    """The same for Anthropic's SDK."""
    anthropic = importlib.import_module("anthropic")
    make = {"base_url": url, "api_key": "sk-test", "default_headers": CLAUDE_COUNTS}
    client = anthropic.Anthropic(**make, max_retries=0)
    patient = anthropic.Anthropic(**make, max_retries=2)
    create = client.messages.create

    def drain(stream: Any) -> None:
        for _ in stream:
            pass

    def helper() -> None:
        with client.messages.stream(model=CLAUDE, max_tokens=400, messages=ASK) as stream:
            drain(stream)

    def broken() -> None:
        stream = create(model=CLAUDE, max_tokens=400, messages=ASK, stream=True)
        for _ in stream:
            break
        stream.close()

    async def at_once() -> None:
        async with anthropic.AsyncAnthropic(**make, max_retries=0) as many:
            ask = many.messages.create
            await asyncio.gather(*[ask(model=CLAUDE, max_tokens=400, messages=ASK) for _ in range(3)])
            async for _ in await ask(model=CLAUDE, max_tokens=400, messages=ASK, stream=True):
                pass

    def failed() -> None:
        with contextlib.suppress(anthropic.APIStatusError):
            create(model=CLAUDE, max_tokens=400, messages=ASK, extra_headers={"x-fail": "503"})

    return {
        "messages": lambda: create(model=CLAUDE, max_tokens=400, messages=ASK),
        "messages-hour": lambda: create(
            model=CLAUDE, max_tokens=400, messages=ASK, extra_headers={"x-stand-in-cache-write-1h-tokens": "100"}
        ),
        "messages-stream": lambda: drain(create(model=CLAUDE, max_tokens=400, messages=ASK, stream=True)),
        "messages-stream-helper": helper,
        "messages-broken-off": broken,
        "async": lambda: asyncio.run(at_once()),
        "failed": failed,
        "retried": lambda: patient.messages.create(
            model=CLAUDE, max_tokens=400, messages=ASK, extra_headers={"x-fail": "once"}
        ),
    }


def langchain_calls(url: str) -> Calls:
    """LangChain over both SDKs."""
    langchain_openai = importlib.import_module("langchain_openai")
    langchain_anthropic = importlib.import_module("langchain_anthropic")
    make: Any = {
        "model": CHAT,
        "base_url": f"{url}/v1",
        "api_key": "sk-test",
        "default_headers": COUNTS,
        "max_retries": 0,
    }
    chat = langchain_openai.ChatOpenAI(**make, stream_usage=True)
    responses = langchain_openai.ChatOpenAI(**make, use_responses_api=True)
    claude = langchain_anthropic.ChatAnthropic(
        model=CLAUDE, base_url=url, api_key="sk-test", default_headers=CLAUDE_COUNTS, max_retries=0, max_tokens=400
    )
    return {
        "chat": lambda: chat.invoke("How far is the moon?"),
        "chat-stream": lambda: list(chat.stream("How far is the moon?")),
        "chat-async": lambda: asyncio.run(chat.ainvoke("How far is the moon?")),
        "responses": lambda: responses.invoke("How far is the moon?"),
        "responses-stream": lambda: list(responses.stream("How far is the moon?")),
        "messages": lambda: claude.invoke("How far is the moon?"),
        "messages-stream": lambda: list(claude.stream("How far is the moon?")),
    }


def pydantic_ai_calls(url: str) -> Calls:
    """pydantic-ai's agents over both SDKs."""
    openai = importlib.import_module("openai")
    anthropic = importlib.import_module("anthropic")
    from pydantic_ai import Agent
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    def agent(kind: str) -> Any:
        if kind == "messages":
            claude = anthropic.AsyncAnthropic(
                base_url=url, api_key="sk-test", default_headers=CLAUDE_COUNTS, max_retries=0
            )
            return Agent(AnthropicModel(CLAUDE, provider=AnthropicProvider(anthropic_client=claude)), name="teller")
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-test", default_headers=COUNTS, max_retries=0)
        model = OpenAIResponsesModel if kind == "responses" else OpenAIChatModel
        return Agent(model(CHAT, provider=OpenAIProvider(openai_client=client)), name="teller")

    async def streamed(kind: str) -> None:
        async with agent(kind).run_stream("How far is the moon?") as result:
            async for _ in result.stream_text():
                pass

    async def whole(kind: str) -> None:
        await agent(kind).run("How far is the moon?")

    def run(kind: str, how: str) -> None:
        asyncio.run(streamed(kind) if how else whole(kind))

    return {
        kind + how: functools.partial(run, kind, how)
        for kind in ("chat", "responses", "messages")
        for how in ("", "-stream")
    }


def agents_calls(url: str) -> Calls:
    """openai-agents over both of OpenAI's APIs."""
    openai = importlib.import_module("openai")
    agents = importlib.import_module("agents")

    def run(kind: str) -> None:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-test", default_headers=COUNTS, max_retries=0)
        model = (agents.OpenAIResponsesModel if kind == "responses" else agents.OpenAIChatCompletionsModel)(
            model=CHAT, openai_client=client
        )
        agent = agents.Agent(name="teller", instructions="Be brief.", model=model)
        agents.Runner.run_sync(agent, "How far is the moon?")

    return {kind: functools.partial(run, kind) for kind in ("chat", "responses")}


def litellm_calls(url: str) -> Calls:
    """LiteLLM's functions."""
    litellm = importlib.import_module("litellm")

    make: Any = {"base_url": f"{url}/v1", "api_key": "sk-test", "messages": ASK, "num_retries": 0}
    claude: Any = {"base_url": url, "api_key": "sk-test", "messages": ASK, "max_tokens": 400}

    def embed() -> None:
        litellm.embedding(model=f"openai/{EMBEDDINGS}", input=["hello"], api_base=f"{url}/v1", api_key="sk-test")

    return {
        "chat": lambda: litellm.completion(model=f"openai/{CHAT}", extra_headers=COUNTS, **make),
        "chat-stream": lambda: list(
            litellm.completion(
                model=f"openai/{CHAT}",
                extra_headers=COUNTS,
                stream=True,
                stream_options={"include_usage": True},
                **make,
            )
        ),
        "chat-async": lambda: asyncio.run(
            _settled(litellm.acompletion(model=f"openai/{CHAT}", extra_headers=COUNTS, **make))
        ),
        "messages": lambda: litellm.completion(model=f"anthropic/{CLAUDE}", extra_headers=CLAUDE_COUNTS, **claude),
        "embeddings": embed,
    }


async def _settled(call: Any) -> None:
    await call
    await asyncio.sleep(0.3)  # it logs from a task of its own


def google_calls(url: str) -> Calls:
    """Google's SDK."""
    from google import genai

    client = genai.Client(api_key="k", http_options=genai.types.HttpOptions(base_url=url, headers=GEMINI_COUNTS))
    ask: Any = {"model": GEMINI, "contents": "How far is the moon?"}
    return {
        "generate": lambda: client.models.generate_content(**ask),
        "generate-stream": lambda: list(client.models.generate_content_stream(**ask)),
        "generate-async": lambda: asyncio.run(client.aio.models.generate_content(**ask)),
    }


def langfuse_calls(url: str) -> Calls:
    """OpenAI's SDK as langfuse hands it out."""
    return openai_calls(url, importlib.import_module("langfuse.openai"))


CALLS: dict[str, Callable[[str], Calls]] = {
    "openai": openai_calls,
    "anthropic": anthropic_calls,
    "langchain": langchain_calls,
    "pydantic-ai": pydantic_ai_calls,
    "agents": agents_calls,
    "litellm": litellm_calls,
    "google": google_calls,
    "langfuse": langfuse_calls,
}


@contextlib.contextmanager
def instrumented(names: list[str], provider: Any) -> Iterator[None]:
    """Switch instrumentations on; for the life of the process, as apps do."""
    if "anthropic-native" not in names:
        os.environ["ANTHROPIC_OPEN_TELEMETRY"] = "false"
    for name in names:
        FAMILIES[name](provider)
    yield
