"""An agent (pydantic-ai) whose every step is a call within its customer's budget: it is stopped mid-run, not after.

    pip install 'pydantic-ai-slim[openai]'
    python examples/agent.py

The agent revises its answer until a check is satisfied, which costs a call each time. Any framework that takes an
`openai` or `anthropic` client works like this. Without `OPENAI_API_KEY` a stand-in provider answers.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from decimal import Decimal

from openai import AsyncOpenAI
from pydantic_ai import Agent, ModelHTTPError, ModelRetry
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from respan_guard import Customer, Guard
from respan_guard.testing import StandInProvider

MODEL = "gpt-4o-mini"


def make_agent(client: AsyncOpenAI) -> Agent[None, str]:
    """An agent that is hard to please, over a wrapped client."""
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
    agent = Agent(model, retries={"output": 50})

    @agent.output_validator
    def check(output: str) -> str:
        """Send the answer back until it names its source."""
        if "according to" not in output:
            raise ModelRetry("Name your source: say according to whom.")
        return output

    return agent


async def run(guard: Guard, client: AsyncOpenAI, customer: str, question: str) -> str:
    """Run the agent for a customer; what it says, or why it was stopped."""
    agent = make_agent(guard.wrap(client))
    with guard.on_behalf_of(customer):
        try:
            return (await agent.run(question, model_settings={"max_tokens": 200})).output
        except ModelHTTPError as error:
            if error.status_code not in (402, 429):
                raise
            return f"stopped: {error.body['message'] if isinstance(error.body, dict) else error.body}"


async def main() -> None:
    """Let a lost agent run into a budget."""
    guard = Guard(os.environ.get("RESPAN_GUARD_STORAGE", "sqlite:///agent.db"))
    with ExitStack() as stack:
        if "OPENAI_API_KEY" in os.environ:
            client = AsyncOpenAI()
        else:
            client = AsyncOpenAI(base_url=f"{stack.enter_context(StandInProvider().serve())}/v1", api_key="no-key")
        async with guard, client:
            await guard.put_customer(Customer(customer_identifier="acme", total_budget=Decimal("0.002")))
            print(await run(guard, client, "acme", "How far is the moon?"))
            status = await guard.status("acme")
            print(f"{status.total_calls} calls, {status.total_spend} USD of 0.002")


if __name__ == "__main__":
    asyncio.run(main())
