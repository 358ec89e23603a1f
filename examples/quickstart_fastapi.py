"""A FastAPI app that admits the customer itself, once it knows who calls.

    uvicorn examples.quickstart_fastapi:app
    curl -i 127.0.0.1:8000/draw?prompt=a+river -X POST -H 'Authorization: Bearer key-of-acme'
    curl    127.0.0.1:8000/me/usage -H 'Authorization: Bearer key-of-acme'

The fourth drawing within a minute is a 429; the sixth in a day a 402.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from respan_guard import Guard, GuardMiddleware, Status, Usage

PRICE = Decimal("0.04")
ORGANISATIONS = {"key-of-acme": "acme", "key-of-bolt": "bolt"}

guard = Guard(
    "sqlite:///quickstart.db",
    default_limits={"rate_limit": 3, "budget_duration": "daily", "period_budget": PRICE * 5},
)
app = FastAPI()
app.add_middleware(GuardMiddleware, guard=guard)  # no identify=: the endpoints say who it is


def organisation(key: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    """Whose key it is."""
    if key.credentials not in ORGANISATIONS:
        raise HTTPException(401, "unknown key")
    return ORGANISATIONS[key.credentials]


Caller = Annotated[str, Depends(organisation)]


async def admitted(caller: Caller) -> None:
    """Let the caller in, holding what the work may cost; over a limit, the response is a 429 or a 402."""
    await guard.admit(caller, estimate=PRICE)


@app.post("/draw", dependencies=[Depends(admitted)])
async def draw(prompt: str) -> dict[str, str]:
    """Spend four cents; they are charged to the admission in force."""
    picture = f"a picture of {prompt}"  # stands for whatever costs money
    await guard.record(Usage(model="flux-pro", cost=PRICE))
    return {"picture": picture}


@app.get("/me/usage")
async def usage(caller: Caller) -> Status:
    """Show callers where they stand; asking costs them nothing."""
    return await guard.status(caller)
