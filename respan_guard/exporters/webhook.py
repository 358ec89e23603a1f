"""Records in batches to an URL, signed per Standard Webhooks."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from respan_guard.clock import Clock, SystemClock
from respan_guard.exporters.base import ExportResult, check_name
from respan_guard.exporters.http import Sender, check_answer
from respan_guard.exporters.rows import record_row
from respan_guard.exporters.signing import Signer
from respan_guard.usage import UsageRecord

__all__ = ["SignedSender", "WebhookExporter"]


class SignedSender:
    """Posts signed events to one URL.

    Args:
        url: Where to.
        secret: See `Signer`.
        allow_private: See `Sender`.
        clock: Where time comes from.
    """

    def __init__(self, url: str, secret: str | Sequence[str], *, allow_private: bool, clock: Clock | None) -> None:
        self._sender = Sender(url, allow_private=allow_private)
        self._signer = Signer(secret)
        self._clock = clock or SystemClock()

    async def send(self, message_id: str, kind: str, data: dict[str, Any]) -> None:
        """Send one event; the id is the same each time it is sent, the timestamp that of the attempt.

        Raises:
            ExportFailed: Try again later.
            BatchRefused: It won't be taken as it is.
        """
        seconds = self._clock.now_ms() // 1000
        moment = datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
        body = await asyncio.to_thread(_body, {"type": kind, "timestamp": moment, "data": data})
        headers = self._signer.headers(message_id, seconds, body) | {"content-type": "application/json"}
        check_answer(await self._sender.post(body, headers), self._clock)

    async def close(self) -> None:
        """Let go of connections."""
        await self._sender.close()


class WebhookExporter:
    """Posts batches of records as events of type "usage.recorded"; the body is described by `webhook.schema.json`.

    Args:
        url: Where to. Redirects are not followed.
        secret: "whsec_" and the base64 of 24 to 64 random bytes; several while one takes the place of another.
        name: Names its place in the log.
        batch_size: How many records an event holds at most.
        allow_private: Whether the URL may lead to an address that is not public: this machine, the local network.
        clock: Where time comes from.

    Raises:
        ConfigurationError: URL, secret or name can't work, or httpx2 is missing.
    """

    def __init__(
        self,
        url: str,
        secret: str | Sequence[str],
        *,
        name: str = "webhook",
        batch_size: int = 100,
        allow_private: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.name = check_name(name)
        self.batch_size = batch_size
        self._sender = SignedSender(url, secret, allow_private=allow_private, clock=clock)

    async def export(self, batch: Sequence[UsageRecord]) -> ExportResult | None:
        """See `Exporter.export`."""
        names = "\n".join([self.name, *(f"{r.customer_identifier}\t{r.id}\t{r.revision}" for r in batch)])
        message_id = f"usage_{hashlib.sha256(names.encode()).hexdigest()[:32]}"
        await self._sender.send(message_id, "usage.recorded", {"records": [record_row(record) for record in batch]})
        return None

    async def close(self) -> None:
        """Let go of connections."""
        await self._sender.close()


def _body(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":"), allow_nan=False).encode()
