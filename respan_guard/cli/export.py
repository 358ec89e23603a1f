"""`respan-guard export`: records as JSONL or CSV, exporters and their dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TextIO

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from respan_guard.backends.base import Backend, RecordQuery, StoredEntry
from respan_guard.cli.destination import begin_writing, is_special, refuse_store
from respan_guard.cli.output import MISUSED, columns, fail, print_json, print_table, progress, say
from respan_guard.cli.session import JSON, Storage, store_file, told, with_guard
from respan_guard.customer import normalise_identifier
from respan_guard.dead_letters import DeadLetters
from respan_guard.exporters.rows import csv_header, csv_lines, json_line
from respan_guard.markups import markups_of
from respan_guard.recorder import record_from_entry
from respan_guard.settings import Settings
from respan_guard.usage import UsageRecord

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["app"]

_PAGE: Final = 100
_POLL: Final = 1.0
_DAY: Final = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
_WRITERS: Final[dict[str, Callable[[Sequence[UsageRecord]], str]]] = {
    "jsonl": lambda batch: "".join(f"{json_line(record)}\n" for record in batch),
    "csv": csv_lines,
}

app = typer.Typer(help="Write usage records to standard output or a file; look after exporters.")
letters = typer.Typer(no_args_is_help=True, help="Records that an exporter's other side would not take.")
app.add_typer(letters, name="dead-letters")


@app.callback(invoke_without_command=True)
def export(
    context: typer.Context,
    form: Annotated[str, typer.Option("--format", metavar="jsonl|csv", help="How to write them.")] = "jsonl",
    since: Annotated[
        datetime | None, typer.Option(formats=_DAY, metavar="DAY|TIME", help="Calls that ended at or after it, UTC.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=_DAY, metavar="DAY|TIME", help="Calls that ended before it, UTC.")
    ] = None,
    customer: Annotated[str | None, typer.Option(metavar="ID", help="Only this customer's.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is booked from now on.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; else standard output.")] = None,
    storage: Storage = None,
) -> None:
    """Write usage records, oldest first; of one that was revised its newest form."""
    if context.invoked_subcommand is not None:
        return
    if form not in _WRITERS:
        fail(f"--format must be jsonl or csv, got {form!r}", MISUSED)
    with told():
        query = RecordQuery(
            customer=None if customer is None else normalise_identifier(customer),
            since_ms=_instant(since),
            until_ms=_instant(until),
            limit=_PAGE,
        )
        if output is not None:
            refuse_store(output, store_file(Settings.load(storage=storage).storage))
    try:
        with begin_writing(output, growing=follow) as begin:
            count = with_guard(lambda guard: _write(guard, query, form, begin, follow=follow), storage)
    except KeyboardInterrupt:
        if follow:  # that is how it ends
            return
        raise
    if output is not None and not is_special(output):  # which may be where this would be said
        say(f"{count} records written to {output}")


async def _write(guard: Guard, query: RecordQuery, form: str, begin: Callable[[], TextIO], *, follow: bool) -> int:
    newest = await guard.lane().call(lambda backend: backend.entries(RecordQuery(descending=True, limit=1)))
    out = begin()  # not before storage answers: else all is as it was
    count = 0
    if form == "csv":
        out.write(csv_header())
    with _progress() as bar:
        task = bar.add_task("exporting", total=newest[0].seq if newest else 0)
        async for batch in _batches(guard, query, follow=follow):
            out.write(_WRITERS[form](batch))
            out.flush()
            count += len(batch)
            bar.update(task, completed=batch[-1].sequence)
    out.flush()
    return count


async def _batches(guard: Guard, query: RecordQuery, *, follow: bool) -> AsyncIterator[list[UsageRecord]]:
    after: int | None = None
    while True:
        page = await guard.lane().call(_entries(_behind(query, after)))
        if page:
            after = page[-1].seq
            markups = await markups_of(guard, {stored.entry.customer for stored in page})
            yield [record_from_entry(stored, markups.get(stored.entry.customer)) for stored in page]
        elif follow:
            await asyncio.sleep(_POLL)
        else:
            return


@app.command()
def status(storage: Storage = None, as_json: JSON = False) -> None:
    """Show where exporters stand: what waits, dead letters, who leads, what went wrong last."""
    found = with_guard(lambda guard: guard.exporters(), storage)
    if as_json:
        print_json(
            [
                {
                    "name": row.name,
                    "cursor": row.cursor,
                    "behind": row.behind,
                    "lag_seconds": row.lag_seconds,
                    "dead_letters": row.dead_letters,
                    "leader": row.leader,
                    "error": row.error,
                }
                for row in found
            ]
        )
        return
    rows = [
        (row.name, row.behind, f"{row.lag_seconds:.0f}", row.dead_letters, row.leader or "-", row.error or "")
        for row in found
    ]
    print_table(columns("exporter", ">behind", ">lag s", ">dead letters", "leader", "~error"), rows, "no exporters yet")


@app.command()
def forget(name: str, storage: Storage = None, as_json: JSON = False) -> None:
    """Forget an exporter that is no more, so that pruning no longer waits for it; its dead letters go, too."""
    with_guard(lambda guard: guard.outbox.forget_exporter(name), storage)
    if as_json:
        print_json({"exporter": name, "forgotten": True})
    else:
        say(f"{name} is forgotten")


@letters.command("list")
def list_letters(name: str, storage: Storage = None, as_json: JSON = False) -> None:
    """Show an exporter's dead letters."""

    async def read(guard: Guard) -> list[dict[str, object]]:
        kept = DeadLetters(name)
        found: list[dict[str, object]] = []
        after = 0
        lane = guard.lane()
        while page := await lane.call(partial(kept.page, after=after)):
            for letter in page:
                record = await lane.call(partial(kept.record, letter=letter))
                found.append(
                    {
                        "sequence": letter.sequence,
                        "at": letter.at,
                        "reason": letter.reason,
                        "id": None if record is None else record.id,
                        "customer_identifier": None if record is None else record.customer_identifier,
                    }
                )
            after = page[-1].sequence
        return found

    found = with_guard(read, storage)
    if as_json:
        print_json(found)
    else:
        rows = [
            (row["sequence"], f"{row['at']:%Y-%m-%d %H:%M:%S}", row["id"], row["customer_identifier"], row["reason"])
            for row in found
        ]
        print_table(columns(">sequence", "since (UTC)", "id", "customer", "~reason"), rows, "no dead letters")


@letters.command("replay")
def replay_letters(name: str, storage: Storage = None, as_json: JSON = False) -> None:
    """Have the process that exports send an exporter's dead letters again; those refused again stay."""
    count = with_guard(lambda guard: guard.lane().call(DeadLetters(name).replay), storage)
    if as_json:
        print_json({"exporter": name, "asked": count})
    else:
        say(f"{count} dead letters of {name} are sent again as soon as a process exports")


def _entries(query: RecordQuery) -> Callable[[Backend], Awaitable[list[StoredEntry]]]:
    return lambda backend: backend.entries(query)


def _behind(query: RecordQuery, after: int | None) -> RecordQuery:
    return RecordQuery(query.customer, since_ms=query.since_ms, until_ms=query.until_ms, after=after, limit=query.limit)


def _instant(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    return int((moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _progress() -> Progress:
    """A bar by place in the log."""
    return progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
