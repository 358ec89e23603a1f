"""Records to Respan's request logs: `POST /api/request-logs/bulk/`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

from respan_guard.clock import Clock, SystemClock
from respan_guard.errors import ConfigurationError
from respan_guard.exporters.base import BatchRefused, ExportFailed, ExportResult, check_name
from respan_guard.exporters.http import Answer, Sender, check_answer
from respan_guard.usage import UsageRecord

__all__ = ["GATEWAY_LOG", "RespanExporter"]

GATEWAY_LOG: Final = "respan_log_id"
"""The key of a record's metadata that says that Respan's own gateway has logged the call already."""
_MAX_IDENTIFIER = 120  # Respan cuts `*_identifier` to so many characters when it stores them
_LATER = re.compile(
    r"\b(try|send|retry)\b.*\b(again|later)\b|\btemporar|\bunavailable\b|\btimed? ?out\b|\boverloaded\b", re.IGNORECASE
)
"""What says of a row, in words, that it is not the row's fault; our own API says `retryable`."""
_LOG_TYPES = {"embeddings": "embedding", "text_completion": "completion"}
logger = logging.getLogger("respan_guard")


class RespanExporter:
    """Sends each call as a request log; its record id is the log's `custom_identifier`.

    Respan knows no way to take a log back or to correct its cost. So only what is final is sent: calls (`kind`
    "usage"), not corrections by hand, and not calls whose usage is presumed. A call that Respan's gateway logged is
    left out, else it would be there twice. A call whose cost is unknown is sent without one.

    Args:
        api_key: A key of Respan.
        base_url: Where Respan is.
        name: Names its place in the log.
        clock: Where time comes from.

    Raises:
        ConfigurationError: Key, URL or name can't work, or httpx2 is missing.
    """

    batch_size = 500  # Respan's limit a request
    interval = 2.0  # seconds: 30 requests a minute

    def __init__(
        self,
        api_key: str,
        *,
        base_url: str = "https://api.respan.ai",
        name: str = "respan",
        clock: Clock | None = None,
    ) -> None:
        self.name = check_name(name)
        if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise ConfigurationError("api_key must be a key of Respan")
        root = base_url.rstrip("/").removesuffix("/api")
        self._sender = Sender(f"{root}/api/request-logs/bulk/", allow_private=True)
        self._headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
        self._clock = clock or SystemClock()
        self._warned = False

    async def export(self, batch: Sequence[UsageRecord]) -> ExportResult | None:
        """See `Exporter.export`."""
        places = [place for place, record in enumerate(batch) if _belongs(record)]
        if not places:
            return None
        self._warn(batch)
        rows = [batch[place] for place in places]
        body = await asyncio.to_thread(lambda: f'{{"logs":[{",".join(map(_log, rows))}]}}'.encode())
        answer = await self._sender.post(body, self._headers)
        try:
            check_answer(answer, self._clock)
        except BatchRefused:
            # 400 may also say that each row is wrong, one by one.
            if not (errors := _errors(answer, len(rows))):
                raise
        else:
            errors = _errors(answer, len(rows))
            if errors is None:
                raise ExportFailed(f"HTTP {answer.status} with a body that tells nothing of the rows")
        return ExportResult(
            rejected={places[index]: reason for index, (reason, again) in errors.items() if not again},
            again={places[index]: reason for index, (reason, again) in errors.items() if again},
        )

    async def close(self) -> None:
        """Let go of connections."""
        await self._sender.close()

    def _warn(self, batch: Sequence[UsageRecord]) -> None:
        if not self._warned and any(len(record.customer_identifier) > _MAX_IDENTIFIER for record in batch):
            self._warned = True
            logger.warning(
                "a customer identifier has more than %d characters: Respan cuts it off there,"
                " and customers that begin alike become one",
                _MAX_IDENTIFIER,
            )


def _belongs(record: UsageRecord) -> bool:
    return record.kind == "usage" and GATEWAY_LOG not in (record.usage.metadata or {})


def _errors(answer: Answer, count: int) -> dict[int, tuple[str, bool]] | None:
    """Which rows were not taken, why, and whether they may be taken later; None if the answer does not say."""
    try:
        told = json.loads(answer.body)
        if not isinstance(told["success_count"], int):
            return None
        found = {int(error["index"]): _reason(error) for error in told.get("errors") or ()}
        if told["success_count"] + len(found) != count:
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if all(0 <= index < count for index in found) else None


def _reason(error: dict[str, Any]) -> tuple[str, bool]:
    reason, told = str(error.get("error", "")), error.get("retryable")
    return reason[:200], bool(_LATER.search(reason)) if told is None else told is True


def _log(record: UsageRecord) -> str:
    """One row, as JSON; amounts are numbers with all their digits, which no float could promise."""
    usage = record.usage
    values: dict[str, Any] = {
        "model": usage.model or "unknown",
        "customer_identifier": record.customer_identifier or None,
        "custom_identifier": _identifier(record.id),
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "usage": {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
            "cache_creation_input_tokens": usage.cache_write_tokens,
        },
        "timestamp": _moment(record, 0),
        "start_time": _moment(record, usage.latency_ms or 0),
        "log_type": _LOG_TYPES.get(usage.operation or "", "chat"),
        "status": "success" if usage.status == "ok" else "error",
        "status_code": 200 if usage.status == "ok" else 500,
        "trace_unique_id": usage.trace_id,
        "metadata": {
            **{name: value for name, value in (usage.metadata or {}).items() if not str(name).startswith("_")},
            "respan_guard_record_id": record.id,
        },
    }
    numbers = {
        "cost": record.cost,
        "latency": None if usage.latency_ms is None else Decimal(usage.latency_ms).scaleb(-3),
        "time_to_first_token": None if usage.ttft_ms is None else Decimal(usage.ttft_ms).scaleb(-3),
    }
    text = json.dumps({name: value for name, value in values.items() if value is not None}, allow_nan=False)
    exact = "".join(f', "{name}": {value:f}' for name, value in numbers.items() if value is not None)
    return f"{text[:-1]}{exact}}}"


def _moment(record: UsageRecord, earlier_ms: int) -> str:
    moment = record.time - timedelta(milliseconds=earlier_ms)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _identifier(record_id: str) -> str:
    """An id that Respan keeps whole; of a longer one, so much that it stays the only one of its kind."""
    if len(record_id) <= _MAX_IDENTIFIER:
        return record_id
    digest = hashlib.sha256(record_id.encode()).hexdigest()[:32]
    return f"{record_id[: _MAX_IDENTIFIER - 33]}~{digest}"
