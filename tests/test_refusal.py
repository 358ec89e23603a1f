"""What a refused client is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from respan_guard.backends.base import Limit, Refused
from respan_guard.decision import Decision
from respan_guard.errors import (
    BodyTooLarge,
    BudgetExceeded,
    ConfigurationError,
    CustomerUnknown,
    GuardError,
    InvalidIdentifier,
    InvalidInput,
    StorageCorrupt,
    StorageUnavailable,
    Unidentified,
    UnpricedModel,
)
from respan_guard.refusal import MAX_RETRY_AFTER, RefusalAnswer, is_refusal, render

NOW = 1_764_547_200_000  # 2025-12-01T00:00:00Z
RATE = Limit("rate_limit", "rate", "requests", 10, window_ms=60_000)
PERIOD = Limit("period_budget", "span", "cost", 5_000_000_000, first_day=1, end_day=31)
TOTAL = Limit("total_budget", "total", "cost", 50_000_000_000)
BLOCK = Limit("blocked", "total", "cost", 0)
MONTH_END = 1_767_225_600_000  # 2026-01-01T00:00:00Z


def decision(*, reasons: tuple[str | None, ...], window: tuple[int, int, int] = (NOW, 0, 10)) -> Decision:
    """A refusal of a customer with a rate and two budgets."""
    outcome = Refused(NOW, reasons, (10, 5_000_000_000, 7), (0, 1_000, 0), (window,))
    return Decision("org_1", (RATE, PERIOD, TOTAL), (None, MONTH_END, None), outcome)


def headers_of(answer: RefusalAnswer) -> dict[str, str]:
    """The headers by name; each comes once."""
    names = [name for name, _ in answer.headers]
    assert len(names) == len(set(names))
    return {name.decode(): value.decode() for name, value in answer.headers}


def body_of(answer: RefusalAnswer) -> dict[str, Any]:
    """The body, which must agree with the status and with its own length."""
    body: dict[str, Any] = json.loads(answer.body)
    assert body["status"] == answer.status
    assert headers_of(answer)["content-length"] == str(len(answer.body))
    assert headers_of(answer)["content-type"] == "application/problem+json"
    assert headers_of(answer)["cache-control"] == "no-store"
    return body


def test_a_rate_is_429_with_the_wait_rounded_up() -> None:
    """A full rate answers 429; both retry headers say at least the exact wait, in agreement."""
    answer = render(decision(reasons=("rate", None, None)), random=lambda: 0.0)
    headers = headers_of(answer)
    assert answer.status == 429
    assert 60_000 <= int(headers["retry-after-ms"]) <= 60_000 + 7
    assert int(headers["retry-after"]) == MAX_RETRY_AFTER
    assert "x-should-retry" not in headers
    body = body_of(answer)
    assert body["violated-policies"] == ["rate_limit"]
    assert body["error"] == {
        "type": "rate_limit_exceeded",
        "code": "rate_limit",
        "message": body["detail"],
        "param": None,
    }
    assert body["type"].endswith("#quota-exceeded")
    assert body["resets_at"].startswith("2025-12-01T00:01:0")


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999999])
@pytest.mark.parametrize("left_ms", [1, 400, 1_000, 30_000, 59_999])
def test_jitter_only_delays(jitter: float, left_ms: int) -> None:
    """Whatever the random number, nobody is told to come back too early, after less than 1 s or more than 60 s."""
    refused = decision(reasons=("rate", None, None), window=(NOW - 60_000 + left_ms, 0, 10))
    wait = refused.retry_after
    assert wait is not None
    headers = headers_of(render(refused, random=lambda: jitter))
    told = int(headers["retry-after-ms"]) / 1000
    assert told >= min(wait, MAX_RETRY_AFTER)
    assert 1 <= told <= int(headers["retry-after"]) <= MAX_RETRY_AFTER
    assert int(headers["retry-after"]) - told < 1


def test_jitter_spreads_those_refused_together() -> None:
    """Two clients refused at the same instant are told different times."""
    refused = decision(reasons=("rate", None, None), window=(NOW - 50_000, 0, 10))
    early, late = (
        headers_of(render(refused, random=random))["retry-after-ms"] for random in (lambda: 0.1, lambda: 0.9)
    )
    assert early != late


def test_a_rate_of_zero_is_not_worth_retrying() -> None:
    """A rate that no wait cures has no Retry-After, and clients are told not to retry."""
    limit = Limit("rate_limit", "rate", "requests", 0, window_ms=60_000)
    never = Decision("org_1", (limit,), (None,), Refused(NOW, ("rate",), (0,), (0,), ((NOW, 0, 0),)))
    answer = render(never)
    assert answer.status == 429
    assert headers_of(answer)["x-should-retry"] == "false"
    assert "retry-after" not in headers_of(answer)


def test_a_spent_budget_is_402_without_retry_after() -> None:
    """A spent budget answers 402 (or what is configured), never with Retry-After: clients would sleep for days."""
    refused = decision(reasons=(None, "exhausted", None))
    for status, answer in ((402, render(refused)), (429, render(refused, budget_status_code=429))):
        headers = headers_of(answer)
        assert answer.status == status
        assert headers["x-should-retry"] == "false"
        assert "retry-after" not in headers
        assert "retry-after-ms" not in headers
        body = body_of(answer)
        assert body["error"]["type"] == "budget_exceeded"
        assert body["error"]["code"] == "period_budget"
        assert body["violated-policies"] == ["period_budget"]
        assert body["resets_at"] == "2026-01-01T00:00:00Z"
        assert body["type"].endswith("#quota-exceeded")


def test_a_budget_full_of_calls_in_flight_is_a_short_429() -> None:
    """Holds pass, so the answer is a retryable 429 within few seconds and says so in its code."""
    answer = render(decision(reasons=(None, "held", None)), random=lambda: 0.7)
    assert answer.status == 429
    assert 1 <= int(headers_of(answer)["retry-after"]) <= 5
    assert "x-should-retry" not in headers_of(answer)
    assert body_of(answer)["error"]["code"] == "budget_in_flight"
    assert body_of(answer)["error"]["type"] == "budget_exceeded"


def test_the_hardest_limit_decides() -> None:
    """A spent budget beside a full rate is 402, and both are listed."""
    answer = render(decision(reasons=("rate", "exhausted", None)))
    assert answer.status == 402
    assert set(body_of(answer)["violated-policies"]) == {"rate_limit", "period_budget"}


def test_a_blocked_customer_is_403() -> None:
    """A block answers 403 and is not retried."""
    refused = Decision("org_1", (BLOCK,), (None,), Refused(NOW, ("exhausted",), (0,), (0,)))
    answer = render(refused)
    assert answer.status == 403
    assert headers_of(answer)["x-should-retry"] == "false"
    assert body_of(answer)["error"]["code"] == "customer_blocked"


def test_amounts_only_on_request() -> None:
    """No amount of money is in the body unless `show_amounts` is set; then they come in Respan's shape."""
    refused = decision(reasons=(None, "exhausted", None))
    assert "limit_info" not in body_of(render(refused))
    assert b"5.0" not in render(refused).body
    info = body_of(render(refused, show_amounts=True))["limit_info"]
    assert info["is_allowed"] is False
    assert info["limits"][1] == {
        "name": "period_budget",
        "current_value": 5.0,
        "new_value": 5.000001,
        "limit_value": 5.0,
        "is_within_limit": False,
    }


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Unidentified("nobody"), 401, "unidentified"),
        (CustomerUnknown("customer 'org_9' is not known"), 403, "customer_unknown"),
        (InvalidIdentifier("customer_identifier must not be empty", field="customer_identifier"), 400,
         "invalid_customer_identifier"),
        (UnpricedModel("no price is known for model 'x'"), 400, "unpriced_model"),
        (InvalidInput("the body names model twice", field="model"), 400, "invalid_request"),
        (BodyTooLarge("too large", field="body"), 413, "body_too_large"),
        (StorageUnavailable("redis://:secret@host did not answer"), 503, "storage_unavailable"),
        (StorageCorrupt("/var/lib/guard.db is damaged"), 503, "storage_unavailable"),
    ],
)  # fmt: skip
def test_errors(error: GuardError, status: int, code: str) -> None:
    """Each error has its status and code; only a storage that may come back is worth retrying."""
    answer = render(error, random=lambda: 0.2)
    assert (answer.status, body_of(answer)["error"]["code"]) == (status, code)
    headers = headers_of(answer)
    if status == 503:
        assert 1 <= int(headers["retry-after"]) <= 5
        assert body_of(answer)["type"].endswith("#temporary-reduced-capacity")
        assert b"secret" not in answer.body
        assert b"guard.db" not in answer.body
    else:
        assert headers["x-should-retry"] == "false"
    assert ("www-authenticate" in headers) == (status == 401)


def test_the_answer_to_an_error_is_that_to_its_decision() -> None:
    """A refusal caught as an exception is answered as its decision is."""
    refused = decision(reasons=(None, "exhausted", None))
    assert render(BudgetExceeded(refused)) == render(refused)


def test_hostile_text_stays_json() -> None:
    """A detail that quotes what the client sent can't break the body or its ASCII."""
    answer = render(InvalidIdentifier('bad "id" \ud800 \r\n \u2028'))
    assert json.loads(answer.body)["detail"].startswith('bad "id"')
    assert answer.body.isascii()
    assert b"\n" not in answer.body


def test_what_counts_as_a_refusal() -> None:
    """Errors that say no to a request are refusals; a wrong setup and the app's own errors are not."""
    assert is_refusal(StorageUnavailable("x"))
    assert is_refusal(Unidentified("x"))
    assert is_refusal(InvalidIdentifier("x"))
    assert not is_refusal(ConfigurationError("x"))
    assert not is_refusal(InvalidInput("x"))
    assert not is_refusal(ValueError("x"))
