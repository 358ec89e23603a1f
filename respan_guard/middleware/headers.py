"""`RateLimit-Policy` and `RateLimit`, as in draft-ietf-httpapi-ratelimit-headers-11, and reading request headers.

Both fields are lists of strings with parameters (RFC 9651): the policy's quota `q` and window `w` in
seconds, and what is left of it (`r`) for the next `t` seconds. Budgets appear only where amounts may be
shown, in whole micro-USD: the draft knows no unit for money, so the unit is a parameter of our own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from respan_guard.backends.base import Limit
from respan_guard.decision import Decision, rate_wait_ms
from respan_guard.errors import InvalidInput

__all__ = ["RateLimitFields", "header", "is_preflight", "sends_body", "without_body"]

_UNIT = ';respan-unit="usd-micros"'
_NANO_PER_MICRO = 1000
_MAX_PLANS = 1024
_OF_A_BODY = frozenset({b"content-length", b"transfer-encoding"})


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The value of a request header that may come once.

    Raises:
        InvalidInput: It came more than once: which one counts is then anybody's guess.
    """
    found = None
    for key, value in headers:
        if key == name:
            if found is not None:
                raise InvalidInput(f"the header {name.decode()} must be sent once only", field=name.decode())
            found = value
    return found


class _Plan:
    """What of the fields is the same for every decision under the same limits.

    Attributes:
        limits: The limits; kept, so that no other tuple gets their id.
        policy: The `RateLimit-Policy` field.
        rates: For each rate its place among the limits, its cap, its window (ms), and how its item begins.
        budgets: For each budget shown its place among the limits, its cap, and how its item begins.
    """

    __slots__ = ("budgets", "limits", "policy", "rates")

    def __init__(self, limits: tuple[Limit, ...], *, show_amounts: bool) -> None:
        self.limits = limits
        self.rates: list[tuple[int, int, int, str]] = []
        self.budgets: list[tuple[int, int, str]] = []
        policies: list[str] = []
        for place, limit in enumerate(limits):
            if limit.kind == "rate":
                self.rates.append((place, limit.amount, limit.window_ms, f'"{limit.name}";r='))
                policies.append(f'"{limit.name}";q={limit.amount};w={limit.window_ms // 1000}')
            elif show_amounts and limit.metric == "cost" and not limit.shared:
                self.budgets.append((place, limit.amount, f'"{limit.name}";r='))
                policies.append(f'"{limit.name}";q={limit.amount // _NANO_PER_MICRO}{_UNIT}')
        self.policy = (b"ratelimit-policy", ", ".join(policies).encode("ascii")) if policies else None


class RateLimitFields:
    """Makes the two fields.

    Args:
        show_amounts: Whether the customer's budgets are shown.
    """

    __slots__ = ("_plans", "_show_amounts")

    def __init__(self, *, show_amounts: bool = False) -> None:
        self._show_amounts = show_amounts
        self._plans: dict[int, _Plan] = {}

    def of(self, decision: Decision, held: int = 0) -> list[tuple[bytes, bytes]]:
        """The fields, or nothing for a customer without limits to show.

        Args:
            decision: What was decided; of an admission, `r` is what is left after it.
            held: What the admission itself holds, nano-USD.
        """
        limits = decision.compiled
        plan = self._plans.get(id(limits))  # a policy's limits are one tuple all day long
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[id(limits)] = _Plan(limits, show_amounts=self._show_amounts)
        if plan.policy is None:
            return []
        outcome = decision.outcome
        now = outcome.now
        used = outcome.used
        taken = decision.requests if decision.allowed else 0
        items: list[str] = []
        for (place, amount, width, begin), (start, before, hits) in zip(plan.rates, outcome.windows, strict=True):
            left = amount - used[place] - taken
            if left < 0:
                left = 0
            end = start + width
            if before:
                # What the window before still weighs falls off bit by bit, so that more is free earlier.
                wait = rate_wait_ms((start, before, hits + taken), width, amount, left + 1, now)
                if wait is not None and now + wait < end:
                    end = now + wait
            items.append(f"{begin}{left};t={-((now - end) // 1000) if end > now else 0}")
        for place, amount, begin in plan.budgets:
            left = max(0, amount - used[place] - outcome.held[place] - held) // _NANO_PER_MICRO
            reset = decision.resets_ms[place]
            ends = "" if reset is None else f";t={max(0, -((now - reset) // 1000))}"
            items.append(f"{begin}{left}{ends}{_UNIT}")
        return [plan.policy, (b"ratelimit", ", ".join(items).encode("ascii"))]


def is_preflight(scope: MutableMapping[str, Any]) -> bool:
    """Whether a browser asks whether it may ask: `OPTIONS` with the two headers of a CORS preflight, and no body."""
    if scope["method"] != "OPTIONS" or sends_body(scope):
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names


def without_body(receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> Any:
    """A `receive` for a request that has no body, whatever the client sends: over HTTP/2 no header tells beforehand."""
    asked = False

    async def received() -> MutableMapping[str, Any]:
        nonlocal asked
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            if not asked:
                asked = True
                if message.get("body") or message.get("more_body"):
                    message = {"type": "http.request", "body": b"", "more_body": False}
                return message

    return received


def sends_body(scope: MutableMapping[str, Any]) -> bool:
    """Whether the headers of a request announce a body; over HTTP/2 they need not."""
    return any(name in _OF_A_BODY and value != b"0" for name, value in scope["headers"])
