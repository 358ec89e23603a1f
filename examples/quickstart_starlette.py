"""An app behind a proxy that says who the customer is; each has a rate limit and a budget.

    uvicorn examples.quickstart_starlette:app
    curl -i 127.0.0.1:8000/v1/draw -H 'x-customer: org_1' -d '{"prompt": "a river"}'

The fourth drawing within a minute is a 429; the sixth in a day a 402.
"""

from __future__ import annotations

from decimal import Decimal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from respan_guard import Guard, GuardMiddleware, Usage

PRICE = Decimal("0.04")

guard = Guard(
    "sqlite:///quickstart.db",
    default_limits={"rate_limit": 3, "budget_duration": "daily", "period_budget": PRICE * 5},
    default_hold=PRICE,  # what a request may cost; held while it runs, so that no two share the last four cents
)


async def paint(prompt: str) -> str:
    """Stands for whatever costs money."""
    return f"a picture of {prompt}"


async def draw(request: Request) -> JSONResponse:
    """Spend four cents on behalf of the customer that the door let in."""
    asked = await request.json()
    picture = await paint(asked["prompt"])
    await guard.record(Usage(model="flux-pro", cost=PRICE))
    return JSONResponse({"picture": picture})


app = Starlette(routes=[Route("/v1/draw", draw, methods=["POST"])])
# Only for a header that your own proxy sets and strips from what comes from outside.
app.add_middleware(GuardMiddleware, guard=guard, identify="header:x-customer", include=["/v1/*"])
