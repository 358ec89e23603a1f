"""Commands on the store as a whole: `check`, `verify`, `prune`."""

from __future__ import annotations

import os
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from respan_guard.backends.base import Discrepancy, StoreInfo
from respan_guard.cli.discrepancies import as_row
from respan_guard.cli.output import MISUSED, columns, fail, print_json, print_table, progress, say
from respan_guard.cli.session import absent, actor, opened, store_file, with_guard
from respan_guard.clock import SystemClock
from respan_guard.decision import as_datetime
from respan_guard.errors import ConfigurationError, GuardError, StorageUnavailable
from respan_guard.option_values import LEAST_RETENTION
from respan_guard.settings import Settings
from respan_guard.switch import MODES, Switched

if TYPE_CHECKING:
    from respan_guard.guard import Guard
    from respan_guard.options import Mode

__all__ = ["check", "prune", "switch", "verify"]

_ELSEWHERE: Final = "memory://"
"""Where all but a store that is not there yet can be looked at."""


def check(storage: str | None, *, as_json: bool) -> bool:
    """Show settings and storage; whether both are all right."""
    settings: dict[str, Any] = {}
    info: StoreInfo | None = None
    switched: Switched | None = None
    error: str | None = None
    journal: Path | None = None
    refused: str | None = None
    note: str | None = None
    try:
        loaded = Settings.load(storage=storage)
        settings = loaded.sources()
        settings.pop("clock")
        path = store_file(loaded.storage)
        if path is not None and absent(path):
            _can_be_made(path)
            note = f"there is no store yet at {path}; the app makes it at its first start"

        async def ask(guard: Guard) -> StoreInfo:
            nonlocal switched, journal, refused
            lane = guard.lane()
            switched = await guard.switch.look(lane)
            if lane.home is not None and lane.home.rates is not None:
                await lane.home.rates.check()
            found = await guard.info()
            if lane.home is not None or note is not None:
                journal = guard.journal.directory
                try:
                    guard.journal.check()
                except OSError as disk:
                    refused = f"no usage records can wait in {journal} ({disk.strerror or disk}); set journal_dir"
            return found

        info = opened(ask, storage if note is None else _ELSEWHERE)
        if note is not None:  # all but the store was looked at
            info = None
        elif info.problems:
            error = f"no budget can rest on this storage: {info.problems[0]}"
        error = error or refused
    except GuardError as problem:
        error = str(problem)
    if as_json:
        print_json(
            {
                "ok": error is None,
                "error": error,
                "note": note,
                "switch": as_json_switch(switched),
                "journal": None if journal is None else str(journal),
                "settings": {name: {"value": value, "source": source} for name, (value, source) in settings.items()},
                "storage": None
                if info is None
                else {
                    "url": info.url,
                    "schema": info.schema,
                    "durable": info.durable,
                    "facts": info.facts,
                    "warnings": info.warnings,
                },
            }
        )
        return error is None
    if settings:
        rows = [(name, "not set" if value is None else value, source) for name, (value, source) in settings.items()]
        print_table(columns("setting", "~value", "~source"), rows, "")
    if info is not None:
        facts = {"storage": info.url, "schema": info.schema, "durable": "yes" if info.durable else "no", **info.facts}
        if journal is not None:
            facts["journal"] = str(journal)
        print_table(columns("storage", "is"), list(facts.items()), "")
        for warning in info.warnings:
            say(f"warning: {warning}")
        if switched is not None:
            say(f"warning: {in_words(switched)}")
    if note is not None:
        say(note)
    say("all right" if error is None else f"wrong: {error}")
    return error is None


def _can_be_made(path: Path) -> None:
    """See whether the app can make a store.

    Raises:
        ConfigurationError: There is no directory for it.
        StorageUnavailable: The directory takes no new file.
    """
    if not path.parent.is_dir():
        raise ConfigurationError(f"the directory {path.parent} does not exist; create it: mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageUnavailable(f"there is no store yet at {path}, and {path.parent} is read-only for this process")


def switch(storage: str | None, mode: str | None, reason: str, *, as_json: bool) -> None:
    """Show or set the kill switch."""
    if mode not in (None, "configured", *MODES):
        fail(f"mode must be one of {', '.join(MODES)} or configured, got {mode!r}", MISUSED)

    async def work(guard: Guard) -> Switched | None:
        if mode is not None:
            wanted = None if mode == "configured" else cast("Mode", mode)
            await guard.switch.set(wanted, reason=reason, actor=actor())
        return await guard.switch.look(guard.lane())

    switched = with_guard(work, storage)
    if as_json:
        print_json({"switch": as_json_switch(switched)})
    else:
        say("every process goes by its own setting" if switched is None else in_words(switched))


def in_words(switched: Switched) -> str:
    """Where the kill switch stands, in words."""
    because = f": {switched.reason}" if switched.reason else ""
    by = f" by {switched.actor}" if switched.actor else ""
    return f"every process is switched to {switched.mode} since {switched.at:%Y-%m-%d %H:%M:%S} UTC{by}{because}"


def as_json_switch(switched: Switched | None) -> dict[str, Any] | None:
    """Where the kill switch stands, as JSON values."""
    if switched is None:
        return None
    return {
        "mode": switched.mode,
        "since": switched.at.isoformat(),
        "actor": switched.actor,
        "reason": switched.reason,
    }


def verify(storage: str | None, *, as_json: bool) -> bool:
    """Compare sums with records; whether they agree."""

    async def ask(guard: Guard) -> list[Discrepancy]:
        with _progress() as bar:
            bar.add_task("recomputing every sum", total=None)
            return await guard.verify()

    found = with_guard(ask, storage)
    if as_json:
        print_json({"ok": not found, "discrepancies": [as_row(row) for row in found]})
    else:
        print_table(
            columns("what", "where", ">stored", ">recomputed"),
            [tuple(as_row(row).values()) for row in found],
            "every sum is what its records add up to",
        )
    return not found


def prune(storage: str | None, before: date | None, older_than: str | None, *, as_json: bool) -> None:
    """Delete records booked before a day."""
    if before is not None and older_than is not None:
        fail("give --before or --older-than, not both", MISUSED)
    today = as_datetime(SystemClock().now_ms()).date()
    if before is None:
        try:
            settings = Settings.load(storage=storage, **({} if older_than is None else {"retention": older_than}))
        except ConfigurationError as error:
            fail(_of_option(str(error)) if older_than is not None else str(error), MISUSED)
        if settings.retention is None:
            fail("give --before YYYY-MM-DD or --older-than DAYS, or set retention", MISUSED)
        before = today - timedelta(days=settings.retention)
    latest = today - timedelta(days=LEAST_RETENTION)
    if before > latest:  # records of pruned days are refused for ever: usage of now would not count
        fail(f"--before must be a day up to {latest}: records of {LEAST_RETENTION} days are kept", MISUSED)
    day = before

    async def work(guard: Guard) -> int:
        with _progress() as bar:
            task = bar.add_task(f"deleting records before {day}", total=None)
            return await guard.prune(day, lambda gone: bar.update(task, completed=gone))

    gone = with_guard(work, storage)
    if as_json:
        print_json({"before": day, "deleted": gone})
    else:
        say(f"{gone} records booked before {day} deleted; sums stay")


def _of_option(problem: str) -> str:
    """What is wrong with the setting, said of the option that takes its place here."""
    upper = f"from {LEAST_RETENTION} to 100000 like"
    return problem.replace("retention", "--older-than").replace(f"from {LEAST_RETENTION} like", upper)


def _progress() -> Progress:
    return progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}"),
        TimeElapsedColumn(),
    )
