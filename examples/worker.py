"""A worker: jobs of several customers on several threads, each within its customer's budget.

    python examples/worker.py

There is no request here: `on_behalf_of` says whose job it is. Under Celery, RQ or cron it looks the same, and a guard
may be made before the workers are forked. Without `OPENAI_API_KEY` a stand-in provider answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

from openai import APIStatusError, OpenAI

from respan_guard import Guard
from respan_guard.testing import StandInProvider


class Job(NamedTuple):
    """A text to summarise for an organisation."""

    organisation: str
    text: str


def summarise(guard: Guard, client: OpenAI, job: Job) -> str:
    """Do one job; `client` is wrapped. Raises what the SDK raises if the organisation is over a limit."""
    with guard.on_behalf_of(job.organisation):
        reply = client.responses.create(model="gpt-4o-mini", input=f"Summarise: {job.text}", max_output_tokens=200)
        return reply.output_text


def work(guard: Guard, client: OpenAI, jobs: Iterable[Job]) -> dict[str, int]:
    """Do all jobs that their organisations can pay for; returns how many of each were refused."""
    refused: dict[str, int] = {}

    def one(job: Job) -> None:
        try:
            summarise(guard, client, job)
        except APIStatusError as error:
            if "respan_guard" not in error.response.extensions:
                raise  # the provider's own error
            refused[job.organisation] = refused.get(job.organisation, 0) + 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, jobs))
    return refused


def main() -> None:
    """Work on twenty jobs; one organisation has no budget left."""
    with ExitStack() as stack:
        guard = Guard(os.environ.get("RESPAN_GUARD_STORAGE", "sqlite:///worker.db"), default_limits={"total_budget": 1})
        stack.enter_context(guard.sync)
        if "OPENAI_API_KEY" in os.environ:
            client = OpenAI()
        else:
            client = OpenAI(base_url=f"{stack.enter_context(StandInProvider().serve())}/v1", api_key="no-key")
        client = stack.enter_context(guard.wrap(client))
        guard.sync.update_customer("bolt", total_budget=0)
        refused = work(guard, client, [Job(("acme", "bolt")[n % 2], f"report {n}") for n in range(20)])
        guard.sync.flush()
        for row in guard.sync.usage():
            print(f"{row.customer_identifier}: {row.calls} calls, {row.cost} USD")
        print(f"refused: {refused}")


if __name__ == "__main__":
    main()
