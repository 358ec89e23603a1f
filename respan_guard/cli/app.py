"""The commands of `respan-guard`; those on customers are in `customers`."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version
from typing import Annotated

import typer

from respan_guard.cli import customers, export, reports, store
from respan_guard.cli.output import FAILED, MISUSED, as_day, fail
from respan_guard.cli.session import JSON, Storage, told

__all__ = ["app"]

app = typer.Typer(
    help="Rate limits, USD budgets and usage records per customer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback with locals could show a storage URL's password
)
app.add_typer(customers.app, name="customers")
app.add_typer(export.app, name="export")

_DAY = ["%Y-%m-%d"]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("respan-guard"))
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Rate limits, USD budgets and usage records per customer."""


@app.command()
def demo(
    serve: Annotated[bool, typer.Option("--serve", help="Keep the gateway running, with the console.")] = False,
    seed: Annotated[
        bool, typer.Option("--seed", help="Fill 60 days of traffic of 200 customers, and show it in the console.")
    ] = False,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="With --seed: an empty store to fill, instead of showing it.")
    ] = None,
) -> None:
    """See it work: a gateway, a stand-in provider, the real openai client, customers that meet their limits."""
    if storage is not None and (serve or not seed):
        fail("--storage is for --seed alone: the demo keeps its own", MISUSED)
    try:
        from respan_guard.cli.demo import run_demo, run_seed  # what only the demo needs
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("respan_guard"):
            raise
        fail(f"the demo needs {error.name}: pip install 'respan-guard[cli]'", MISUSED)
    raise typer.Exit(run_seed(storage) if seed and not serve else run_demo(serve=serve, seeded=seed))


@app.command()
def serve(
    storage: Annotated[
        str | None, typer.Argument(metavar="[STORAGE_URL]", help="Where everything is kept; else as the settings say.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8080,
) -> None:
    """Serve the console. Its password is CONSOLE_PASSWORD, else one that is made for this run and printed."""
    try:
        from respan_guard.cli.serve import run_serve  # what only this needs
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("respan_guard"):
            raise
        fail(f"serve needs {error.name}: pip install 'respan-guard[cli]'", MISUSED)
    try:
        with told():
            run_serve(storage, host, port)
    except OSError as error:
        fail(f"{host}:{port} can't be served: {error.strerror or error}", FAILED)


@app.command()
def check(storage: Storage = None, as_json: JSON = False) -> None:
    """Show every setting with its source, and whether storage works. Exit code 1 if something is wrong."""
    if not store.check(storage, as_json=as_json):
        raise typer.Exit(FAILED)


@app.command()
def usage(
    by: Annotated[
        list[str] | None, typer.Option(metavar="customer|model|day", help="What to sum by; may be repeated.")
    ] = None,
    customer: Annotated[str | None, typer.Option(metavar="ID", help="Only this customer's.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model's.")] = None,
    since: Annotated[datetime | None, typer.Option(formats=_DAY, metavar="YYYY-MM-DD", help="First day.")] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=_DAY, metavar="YYYY-MM-DD", help="The day after the last.")
    ] = None,
    storage: Storage = None,
    as_json: JSON = False,
) -> None:
    """Show what was used and what it cost, by customer unless told otherwise."""
    reports.usage(storage, tuple(by or ()), customer, model, as_day(since), as_day(until), as_json=as_json)


@app.command()
def prices(
    model: str,
    provider: Annotated[str | None, typer.Option(help="Whose prices, where several serve the model.")] = None,
    as_json: JSON = False,
) -> None:
    """Show what a model costs, and where the number is from. Exit code 1 if it has no price."""
    if not reports.prices(model, provider, as_json=as_json):
        raise typer.Exit(FAILED)


@app.command()
def switch(
    mode: Annotated[
        str | None, typer.Argument(metavar="[off|shadow|enforce|configured]", help="Nothing shows where it stands.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; for the log and the audit.")] = "",
    storage: Storage = None,
    as_json: JSON = False,
) -> None:
    """The kill switch: put every process of the store into a mode within a second; `configured` takes that back."""
    store.switch(storage, mode, reason, as_json=as_json)


@app.command()
def verify(storage: Storage = None, as_json: JSON = False) -> None:
    """Recompute every sum from the records and compare. Exit code 1 if one differs."""
    if not store.verify(storage, as_json=as_json):
        raise typer.Exit(FAILED)


@app.command()
def prune(
    before: Annotated[
        datetime | None, typer.Option(formats=_DAY, metavar="YYYY-MM-DD", help="Delete records booked before this day.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="DAYS", help='Delete records older than this, like "400 days".')
    ] = None,
    storage: Storage = None,
    as_json: JSON = False,
) -> None:
    """Delete old records; sums and reports stay. Without an option, as old as the setting `retention` says."""
    store.prune(storage, as_day(before), older_than, as_json=as_json)
