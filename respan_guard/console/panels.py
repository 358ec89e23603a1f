"""The system page: panels of facts about the store, the journal and the settings; other parts add theirs."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from respan_guard.console.formats import count
from respan_guard.errors import GuardError

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Panel", "PanelSource", "exporters_panel", "journal_panel", "settings_panel", "storage_panel", "system"]


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of the system page.

    Args:
        title: What it is about.
        columns: Heads of the table.
        rows: Its cells.
        state: "ok", "near" (somebody should look) or "over" (something is wrong).
        summary: One line under the title.
        warnings: What people should know.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    state: str = "ok"
    summary: str = ""
    warnings: Sequence[str] = field(default=())


PanelSource = Callable[["Guard"], Awaitable[Panel | None]]
"""Makes a panel; None where there is nothing to show."""


async def system(guard: Guard, more: Sequence[PanelSource] = ()) -> list[Panel]:
    """The panels, in order. One that fails says so in its place, so that the others are seen."""
    found = []
    for source in (storage_panel, journal_panel, exporters_panel, *more, settings_panel):
        try:
            panel = await source(guard)
        except GuardError as error:
            title = source.__name__.removesuffix("_panel").replace("_", " ").capitalize()
            panel = Panel(title, (), (), "over", "No answer.", (str(error),))
        if panel is not None:
            found.append(panel)
    return found


async def storage_panel(guard: Guard) -> Panel:
    """Whether storage answers, how fast, and what it says of itself."""
    clock = guard.clock
    started = clock.monotonic()
    await guard.lane().call(lambda backend: backend.cursor("console"))
    took = (clock.monotonic() - started) * 1000
    info = await guard.info()
    rows = [("URL", info.url), ("schema", info.schema), ("durable", "yes" if info.durable else "no")]
    rows += [(name, count(int(value)) if value.isdigit() else value) for name, value in info.facts.items()]
    return Panel(
        "Storage",
        ("fact", "value"),
        rows,
        "near" if info.warnings else "ok",
        f"Answered in {took:.1f} ms.",
        info.warnings,
    )


async def journal_panel(guard: Guard) -> Panel:
    """Records that wait on this machine's disk because storage did not take them."""
    waiting = guard.journal.waiting()
    rows = [
        ("records of this process that wait", count(guard.journal.pending)),
        ("files that wait", count(waiting.files)),
        ("bytes that wait", count(waiting.size)),
        ("records storage will never take", count(waiting.dead)),
        ("directory", str(guard.journal.directory)),
    ]
    state = "over" if waiting.dead else "near" if waiting.files else "ok"
    summary = "Nothing waits." if state == "ok" else "Records wait to be stored; they are not lost."
    warnings = (f"look at {guard.journal.dead_letters}",) if waiting.dead else ()
    return Panel("Journal", ("what", "value"), rows, state, summary, warnings)


async def exporters_panel(guard: Guard) -> Panel | None:
    """Where each exporter stands, whichever process runs it."""
    found = await guard.exporters()
    if not found:
        return None
    rows = [
        (
            one.name,
            count(one.behind),
            f"{one.lag_seconds:,.0f} s",
            count(one.dead_letters),
            one.leader or "nobody",
            one.error or "none",
        )
        for one in found
    ]
    dead = [one.name for one in found if one.dead_letters]
    state = "over" if dead else "near" if any(one.error for one in found) else "ok"
    warnings = [f"see them with respan-guard export dead-letters list {name}" for name in dead]
    columns = ("exporter", "records behind", "lag", "dead letters", "run by", "last error")
    return Panel("Exporters", columns, rows, state, "Records that leave for elsewhere.", warnings)


async def settings_panel(guard: Guard) -> Panel:
    """Every setting and where its value is from."""
    rows = []
    for name, (value, source) in guard.settings.sources().items():
        if name != "clock":
            rows.append((name, _shown(value), source))
    return Panel("Settings", ("setting", "value", "source"), rows, summary="Keyword, else environment, else file.")


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)
