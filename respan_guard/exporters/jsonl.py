"""Records as lines of JSON in a file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from respan_guard.exporters.base import ExportResult, check_name
from respan_guard.exporters.files import GrowingFile
from respan_guard.exporters.rows import json_line
from respan_guard.usage import UsageRecord

__all__ = ["JSONLExporter"]


class JSONLExporter:
    """Appends one JSON object a line, see docs/exporters.md for its fields.

    Args:
        path: The file. Of several processes or machines one exports at a time, into its own file system.
        name: Names its place in the log.
        max_bytes: From which size on the file is put aside (`usage.1.jsonl`, ...) and a new one begun.

    Raises:
        ConfigurationError: There is no such directory, or the name or the size can't work.
    """

    batch_size = 100

    def __init__(self, path: str | os.PathLike[str], *, name: str = "jsonl", max_bytes: int = 100_000_000) -> None:
        self.name = check_name(name)
        self._file = GrowingFile(path, max_bytes)

    async def export(self, batch: Sequence[UsageRecord]) -> ExportResult | None:
        """See `Exporter.export`."""
        await asyncio.to_thread(lambda: self._file.append("".join(f"{json_line(record)}\n" for record in batch)))
        return None
