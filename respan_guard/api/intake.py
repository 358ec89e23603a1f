"""Usage that comes in: one log, or up to 500.

An answer that asks for a row again (503, or `retryable` in a bulk) means that it is not stored and won't be: no
row counts twice because its sender did as it was told.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from pydantic import BaseModel, Field
from starlette.responses import Response

from respan_guard.api.log import Log, spread
from respan_guard.api.operation import Call, validated
from respan_guard.api.reading import Told, read_log
from respan_guard.api.rows import log_row
from respan_guard.api.wire import JSON
from respan_guard.bookings import Booked
from respan_guard.customers import not_reserved
from respan_guard.errors import BackendError, GuardError, InvalidInput, RevisionConflict, StorageUnavailable

__all__ = ["LogBatch", "bulk", "create"]

MAX_ROWS: Final = 500
_RETRYABLE = (BackendError, RevisionConflict)
_WAITS = "storage does not answer; this log is kept in memory until it does, and counts once: do not send it again"


class LogBatch(BaseModel):
    """Up to 500 logs."""

    logs: list[Log] = Field(min_length=1, max_length=MAX_ROWS)


async def create(call: Call) -> Response:
    """Book one call."""
    told = _read(call, call.body)
    await _introduce(call, told)
    booked = await _record(call, told, look=True)
    return JSON(_created(call, booked), 202 if booked.waits else 201)


async def bulk(call: Call) -> Response:
    """Book up to 500 calls; each is taken or refused by itself."""
    body = call.body
    logs = body.get("logs") if isinstance(body, dict) else None
    if not isinstance(logs, list) or not logs:
        raise InvalidInput('logs must be a list of logs: {"logs": [{...}, ...]}', field="logs")
    if len(logs) > MAX_ROWS:
        raise InvalidInput(f"logs must hold at most {MAX_ROWS} rows, got {len(logs):,}", field="logs")
    errors: dict[int, GuardError] = {}
    told: dict[int, Told] = {}
    down: BackendError | None = None
    for index, log in enumerate(logs):
        try:
            told[index] = row = _read(call, log)
            if down is not None and row.params:
                raise down  # 500 waits, one after the other, would tell no more
            await _introduce(call, row)
        except GuardError as error:
            told.pop(index, None)
            errors[index] = error
            down = error if isinstance(error, BackendError) else down
    # All at once, so that storage takes them together; in order, since the first of two with one id counts.
    outcomes = await asyncio.gather(*(_record(call, row) for row in told.values()), return_exceptions=True)
    warnings: list[dict[str, Any]] = []
    for index, outcome in zip(told, outcomes, strict=True):
        if isinstance(outcome, GuardError):
            errors[index] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        elif (warning := _warning(outcome)) is not None:
            warnings.append({"index": index, "warning": warning})
    if len(errors) == len(logs) and any(isinstance(error, _RETRYABLE) for error in errors.values()):
        raise StorageUnavailable("no row was taken, and some will be if they are sent again")
    failed = [
        {"index": index, "error": _public(error), "retryable": isinstance(error, _RETRYABLE)}
        for index, error in sorted(errors.items())
    ]
    answer = {
        "success_count": len(logs) - len(failed), "error_count": len(failed), "errors": failed, "warnings": warnings,
    }  # fmt: skip
    waits = any(isinstance(outcome, Booked) and outcome.waits for outcome in outcomes)
    return JSON(answer, 400 if len(failed) == len(logs) else 202 if waits else 201)


def _read(call: Call, body: Any) -> Told:
    if not isinstance(body, dict):
        raise InvalidInput("a log must be a JSON object")
    told = read_log(validated(Log, spread(body)), store_content=call.guard.settings.store_content)
    not_reserved(told.customer)
    return told


async def _introduce(call: Call, told: Told) -> None:
    """What the log says about its customer: the name of one that has none; limits where the guard trusts them."""
    if told.customer and told.params:
        trusted = call.guard.settings.trust_customer_params
        time = told.usage.time
        at_ms = None if time is None else int(time.timestamp() * 1000)
        await call.guard.customers.merge(told.customer, told.params, trusted=trusted, at_ms=at_ms)


async def _record(call: Call, told: Told, *, look: bool = False) -> Booked:
    return await call.guard.bookings.book(
        told.usage,
        told.customer,
        entry_id=told.entry_id,
        unpriced=told.unpriced,
        no_call=told.no_call,
        look=look,
    )


def _public(error: GuardError) -> str:
    if isinstance(error, BackendError):  # its text may name hosts and files
        return "storage is unavailable; send this row again"
    return str(error)


def _created(call: Call, booked: Booked) -> dict[str, Any]:
    row = log_row(booked.record, call.guard.settings.namespace)
    names = (
        "id", "unique_id", "organization_id", "customer_identifier", "status", "cost", "timestamp", "environment",
        "latency", "time_to_first_token", "prompt_tokens", "completion_tokens", "prompt_cache_creation_tokens",
        "prompt_cache_hit_tokens", "model", "warnings",
    )  # fmt: skip
    found = {name: row[name] for name in names}
    if not booked.found:
        found |= {"id": None, "unique_id": None, "customer_identifier": None}
    if (warning := _warning(booked)) is not None:
        found |= {"status": "warning", "warnings": "; ".join(filter(None, (found["warnings"], warning)))}
    return found


def _warning(booked: Booked) -> str | None:
    """What whoever logged it should know, beside what the row itself says."""
    if booked.conflict:
        return "logged before with other amounts; the first stands"
    if not booked.found:
        return "its customer was deleted after the call: it counts, under no name, and there is no id to find it by"
    return _WAITS if booked.waits else None
