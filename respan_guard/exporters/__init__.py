"""Where usage records go: files, webhooks, Respan, or an exporter of your own; see docs/exporters.md."""

from __future__ import annotations

from respan_guard.exporters.base import BatchRefused, Exporter, ExportFailed, ExportResult
from respan_guard.exporters.csv import CSVExporter
from respan_guard.exporters.jsonl import JSONLExporter
from respan_guard.exporters.respan import RespanExporter
from respan_guard.exporters.webhook import WebhookExporter

__all__ = [
    "BatchRefused",
    "CSVExporter",
    "ExportFailed",
    "ExportResult",
    "Exporter",
    "JSONLExporter",
    "RespanExporter",
    "WebhookExporter",
]
