"""What an exporter is, and what it says of a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from respan_guard.errors import ConfigurationError, GuardError
from respan_guard.usage import UsageRecord

__all__ = ["BatchRefused", "ExportFailed", "ExportResult", "Exporter", "check_name"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What became of a batch that was taken.

    Attributes:
        rejected: Why single rows were not, by their place in the batch; they become dead letters.
        again: Why single rows were not this time. They come again, without those that were taken; one that is put off
            ten times while others are taken becomes a dead letter.
    """

    rejected: Mapping[int, str] = field(default_factory=dict)
    again: Mapping[int, str] = field(default_factory=dict)


class ExportFailed(GuardError):
    """Nothing of the batch is known to be taken, and it may be taken later: it is sent again.

    Args:
        reason: What happened, for people; shown beside the exporter's name.
        retry_after: Seconds before which trying again makes no sense, if the other side said so.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class BatchRefused(GuardError):
    """The batch will not be taken as it is, ever: it is halved, and a single row becomes a dead letter."""


@runtime_checkable
class Exporter(Protocol):
    """Somebody who takes usage records: `guard.add_exporter(exporter)`.

    Of all processes of a store, one at a time exports under a name. Records come in the order of the ledger's log,
    each at least once: after a crash, or a failure half way, rows that were taken come again. Customer and id
    together name a record for ever; one that comes with a higher `revision` takes the place of the one before.

    It may also have: `batch_size`, how many records at most it takes at once (100); `interval`, the seconds from
    one batch to the next at least (0); `from_start`, whether it begins with the oldest record when its name is new
    (True), or with the next; `traced`, whether instrumentations may make spans of what it sends (False); and async
    methods `open()` and `close()`, called where it is used, around its use.

    Attributes:
        name: Names its place in the log: 1 to 64 letters, digits, dots, dashes and underscores. Two exporters of one
            guard have two names, and the same exporter has the same name in every process.
    """

    name: str

    async def export(self, batch: Sequence[UsageRecord]) -> ExportResult | None:
        """Take records, durably; within 20 seconds, else it counts as failed.

        Returns:
            Rows that were not taken; None if all were.

        Raises:
            ExportFailed: Try again later. Any other exception means the same.
            BatchRefused: It won't be taken as it is.
        """
        ...


def check_name(name: object) -> str:
    """Refuse what can't name an exporter.

    Raises:
        ConfigurationError: It is no such name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"an exporter's name must be 1 to 64 letters, digits, dots, dashes and underscores, got {name!r}"
        )
    return name
