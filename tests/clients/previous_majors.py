"""What `test_previous_majors.py` runs in an environment with the SDKs' previous major versions.

python previous_majors.py URL STORAGE JOURNAL
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version
from typing import Any

import anthropic
import openai

from respan_guard import Guard

CHAT = "gpt-4o-mini"
CLAUDE = "claude-haiku-4-5"
ASK: Any = [{"role": "user", "content": "How far is the moon?"}]


def calls(client: Any) -> list[Any]:
    """One call of each kind; those that stream are to be read."""
    chat = client.chat.completions.create
    return [
        lambda: chat(model=CHAT, messages=ASK),
        lambda: chat(model=CHAT, messages=ASK, stream=True),
        lambda: chat(model=CHAT, messages=ASK, stream=True, stream_options={"include_usage": True}),
        lambda: client.responses.create(model=CHAT, input="hello"),
        lambda: client.responses.create(model=CHAT, input="hello", stream=True),
        lambda: client.embeddings.create(model="text-embedding-3-small", input="hello"),
    ]


def messages(client: Any) -> list[Any]:
    """The same for Anthropic's client."""
    return [
        lambda: client.messages.create(model=CLAUDE, max_tokens=20, messages=ASK),
        lambda: client.messages.create(model=CLAUDE, max_tokens=20, messages=ASK, stream=True),
    ]


def refused(call: Any, error: type[Exception]) -> int:
    """The status of a refusal."""
    try:
        call()
    except error as found:
        refusal: Any = found
    assert "respan_guard" in refusal.response.extensions
    status: int = refusal.status_code
    return status


def blocking(guard: Guard, url: str) -> dict[str, Any]:
    """Sync clients; says what they are made of and how they are refused."""
    client = guard.wrap(openai.OpenAI(base_url=f"{url}/v1", api_key="k"))
    claude = guard.wrap(anthropic.Anthropic(base_url=url, api_key="k"))
    with guard.on_behalf_of("sync"):
        for call in calls(client) + messages(claude):
            reply = call()
            if type(reply).__name__ == "Stream":
                list(reply)
    guard.sync.update_customer("poor", total_budget=0)
    with guard.on_behalf_of("poor"):
        statuses = [
            refused(calls(client)[0], openai.APIStatusError),
            refused(messages(claude)[0], anthropic.APIStatusError),
        ]
    made_of = [
        next(kind.__module__.partition(".")[0] for kind in type(found._client).__mro__ if "httpx" in kind.__module__)
        for found in (client, claude)
    ]
    client.close()
    claude.close()
    return {"made_of": made_of, "refused": statuses}


async def on_a_loop(guard: Guard, url: str) -> None:
    """Async clients."""
    async with (
        guard,
        guard.wrap(openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k")) as client,
        guard.wrap(anthropic.AsyncAnthropic(base_url=url, api_key="k")) as claude,
    ):
        with guard.on_behalf_of("async"):
            for call in calls(client) + messages(claude):
                reply = await call()
                if type(reply).__name__ == "AsyncStream":
                    async for _ in reply:
                        pass


def main() -> None:
    """Run all of it."""
    url, storage, journal = sys.argv[1:]
    guard = Guard(storage, default_limits={"period_budget": 10}, journal_dir=journal)
    found = blocking(guard, url)
    asyncio.run(on_a_loop(guard, url))
    guard.sync.close()
    sys.stdout.write(
        json.dumps(found | {name: int(version(name).partition(".")[0]) for name in ("openai", "anthropic")})
    )


if __name__ == "__main__":
    main()
