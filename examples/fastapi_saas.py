"""A FastAPI service whose endpoints call an LLM for their callers' organisations.

    uvicorn examples.fastapi_saas:app
    curl -i -X POST '127.0.0.1:8000/ask?question=How+far+is+the+moon' -H 'Authorization: Bearer key-of-acme'
    curl    127.0.0.1:8000/me/usage -H 'Authorization: Bearer key-of-acme'

Without settings a stand-in provider answers, so that it costs nothing to try; `OPENAI_API_KEY` puts the real one there.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from openai import AsyncOpenAI

from respan_guard import Guard, GuardMiddleware, Status
from respan_guard.testing import StandInProvider

MODEL = "gpt-4o-mini"
ORGANISATIONS = {"key-of-acme": "acme", "key-of-bolt": "bolt"}

guard = Guard(
    os.environ.get("RESPAN_GUARD_STORAGE", "sqlite:///saas.db"),
    default_limits={"rate_limit": 60, "budget_duration": "monthly", "period_budget": 5},
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the client, once; every call that goes through it is checked, priced and recorded."""
    with ExitStack() as stack:
        if "OPENAI_API_KEY" in os.environ:
            client = AsyncOpenAI()
        else:
            client = AsyncOpenAI(base_url=f"{stack.enter_context(StandInProvider().serve())}/v1", api_key="no-key")
        async with guard.wrap(client) as app.state.llm:
            yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(GuardMiddleware, guard=guard)  # no identify=: the endpoints say who it is


def organisation(key: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    """Whose key it is."""
    if key.credentials not in ORGANISATIONS:
        raise HTTPException(401, "unknown key")
    return ORGANISATIONS[key.credentials]


Caller = Annotated[str, Depends(organisation)]


async def admitted(caller: Caller) -> None:
    """Let the caller in; over a limit, the response is a 429 or a 402."""
    await guard.admit(caller)


@app.post("/ask", dependencies=[Depends(admitted)])
async def ask(question: str) -> str:
    """Answer. A call that the budget has no room for is refused before it is made, and so is this request."""
    reply = await app.state.llm.responses.create(model=MODEL, input=question, max_output_tokens=500)
    return str(reply.output_text)


@app.post("/tell", dependencies=[Depends(admitted)])
async def tell(question: str) -> StreamingResponse:
    """Answer word by word; the call is made before the response starts, so that a refusal can still be one."""
    chunks = await app.state.llm.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=500, stream=True
    )

    async def words() -> AsyncIterator[str]:
        async for chunk in chunks:
            yield chunk.choices[0].delta.content or ""

    return StreamingResponse(words(), media_type="text/plain")


@app.get("/me/usage")
async def usage(caller: Caller) -> Status:
    """Show callers where they stand; asking costs them nothing."""
    return await guard.status(caller)
