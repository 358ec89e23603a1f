"""From a refusal to its HTTP answer: status, headers and one body that every kind of client reads.

The body is an RFC 9457 problem (`type`, `title`, `status`, `detail`, and the `violated-policies` of the
RateLimit draft) with an `error` object beside it, which is where the OpenAI and Anthropic clients look.
The official clients retry every 429 and 503, and sleep as long as `Retry-After` says, for days if it
says so; hence `x-should-retry: false` on what waiting does not cure, and `Retry-After` on nothing else.
"""

from __future__ import annotations

import json
import math
import random as _random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from respan_guard.decision import BLOCKED, Decision, LimitStatus
from respan_guard.errors import (
    BackendError,
    BodyTooLarge,
    CustomerUnknown,
    GuardError,
    InvalidIdentifier,
    InvalidInput,
    LimitExceeded,
    Unidentified,
    UnpricedModel,
)

__all__ = ["MAX_RETRY_AFTER", "RefusalAnswer", "is_refusal", "render"]

MAX_RETRY_AFTER = 60
"""Seconds. Older clients ignore a longer `Retry-After`, newer ones sleep it."""

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
BLOCKED_CODE = "customer_blocked"
_BLANK = "about:blank"
_STORAGE_WAIT = 1.0
_REFUSALS = (LimitExceeded, BackendError, Unidentified, InvalidIdentifier, UnpricedModel, CustomerUnknown, BodyTooLarge)


@dataclass(frozen=True, slots=True)
class RefusalAnswer:
    """An HTTP response, ready to be sent.

    Attributes:
        status: The status code.
        headers: Lower-case names and values, as ASGI wants them.
        body: JSON in ASCII.
        title: What is wrong, in a few words.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    title: str


def is_refusal(error: BaseException) -> bool:
    """Whether an error that left the app says no to the request, rather than that something is broken."""
    return isinstance(error, _REFUSALS)


def render(
    refusal: Decision | GuardError,
    *,
    show_amounts: bool = False,
    budget_status_code: int = 402,
    random: Callable[[], float] = _random.random,
) -> RefusalAnswer:
    """Make the answer to a refused request.

    Args:
        refusal: The decision, or the error that carries it or says what else is wrong.
        show_amounts: Whether the body tells amounts of the customer's budgets (as `limit_info`, in Respan's shape).
        budget_status_code: The status of a spent budget.
        random: Numbers from 0 to 1 that spread the times at which refused clients come back.
    """
    if isinstance(refusal, LimitExceeded):
        refusal = refusal.decision
    if isinstance(refusal, Decision):
        return _of_decision(refusal, show_amounts, budget_status_code, random)
    return _of_error(refusal, random)


def _of_decision(
    decision: Decision, show_amounts: bool, budget_status_code: int, random: Callable[[], float]
) -> RefusalAnswer:
    violated = decision.violated
    hardest = violated[0].name if violated else ""
    reason = decision.reason
    resets_at = decision.resets_at
    members: dict[str, Any] = {"violated-policies": [status.name for status in violated]}
    if resets_at is not None:
        members["resets_at"] = _iso(resets_at)
    if show_amounts:
        members["limit_info"] = _limit_info(decision.limits)
    wait = decision.retry_after
    if reason == BLOCKED:
        return _answer(
            403, _BLANK, "Customer blocked", decision.detail, "permission_error", "customer_blocked", members
        )
    if reason == "rate":
        return _answer(
            429, QUOTA_EXCEEDED, "Too many requests", decision.detail, "rate_limit_exceeded", hardest, members,
            None if wait is None else _spread(wait, random),
        )  # fmt: skip
    if reason == "held":
        return _answer(
            429, QUOTA_EXCEEDED, "Budget in use", decision.detail, "budget_exceeded", "budget_in_flight", members,
            _spread(wait or 1.0, random),
        )  # fmt: skip
    title = "Budget used up" if violated[0].used >= violated[0].limit else "Budget too small"
    return _answer(budget_status_code, QUOTA_EXCEEDED, title, decision.detail, "budget_exceeded", hardest, members)


def _of_error(error: GuardError, random: Callable[[], float]) -> RefusalAnswer:
    if isinstance(error, BackendError):
        # Nothing of the error's text: it may name hosts and files.
        detail = "The limits can't be checked at the moment. Try again shortly."
        wait = _spread(_STORAGE_WAIT, random)
        return _answer(
            503, REDUCED_CAPACITY, "Service unavailable", detail, "server_error", "storage_unavailable", {}, wait
        )
    if isinstance(error, Unidentified):
        detail = str(error) or "The request does not say which customer it is for."
        answer = _answer(401, _BLANK, "Customer not identified", detail, "authentication_error", "unidentified", {})
        answer.headers.append((b"www-authenticate", b"Bearer"))  # RFC 9110, 15.5.2: a 401 needs a challenge
        return answer
    if isinstance(error, CustomerUnknown):
        detail = "There is no such customer."
        return _answer(403, _BLANK, "Customer unknown", detail, "permission_error", "customer_unknown", {})
    code = "invalid_request"
    status, title = 400, "Invalid request"
    if isinstance(error, BodyTooLarge):
        status, title, code = 413, "Request body too large", "body_too_large"
    elif isinstance(error, UnpricedModel):
        title, code = "Model without a price", "unpriced_model"
    elif isinstance(error, InvalidIdentifier):
        title, code = "Invalid customer identifier", "invalid_customer_identifier"
    param = error.field if isinstance(error, InvalidInput) else None
    return _answer(status, _BLANK, title, str(error), "invalid_request_error", code, {}, param=param)


def _answer(
    status: int,
    problem: str,
    title: str,
    detail: str,
    kind: str,
    code: str,
    members: dict[str, Any],
    wait_ms: int | None = None,
    param: str | None = None,
) -> RefusalAnswer:
    content = {"type": problem, "title": title, "status": status, "detail": detail, **members}
    content["error"] = {"type": kind, "code": code, "message": detail, "param": param}
    body = json.dumps(content).encode()  # ASCII: a detail may quote anything
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    if wait_ms is None:
        headers.append((b"x-should-retry", b"false"))
    else:
        headers.append((b"retry-after", b"%d" % -(-wait_ms // 1000)))
        headers.append((b"retry-after-ms", b"%d" % wait_ms))  # official clients prefer it; others read whole seconds
    return RefusalAnswer(status, headers, body, title)


def _spread(wait: float, random: Callable[[], float]) -> int:
    """Milliseconds to wait: at least `wait` seconds and a tenth more at random, within 1 to `MAX_RETRY_AFTER` seconds.

    Official clients sleep exactly what they are told, so that those refused together would come back together.
    """
    jittered = wait + random() * max(1.0, wait / 10)
    return math.ceil(min(max(jittered, 1.0), MAX_RETRY_AFTER) * 1000)


def _iso(moment: datetime) -> str:
    if moment.microsecond:
        moment += timedelta(seconds=1)  # rounded up: not a moment at which it would be refused again
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _limit_info(limits: tuple[LimitStatus, ...]) -> dict[str, Any]:
    """Respan's `limit_info`; its amounts are JSON numbers of USD."""
    return {
        "is_allowed": False,
        "limits": [
            {
                "name": status.name,
                "current_value": float(status.used),
                "new_value": float(status.used + status.held),
                "limit_value": float(status.limit),
                "is_within_limit": status.reason is None,
            }
            for status in limits
            if not status.shared
        ],
    }
