"""`/api/users/`: customers, what they may spend, and what they spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.responses import Response

from respan_guard.api import schemas
from respan_guard.api.fields import Environment, Identifier, clean, date_part
from respan_guard.api.filters import Condition, Filters, read_filters
from respan_guard.api.operation import Call, Operation, validated
from respan_guard.api.pages import MAX_PAGE_SIZE, Page, Slice, as_filters, checked, sorted_slice
from respan_guard.api.records import FilteredBy, with_condition
from respan_guard.api.user_rows import USER_KINDS, show_user, user_field, user_row
from respan_guard.api.wire import JSON
from respan_guard.backends.base import CustomerQuery, CustomerRow
from respan_guard.customer import Customer, normalise_identifier
from respan_guard.customers import is_shown, not_reserved
from respan_guard.errors import CustomerUnknown, InvalidIdentifier, InvalidInput

__all__ = ["OPERATIONS"]

MAX_CUSTOMERS: Final = 10_000
"""How many customers one request looks at, where no index answers it."""

_ACTOR = "api"
_PAGE = 500
_ALIASES = {
    "total_requests": "number_of_requests",
    "tokens": "total_tokens",
    "cost": "total_cost",
    "id": "customer_identifier",
}
# What storage has in order, and the type of what it is ordered by.
_SORTS: Mapping[str, tuple[str, type]] = {
    "customer_identifier": ("customer", str),
    "name": ("name", str),
    "first_seen": ("first_seen", int),
    "last_active_timeframe": ("last_seen", int),
    "number_of_requests": ("calls", int),
    "total_cost": ("cost", int),
    "total_tokens": ("tokens", int),
}
_SEARCHED = ("customer_identifier", "name", "email")
_READ_ONLY = frozenset(schemas.User.model_fields)


# `Customer` checks these; here stands what the document says of them.
_Word: TypeAlias = Annotated[Any, WithJsonSchema({"type": ["string", "null"]})]
_Key: TypeAlias = Annotated[Any, WithJsonSchema({"type": ["string", "integer", "null"]})]
_Map: TypeAlias = Annotated[Any, WithJsonSchema({"type": ["object", "null"]})]
_Flag: TypeAlias = Annotated[Any, WithJsonSchema({"type": ["boolean", "null"]})]
_Rate: TypeAlias = Annotated[Any, WithJsonSchema({"type": ["integer", "string", "null"]})]
_Amount: TypeAlias = Annotated[Any, WithJsonSchema({"type": ["number", "string", "null"]})]
_Duration: TypeAlias = Annotated[Any, WithJsonSchema({"enum": ["daily", "weekly", "monthly", "yearly", None]})]


class UserChanges(BaseModel):
    """What to set; null removes."""

    model_config = ConfigDict(extra="forbid")

    name: _Word = None
    email: _Word = None
    metadata: _Map = None
    group_identifier: _Key = None
    rate_limit: _Rate = Field(None, description='Per minute, or like "100/minute; 2000/hour".')
    period_budget: _Amount = Field(None, description="USD for each period.")
    budget_duration: _Duration = None
    total_budget: _Amount = Field(None, description="USD for all time.")
    period_start: _Word = Field(None, description="First day of a period, YYYY-MM-DD.")
    period_end: _Word = Field(None, description="The day after the last.")
    period_anchor: _Word = None
    markup_percentage: _Amount = Field(None, description="What reports add to costs: 20 for 20 %.")
    blocked: _Flag = Field(None, description="Refuse everything.")
    time_zone: _Word = Field(None, description='Where days begin: "Europe/Berlin".')


class NewUser(UserChanges):
    """A user."""

    customer_identifier: Annotated[Any, WithJsonSchema({"type": ["string", "integer"]})]


class InEnvironment(BaseModel):
    """Query parameters of one user."""

    model_config = ConfigDict(extra="forbid")

    environment: Environment = Field(None, description='All here is "prod".')


class UserPage(InEnvironment):
    """Which page of users."""

    page: int = Field(1, ge=1, le=1_000_000)
    page_size: int = Field(50, ge=1, le=MAX_PAGE_SIZE)
    cursor: Identifier = Field(None, description="From `next`: where the page begins.")
    sort_by: Identifier = Field(None, description="`-first_seen` (the default), or another field; `-` for descending.")
    filters: Identifier = Field(None, description="In a GET: the filters, as JSON.")


# -- one user ----------------------------------------------------------------------------------------


async def create(call: Call) -> Response:
    """Create a user, or set what is given of one that usage has created already."""
    given = _writable(call.body)
    new = validated(NewUser, given)
    identifier = not_reserved(normalise_identifier(new.customer_identifier))
    known = await call.guard.get_customer(identifier) is not None
    await _change(call, identifier, new)
    return JSON(await show_user(call.guard, identifier), 200 if known else 201)


async def retrieve(call: Call) -> Response:
    """One user."""
    return JSON(await show_user(call.guard, await _known(call)))


async def update(call: Call) -> Response:
    """Change single fields."""
    identifier = await _known(call)
    given = _writable(call.body)
    if isinstance(given, dict) and str(given.pop("customer_identifier", identifier)) != identifier:
        raise InvalidInput("customer_identifier can't be changed; create another user", field="customer_identifier")
    changes = validated(UserChanges, given)
    await _change(call, identifier, changes)
    return JSON(await show_user(call.guard, identifier))


async def delete(call: Call) -> Response:
    """Erase who a user was; the sums stay, under no name."""
    if not await call.guard.delete_customer(await _known(call), actor=_ACTOR):
        raise _no_such_user()
    return Response(status_code=204)


async def block(call: Call) -> Response:
    """Refuse everything that a user asks for."""
    return await _set_blocked(call, True)


async def unblock(call: Call) -> Response:
    """Let a user in again."""
    return await _set_blocked(call, None)


async def _set_blocked(call: Call, blocked: bool | None) -> Response:
    identifier = await _known(call)
    await call.guard.update_customer(identifier, actor=_ACTOR, blocked=blocked)
    return JSON(await show_user(call.guard, identifier))


async def _known(call: Call) -> str:
    """The user that the path names."""
    try:
        identifier = normalise_identifier(call.path("customer_identifier"))
    except InvalidIdentifier:
        raise _no_such_user() from None
    row = await call.guard.lane().call(lambda backend: backend.get(identifier))
    if call.query.environment not in (None, "prod") or row is None or not is_shown(row):
        raise _no_such_user()
    return identifier


def _no_such_user() -> CustomerUnknown:
    return CustomerUnknown("there is no such user")


def _writable(body: Any) -> Any:
    """A body without what reads show and nobody can set, so that what was read can be sent back."""
    if not isinstance(body, dict):
        return body
    settable = {*UserChanges.model_fields, "customer_identifier"}
    return {name: value for name, value in body.items() if name in settable or name not in _READ_ONLY}


async def _change(call: Call, identifier: str, changes: UserChanges) -> None:
    given = {name: getattr(changes, name) for name in changes.model_fields_set if name != "customer_identifier"}
    for name in ("period_start", "period_end", "period_anchor"):
        if isinstance(given.get(name), str):
            given[name] = date_part(given[name])  # reads show them as times, and so does Respan
    if given.get("metadata") is not None:
        given["metadata"] = clean(given["metadata"], "metadata")
    if given.get("blocked") is False:
        given["blocked"] = None
    if given:
        await call.guard.update_customer(identifier, actor=_ACTOR, **given)
    elif await call.guard.get_customer(identifier) is None:
        await call.guard.put_customer(Customer(customer_identifier=identifier), actor=_ACTOR)


# -- many --------------------------------------------------------------------------------------------


async def list_users(call: Call) -> Response:
    """A page of users."""
    query: UserPage = call.query
    given = as_filters(call.body, query.filters)
    if query.environment is not None:
        given = with_condition(given, "environment", query.environment)
    filters = read_filters(given, USER_KINDS, user_field, _ALIASES)
    page = call.pages.asked(call.request, query, filters.shown())
    sort = (query.sort_by or "-first_seen").strip()
    field = sort.removeprefix("-")
    field = _ALIASES.get(field, field)
    if field in _SORTS:
        found = await _in_order(call, filters, page, field, descending=sort.startswith("-"))
    elif field in USER_KINDS:
        found = await _sorted(call, filters, page, field, descending=sort.startswith("-"))
    else:
        known = ", ".join({**_SORTS, **USER_KINDS})
        raise InvalidInput(f"sort_by must be one of {known}, with - for descending", field="sort_by")
    return call.pages.answer(call.request, page, [user_row(row, call.guard) for row in found.rows], found)


def _searched(filters: Filters[CustomerRow]) -> str:
    """A text that all rows have somewhere; storage looks for it in any case and in any of the three fields."""

    def positive(condition: Condition) -> bool:
        texts = ("contains", "icontains", "startswith", "endswith")
        return condition.field in _SEARCHED and (condition.operator in texts or condition.only is not None)

    return max((str(c.values[0]) for c in filters.conditions if positive(c)), key=len, default="")


async def _in_order(
    call: Call, filters: Filters[CustomerRow], page: Page, field: str, *, descending: bool
) -> Slice[CustomerRow]:
    sort, kind = _SORTS[field]
    place = checked(page.start, kind, str)
    query = CustomerQuery(_searched(filters), sort, descending, (place[0], place[1]) if place else None, _PAGE)
    rows: list[CustomerRow] = []
    looked, skip = 0, page.skip
    while looked < MAX_CUSTOMERS:
        found = await call.guard.lane().call(lambda backend, query=query: backend.customers(query))  # type: ignore[misc]
        for row in found:
            looked += 1
            if is_shown(row) and filters(row):
                if skip:
                    skip -= 1
                    continue
                if len(rows) == page.size:
                    return Slice(rows, _place(rows[-1], sort), more=True)
                rows.append(row)
        if len(found) < _PAGE:
            return Slice(rows, _place(rows[-1], sort) if rows else None, more=False)
        last = found[-1]
        query = CustomerQuery(query.search, sort, descending, (_sort_value(last, sort), last.customer), _PAGE)
    if not rows:
        raise _too_many()
    # What was looked at since the last row on the page is looked at again by the next.
    return Slice(rows, _place(rows[-1], sort), more=True)


def _too_many() -> InvalidInput:
    return InvalidInput(
        f"this needs a look at more than {MAX_CUSTOMERS:,} users, which one request may not take; filter by"
        f" customer_identifier, or sort by one of {', '.join(_SORTS)}",
        field="filters",
    )


def _sort_value(row: CustomerRow, sort: str) -> str | int:
    values: dict[str, str | int] = {
        "customer": row.customer,
        "name": str((row.params or {}).get("name") or ""),
        "first_seen": row.first_seen_ms,
        "last_seen": row.last_seen_ms,
        "calls": row.totals.calls,
        "cost": row.totals.cost,
        "tokens": row.totals.input_tokens + row.totals.output_tokens,
    }
    return values[sort]


def _place(row: CustomerRow, sort: str) -> list[Any]:
    return [_sort_value(row, sort), row.customer]


async def _sorted(
    call: Call, filters: Filters[CustomerRow], page: Page, field: str, *, descending: bool
) -> Slice[CustomerRow]:
    """A page in order of a field that has no index: reads all users that the filters let through, up to the bound."""
    everything = Page(1, MAX_CUSTOMERS, None, 0, "", "")
    found = await _in_order(call, filters, everything, "customer_identifier", descending=False)
    if found.more:
        raise _too_many()
    return sorted_slice(found.rows, lambda row: (user_field(row, field), row.customer), page, descending=descending)


_ONE = "/api/users/{customer_identifier:path}/"
_TAG = "users"
_USER = {200: schemas.User}

OPERATIONS: Final = (
    Operation("createUser", "POST", "/api/users/create/", create, "Create a user, or set fields of one.", _TAG,
              {201: schemas.User, 200: schemas.User}, writes=True, takes=NewUser, errors=(400, 409, 413, 415)),
    Operation("listUsers", "POST", "/api/users/list/", list_users, "List users.", _TAG, {200: schemas.UserPage},
              query=UserPage, takes=FilteredBy, optional=True, errors=(400, 413, 415)),
    Operation("listUsersByGet", "GET", "/api/users/list/", list_users, "List users.", _TAG, {200: schemas.UserPage},
              query=UserPage),
    Operation("blockUser", "POST", f"{_ONE}block/", block, "Refuse everything a user asks for.", _TAG, _USER,
              writes=True, query=InEnvironment, errors=(400, 404, 409)),
    Operation("unblockUser", "POST", f"{_ONE}unblock/", unblock, "Let a user in again.", _TAG, _USER,
              writes=True, query=InEnvironment, errors=(400, 404, 409)),
    Operation("retrieveUser", "GET", _ONE, retrieve, "One user, with its current period.", _TAG, _USER,
              query=InEnvironment, errors=(400, 404)),
    Operation("updateUser", "PATCH", _ONE, update, "Change single fields; null removes one.", _TAG, _USER, writes=True,
              query=InEnvironment, takes=UserChanges, errors=(400, 404, 409, 413, 415)),
    Operation("deleteUser", "DELETE", _ONE, delete, "Erase who a user was; sums stay.", _TAG, {204: None}, writes=True,
              query=InEnvironment, errors=(400, 404)),
    Operation("updateUserLegacy", "PATCH", "/api/user/update/{customer_identifier:path}/", update,
              "The same as updateUser, under its old name.", _TAG, _USER, writes=True, query=InEnvironment,
              takes=UserChanges, errors=(400, 404, 409, 413, 415)),
)  # fmt: skip
