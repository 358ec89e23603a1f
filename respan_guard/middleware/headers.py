"""`RateLimit-Policy` and `RateLimit`, as in draft-ietf-httpapi-ratelimit-headers-11, and reading request headers.

Both fields are lists of strings with parameters (RFC 9651): the policy's quota `q` and window `w` in
seconds, and what is left of it (`r`) for the next `t` seconds. Budgets appear only where amounts may be
shown, in whole micro-USD: the draft knows no unit for money, so the unit is a parameter of our own.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from respan_guard.decision import Decision, rate_wait_ms
from respan_guard.errors import InvalidInput

__all__ = ["header", "rate_limit_headers"]

_UNIT = ';respan-unit="usd-micros"'
_NANO_PER_MICRO = 1000


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


def rate_limit_headers(decision: Decision, *, show_amounts: bool = False, held: int = 0) -> list[tuple[bytes, bytes]]:
    """The two fields, or nothing for a customer without limits to show.

    Args:
        decision: What was decided; of an admission, `r` is what is left after it.
        show_amounts: Whether budgets are shown.
        held: What the admission itself holds, nano-USD.
    """
    policies: list[str] = []
    standings: list[str] = []
    taken = decision.requests if decision.allowed else 0
    now = decision.now_ms
    for limit, window, used, others, reset in decision.standings():
        if limit.metric == "requests" and window is not None:
            start, before, hits = window
            width = limit.window_ms
            left = max(0, limit.amount - used - taken)
            end = start + width
            if before:
                # What the window before still weighs falls off bit by bit, so that more is free earlier.
                wait = rate_wait_ms((start, before, hits + taken), width, limit.amount, left + 1, now)
                end = end if wait is None else min(end, now + wait)
            policies.append(f'"{limit.name}";q={limit.amount};w={width // 1000}')
            standings.append(f'"{limit.name}";r={left};t={max(0, -(-(end - now) // 1000))}')
        elif show_amounts and limit.metric == "cost":
            left = max(0, limit.amount - used - others - held) // _NANO_PER_MICRO
            policies.append(f'"{limit.name}";q={limit.amount // _NANO_PER_MICRO}{_UNIT}')
            ends = "" if reset is None else f";t={max(0, -(-(reset - now) // 1000))}"
            standings.append(f'"{limit.name}";r={left}{ends}{_UNIT}')
    if not policies:
        return []
    return [
        (b"ratelimit-policy", ", ".join(policies).encode("ascii")),
        (b"ratelimit", ", ".join(standings).encode("ascii")),
    ]


def is_preflight(scope: MutableMapping[str, Any]) -> bool:
    """Whether a browser asks whether it may ask: `OPTIONS` with the two headers of a CORS preflight."""
    if scope["method"] != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names
