"""Requests that cost money and can't be metered, or can't be read: said once in the log, by whichever door sees one."""

from __future__ import annotations

import logging
import re

from respan_guard.providers.urls import as_read

__all__ = ["warn_of", "warn_unread"]

logger = logging.getLogger("respan_guard")

_KINDS = tuple(
    (kind, re.compile(pattern + "$", re.IGNORECASE))
    for kind, pattern in (
        ("batches", r"/batches|:(?:batchGenerateContent|asyncBatchEmbedContent)"),
        ("images and videos by Imagen and Veo", r":predict(?:LongRunning)?"),
        ("videos", r"/videos(?:/edits|/extensions|/[^/]+/remix)?"),
        ("fine-tuning", r"/fine_tuning/(?:jobs(?:/[^/]+/resume)?|alpha/graders/run)"),
        ("searches of vector stores", r"/vector_stores/[^/]+/search"),
        ("files in vector stores", r"/vector_stores(?:/[^/]+/(?:files|file_batches))?"),
        ("evals", r"/evals/[^/]+/runs"),
        ("containers", r"/containers"),
        ("realtime and live sessions", r"/(?:realtime/.+|live/sessions)"),
        ("assistants' runs", r"/threads/(?:runs|[^/]+/runs(?:/[^/]+/submit_tool_outputs)?)"),
        ("agents' sessions", r"/(?:chatkit/sessions|agents/automations/[^/]+/invocations)"),
        ("agents' sessions", r"/(?:agents|v1)/sessions(?:/[^/]+/events)?"),
        ("agents' sessions", r"/v1/(?:dreams|deployments/[^/]+/run)"),
    )
)
_said: set[str] = set()  # kinds, once a process


def warn_of(path: str) -> None:
    """Say that a request to this path costs what no guard sees, the first time for its kind."""
    path = as_read(path)
    for kind, pattern in _KINDS:
        if pattern.search(path):
            if kind not in _said:
                _said.add(kind)
                logger.warning(
                    "%s cost money and are not metered: a request for one just passed, no budget sees what it costs "
                    "and nothing is recorded; when the cost is known, book it with "
                    "guard.record(Usage(cost=...), customer)",
                    kind,
                )
            return


def warn_unread(path: str) -> None:
    """Say, the first time, that a request's path makes it a call and its body can't be read."""
    if "unread" not in _said:
        _said.add("unread")
        logger.warning(
            "the body of a request to %s can't be read (compressed? no JSON, no form?): it counts as a call of an "
            "unknown model, which budgets refuse, and costs what its reply says; send it plain",
            path[-100:],
        )
