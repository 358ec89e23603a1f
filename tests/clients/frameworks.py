"""What `test_frameworks.py` runs in an environment with LangChain, LiteLLM and the Agents SDK.

python frameworks.py URL STORAGE JOURNAL

Each framework makes a few calls in a wrapped client for a customer of its own name, and one for a customer without
money, which has to end in an error that carries the refusal.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}

import openai

from respan_guard import Guard, LimitExceeded

# Not where everything else is tested, so nothing is known of their types there.
agents: Any = importlib.import_module("agents")
httpx: Any = importlib.import_module("httpx")
litellm: Any = importlib.import_module("litellm")
of_anthropic: Any = importlib.import_module("langchain_anthropic")
of_openai: Any = importlib.import_module("langchain_openai")

CHAT = "gpt-4o-mini"
CLAUDE = "claude-haiku-4-5"
QUESTION = "How far is the moon?"


def refusal_of(error: BaseException | None) -> LimitExceeded | None:
    """Ours, from what a framework raised."""
    while error is not None:
        found = getattr(getattr(error, "response", None), "extensions", {}).get("respan_guard")
        if isinstance(found, LimitExceeded):
            return found
        error = error.__cause__ or error.__context__
    return None


class Frameworks:
    """Every framework with clients of one guard."""

    def __init__(self, guard: Guard, url: str) -> None:
        self.guard = guard
        self.url = url
        self.client = guard.wrap(openai.OpenAI(base_url=f"{url}/v1"))
        self.aclient = guard.wrap(openai.AsyncOpenAI(base_url=f"{url}/v1"))

    def langchain_openai(self) -> Any:
        """A chat model that is given both clients."""
        return of_openai.ChatOpenAI(
            model=CHAT,
            client=self.client.chat.completions,
            root_client=self.client,
            async_client=self.aclient.chat.completions,
            root_async_client=self.aclient,
        )

    def langchain_anthropic(self) -> Any:
        """A chat model whose clients are wrapped, since it takes none."""
        chat = of_anthropic.ChatAnthropic(model=CLAUDE, base_url=self.url, max_tokens=50)
        chat._client = self.guard.wrap(chat._client)
        chat._async_client = self.guard.wrap(chat._async_client)
        return chat

    def agent(self, kind: Any) -> Any:
        """An agent of the Agents SDK over the wrapped client."""
        return agents.Agent(name="one", model=kind(model=CHAT, openai_client=self.aclient))

    def sync(self) -> dict[str, list[Callable[[], Any]]]:
        """Blocking calls by framework."""
        chat, claude = self.langchain_openai(), self.langchain_anthropic()
        embeddings = of_openai.OpenAIEmbeddings(
            model="text-embedding-3-small", client=self.client.embeddings, check_embedding_ctx_length=False
        )
        raw = httpx.Client(transport=self.guard.transport(httpx.HTTPTransport()))
        handler = litellm.llms.custom_httpx.http_handler.HTTPHandler(client=raw)
        ask = [{"role": "user", "content": QUESTION}]
        lite = {"model": f"openai/{CHAT}", "messages": ask, "client": self.client}
        other = {"model": f"anthropic/{CLAUDE}", "messages": ask, "api_base": self.url, "client": handler}
        return {
            "langchain-openai": [
                lambda: chat.invoke(QUESTION),
                lambda: list(chat.stream(QUESTION)),
                lambda: chat.batch([QUESTION, QUESTION]),
                lambda: list(chat.stream(QUESTION, stream_usage=False)),
                lambda: embeddings.embed_documents(["the moon", "the sun"]),
            ],
            "langchain-anthropic": [lambda: claude.invoke(QUESTION), lambda: list(claude.stream(QUESTION))],
            "litellm-openai": [
                lambda: litellm.completion(**lite),
                lambda: list(litellm.completion(**lite, stream=True)),
                lambda: list(litellm.completion(**lite, stream=True, stream_options={"include_usage": True})),
            ],
            "litellm-anthropic": [
                lambda: litellm.completion(**other),
                lambda: list(litellm.completion(**other, stream=True)),
            ],
        }

    def on_a_loop(self) -> dict[str, list[Callable[[], Any]]]:
        """Calls to await by framework."""
        chat, claude = self.langchain_openai(), self.langchain_anthropic()
        lite = {"model": f"openai/{CHAT}", "messages": [{"role": "user", "content": QUESTION}], "client": self.aclient}

        async def read(stream: Any) -> None:
            async for _ in stream:
                pass

        async def run(kind: Any) -> None:
            await agents.Runner.run(self.agent(kind), QUESTION)

        async def streamed(kind: Any) -> None:
            await read(agents.Runner.run_streamed(self.agent(kind), QUESTION).stream_events())

        async def lite_stream() -> None:
            await read(await litellm.acompletion(**lite, stream=True))

        chats, responses = agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel
        return {
            "langchain-openai": [lambda: chat.ainvoke(QUESTION), lambda: read(chat.astream(QUESTION))],
            "langchain-anthropic": [lambda: claude.ainvoke(QUESTION), lambda: read(claude.astream(QUESTION))],
            "litellm-openai": [lambda: litellm.acompletion(**lite), lite_stream],
            "agents-chat": [lambda: agents.Runner.run(self.agent(chats), QUESTION), lambda: streamed(chats)],
            "agents-responses": [
                lambda: agents.Runner.run(self.agent(responses), QUESTION),
                lambda: streamed(responses),
            ],
        }


def main() -> None:
    """Run all of it; prints how each call without money ended."""
    url, storage, journal = sys.argv[1:]
    agents.set_tracing_disabled(True)
    litellm.disable_aiohttp_transport = True
    litellm.num_retries = 0
    guard = Guard(storage, default_limits={"period_budget": 10}, journal_dir=journal)
    guard.sync.update_customer("poor", total_budget=0)
    found: dict[str, list[str]] = {}
    frameworks = Frameworks(guard, url)
    for name, calls in frameworks.sync().items():
        with guard.on_behalf_of(name):
            for call in calls:
                call()
        for call in calls:
            with guard.on_behalf_of("poor"):
                try:
                    call()
                except Exception as error:
                    found.setdefault(name, []).append(_told(error))

    async def awaited() -> None:
        async with guard:
            for name, calls in frameworks.on_a_loop().items():
                with guard.on_behalf_of(f"{name}-async"):
                    for call in calls:
                        await call()
                for call in calls:
                    with guard.on_behalf_of("poor"):
                        try:
                            await call()
                        except Exception as error:
                            found.setdefault(f"{name}-async", []).append(_told(error))

    asyncio.run(awaited())
    guard.sync.close()
    sys.stdout.write(json.dumps(found))


def _told(error: Exception) -> str:
    refusal = refusal_of(error)
    return "" if refusal is None else str(refusal.decision.reason)


if __name__ == "__main__":
    main()
