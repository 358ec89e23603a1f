"""The commands that only read: `usage` and `prices`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING

from respan_guard.cli.output import FAILED, MISUSED, columns, fail, print_json, print_table, say, usd
from respan_guard.cli.session import with_guard
from respan_guard.errors import ConfigurationError
from respan_guard.pricing import PriceBook
from respan_guard.settings import Settings

if TYPE_CHECKING:
    from respan_guard.guard import Guard
    from respan_guard.reports import UsageReport

__all__ = ["prices", "usage"]

_BY = {"customer": "customer_identifier", "model": "model", "day": "day"}


def usage(
    storage: str | None,
    by: tuple[str, ...],
    customer: str | None,
    model: str | None,
    since: date | None,
    until: date | None,
    *,
    as_json: bool,
) -> None:
    """Show sums of usage."""
    by = tuple(dict.fromkeys(by)) or ("customer",)
    for name in by:
        if name not in _BY:
            fail(f"--by {name}: usage is summed by {', '.join(_BY)}", MISUSED)
    if since is not None and until is not None and until <= since:
        fail("--until must be after --since: it is the day after the last", MISUSED)

    async def work(guard: Guard) -> list[UsageReport]:
        return await guard.usage(*by, customer_identifier=customer, model=model, since=since, until=until)

    found = with_guard(work, storage)
    if as_json:
        print_json([asdict(row) for row in found])
        return
    names = ("requests", "calls", "input tokens", "output tokens", "cost USD", "with markup", "unpriced", "errors")
    table = columns(*by, *(f">{name}" for name in names))
    table.show_footer = bool(found)
    if found:
        sums = (
            sum(row.requests for row in found),
            sum(row.calls for row in found),
            sum(row.input_tokens for row in found),
            sum(row.output_tokens for row in found),
            usd(sum((row.cost for row in found), Decimal(0))),
            usd(sum((row.cost_with_markup for row in found), Decimal(0))),
            sum(row.unpriced for row in found),
            sum(row.errors for row in found),
        )
        for column, footer in zip(table.columns, ("total", *[""] * (len(by) - 1), *sums), strict=True):
            column.footer = str(footer)
    print_table(
        table,
        [
            (
                *(getattr(row, _BY[name]) if getattr(row, _BY[name]) != "" else "(none)" for name in by),
                row.requests,
                row.calls,
                row.input_tokens,
                row.output_tokens,
                usd(row.cost),
                usd(row.cost_with_markup),
                row.unpriced,
                row.errors,
            )
            for row in found
        ],
        "no usage",
    )


def prices(model: str, provider: str | None, *, as_json: bool) -> bool:
    """Show what a model costs; whether its price is known."""
    try:
        found = PriceBook(Settings.load().prices).explain(model, provider)
    except ConfigurationError as error:
        fail(str(error), MISUSED)
    if as_json:
        print_json(asdict(found))
        return found.source is not None
    if found.source is None:
        fail(found.detail, FAILED)
    say(f"{model}: USD per million tokens. {found.detail}")
    variants = {f"over {start} input tokens": rates for start, rates in found.long_input.items()}
    variants |= {f"tier {name}": rates for name, rates in found.service_tiers.items()}
    print_table(
        columns("what", ">price", *(f">{name}" for name in variants)),
        [
            (kind, usd(rate), *(usd(rates.get(kind)) for rates in variants.values()))
            for kind, rate in found.rates.items()
        ],
        "no charge by tokens",
    )
    return True
