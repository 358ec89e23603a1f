"""The commands `respan-guard customers ...`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from respan_guard.cli.output import FAILED, MISUSED, columns, fail, print_json, print_table, say, usd
from respan_guard.cli.session import JSON, Storage, actor, with_guard
from respan_guard.customer import Customer

if TYPE_CHECKING:
    from respan_guard.decision import Status
    from respan_guard.guard import Guard
    from respan_guard.reports import CustomerReport

__all__ = ["app"]

app = typer.Typer(help="Show customers and change their limits.", no_args_is_help=True)

_LONGEST_COUNT = 18
_PAGE = 500
_NOBODY = "(nobody)"
_LIST = ("customer", "name", "rate limit", ">budget", ">total", ">requests", ">cost USD", ">with markup", ">last seen")

Identifier = Annotated[str, typer.Argument(metavar="CUSTOMER", help="Its customer_identifier.")]


class Sort(StrEnum):
    """What a list of customers may be sorted by."""

    customer = "customer"
    name = "name"
    first_seen = "first_seen"
    last_seen = "last_seen"
    requests = "requests"
    calls = "calls"
    cost = "cost"
    tokens = "tokens"


@app.command("list")
def list_(
    search: Annotated[str, typer.Option(help="Only with this in identifier, name or email.")] = "",
    sort: Annotated[Sort, typer.Option(help="What to sort by.")] = Sort.customer,
    descending: Annotated[bool, typer.Option("--descending", help="Largest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many to show at most.")] = 50,
    storage: Storage = None,
    as_json: JSON = False,
) -> None:
    """List customers with what they used in all time."""

    async def work(guard: Guard) -> list[CustomerReport]:
        found: list[CustomerReport] = []
        while True:
            page = await guard.list_customers(
                search=search,
                sort=sort.value,
                descending=descending,
                limit=min(_PAGE, limit + 1 - len(found)),
                after=found[-1] if found else None,
            )
            found += page
            if not page or len(found) > limit:
                return found

    found = with_guard(work, storage)
    shown = found[:limit]
    if as_json:
        print_json([_report(row) for row in shown])
    else:
        print_table(
            columns(*_LIST),
            [
                (
                    row.customer.customer_identifier or _NOBODY,
                    row.customer.name,
                    row.customer.rate_limit,
                    _budget(row.customer),
                    row.customer.total_budget,
                    row.requests,
                    usd(row.cost),
                    usd(row.cost_with_markup),
                    f"{row.last_seen:%Y-%m-%d}",
                )
                for row in shown
            ],
            "no customers",
        )
    if len(found) > limit:
        typer.echo(f"{limit} shown, there are more: --limit", err=True)


@app.command()
def show(customer_identifier: Identifier, storage: Storage = None, as_json: JSON = False) -> None:
    """Show a customer and where each of its limits stands.

    Limits that only your app's code sets as default_limits are not known here; settings from the environment and
    the file are.
    """

    async def work(guard: Guard) -> tuple[Customer | None, Status]:
        return await guard.get_customer(customer_identifier), await guard.status(customer_identifier)

    customer, status = with_guard(work, storage)
    if customer is None:
        fail(f"customer {customer_identifier!r} is not known", FAILED)
    if as_json:
        print_json({**_fields(customer), "status": _status(status)})
        return
    set_fields = [(name, value) for name, value in _fields(customer).items() if value not in (None, False)]
    print_table(columns("field", "value"), set_fields, "")
    print_table(
        columns("limit", ">used", ">held", ">limit", ">remaining", "resets"),
        [(row.name, row.used, row.held, row.limit, row.remaining, _moment(row.resets_at)) for row in status.limits],
        "no limits",
    )
    say(f"spent in all time: {usd(status.total_spend)} USD in {status.total_calls} calls")


@app.command("set")
def set_(
    customer_identifier: Identifier,
    name: str | None = None,
    email: str | None = None,
    metadata: Annotated[str | None, typer.Option(metavar="JSON", help="A JSON object.")] = None,
    group_identifier: str | None = None,
    rate_limit: Annotated[
        str | None, typer.Option(metavar="RATE", help='Requests per minute, or like "100/minute; 2000/hour".')
    ] = None,
    budget_duration: Annotated[str | None, typer.Option(metavar="yearly|monthly|weekly|daily")] = None,
    period_budget: Annotated[str | None, typer.Option(metavar="USD", help="For each period.")] = None,
    total_budget: Annotated[str | None, typer.Option(metavar="USD", help="For all time.")] = None,
    period_start: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="First day of a period.")] = None,
    period_end: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="The day after the last.")] = None,
    markup_percentage: Annotated[str | None, typer.Option(metavar="PERCENT", help="What reports add.")] = None,
    blocked: Annotated[bool | None, typer.Option("--blocked/--not-blocked", help="Refuse everything.")] = None,
    time_zone: Annotated[str | None, typer.Option(metavar="ZONE", help='Like "Europe/Berlin".')] = None,
    unset: Annotated[list[str] | None, typer.Option(metavar="FIELD", help="Remove a field; may be repeated.")] = None,
    storage: Storage = None,
    as_json: JSON = False,
) -> None:
    """Change fields of a customer; the others stay. A customer that was never seen is made."""
    given: dict[str, Any] = {
        "name": name,
        "email": email,
        "metadata": None if metadata is None else _object(metadata),
        "group_identifier": group_identifier,
        "rate_limit": int(rate_limit) if rate_limit is not None and _is_count(rate_limit) else rate_limit,
        "budget_duration": budget_duration,
        "period_budget": period_budget,
        "total_budget": total_budget,
        "period_start": period_start,
        "period_end": period_end,
        "markup_percentage": markup_percentage,
        "blocked": blocked,
        "time_zone": time_zone,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    for field in (text.replace("-", "_") for text in unset or ()):
        if field not in given:
            fail(f"--unset {field}: no such field; the fields are {', '.join(given)}", MISUSED)
        if field in changes:
            fail(f"{field} is both set and unset", MISUSED)
        changes[field] = None
    if not changes:
        fail("nothing to change; give --rate-limit, --period-budget, --unset FIELD, ...", MISUSED)

    async def work(guard: Guard) -> Customer:
        return await guard.update_customer(customer_identifier, actor=actor(), **changes)

    customer = with_guard(work, storage, create=True)
    if as_json:
        print_json(_fields(customer))
    else:
        set_fields = [(field, value) for field, value in _fields(customer).items() if value not in (None, False)]
        print_table(columns("field", "value"), set_fields, "")


@app.command()
def delete(
    customer_identifier: Identifier,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: Storage = None,
    as_json: JSON = False,
) -> None:
    """Erase who a customer was; its sums and records stay, under a random label."""
    if not yes:
        if sys.stdin is None:
            fail("there is nobody to ask; --yes erases without asking", MISUSED)
        typer.confirm(f"Erase customer {customer_identifier!r}? There is no way back", abort=True, err=True)

    async def work(guard: Guard) -> bool:
        return await guard.delete_customer(customer_identifier, actor=actor())

    if not with_guard(work, storage):
        fail(f"customer {customer_identifier!r} is not known", FAILED)
    if as_json:
        print_json({"customer_identifier": customer_identifier, "deleted": True})
    else:
        say(f"customer {customer_identifier!r} is erased")


def _is_count(text: str) -> bool:
    """Whether it is a number of requests per minute; a number of thousands of digits is none."""
    return text.isdecimal() and len(text) <= _LONGEST_COUNT


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(f"--metadata is no JSON: {error}", MISUSED)
    if not isinstance(found, dict):
        fail('--metadata must be a JSON object like {"plan": "pro"}', MISUSED)
    return found


def _moment(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"


def _budget(customer: Customer) -> str | None:
    if customer.period_budget is None:
        return None
    return f"{customer.period_budget:f} {customer.budget_duration or 'per period'}"


def _fields(customer: Customer) -> dict[str, Any]:
    """Every field of a customer, None where it is not set."""
    return {name: getattr(customer, name) for name in Customer.model_fields}


def _report(row: CustomerReport) -> dict[str, Any]:
    return {
        **_fields(row.customer),
        "first_seen": row.first_seen,
        "last_seen": row.last_seen,
        "active_days": row.active_days,
        "requests": row.requests,
        "calls": row.calls,
        "cost": row.cost,
        "cost_with_markup": row.cost_with_markup,
        "input_tokens": row.input_tokens,
        "output_tokens": row.output_tokens,
        "unpriced": row.unpriced,
    }


def _status(status: Status) -> dict[str, Any]:
    found = asdict(status)
    del found["customer_identifier"]
    return found
